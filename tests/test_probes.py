"The probes of actions: against references, the jobs on UCF-101 and SSv2, and the name of a single video."
import csv, json, shutil
import numpy as np, pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from pathlib import Path
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from stjepa.core import InputError, generator
from stjepa.features import encoders_of, fill_store
from stjepa.probe import bootstrap, fit_attentive, fit_linear, linear_probe, softmax_regression, topk_accuracy
from stjepa.ssv2_probe import Ssv2Config, ssv2_eval
from stjepa.ucf101 import ucf101
from stjepa.ucf101_infer import (Judged, Labelled, UcfConfig, interval, metrics, per_class, read_probe, show_confused, ucf101_eval, worst_pairs)

torch.set_num_threads(1)

# ---- bootstrap

def test_groups_are_drawn_whole():
    values, groups = torch.arange(12.), ["a", None, "a", "b", None, "b", "b", "c", "c", "c", "c", None]
    members = [[0, 2], [1], [3, 5, 6], [4], [7, 8, 9, 10], [11]]
    allowed = {tuple(m) for m in members}; seen = []
    def look(v):
        left = v[0].tolist()
        while left:
            size = next(n for n in range(1, len(left) + 1) if tuple(map(int, left[:n])) in allowed)
            seen.append(tuple(map(int, left[:size]))); left = left[size:]
        return v.mean(-1)
    bootstrap(values, look, groups, resamples=200)
    assert set(seen) == allowed and len(seen) == 200 * len(members)
    share = np.array([seen.count(m) for m in allowed]) / len(seen)
    assert (abs(share - 1/6) < .05).all()

@pytest.mark.parametrize("statistic", [lambda v: v.mean(-1), lambda v: v.median(-1).values])
def test_an_interval_is_that_of_loops(statistic):
    values = torch.randn(80, generator=generator("interval"))
    rng = np.random.default_rng(0); draws = [statistic(values[torch.from_numpy(rng.integers(80, size=80))][None]).item() for _ in range(4000)]
    found = bootstrap(values, statistic, resamples=4000, seed=1)
    assert np.allclose(found, np.quantile(draws, (.025, .975)), atol=.06) and bootstrap(values, statistic) == bootstrap(values, statistic) != bootstrap(values, statistic, seed=1)

def test_siblings_widen_the_interval():
    right = torch.tensor([1., 0.]).repeat_interleave(5).repeat(20)
    judged = Judged(None, Labelled(None, torch.zeros(200, dtype=torch.int64), [f"g{i // 5}" for i in range(200)]), torch.stack([right, .5 * torch.ones(200)], 1))
    alone = replace(judged, test=replace(judged.test, groups=[None] * 200))
    width = lambda js: np.subtract(*interval(js)[::-1])
    assert width([judged]) > 1.6 * width([alone]) and width([judged, judged]) < .85 * width([judged])

# ---- the linear probe

def hard(n=400, d=40, k=7):
    "Correlated features, unequal classes."
    g = generator("hard"); y = (k * torch.rand(n, generator=g)**1.5).long()
    x = (torch.randn(n, d, generator=g) + torch.randn(k, d, generator=g)[y]) * torch.logspace(0, -2, d) @ torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    return (x - x.mean(0)) / x.std(0), y

@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.])
@pytest.mark.parametrize("k", [7, 2])
def test_the_regression_is_that_of_scikit_learn(strength, k):
    z, y = hard(k=k)
    w, b = softmax_regression(z, y, strength, tolerance=1e-7)
    theirs = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(z.double().numpy(), y.numpy())
    if k > 2: assert np.allclose((z @ w + b).softmax(1), theirs.predict_proba(z.double().numpy()), atol=2e-3)
    else: # scikit-learn's two classes have one vector of weights, ours two of half its length each: a penalty half as large
        half = LogisticRegression(C=2*strength, max_iter=5000, tol=1e-8).fit(z.double().numpy(), y.numpy())
        assert np.allclose((z @ w + b).softmax(1), half.predict_proba(z.double().numpy()), atol=2e-3)

def test_top_k_of_a_fitted_probe_is_that_of_scikit_learn():
    z, y = hard(); n = int(y.max()) + 1
    scores = linear_probe(z[:300], y[:300], [None] * 300, n).scores(z[300:])
    for k in (1, 2): assert abs(topk_accuracy(scores, y[300:], k) - top_k_accuracy_score(y[300:], scores, k=k, labels=range(n))) < 1e-12

def test_metrics_at_both_ends_and_by_class():
    y = torch.arange(30) % 6
    test = Labelled(None, y, [None] * 30)
    fitted = fit_linear(torch.randn(30, 4, generator=generator("ends")), y, 6)
    assert metrics(dict(linear=Judged(fitted, test, F.one_hot(y).double()))) == dict(linear_top1=1, linear_top5=1, strength=1e-2)
    same = metrics(dict(linear=Judged(fitted, test, torch.zeros(30, 6).double())))
    assert abs(same["linear_top1"] - 1/6) < 1e-12 and abs(same["linear_top5"] - 5/6) < 1e-12
    clips, right = per_class([Judged(fitted, test, F.one_hot(torch.where(y == 2, 3, y), 6).double())] * 2, 7)
    assert clips.tolist() == [10] * 6 + [0] and right.tolist() == [1, 1, 0, 1, 1, 1, 0]

def test_the_worst_pairs_come_first():
    confusion = torch.tensor([[.5, .5, 0], [.1, .9, 0], [0, .2, .8]])
    assert [(a, b) for a, b, _ in worst_pairs(confusion, 3)] == [(0, 1), (2, 1), (1, 0)] and worst_pairs(torch.eye(2)) == []
    show_confused([])

@pytest.mark.cuda
def test_probes_on_a_gpu_are_those_of_the_cpu():
    z, y = hard(); n = int(y.max()) + 1
    a, b = (fit_linear(z, y, n, device=device).probabilities(z) for device in ("cpu", "cuda"))
    assert torch.allclose(a, b, atol=1e-3)
    tokens = torch.randn(64, 6, 32, generator=generator("gpu")); tokens[torch.arange(64), :, torch.arange(64) % 4] += 4
    scores = fit_attentive(tokens, torch.arange(64) % 4, 4, epochs=8, device="cuda").scores(tokens)
    assert scores.device.type == "cpu" and topk_accuracy(scores, torch.arange(64) % 4) > .9

# ---- the job

@pytest.fixture(scope="module")
def checkpoint(run_dir): return max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))

@pytest.fixture(scope="module")
def job(toy, checkpoint, tmp_path_factory):
    "All probes on split 1, one clip after the other."
    out = tmp_path_factory.mktemp("probes")
    config = UcfConfig(str(toy/"ucf101"), str(checkpoint), out=str(out/"ucf"), rows="student", probes="linear,knn,attentive", batch_size=1, num_workers=0, device="cpu")
    return config, ucf101_eval(config)

def lines_of(path): return list(csv.DictReader(open(path, encoding="utf-8")))

def test_the_same_numbers_however_the_work_is_shared(job, tmp_path):
    config, summary = job
    again = ucf101_eval(replace(config, out=str(tmp_path), batch_size=5, num_workers=2))
    for key in ("ucf101", "intervals", "clips"): assert again[key] == summary[key]
    for name in ("predictions.csv", "per_class.csv"): assert (tmp_path/name).read_bytes() == Path(config.out, name).read_bytes()

def test_results_agree_with_each_other(job):
    config, summary = job; out = Path(config.out)
    top1, rows = summary["ucf101"]["linear_top1"], lines_of(out/"predictions.csv")
    assert abs(np.mean([r["label"] == r["predicted"] for r in rows]) - top1["student"]) < 1e-9 and {r["list"] for r in rows} == {"test1"}
    by_class = lines_of(out/"per_class.csv")
    assert sum(int(r["clips"]) for r in by_class) == len(rows) and abs(np.mean([float(r["student"]) for r in by_class]) - top1["student"]) < 1e-3
    for probe in ("linear", "knn", "attentive"):
        low, high = summary["intervals"][f"{probe}_top1"]["student"]
        assert 0 <= low <= summary["ucf101"][f"{probe}_top1"]["student"] <= high <= 1 and summary["ucf101"][f"{probe}_top5"]["chance"] == 5/12
    table = (out/"table.md").read_text()
    assert "attentive top-1 %" in table and "drawn by group" in table and f"{100*top1['student']:.1f} (" in table
    assert min((out/f"{name}.png").stat().st_size for name in ("confusion", "confused")) > 1000

def test_all_splits_and_their_mean(job, checkpoint, tmp_path):
    config, summary = job
    found = ucf101_eval(replace(config, probes="linear", split="all", out=str(tmp_path), store=f"{config.out}/features"))
    each = [found["splits"][s]["linear_top1"]["student"] for s in "123"]
    assert abs(found["ucf101"]["linear_top1"]["student"] - np.mean(each)) < 1e-12 and each[0] == summary["ucf101"]["linear_top1"]["student"] and found["split"] == "all"
    rows = lines_of(tmp_path/"predictions.csv")
    assert found["clips"]["test"] == len(rows) == len({r["file"] for r in rows}) and {r["list"] for r in rows} == {"test1", "test2", "test3"}
    assert found == json.load(open(tmp_path/"summary.json"))

def test_splits_share_the_features_of_a_video(toy, checkpoint, tmp_path):
    encoder = encoders_of(["mean_pixel"], checkpoint)
    fill_store(tmp_path, encoder, ucf101(toy/"ucf101", 1, "train")); fill_store(tmp_path, encoder, ucf101(toy/"ucf101", 1, "test"))
    def never(frames): raise AssertionError("encoded again")
    blind = [replace(encoder[0], encode=never)]
    for split in (2, 3):
        for subset in ("train", "test"): assert fill_store(tmp_path, blind, ucf101(toy/"ucf101", split, subset)) == []

def renumbered(root, order, lists=True):
    "Give class `i` of `classInd.txt` the place `order[i]`, and say so in the lists if `lists`."
    for path in [*root.rglob("classInd.txt"), *(root.rglob("trainlist*.txt") if lists else ())]:
        rows = [line.split(" ") for line in path.read_text().split("\n") if line.strip()]
        if path.name == "classInd.txt": rows = sorted([[str(order[int(i) - 1] + 1), name.strip()] for i, name in rows], key=lambda r: int(r[0]))
        else: rows = [[file, str(order[int(i) - 1] + 1)] for file, i in rows]
        path.write_text("".join(f"{a} {b}\n" for a, b in rows))

def test_class_numbers_do_not_matter_but_must_agree(job, toy, tmp_path):
    config, summary = job
    root = Path(shutil.copytree(toy/"ucf101", tmp_path/"ucf101")); order = np.random.default_rng(0).permutation(12).tolist()
    renumbered(root, order)
    now = replace(config, data_root=str(root), probes="linear,knn", out=str(tmp_path/"out"))
    found = ucf101_eval(now)
    for metric in ("linear_top1", "linear_top5", "knn_top1", "knn_top5"): assert abs(found["ucf101"][metric]["student"] - summary["ucf101"][metric]["student"]) < 1e-9, metric
    was, same = ({r["file"]: r["label"] for r in lines_of(Path(out, "predictions.csv"))} for out in (config.out, now.out))
    assert was == same
    renumbered(root, order, lists=False)
    with pytest.raises(InputError, match="contradicts folder"): ucf101_eval(now)

@pytest.mark.parametrize("change, says", [(dict(probes="svm"), "--probes svm: expected some of"), (dict(probes=""), "--probes : expected"), (dict(clips=5), "--probes attentive: reads the tokens of one view"),
                                          (dict(split="4"), "--split 4: expected 1, 2, 3 or all"), (dict(video="gone.avi"), "--video gone.avi: no such file")])
def test_bad_options_are_named(job, tmp_path, change, says):
    with pytest.raises(InputError, match=says): ucf101_eval(replace(job[0], out=str(tmp_path/"out"), **change))
    assert not (tmp_path/"out"/"summary.json").exists()

# ---- a single video

def test_a_video_is_named_by_the_stored_probe(job, command, tmp_path):
    config, _ = job
    row = lines_of(Path(config.out, "predictions.csv"))[3]
    video = shutil.copy(Path(config.data_root, row["file"]), tmp_path/"my clip.avi")
    done = command("stjepa_ucf101", "no_data_here", config.checkpoint, "--video", video, "--out", config.out, "--rows", "student", "--device", "cpu")
    assert done.returncode == 0 and not done.stderr, done.stderr
    first, *others = done.stdout.splitlines()
    assert first == f"my clip.avi: {row['predicted']} {100*float(row['probability']):.1f} %" or abs(float(first.split()[-2]) - 100*float(row["probability"])) < .11
    assert sum(line.startswith("  then ") for line in others) == 4 and Path(config.out, "video_my clip.png").stat().st_size > 1000

def test_a_probe_that_does_not_fit_is_fitted_anew(job, tmp_path, capsys):
    config, _ = job; out = tmp_path/"out"
    config = replace(config, probes="linear", out=str(out), store=f"{config.out}/features", video=str(Path(config.data_root, lines_of(Path(config.out, "predictions.csv"))[0]["file"])))
    named = ucf101_eval(config)
    assert len(named["top5"]) == 5 and (out/"summary.json").exists() and read_probe(out/"probe.safetensors")[1]["protocol"]["split"] == "1"
    was = (out/"probe.safetensors").stat().st_mtime_ns
    assert ucf101_eval(config) == named and (out/"probe.safetensors").stat().st_mtime_ns == was
    ucf101_eval(replace(config, split="2"))
    assert read_probe(out/"probe.safetensors")[1]["protocol"]["split"] == "2"
    (out/"probe.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="delete it to have it fitted again"): ucf101_eval(config)

def test_a_video_that_is_none_is_one_line(job, command, tmp_path):
    config, _ = job; (tmp_path/"clip.avi").write_bytes(b"no video")
    done = command("stjepa_ucf101", "none", config.checkpoint, "--video", tmp_path/"clip.avi", "--out", config.out, "--rows", "student", "--device", "cpu")
    assert done.returncode == 1 and done.stderr.startswith("stjepa_ucf101: error: --video ") and done.stderr.count("\n") == 1 and "clip.avi" in done.stderr, done.stderr
    with pytest.raises(InputError, match="a video is named by the linear probe"): ucf101_eval(replace(config, probes="knn", video=str(tmp_path/"clip.avi")))

# ---- SSv2

def test_ssv2_is_probed_on_validation(toy, checkpoint, tmp_path, capsys):
    summary = ssv2_eval(Ssv2Config(str(toy/"ssv2"), str(checkpoint), out=str(tmp_path/"out"), rows="mean_pixel,student", limit=2, num_workers=0, device="cpu"))
    assert capsys.readouterr().out.startswith("SSv2 validation: student top-1") and summary == json.load(open(tmp_path/"out"/"summary.json"))
    assert set(summary["ssv2"]["linear_top1"]) == {"chance", "mean_pixel", "student"} and (summary["split"], summary["drawn_by"]) == ("validation", "clip")
    assert {r["list"] for r in lines_of(tmp_path/"out"/"predictions.csv")} == {"validation"} and summary["clips"]["train"] == 24
