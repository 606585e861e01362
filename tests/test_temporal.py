"Temporal tests: exact at both ends of the scale, the same however the work is shared, restarted where they stopped."
import json, os, shutil, subprocess
import numpy as np, pytest, torch
from dataclasses import replace
from conftest import BIN
from stjepa.core import InputError
from stjepa.features import Features
from stjepa.temporal import (SPOILT, VARIANTS, TemporalConfig, action_scores, blocks_of, encode_block, examples, frame_order, joined, read_takes, show_drops, shuffled,
                             tell_apart, temporal_eval, token_encoders, variant_features, window)
from stjepa.records import Dataset, Record
from stjepa.video import View, load_clip, write_video

torch.set_num_threads(1)
VIEW = View(num_frames=8, size_px=32)

# ---- which frames

@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40, 1777])
def test_spoilt_clips_show_the_frames_of_the_ordered_one(n):
    ordered = frame_order("ordered", VIEW, n, "clip")
    for v in ("reversed", "shuffled"): assert sorted(frame_order(v, VIEW, n, "clip")) == sorted(ordered)
    assert (frame_order("reversed", VIEW, n, "clip") == ordered[::-1]).all()
    assert len({*frame_order("frozen", VIEW, n, "clip").tolist()}) == 1 and frame_order("frozen", VIEW, n, "clip")[0] in ordered

@pytest.mark.parametrize("n", range(2, 20))
def test_a_shuffle_is_never_the_order_and_always_the_same(n):
    for clip in "abcdef":
        assert sorted(shuffled(n, clip)) == [*range(n)] and (shuffled(n, clip) != np.arange(n)).any()
        assert (shuffled(n, clip) == shuffled(n, clip)).all()

def test_shuffles_are_even():
    "Over many clips every frame comes everywhere about equally often: the order holds no hint but itself."
    counts = np.zeros((8, 8))
    for i in range(4000): counts[np.arange(8), shuffled(8, str(i))] += 1
    assert np.abs(counts / 4000 - 1/8).max() < .03

@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("n", [7, 8, 15, 36, 100])
def test_windows_are_centred_and_inside_or_refused(stride, n):
    found, span = window(8, stride, n), 7 * stride + 1
    if span > n: assert found is None; return
    assert found[0] >= 0 and found[-1] < n and (np.diff(found) == stride).all() and abs((found[0] + found[-1]) - (n - 1)) <= 1

def test_one_decode_serves_all_variants(tmp_path):
    frames = np.repeat(np.arange(0, 240, 5, dtype=np.uint8), 64 * 48 * 3).reshape(48, 48, 64, 3)
    record = Record("clip", str(write_video(tmp_path/"clip.avi", frames)))
    takes = read_takes(record, VIEW, [*VARIANTS, "stride1", "stride6", "stride7"])
    assert torch.equal(takes.of("ordered"), load_clip(record.path, VIEW, "clip").frames) and takes.where["stride7"] is None
    for v in (*VARIANTS, "stride1", "stride6"): # the brightness of a frame says which one it is
        seen = takes.of(v).float().mean((1, 2, 3)).numpy() / 5
        assert np.abs(seen - frame_order(v, VIEW, 48, "clip")).max() < .5, v

# ---- both ends of the scale

def dataset(clips=24, classes=4):
    return Dataset("ucf101", None, "train1", [Record(f"c{i}", f"c{i}.avi", i % classes, f"g{i // classes:02}") for i in range(clips)], [f"class{i}" for i in range(classes)])

def features_of(d, make): return {v: Features(make(v), torch.arange(len(d)), []) for v in (*VARIANTS, "stride1", "stride2", "stride4")}

@pytest.mark.parametrize("classes", [("ordered", "reversed"), ("ordered", "shuffled"), ("stride1", "stride2", "stride4")])
def test_frame_numbers_answer_everything_and_constants_nothing(classes):
    d = dataset(); orders = lambda v: torch.from_numpy(np.stack([frame_order(v, VIEW, 60, r.id) for r in d.records])).float()
    knowing, blind = features_of(d, orders), features_of(d, lambda v: torch.full((len(d), 8), .3))
    assert tell_apart((d, d), (knowing, knowing), classes) == 1
    assert abs(tell_apart((d, d), (blind, blind), classes) - 1 / len(classes)) < 1e-12

def test_the_attentive_probe_at_both_ends():
    d, place = dataset(), torch.eye(8)
    def tokens(v): # token i: which place, and which frame came there
        return torch.stack([torch.cat([place, place * torch.from_numpy(frame_order(v, VIEW, 60, r.id) / 60).float()[:, None]], 1) for r in d.records])
    knowing, blind = features_of(d, tokens), features_of(d, lambda v: torch.ones(len(d), 4, 8))
    assert tell_apart((d, d), (blind, blind), ("ordered", "reversed"), "attentive", epochs=1) == .5
    assert tell_apart((d, d), (knowing, knowing), ("ordered", "reversed"), "attentive", rates=(1e-2,), epochs=40) == 1

def test_motion_is_told_from_the_still_picture():
    d, y = dataset(), torch.arange(24) % 4
    still, moving = torch.eye(4)[y], lambda v: torch.eye(4)[y] * (v == "ordered")
    known = features_of(d, lambda v: still); felt = features_of(d, moving); nothing = features_of(d, lambda v: torch.ones(24, 4))
    assert {*action_scores((d, d), (known, known)).values()} == {1.}
    seen = action_scores((d, d), (felt, felt))
    assert seen["ordered"] == 1 and all(seen[k] == .25 for k in ("shuffled", "reversed", "frozen", "refitted"))
    assert {*action_scores((d, d), (nothing, nothing)).values()} == {.25}

def test_examples_of_a_clip_stay_together_and_short_clips_stay_out():
    d = dataset(); x = features_of(d, lambda v: torch.arange(24.)[:, None])
    x["stride4"] = Features(x["stride4"].x[3:], torch.arange(3, 24), [])
    found = examples(d, x, ("stride1", "stride2", "stride4"))
    assert len(found.y) == 3 * 21 and found.y.bincount().tolist() == [21] * 3
    assert torch.equal(found.x[:21], found.x[21:42]) and torch.equal(found.x[:21], found.x[42:]) and found.x[0] == 3
    assert found.groups[:21] == found.groups[21:42] == [r.group for r in d.records[3:]]
    lone = replace(d, records=[replace(r, group=None) for r in d.records])
    assert examples(lone, x, ("ordered", "reversed")).groups == [r.id for r in d.records] * 2

# ---- the store

@pytest.fixture(scope="module")
def checkpoint(run_dir): return max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))

@pytest.fixture(scope="module")
def encoders(checkpoint):
    from stjepa.features import encoders_of
    return encoders_of(["mean_pixel", "student"], checkpoint)

@pytest.fixture(scope="module")
def test_set(toy):
    from stjepa.ucf101 import ucf101
    return ucf101(toy/"ucf101", split=1, subset="test")

def test_features_do_not_depend_on_batches_or_workers(encoders, test_set):
    few, missing = replace(test_set, records=test_set.records[:5]), {v: encoders for v in ("ordered", "shuffled", "stride2")}
    one = encode_block(few, missing, batch_size=1)
    for other in (encode_block(few, missing, batch_size=5), encode_block(few, missing, batch_size=3, num_workers=2)):
        for key in one: assert torch.equal(one[key].x, other[key].x) and torch.equal(one[key].rows, other[key].rows)

def test_a_restart_decodes_only_what_is_missing(encoders, test_set, tmp_path, monkeypatch):
    from stjepa import temporal
    monkeypatch.setattr(temporal.blocks_of, "__defaults__", (4,)) # three blocks
    decoded, read = [], temporal.read_takes
    monkeypatch.setattr(temporal, "read_takes", lambda record, *a: (decoded.append(record.id), read(record, *a))[1])
    whole = variant_features(encoders, test_set, ["ordered", "reversed"], tmp_path/"whole")
    class Killed(Exception): pass
    fill, done = temporal.fill_block, []
    def dies(*args):
        if len(done) == 2: raise Killed
        fill(*args); done.append(1)
    monkeypatch.setattr(temporal, "fill_block", dies)
    with pytest.raises(Killed): variant_features(encoders, test_set, ["ordered", "reversed"], tmp_path/"store")
    monkeypatch.setattr(temporal, "fill_block", fill); decoded.clear()
    again = variant_features(encoders, test_set, ["ordered", "reversed"], tmp_path/"store")
    assert decoded == [r.id for r in test_set.records[8:]]
    for v in whole:
        for name in whole[v]: assert torch.equal(whole[v][name].x, again[v][name].x)
    decoded.clear(); variant_features(encoders, test_set, ["ordered", "reversed"], tmp_path/"store"); assert not decoded
    variant_features(encoders, test_set, ["frozen"], tmp_path/"store"); assert len(decoded) == len(test_set)

def test_blocks_joined_are_the_dataset():
    parts = [Features(torch.tensor([[0.], [2.]]), torch.tensor([0, 2]), [(1, "bad")]), Features(torch.zeros(0, 1), torch.tensor([], dtype=torch.int64), [(0, "bad")]), Features(torch.tensor([[4.]]), torch.tensor([0]), [])]
    found = joined(parts, [3, 1, 1])
    assert found.rows.tolist() == found.x[:, 0].tolist() == [0, 2, 4] and found.errors == [(1, "bad"), (3, "bad")]
    assert [len(b) for b in blocks_of(dataset(10), 4)] == [4, 4, 2]

# ---- the job

@pytest.fixture(scope="module")
def job(toy, checkpoint, tmp_path_factory):
    config = TemporalConfig(str(toy/"ucf101"), str(checkpoint), out=str(tmp_path_factory.mktemp("temporal")), strides="1,2", num_workers=0, device="cpu")
    return config, temporal_eval(config)

def test_the_job_writes_what_it_says(job):
    config, summary = job
    table = summary["temporal"]["linear"]
    assert json.load(open(f"{config.out}/summary.json")) == summary
    assert set(table) == {"arrow", "order", "speed", "action"} and set(table["action"]) == {*SPOILT, "refitted"}
    for scores in (table["arrow"], table["speed"], *table["action"].values()): assert set(scores) == {"chance", "mean_pixel", "random_init", "student"}
    assert table["arrow"]["chance"] == .5 and abs(table["action"]["frozen"]["chance"] - 1/12) < 1e-12
    assert os.path.getsize(f"{config.out}/drops_linear.png") > 3000 and "frame order %" in open(f"{config.out}/table.md").read()
    assert len(show_drops(table).axes[0].patches) == 5 * 3

def test_the_same_numbers_however_the_work_is_shared(job, toy, checkpoint, tmp_path):
    config, summary = job
    assert temporal_eval(replace(config, out=str(tmp_path/"batches"), batch_size=3, num_workers=2))["temporal"] == summary["temporal"]
    done = subprocess.run([BIN/"torchrun", "--standalone", "--nproc-per-node=2", "--no-python", BIN/"stjepa_temporal", toy/"ucf101", checkpoint, "--out", tmp_path/"two",
        "--strides", "1,2", "--num-workers", "0", "--device", "cpu"], capture_output=True, text=True, timeout=200, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert json.load(open(tmp_path/"two"/"summary.json"))["temporal"] == summary["temporal"] and done.stdout.count("arrow of time %") == 1

def test_an_unreadable_clip_is_counted_and_its_variants_left_out(job, toy, tmp_path):
    config, _ = job
    root = shutil.copytree(toy/"ucf101", tmp_path/"ucf101")
    victim = sorted(root.rglob("*_g01_c01.avi"))[0]; victim.write_bytes(b"<html>")
    summary = temporal_eval(replace(config, data_root=str(root), out=str(tmp_path/"out"), rows="mean_pixel", max_failed=.5))
    assert summary["unreadable"] == 1 and summary["clips"]["test"] == 11
    assert victim.name in (tmp_path/"out"/"failed.csv").read_text()
    with pytest.raises(InputError, match="more than --max-failed"): temporal_eval(replace(config, data_root=str(root), out=str(tmp_path/"out2"), rows="mean_pixel", max_failed=0.))

@pytest.mark.parametrize("name", ["ssv2", "msvd"])
def test_other_datasets(job, toy, tmp_path, name):
    config, _ = job
    table = temporal_eval(replace(config, data_root=str(toy/name), out=str(tmp_path), rows="mean_pixel"))["temporal"]["linear"]
    assert ("action" in table) == (name == "ssv2") and set(table["order"]) == {"chance", "mean_pixel"}

def test_tokens_average_to_the_vectors(checkpoint, test_set):
    from stjepa.features import encoders_of
    rows = ["mean_pixel", "random_init", "random_encoder", "student", "student_encoder"]
    frames = load_clip(test_set.records[0].path, View(size_px=64)).frames[None]
    for whole, tokens in zip(encoders_of(rows, checkpoint), token_encoders(rows, checkpoint)):
        assert torch.allclose(tokens(frames).mean(1), whole(frames), atol=1e-5) and tokens.name == f"{whole.name} tokens" and tokens.key != whole.key

@pytest.mark.parametrize("change, says", [(dict(strides="1"), "--strides 1: expected at least two"), (dict(strides="1,99"), "no clip of ucf101 train1 is long enough"), (dict(rows="chance"), "name at least one row"),
                                          (dict(probes="knn"), "--probes knn: expected linear or attentive"), (dict(split=4), "--split 4: expected 1, 2 or 3"), (dict(data_root="/nowhere"), "no such folder")])
def test_bad_input_is_named(job, tmp_path, change, says):
    config, _ = job
    with pytest.raises(InputError, match=says): temporal_eval(replace(config, **{"out": str(tmp_path), "rows": "mean_pixel", "store": f"{config.out}/features"} | change))
