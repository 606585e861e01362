"Retrieval: ranks, intervals, closed forms and alignment against direct references; what lists may share; the same numbers however the work is cut."
import csv, json
import numpy as np, pytest, scipy.linalg, torch
from dataclasses import replace
from stjepa.captions import msrvtt, msvd, with_source, youtube_id
from stjepa.core import InputError, generator, read_json
from stjepa.probe import bootstrap
from stjepa.retrieval import (Pairs, RetrievalConfig, TextEncoder, alignment, cca, chance_scores, fit_closed, hold_out, intervals, judge, moments, mutual_knn,
                              nearest, places, read_lists, retrieval_eval, ridge, shared_recordings, sharing, text_features, without_shared)

torch.set_num_threads(1)
WAYS = ("t2v", "v2t", "t2v_ridge", "v2t_ridge", "t2v_cca", "v2t_cca")

def uneven(n, seed, dv=24, dt=17, noise=.5):
    "Videos with 1 to 4 captions each, in a scene of 6 numbers."
    g = generator("uneven", seed); maps = generator("uneven maps")
    see, tell = torch.randn(6, dv, generator=maps), torch.randn(6, dt, generator=maps)
    owner = torch.arange(n).repeat_interleave(torch.randint(1, 5, (n,), generator=g)); scene = torch.randn(n, 6, generator=g)
    return Pairs(scene @ see + noise*torch.randn(n, dv, generator=g) + 5, scene[owner] @ tell + noise*torch.randn(len(owner), dt, generator=g) - 3, owner)

# ---- ranks and intervals

def tied_rank(scores, right):
    "Expected rank in a shuffled list, by counting."
    return 1 + sum(s > scores[right] for s in scores) + (sum(s == scores[right] for s in scores) - 1) / 2

@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_ranks_with_ties_are_those_of_loops_in_chunks_of_any_size(chunk):
    g = generator("ties"); owner = torch.cat([torch.arange(12), torch.randint(12, (20,), generator=g)])[torch.randperm(32, generator=g)]
    text, video = torch.eye(3)[torch.randint(3, (32,), generator=g)], torch.eye(3)[torch.randint(3, (12,), generator=g)] # cosines are 0 or 1: ties everywhere
    found, scores = places(text, video, owner, chunk), (text @ video.T).tolist()
    best = [[max(scores[q][v] for q in range(32) if owner[q] == w) for w in range(12)] for v in range(12)]
    for way, r in dict(t2v=[tied_rank(s, o) for s, o in zip(scores, owner.tolist())], v2t=[tied_rank(s, v) for v, s in enumerate(best)]).items():
        assert (found[way].values()["mnr"] - torch.tensor(r).double()).abs().max() < 1e-12
        assert abs(found[way].scores()["mnr"] - np.mean(r)) < 1e-12 and abs(found[way].scores()["mdr"] - np.median(r)) < 1e-12

def test_intervals_draw_whole_videos():
    pairs = uneven(40, 0); placed = places(torch.randn(len(pairs.owner), 4, generator=generator(1)), torch.randn(40, 4, generator=generator(2)), pairs.owner)["t2v"]
    groups = [f"{o:02}" for o in pairs.owner.tolist()]
    for metric, values in placed.values().items():
        statistic = (lambda x: x.quantile(.5, dim=-1)) if metric == "mdr" else (lambda x: x.mean(-1))
        assert np.allclose(intervals(placed, 3, 300)[metric], bootstrap(values, statistic, groups, 300, 3), atol=1e-9), metric
    assert intervals(placed, 3, 300) == intervals(placed, 3, 300) != intervals(placed, 4, 300)

def test_an_interval_shrinks_with_the_root_of_the_list_and_holds_the_score():
    width = {}
    for n in (100, 1600):
        placed = places(torch.randn(n, 4, generator=generator(1)), torch.randn(n, 4, generator=generator(2)), torch.arange(n))["t2v"]
        low, high = intervals(placed)["mnr"]; width[n] = (high - low) / n
        assert low < placed.scores()["mnr"] < high
    assert 3 < width[100] / width[1600] < 5.3

# ---- closed forms

def standard(pairs):
    "Both sides a row per caption, standardised, each video of weight 1."
    w = (1 / pairs.owner.bincount()[pairs.owner].double() / len(pairs.video)).numpy()
    def to(a): a = a - w @ a; return a / np.sqrt(w @ a**2)
    return to(pairs.video.double().numpy()[pairs.owner]), to(pairs.text.double().numpy()), w[:, None]

@pytest.mark.parametrize("strength", [1e-6, 1e-2, 10.])
def test_ridge_is_the_solution_of_the_normal_equations(strength):
    pairs = uneven(60, 1); x, y, w = standard(pairs)
    direct = np.linalg.solve(x.T @ (w*x) + strength*np.eye(24), x.T @ (w*y))
    found = ridge(moments(pairs), strength)
    assert np.abs(found.video.map.numpy() - direct).max() < 1e-9 and np.abs(found.text.map.numpy() - np.eye(17)).max() < 1e-12

@pytest.mark.parametrize("strength", [1e-6, 1e-2, 10.])
def test_cca_is_the_generalised_eigenvalue_problem(strength):
    pairs = uneven(60, 1); x, y, w = standard(pairs); xy = x.T @ (w*y)
    a = np.block([[np.zeros((24, 24)), xy], [xy.T, np.zeros((17, 17))]])
    values, vectors = scipy.linalg.eigh(a, scipy.linalg.block_diag(x.T @ (w*x) + strength*np.eye(24), y.T @ (w*y) + strength*np.eye(17)))
    found = cca(moments(pairs), strength); top = slice(-1, -18, -1)
    direct = 2 * (vectors[:24, top] * values[top]**2) @ vectors[24:, top].T # signs of single directions are free, the score is not
    assert np.abs((found.video.map @ found.text.map.T).numpy() - direct).max() < 1e-8

def test_cca_finds_perfect_correlation_and_nothing_in_noise():
    g = generator("perfect"); x = torch.randn(200, 8, generator=g).double(); turn = torch.randn(8, 8, generator=g).double()
    same, noise = Pairs(x, x @ turn, torch.arange(200)), Pairs(x, torch.randn(200, 8, generator=g), torch.arange(200))
    def correlations(pairs):
        maps = cca(moments(pairs), 1e-9); z = (pairs.video - maps.video.mean) / maps.video.std @ maps.video.map
        return z.square().mean(0).sqrt() # a direction is as long as its correlation
    assert (correlations(same) - 1).abs().max() < 1e-6 and correlations(noise).max() < .5
    assert judge(cca(moments(same), 1e-9), same)["t2v"]["r1"] == 1

@pytest.mark.parametrize("solve", [ridge, cca])
def test_closed_forms_score_chance_on_constants_and_well_on_what_is_there(solve):
    train, test = uneven(200, 0, noise=.2), uneven(50, 1, noise=.2)
    maps, chosen = fit_closed(train, solve)
    assert judge(maps, test)["t2v"]["r1"] > .5 and fit_closed(train, solve)[1] == chosen
    for value in (1., .1, 1e4):
        for side in ("video", "text"):
            flat = lambda p: replace(p, **{side: torch.full_like(getattr(p, side), value)})
            for found in judge(fit_closed(flat(train), solve)[0], flat(test)).values():
                for metric, chance in chance_scores(50).items(): assert abs(found[metric] - chance) < 1e-9, (side, value, metric)

def test_strengths_are_chosen_without_the_test_list_on_whole_recordings():
    pairs = replace(uneven(60, 0), recording=torch.arange(60) // 4)
    rest, held = hold_out(pairs, seed=2)
    assert len(held.video) == 12 and len(rest.video) == 48 and not set(rest.recording.tolist()) & set(held.recording.tolist())
    seen = {c: judge(ridge(moments(rest), c), held) for c in (100., 1., .01)}
    mean = lambda s: np.mean([s[way][r] for way in s for r in ("r1", "r5", "r10")])
    assert fit_closed(pairs, ridge, seed=2, strengths=(100., 1., .01))[1]["strength"] == max(seen, key=lambda c: mean(seen[c]))

# ---- alignment

@pytest.mark.parametrize("k", [1, 5, 19])
def test_mutual_neighbours_are_those_of_loops(k):
    a, b = (torch.randn(40, d, generator=generator(d)) for d in (6, 9))
    def near(x, i):
        x = (x / x.norm(dim=1, keepdim=True)).double().numpy(); return set(sorted((j for j in range(40) if j != i), key=lambda j: -(x[i] @ x[j]))[:k])
    assert np.allclose(mutual_knn(a, b, k), [len(near(a, i) & near(b, i)) / k for i in range(40)], atol=1e-12)

def test_neighbours_that_tie_share_their_places():
    x = torch.eye(4)[torch.tensor([0, 0, 0, 1, 2])]
    found = nearest(x, 1)
    assert torch.equal(found[0], torch.tensor([0, .5, .5, 0, 0]).double()) and torch.equal(found[3], torch.tensor([.25, .25, .25, 0, .25]).double())
    flat = mutual_knn(torch.ones(30, 3), torch.randn(30, 5, generator=generator(5)), 7)
    assert (flat - 7/29).abs().max() < 1e-12
    share, k = alignment(Pairs(torch.eye(3), torch.eye(3), torch.arange(3)))
    assert k == 1 and abs(share.mean().item() - .5) < 1e-12

# ---- text features

def test_text_features_are_kept_by_model_and_captions(tmp_path):
    asked = []
    def encode(sentences): asked.append(sentences); return torch.arange(len(sentences)).float()[:, None]
    one = TextEncoder("a", "1", encode)
    assert text_features(one, ["x", "y", "x"], tmp_path).flatten().tolist() == [0, 1, 0] and text_features(one, ["x", "y", "x"], tmp_path).shape == (3, 1)
    text_features(one, ["y", "x", "x"], tmp_path)
    for other in (replace(one, weights="2"), replace(one, name="b")): text_features(other, ["x", "y", "x"], tmp_path)
    assert asked == [["x", "y"], ["y", "x"], ["x", "y"], ["x", "y"]]

# ---- what lists share

@pytest.mark.parametrize("text,id", [
    ("https://www.youtube.com/watch?v=9lZi22qLlEo", "9lZi22qLlEo"), ("http://youtube.com/watch?feature=x&v=-_Zi22qLlEo&t=3", "-_Zi22qLlEo"),
    ("https://youtu.be/9lZi22qLlEo", "9lZi22qLlEo"), ("-4wsuPCjDBc_5_15", "-4wsuPCjDBc"), ("_UaAReVEHDA_4_11", "_UaAReVEHDA"), ("a_b_c_d_e_f_33_44", "a_b_c_d_e_f"),
    ("video7020", None), ("vid17", None), ("https://example.org/clip.mp4", None), ("", None), (None, None), (7, None)])
def test_the_recording_of_a_clip(text, id): assert youtube_id(text) == id

def test_a_url_of_another_site_is_a_recording_too():
    assert with_source({}, "toy:17") == {"group": "toy:17"} and with_source({}, "video3", None) == {}
    assert with_source({}, "vid1", "9lZi22qLlEo_1_2") == {"group": "9lZi22qLlEo"}

@pytest.fixture
def roots(toy, tmp_path):
    "Toy lists in which video0 of MSR-VTT was cut from a recording that both test lists have, and video1 from one of MSR-VTT's own test list."
    import shutil
    for name in ("msrvtt", "msvd"): shutil.copytree(toy/name, tmp_path/name)
    youtube = msvd(tmp_path/"msvd", "test").records[3].group
    train, test = (json.loads((tmp_path/f"msrvtt/msrvtt_{s}.json").read_text()) for s in ("train_9k", "test_1k"))
    train[0]["url"] = f"https://www.youtube.com/watch?v={youtube}"; train[1]["url"] = test[2]["url"]; del test[5]["url"]
    for s, value in (("train_9k", train), ("test_1k", test)): (tmp_path/f"msrvtt/msrvtt_{s}.json").write_text(json.dumps(value))
    return dict(msrvtt_root=str(tmp_path/"msrvtt"), msvd_root=str(tmp_path/"msvd"))

def test_shared_recordings_are_named_and_can_be_left_out(roots):
    lists, _ = read_lists(RetrievalConfig(checkpoint="", **roots)); test = {name: [r.id for r in t.records] for name, (_, t) in lists.items()}
    assert {row[:4] for row in shared_recordings(lists)} == {("msrvtt", test["msrvtt"][2], "msrvtt", "video1"), ("msvd", test["msvd"][3], "msrvtt", "video0")}
    assert sharing(lists) == dict(msrvtt=dict(test_videos=8, unknown=1, own=1, other=0), msvd=dict(test_videos=8, unknown=0, own=0, other=1))
    kept = without_shared(lists)
    assert shared_recordings(kept) == [] and len(kept["msrvtt"][0]) == len(lists["msrvtt"][0]) - 2 and kept["msvd"][0].records == lists["msvd"][0].records
    assert all(kept[name][1].records == lists[name][1].records for name in lists)

def test_no_test_video_is_in_its_training_list(toy):
    for train, test in read_lists(RetrievalConfig(str(toy/"msrvtt"), str(toy/"msvd"), ""))[0].values():
        assert not {r.id for r in train.records} & {r.id for r in test.records} and not {r.file for r in train.records} & {r.file for r in test.records}

# ---- the job

@pytest.fixture(scope="module")
def judged(toy, run_dir, tmp_path_factory):
    "The job on the toy sets, and what it said."
    out = tmp_path_factory.mktemp("retrieval"); checkpoint = max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))
    config = RetrievalConfig(str(toy/"msrvtt"), str(toy/"msvd"), str(checkpoint), out=str(out), num_workers=0, device="cpu", head_steps=60)
    return config, retrieval_eval(config)

def test_every_table_has_every_row_with_its_interval(judged):
    config, summary = judged; rows = {"mean_pixel", "random_init", "student"}
    assert read_json(f"{config.out}/summary.json") == summary and set(summary["retrieval"]) == {"msrvtt", "msvd"}
    for name, scores in summary["retrieval"].items():
        assert set(scores) == {*WAYS, "alignment"} and set(scores["alignment"]) == rows | {"chance"}
        for way in WAYS:
            for metric, values in scores[way].items():
                spans = summary["intervals"][name][way][metric]
                assert set(values) == rows | {"chance"} and set(spans) == rows, (name, way, metric)
                assert all(low <= values[row] <= high for row, (low, high) in spans.items()), (name, way, metric)
        k, n = (summary["counts"][name][key] for key in ("neighbours", "test_videos")); assert scores["alignment"]["chance"] == k / (n - 1)
    text = open(f"{config.out}/table.md").read()
    assert text.count("| chance |") == text.count("| mean_pixel |") == text.count("| random_init |") == text.count("| student |") == 10 and "shot" not in text

def test_the_same_numbers_twice_whatever_the_workers_and_the_batch(judged, tmp_path):
    config, summary = judged
    again = retrieval_eval(replace(config, out=str(tmp_path/"out"), batch_size=3, num_workers=2))
    for key in ("retrieval", "intervals", "chosen", "counts", "sharing"): assert again[key] == summary[key], key

def test_the_job_writes_what_lists_share_and_trains_without_it(judged, roots, tmp_path):
    config, _ = judged; config = replace(config, **roots, rows="mean_pixel", head_steps=10, store=str(tmp_path/"store"))
    kept, dropped = (retrieval_eval(replace(config, out=str(tmp_path/str(drop)), drop_shared=drop)) for drop in (False, True))
    rows = list(csv.DictReader(open(tmp_path/"False/shared_recordings.csv")))
    assert [r["train_video"] for r in rows] == ["video1", "video0"] and not (tmp_path/"True/shared_recordings.csv").exists()
    assert kept["counts"]["msrvtt"]["train_videos"] - dropped["counts"]["msrvtt"]["train_videos"] == 2 and dropped["sharing"]["msrvtt"]["own"] == 0
    assert "1 of 8 test videos share a recording with the set's training list" in (tmp_path/"False/table.md").read_text()

@pytest.mark.parametrize("split,title,counts", [("7k", "MSR-VTT 1k-A, trained on 7k", (12, 8, 8)), ("full", "MSR-VTT full split", (12, 8, 40))])
def test_the_other_lists_of_msrvtt(judged, toy, tmp_path, split, title, counts):
    import shutil
    config, _ = judged; root = shutil.copytree(toy/"msrvtt", tmp_path/"msrvtt")
    train, test = msrvtt(root, "train").records, msrvtt(root, "test").records
    five = lambda r: (*r.captions, *(f"{r.captions[0]}, take {i}" for i in range(5)))[:5]
    videos = [dict(video_id=r.id, split="train" if r in train[:12] else "validate" if r in train else "test") for r in (*train, *test)]
    (root/"MSRVTT_data.json").write_text(json.dumps(dict(videos=videos, sentences=[dict(video_id=r.id, caption=c) for r in (*train, *test) for c in five(r)])))
    (root/"MSRVTT_train.7k.csv").write_text("video_id\n" + "".join(f"{r.id}\n" for r in train[:12]))
    found = retrieval_eval(replace(config, msrvtt_root=str(root), msvd_root="none", msrvtt_split=split, rows="mean_pixel", head_steps=10, out=str(tmp_path/"out")))
    assert found["titles"]["msrvtt"] == title and tuple(found["counts"]["msrvtt"][k] for k in ("train_videos", "test_videos", "test_captions")) == counts
    assert title in (tmp_path/"out/table.md").read_text()
