"Frames and pixels: the teacher's own resize, the right frames from every codec, bad files, workers."
import multiprocessing, os, pickle, subprocess, sys, threading, time
from pathlib import Path

import av, numpy as np, pytest, torch
from stjepa.core import InputError
from stjepa.records import Record
import stjepa.video as video
from stjepa.video import ClipDataset, VideoError, View, crop_box, frame_indices, load_clip, load_views, loader, probe, read_frames, resize_crop, to_pixels, write_video

VIEW = View(num_frames=16, size_px=64)
FORMATS = [("clip.webm", 171), ("clip.avi", 170), ("clip.mp4", 170)] # suffix says the codec; VP9 takes SSv2's odd widths

def numbered(n=40, h=96, w=170):
    "Frames that carry their number in their left half as a brightness, 6 levels apart."
    x = np.arange(w)
    return np.stack([np.broadcast_to(np.where(x[None, :, None] < w // 2, 5 + 6*i, 40 + (x[None, :, None] * 3 + 5*i) % 160), (h, w, 3)) for i in range(n)]).astype(np.uint8)

def number(frames):
    "The numbers that `numbered` painted."
    return np.round((np.asarray(frames)[:, 8:-8, 8:24].astype(float).mean((1, 2, 3)) - 5) / 6).astype(int).tolist()

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    return {name: write_video(root/name, numbered(w=w)) for name, w in FORMATS}

@pytest.mark.parametrize("height,width", [(240, 427), (427, 240), (300, 300), (224, 224), (224, 361), (90, 131), (131, 90),
                                          (1080, 1920), (1280, 720), (1, 1), (1, 3), (2, 1), (7, 5), (16, 16), (33, 97), (1, 32), (448, 448), (223, 225)])
def test_pixels_of_the_hugging_face_processor(height, width):
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
    view, frames = View(num_frames=2), np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    reference = VideoMAEImageProcessorPil(do_rescale=False, do_normalize=False)(list(frames), input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    ours = resize_crop(torch.from_numpy(frames), view)
    assert np.abs(ours.permute(0, 3, 1, 2).numpy().astype(int) - reference.astype(int)).max() <= 1
    reference = VideoMAEImageProcessorPil(image_mean=list(view.mean), image_std=list(view.std))(list(frames), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert (to_pixels(ours[None], view) - reference).abs().max() <= 1.01 / 255 / min(view.std)

@pytest.mark.parametrize("name,width", FORMATS)
def test_right_frames_from_either_decoder(videos, name, width):
    pick = lambda n: np.array([0, 0, 1, 7, 8, 21, n - 2, n - 1])
    container, stream = video._open(videos[name])
    with container: b, _, m = video._read_pyav(videos[name], stream, video._packets(videos[name], container, stream), pick)
    a, indices, n = video._read_decord(videos[name], pick); b = np.stack(list(b))
    assert n == m == 40 and a.shape == (8, 96, width, 3)
    assert number(a) == indices.tolist() == [0, 0, 1, 7, 8, 21, 38, 39]
    assert (a == b).all()
    assert probe(videos[name]) == (40, 12, 96, width)

@pytest.mark.parametrize("name,width", FORMATS)
def test_clip_holds_the_frames_it_says(videos, name, width):
    view = View(num_frames=16, size_px=96) # no resize: the codes stay where they are painted
    clip = load_clip(videos[name], view)
    left = (width - 96) // 2
    frames, _, _ = read_frames(videos[name], lambda n: clip.indices)
    assert number(frames) == clip.indices.tolist() == frame_indices(view, 40).tolist()
    assert (clip.frames.numpy() == frames[:, :, left:left + 96]).all()

@pytest.mark.parametrize("f", [1, 2, 3, 7, 8, 16, 32])
def test_sampling_is_the_rule_and_covers_the_clip(f):
    for n in range(1, 200):
        indices = frame_indices(View(num_frames=f), n)
        assert indices.tolist() == [(2*i + 1)*n // (2*f) for i in range(f)]
        assert 0 <= indices[0] <= indices[-1] < n and (np.diff(indices) >= 0).all()
        if n % f == 0: assert (np.diff(indices) == n // f).all()

def test_short_clips_repeat_frames(tmp_path):
    clip = load_clip(write_video(tmp_path/"short.webm", numbered(5)), VIEW)
    assert clip.num_frames == 5 and clip.frames.shape == (16, 64, 64, 3)
    assert clip.indices.tolist() == sorted(clip.indices) and set(clip.indices.tolist()) == set(range(5))

def test_without_decord_the_clip_is_the_same(videos, tmp_path, monkeypatch):
    view, used, decord = View(num_frames=2, size_px=64), [], video._read_decord
    monkeypatch.setattr(video, "_read_decord", lambda *a: used.append(decord(*a)) or used[-1])
    many_keys = write_video(tmp_path/"keys.mp4", numbered(), options={"g": "5", "bf": "0"}) # jumping pays here
    clips = {path: load_clip(path, view) for path in [*videos.values(), many_keys]}
    assert (n := len(used)) and all(u[2] == 40 for u in used)
    monkeypatch.setitem(sys.modules, "decord", None)
    for path, clip in clips.items(): assert (load_clip(path, view).frames == clip.frames).all()
    assert used[n:] == [None] * n

def _bad(root, videos):
    data = videos["clip.mp4"].read_bytes()
    (root/"truncated.mp4").write_bytes(data[:len(data)//2]) # its index, at the end, is gone
    (root/"page.mp4").write_text("<!DOCTYPE html><html>Sign in</html>")
    (root/"empty.webm").touch()
    with av.open(str(root/"sound.mp4"), "w") as c:
        stream = c.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono"); frame.sample_rate = 16000
        c.mux(stream.encode(frame)); c.mux(stream.encode())
    return {"truncated.mp4": "not a readable video", "page.mp4": "not a readable video", "empty.webm": "empty file", "sound.mp4": "no video stream", "gone.webm": "no such video file"}

def test_bad_files_are_refused_with_the_reason(videos, tmp_path):
    for name, reason in _bad(tmp_path, videos).items():
        with pytest.raises(VideoError, match=reason) as e: load_clip(tmp_path/name, VIEW)
        assert str(tmp_path/name) in str(e.value)
        with pytest.raises(InputError, match=reason): probe(tmp_path/name)

def test_bad_files_print_nothing(videos, tmp_path):
    _bad(tmp_path, videos)
    code = ("import sys; from pathlib import Path; from stjepa.records import Record; from stjepa.video import *\n"
            "clips = ClipDataset([Record(p.name, p) for p in sorted(Path(sys.argv[1]).iterdir())], View())\n"
            "assert all('error' in clips[i][0] for i in range(len(clips)))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

@pytest.mark.parametrize("num_workers,context", [(0, None), (2, None), (1, "spawn")])
def test_workers_give_the_same_batches_and_keep_errors_apart(videos, tmp_path, num_workers, context):
    _bad(tmp_path, videos)
    paths = [videos["clip.webm"], tmp_path/"page.mp4", videos["clip.avi"], videos["clip.mp4"], tmp_path/"gone.webm"]
    records = [Record(p.name, p) for p in paths]
    batches = list(loader(records, VIEW, batch_size=2, num_workers=num_workers, multiprocessing_context=context))
    assert [b["rows"].tolist() for b in batches] == [[0], [2, 3], []]
    assert [[row for row, _ in b["errors"]] for b in batches] == [[1], [], [4]]
    assert batches[2]["frames"] is None and "no such video file" in batches[2]["errors"][0][1]
    for b in batches[:2]:
        for row, frames, indices, n in zip(b["rows"], b["frames"], b["indices"], b["num_frames"]):
            clip = load_clip(paths[row], VIEW)
            assert (frames == clip.frames).all() and indices.tolist() == clip.indices.tolist() and n == 40

def test_dataset_pickles(videos):
    clips = ClipDataset([Record(n, p) for n, p in videos.items()], VIEW, rows=[2, 0])
    again = pickle.loads(pickle.dumps(clips))
    assert len(again) == 2 and again[0][0]["row"] == 2 and (again[0][0]["frames"] == clips[0][0]["frames"]).all()

def test_view_is_compared_by_every_field():
    hashes = {View().hash, View(num_frames=8).hash, View(size_px=112).hash, View(mean=(.5, .5, .5)).hash, View(std=(.5, .5, .5)).hash,
              View().numbered(1).hash, View().numbered(2).hash, View(crop_scale=(.4, 1)).hash, View(crop_ratio=(1, 1)).hash}
    assert len(hashes) == 9 and View().numbered(3).numbered(0) == View()
    import json
    assert View.from_dict(json.loads(json.dumps(View().to_dict()))) == View()
    assert View.from_dict(json.loads(json.dumps(View().numbered(4).to_dict()))) == View().numbered(4)
    assert pickle.loads(pickle.dumps(View())).hash == View().hash
    for bad in (dict(sampling="random"), dict(num_frames=0), dict(resize="squash"), dict(number=-1), dict(number=1.5), dict(crop_scale=(0, 1)), dict(crop_scale=(.5, 1.1)),
                dict(crop_scale=(.6, .5)), dict(crop_ratio=(-1, 1)), dict(crop_ratio=(2, 1)), dict(crop_ratio=(1, 2, 3)), dict(crop_scale=())):
        with pytest.raises(InputError): View(**bad)

def test_random_views_draw_alike_everywhere():
    "A cache of today is read by the package of tomorrow: these values may never change."
    view = View(num_frames=8).numbered(2)
    assert frame_indices(view, 100, "clip é", 7).tolist() == [11, 21, 33, 38, 51, 71, 75, 87]
    assert crop_box(view, 240, 427, "clip é", 7) == (22, 113, 218, 174, 224, 224, 0, 0)

def test_random_views_depend_on_clip_number_and_seed_alone():
    for what in (lambda *a: frame_indices(View().numbered(a[0]), 480, *a[1:]).tolist(), lambda *a: crop_box(View().numbered(a[0]), 240, 427, *a[1:])):
        draws = [what(*a) for a in ((1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1))]
        assert len(set(map(str, draws))) == 4 and what(1, "a", 0) == draws[0]
        assert what(0, "a", 0) == what(0, "b", 1) # view 0 is nobody's chance

@pytest.mark.parametrize("n", [1, 5, 16, 17, 48, 301])
def test_jitter_stays_in_its_part(n):
    taken = np.stack([frame_indices(View().numbered(k), n, "a") for k in range(1, 200)])
    i = np.arange(16)
    assert (taken >= i * n // 16).all() and (taken <= ((i + 1) * n - 1) // 16).all() and (np.diff(taken, axis=1) >= 0).all()
    if n >= 48: assert all(len(set(column)) == max(column) - min(column) + 1 >= n // 16 for column in taken.T) # every frame has its chance

@pytest.mark.parametrize("h,w", [(240, 427), (427, 240), (224, 224), (3, 5), (1, 1), (1, 32)])
def test_random_boxes_lie_in_the_frame_and_spread(h, w):
    view = View()
    boxes = [crop_box(view.numbered(k), h, w, "a") for k in range(1, 500)]
    for b in boxes: assert 0 <= b.y <= b.y + b.h <= h and 0 <= b.x <= b.x + b.w <= w and b.h >= 1 <= b.w and b[4:] == (224, 224, 0, 0)
    if min(h, w) < 200: return
    ratio = np.array([b.w / b.h for b in boxes]); share = np.array([b.h / min(h, w / r) for b, r in zip(boxes, ratio)])**2
    assert .74 < ratio.min() < .8 and 1.28 < ratio.max() < 1.37 and .49 < share.min() < .53 and .97 < share.max() < 1.02
    for low, high, size in (min(b.x for b in boxes), max(b.x + b.w for b in boxes), w), (min(b.y for b in boxes), max(b.y + b.h for b in boxes), h): assert low < .05 * size and high > .95 * size

def test_random_view_is_the_resized_box(videos):
    from PIL import Image
    view = View(num_frames=4, size_px=64).numbered(3)
    clip, box = load_clip(videos["clip.webm"], view, "x", 5), crop_box(view, 96, 171, "x", 5)
    frames, _, _ = read_frames(videos["clip.webm"], lambda n: clip.indices)
    assert clip.indices.tolist() == frame_indices(view, 40, "x", 5).tolist()
    for frame, ours in zip(frames, clip.frames.numpy()):
        naive = Image.fromarray(frame[box.y:box.y + box.h, box.x:box.x + box.w]).resize((64, 64), Image.BILINEAR)
        assert np.abs(np.asarray(naive).astype(int) - ours).max() <= 1

def test_views_of_one_decode(videos, monkeypatch):
    opened, read = [], video._read_best
    monkeypatch.setattr(video, "_read_best", lambda *a: opened.append(a) or read(*a))
    views = [VIEW.numbered(k) for k in range(4)] + [View(num_frames=5, size_px=32)]
    clips = load_views(videos["clip.avi"], views, "a", 3)
    assert len(opened) == 1
    for clip, view in zip(clips, views):
        alone = load_clip(videos["clip.avi"], view, "a", 3)
        assert (clip.frames == alone.frames).all() and (clip.indices == alone.indices).all() and clip.num_frames == 40

@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_views_of_a_record_side_by_side(videos, tmp_path, num_workers):
    paths = [videos["clip.webm"], tmp_path/"gone.webm", videos["clip.mp4"]]
    records = [Record(p.name, p) for p in paths]
    first, second = loader(records, VIEW, batch_size=2, rows=[2, 1, 0], views=3, seed=4, num_workers=num_workers)
    assert first["rows"].tolist() == [6, 7, 8] and [row for row, _ in first["errors"]] == [3, 4, 5] and second["rows"].tolist() == [0, 1, 2]
    for batch in first, second:
        for row, frames, indices in zip(batch["rows"].tolist(), batch["frames"], batch["indices"]):
            clip = load_clip(paths[row // 3], VIEW.numbered(row % 3), records[row // 3].id, 4)
            assert (frames == clip.frames).all() and indices.tolist() == clip.indices.tolist()

# time limits, leaks

def hang(path, *_):
    if path.name == "hangs.webm": time.sleep(3600)
    return READ(path, *_)
READ = video._read_best

@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_decoder_that_hangs_is_a_failure_of_its_clip(videos, monkeypatch, num_workers):
    monkeypatch.setattr(video, "_read_best", hang) # workers are forked and inherit it
    records = [Record("a", videos["clip.webm"]), Record("hangs", Path("hangs.webm")), Record("b", videos["clip.mp4"]), Record("c", videos["clip.avi"])]
    start = time.monotonic()
    batches = list(loader(records, VIEW, batch_size=2, timeout=1, num_workers=num_workers))
    assert [b["rows"].tolist() for b in batches] == [[0], [2, 3]] and batches[0]["errors"] == [(1, "hangs.webm: decoding took longer than 1 s")]
    assert time.monotonic() - start < 60
    with pytest.raises(VideoError, match="hangs.webm: decoding took longer than 0.1 s"): probe(Path("hangs.webm"), timeout=.1)

def test_a_process_ends_though_a_decoder_still_hangs(videos):
    code = ("import sys, time, stjepa.video as v\nfrom pathlib import Path\n"
            "v._read_best = lambda *a: time.sleep(3600)\n"
            "try: v.load_clip(sys.argv[1], v.View(), timeout=.2)\nexcept v.VideoError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code, "x.webm"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x.webm: decoding took longer than 0.2 s\n", "")

def test_errors_of_a_decode_keep_their_kind(videos, monkeypatch):
    monkeypatch.setattr(video, "_read_best", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): load_clip(videos["clip.mp4"], VIEW)

def _open_things(): return len(os.listdir("/proc/self/fd")), threading.active_count(), int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def test_five_hundred_opens_leave_nothing_behind(videos, tmp_path):
    _bad(tmp_path, videos)
    few_keys, many_keys = videos["clip.webm"], write_video(tmp_path/"keys.mp4", numbered(), options={"g": "5", "bf": "0"})
    bad = [tmp_path/n for n in ("truncated.mp4", "page.mp4", "sound.mp4", "empty.webm")]
    view = View(num_frames=2, size_px=32)
    def some(times):
        for i in range(times):
            load_clip(few_keys, view); load_clip(many_keys, view) # PyAV, decord
            with pytest.raises(VideoError): load_clip(bad[i % len(bad)], view)
    some(30); fds, threads, rss = _open_things()
    some(170); fds2, threads2, rss2 = _open_things()
    assert (fds2, threads2) == (fds, threads) and rss2 - rss < 20 * 2**20

def _processes():
    "State and parent of every process of this machine."
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError: continue # it has just ended
        yield state, int(parent)

def test_workers_are_gone_afterwards(videos):
    records = [Record("a", videos["clip.webm"])] * 6
    data = loader(records, VIEW, batch_size=1, num_workers=2)
    for _ in range(3): list(data)
    assert not multiprocessing.active_children()
    assert "Z" not in [state for state, parent in _processes() if parent == os.getpid()]

def test_kept_batches_keep_their_pixels(videos):
    "More batches than the ring has slots, all kept; then each dropped at once, twice over."
    paths = [videos[n] for n in ("clip.webm", "clip.avi", "clip.mp4")] * 10; want = [load_clip(p, VIEW).frames for p in paths[:3]]
    data = loader([Record(str(i), p) for i, p in enumerate(paths)], VIEW, batch_size=1, num_workers=2)
    kept = list(data)
    for i, batch in enumerate(kept): assert torch.equal(batch["frames"][0], want[i % 3])
    del kept, batch
    for _ in range(2):
        for i, batch in enumerate(data): assert torch.equal(batch["frames"][0], want[i % 3])
    del batch
    assert sorted(data.dataset.ring.free) == list(range(8))

def test_killed_loading_leaves_no_process_and_no_shared_memory(videos, tmp_path):
    code = ("import sys, time\nfrom stjepa.records import Record\nfrom stjepa.video import View, loader\n"
            "data = iter(loader([Record('a', sys.argv[1])] * 1000, View(num_frames=4, size_px=32), batch_size=2, num_workers=2)); batch = next(data)\n"
            "import multiprocessing; print(*[p.pid for p in multiprocessing.active_children()], flush=True); time.sleep(100)")
    there = lambda: {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith("torch_")} if Path("/dev/shm").is_dir() else set()
    before = there()
    p = subprocess.Popen([sys.executable, "-c", code, str(videos["clip.webm"])], stdout=subprocess.PIPE, text=True)
    workers = p.stdout.readline().split(); p.kill(); p.wait()
    alive = lambda: [w for w in workers if Path(f"/proc/{w}/stat").exists() and Path(f"/proc/{w}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]
    end = time.time() + 30
    while alive() and time.time() < end: time.sleep(.1)
    assert len(workers) == 2 and not alive() and not {n for n in there() - before if f"torch_{p.pid}_" in n or any(f"torch_{w}_" in n for w in workers)}

# writing

SHAPES = [(".webm", 1, 1), (".webm", 3, 5), (".webm", 96, 171), (".avi", 16, 16), (".avi", 33, 17), (".mp4", 2, 2), (".mp4", 96, 170)]

def _write_all(root):
    rng = np.random.default_rng(0); root.mkdir()
    return [write_video(root/f"{h}x{w}{suffix}", rng.integers(0, 256, (12, h, w, 3), dtype=np.uint8)) for suffix, h, w in SHAPES]

def test_same_frames_same_bytes(tmp_path):
    "In one process and in another, also of tiny frames, which decoders and encoders pad with whatever memory holds."
    first, second = _write_all(tmp_path/"a"), _write_all(tmp_path/"b")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; from test_video import _write_all; _write_all(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"c")], check=True)
    for a, b, (_, h, w) in zip(first, second, SHAPES):
        assert a.read_bytes() == b.read_bytes() == (tmp_path/"c"/a.name).read_bytes(), a.name
        assert probe(a) == (12, 12, h, w)
