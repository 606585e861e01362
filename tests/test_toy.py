"The toy set: same seed, same pixels, whatever the process; safe to interrupt; refusals in one line."
import subprocess, sys
from pathlib import Path
import numpy as np, pytest
from stjepa.captions import msrvtt, msvd
from stjepa.ssv2 import ssv2
from stjepa.toy import ACTIONS, SHAPES, ToyConfig, draw_scene, make_toy, poses, render, tiny_toy
from stjepa.ucf101 import ucf101
from stjepa.video import View, load_clip

TINY = dict(ssv2_train=3, ssv2_validation=1, ssv2_test=1, ucf101_groups=4, ucf101_clips=1, msrvtt_train=2, msrvtt_test=2, msvd_train=2, msvd_val=1, msvd_test=2)
BIN = Path(sys.executable).parent

@pytest.fixture(scope="module")
def toy(tmp_path_factory): return tiny_toy(tmp_path_factory.mktemp("toy")/"set", **TINY)

def pixels(root): return {p.relative_to(root): load_clip(p, View(num_frames=4, size_px=64)).frames for p in sorted(root.rglob("*.[wam][evp][bi4]*"))}

def test_same_seed_same_pixels_in_any_process(toy, tmp_path):
    other = make_toy(ToyConfig(str(tmp_path/"other"), num_workers=2, **TINY))
    one, two = pixels(toy), pixels(other)
    assert len(one) == 3 + 1 + 1 + 48 + 4 + 5 and list(one) == list(two)
    assert all((one[k] == two[k]).all() for k in one)

def test_more_clips_leave_the_others_alone(toy, tmp_path):
    more = tiny_toy(tmp_path/"more", **(TINY | dict(ssv2_train=4, ucf101_clips=2)))
    one, two = pixels(toy), pixels(more)
    assert len(two) == len(one) + 1 + 48 and all((one[k] == two[k]).all() for k in one)

def test_every_reader_finds_every_clip(toy):
    sets = [ssv2(toy/"ssv2", s) for s in ("train", "validation", "test")] + [ucf101(toy/"ucf101", k, s) for k in (1, 2, 3) for s in ("train", "test")]
    sets += [msrvtt(toy/"msrvtt", s) for s in ("train", "test")] + [msvd(toy/"msvd", s) for s in ("train", "val", "test")]
    assert [len(d) for d in sets] == [3, 1, 1] + [36, 12]*3 + [2, 2, 2, 1, 2] and not any(d.missing for d in sets)
    assert not {r.group for r in sets[3].records} & {r.group for r in sets[4].records}

def test_interrupted_set_is_completed(toy, tmp_path, monkeypatch):
    import stjepa.toy
    written, write = [], stjepa.toy.write_clip
    def failing(root, clip):
        if len(written) == 10: raise KeyboardInterrupt
        written.append(clip.path); write(root, clip)
    monkeypatch.setattr(stjepa.toy, "write_clip", failing)
    with pytest.raises(KeyboardInterrupt): tiny_toy(tmp_path/"set", **TINY)
    monkeypatch.undo()
    before = {p: (tmp_path/"set"/p).stat().st_mtime_ns for p in written}
    tiny_toy(tmp_path/"set", **TINY)
    assert pixels(tmp_path/"set").keys() == pixels(toy).keys()
    assert all((tmp_path/"set"/p).stat().st_mtime_ns == t for p, t in before.items())

def test_second_of_a_pair_is_the_first_backwards():
    for action in range(0, len(ACTIONS), 2):
        first, second = (poses(np.random.default_rng(9), a, 16) for a in (action, action + 1))
        assert np.allclose(first, second[:, ::-1])

def test_a_still_does_not_tell_the_action():
    from sklearn.linear_model import RidgeClassifier
    labels = np.arange(1200) % 12
    clips = np.stack([render(draw_scene(np.random.default_rng([7, i]), a, SHAPES), 8) for i, a in enumerate(labels)])
    for still in (clips.mean(1), clips[:, 0], clips[:, 4], clips[:, -1]):
        x = still.reshape(-1, 8, 8, 8, 8, 3).mean((2, 4)).reshape(1200, -1)
        assert RidgeClassifier(10*x.var()).fit(x[:800], labels[:800]).score(x[800:], labels[800:]) < 0.16

@pytest.mark.parametrize("arguments, message", [
    (["--msvd-val", "-1"], "from 0 on"), (["--captions", "0"], "expected 1 to 20"), (["--seed", "5"], "another configuration")])
def test_refusals_are_one_line(toy, arguments, message):
    sizes = [o for k, v in TINY.items() for o in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run([BIN/"stjepa_toy", toy, *sizes, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1

def test_no_teacher(tmp_path):
    root = make_toy(ToyConfig(str(tmp_path/"set"), teacher=False, num_workers=1, **(TINY | dict(ucf101_groups=1))))
    assert not (root/"teacher").exists()
    make_toy(ToyConfig(str(tmp_path/"set"), num_workers=1, **(TINY | dict(ucf101_groups=1))))
    assert (root/"teacher"/"model.safetensors").exists()
