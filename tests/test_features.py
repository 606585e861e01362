"Views of an evaluation, and the store of features: right pixels, the same numbers whoever computes them, nothing computed twice."
import dataclasses, signal, subprocess, sys, time
from fractions import Fraction
import numpy as np, pytest, torch
from conftest import ROOT
from test_formats import coded, encode, numbers
from stjepa import features as module
from stjepa.core import InputError
from stjepa.features import encode_all, features, in_passes, lacking, store_mark, stored, student_encoders, video_marks
from stjepa.records import Dataset, Record
from stjepa.ucf101 import ucf101
from stjepa.video import View, crop_box, load_views, read_frames, write_video

torch.set_num_threads(1)

# ---- views in time and space

def test_the_clips_of_a_view_are_the_frames_they_say(tmp_path):
    "Numbers burnt into the pixels: clip k of n takes the middle of the k-th n-th of each part."
    n, f, clips = 40, 8, 5
    path = encode(tmp_path/"coded.mp4", coded(n, 112, 112))
    views = View(num_frames=f, size_px=112).spread(clips=clips)
    shown = [numbers(clip.frames) for clip in load_views(path, views)]
    assert shown == [[int((i + Fraction(2*k + 1, 2*clips)) * Fraction(n, f)) for i in range(f)] for k in range(clips)]
    assert sorted(sum(shown, [])) == list(range(n)) # five clips of 8 frames read all 40

@pytest.mark.parametrize("h,w,axis", [(64, 150, 2), (150, 64, 1), (64, 64, 2)])
def test_the_crops_of_a_view_are_the_pixels_they_say(tmp_path, h, w, axis):
    ramp = np.linspace(0, 255, max(h, w)).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None] if w >= h else ramp[:, None, None], (h, w, 3))
    path = write_video(tmp_path/"ramp.mp4", np.stack([picture] * 4))
    frames, _, _ = read_frames(path, lambda n: np.arange(2))
    free = max(h, w) - 64
    for clip, start in zip(load_views(path, View(num_frames=2, size_px=64).spread(crops=3)), (0, free // 2, free)):
        assert np.array_equal(clip.frames[:1], frames[:1].take(range(start, start + 64), axis))

def test_view_0_is_what_it_was():
    "Caches of today stay readable: hash, fields and pixels of view 0 and of the random ones may never change."
    assert View().hash == "3a50765bb5318324" and "moment" not in View().to_dict() and "place" not in View().to_dict()
    for view in (View(), View().numbered(2)): assert View.from_dict(view.to_dict()) == view and View.from_dict(view.to_dict()).hash == view.hash
    for n in (1, 3, 5): assert View().placed(n // 2, n, n // 2, n).spread()[0] == View()
    assert crop_box(View(short_px=256).placed(0, 1, 2, 3), 240, 427)[6:] == (16, 455 - 224)

@pytest.mark.parametrize("fields", [dict(moment=(5, 5)), dict(moment=(0, 0)), dict(place=(0,)), dict(place=(.5, 1)), dict(moment=(0, 2), number=1), dict(place=(0, 2), resize="square")], ids=str)
def test_places_that_are_none_are_refused(fields):
    with pytest.raises(InputError, match="View: (moment|place)"): View(**fields)

# ---- the same numbers

@pytest.fixture(scope="module")
def checkpoint(run_dir): return max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))

@pytest.fixture(scope="module")
def encoders(checkpoint): return list(student_encoders(checkpoint).values())

@pytest.fixture(scope="module")
def train(toy): return ucf101(toy/"ucf101", split=1, subset="train")

@pytest.fixture(scope="module")
def found(encoders, train): return {views: encode_all(encoders, train, clips=views[0], crops=views[1]) for views in ((1, 1), (2, 3))}

@pytest.mark.parametrize("batch_size,num_workers", [(1, 0), (5, 1), (16, 2)])
@pytest.mark.parametrize("views", [(1, 1), (2, 3)])
def test_the_same_bits_however_clips_are_batched(encoders, train, found, batch_size, num_workers, views):
    for name, f in encode_all(encoders, train, batch_size, num_workers, *views).items(): assert torch.equal(f.x, found[views][name].x)

def test_passes_of_a_gpu_are_of_one_size(encoders):
    frames = torch.arange(7, dtype=torch.uint8)[:, None, None, None, None].expand(7, 2, 4, 4, 3)
    parts = list(in_passes(frames, 4))
    assert [len(x) for x, _ in parts] == [4, 4] and torch.equal(torch.cat([x[:n] for x, n in parts]), frames)

def test_views_are_averaged_and_kept_apart(encoders, train, found, tmp_path):
    assert not torch.equal(found[1, 1]["student"].x, found[2, 3]["student"].x)
    for views in ((1, 1), (2, 3)):
        for name, f in features(encoders, train, tmp_path, clips=views[0], crops=views[1]).items(): assert torch.equal(f.x, found[views][name].x)
    assert len({store_mark(e, *views) for e in encoders for views in ((1, 1), (2, 3), (3, 2))}) == 6

# ---- nothing twice

def blind(encoder): return dataclasses.replace(encoder, encode=None)

def test_another_list_of_the_same_videos_opens_none(encoders, toy, train, tmp_path, monkeypatch):
    test = ucf101(toy/"ucf101", split=1, subset="test")
    for d in (train, test): features(encoders, d, tmp_path)
    monkeypatch.setattr(module, "loader", None)
    both = Dataset("ucf101", train.root, "all", [*test.records, *train.records])
    x = features([blind(e) for e in encoders], both, tmp_path)["student"]
    assert len(x.rows) == len(both) and torch.equal(x.x[len(test):], features(encoders, train, tmp_path)["student"].x)

def test_a_video_that_has_changed_is_encoded_again(encoders, train, tmp_path):
    few, store = dataclasses.replace(train, records=train.records[:3]), tmp_path/"store"
    features(encoders, few, store)
    other = tmp_path/"other.avi"; other.write_bytes(train.records[5].path.read_bytes())
    changed = dataclasses.replace(few, records=[few.records[0], dataclasses.replace(few.records[1], file=str(other)), few.records[2]])
    held = stored(store, few.name, store_mark(encoders[0]))
    assert lacking(held, video_marks(few)) == [] and lacking(held, video_marks(changed)) == [1]
    assert not torch.equal(features(encoders, few, store)["student"].x[1], features(encoders, changed, store)["student"].x[1])

def test_unreadable_videos_are_remembered_once_they_are_few(encoders, train, tmp_path, monkeypatch):
    bad = tmp_path/"bad.avi"; bad.write_bytes(b"no video")
    some = dataclasses.replace(train, records=[*train.records[:9], Record("bad", str(bad)), Record("gone", str(tmp_path/"gone.avi"))])
    with pytest.raises(InputError, match="2 of 11 clips of ucf101"): features(encoders, some, tmp_path/"store")
    first = features(encoders, some, tmp_path/"store", max_failed=.2)["student"]
    assert [row for row, _ in first.errors] == [9, 10] and "no such video file" in first.errors[1][1]
    monkeypatch.setattr(module, "loader", None)
    again = features([blind(e) for e in encoders], some, tmp_path/"store", max_failed=.2)["student"]
    assert again.errors == first.errors and torch.equal(again.x, first.x)

def test_a_damaged_part_is_named(encoders, train, tmp_path):
    few = dataclasses.replace(train, records=train.records[:2])
    features(encoders[:1], few, tmp_path)
    part, = tmp_path.iterdir(); part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(InputError, match="delete it to have them computed again"): features(encoders[:1], few, tmp_path)

SLOW = """
import sys, time, dataclasses, torch
from stjepa import features as f
from stjepa.ucf101 import ucf101
checkpoint, root, store = sys.argv[1:]
torch.set_num_threads(1)
e = f.student_encoders(checkpoint)["student"]
def slow(x, was=e.encode): time.sleep(.05); return was(x)
f.fill_store(store, [dataclasses.replace(e, encode=slow)], ucf101(root, split=1, subset="train"), size=3)
"""

def test_killed_it_goes_on_and_ends_the_same(encoders, checkpoint, toy, train, found, tmp_path):
    job = subprocess.Popen([sys.executable, "-c", SLOW, checkpoint, toy/"ucf101", tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 100
    while len(list(tmp_path.glob("*.safetensors"))) < 2 and job.poll() is None and time.time() < deadline: time.sleep(.01)
    job.send_signal(signal.SIGKILL); job.wait()
    student, = [e for e in encoders if e.name == "student"]
    before, seen = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}, []
    left = lacking(stored(tmp_path, "ucf101", store_mark(student)), video_marks(train))
    assert 0 < len(left) < len(train)
    counted = dataclasses.replace(student, encode=lambda x: (seen.append(len(x)), student.encode(x))[1])
    assert torch.equal(features([counted], train, tmp_path)["student"].x, found[1, 1]["student"].x) and sum(seen) == len(left)
    assert all((tmp_path/name).read_bytes() == data for name, data in before.items())
