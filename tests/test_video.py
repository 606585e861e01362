"Frames and pixels: the teacher's own resize, the right frames from every codec, bad files, workers."
import pickle, subprocess, sys
from pathlib import Path

import av, numpy as np, pytest, torch
from stjepa.core import InputError
from stjepa.records import Record
from stjepa.video import ClipDataset, VideoError, View, _read_decord, _read_pyav, frame_indices, load_clip, loader, probe, read_frames, resize_crop, to_pixels, write_video

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

@pytest.mark.parametrize("height,width", [(240, 427), (427, 240), (300, 300), (224, 224), (224, 361), (90, 131), (131, 90)])
def test_pixels_of_the_hugging_face_processor(height, width):
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
    view, frames = View(num_frames=2), np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    reference = VideoMAEImageProcessorPil(do_rescale=False, do_normalize=False)(list(frames), return_tensors="np")["pixel_values"][0]
    ours = resize_crop(torch.from_numpy(frames), view)
    assert np.abs(ours.permute(0, 3, 1, 2).numpy().astype(int) - reference.astype(int)).max() <= 1
    reference = VideoMAEImageProcessorPil(image_mean=list(view.mean), image_std=list(view.std))(list(frames), return_tensors="pt")["pixel_values"]
    assert (to_pixels(ours[None], view) - reference).abs().max() <= 1.01 / 255 / min(view.std)

@pytest.mark.parametrize("name,width", FORMATS)
def test_right_frames_from_either_decoder(videos, name, width):
    pick = lambda n: np.array([0, 0, 1, 7, 8, 21, n - 2, n - 1])
    (a, indices, n), (b, _, m) = _read_decord(videos[name], pick), _read_pyav(videos[name], pick)
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

def test_edit_list_goes_to_pyav(tmp_path):
    "A stream copy cut between key frames: a player shows the frames from the cut on, decord counts and repeats others."
    source = write_video(tmp_path/"source.mp4", numbered(), options={"crf": "10", "preset": "veryfast", "g": "10", "bf": "2"})
    cut = tmp_path/"cut.mp4"
    with av.open(str(source)) as a, av.open(str(cut), "w") as b:
        stream = a.streams.video[0]; out = b.add_stream_from_template(stream)
        packets = [p for p in a.demux(stream) if p.dts is not None]
        packets = packets[[i for i, p in enumerate(packets) if p.is_keyframe][1]:] # from the second key frame
        start = packets[6].dts
        for p in packets: p.pts -= start; p.dts -= start
        shown = [p.pts >= 0 for p in packets]
        for p in packets: p.stream = out; b.mux(p)
    assert not all(shown) and _read_decord(cut, lambda n: np.arange(n)) is None
    frames, _, n = read_frames(cut, lambda n: np.arange(n))
    assert n == sum(shown) and number(frames) == list(range(40 - n, 40))

def test_without_decord_the_clip_is_the_same(videos, monkeypatch):
    clips = {name: load_clip(path, VIEW) for name, path in videos.items()}
    monkeypatch.setitem(sys.modules, "decord", None)
    for name, path in videos.items(): assert (load_clip(path, VIEW).frames == clips[name].frames).all()

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
            "assert all('error' in clips[i] for i in range(len(clips)))")
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
    assert len(again) == 2 and again[0]["row"] == 2 and (again[0]["frames"] == clips[0]["frames"]).all()

def test_view_is_compared_by_every_field():
    hashes = {View().hash, View(num_frames=8).hash, View(size_px=112).hash, View(mean=(.5, .5, .5)).hash, View(std=(.5, .5, .5)).hash}
    assert len(hashes) == 5
    import json
    assert View.from_dict(json.loads(json.dumps(View().to_dict()))) == View()
    assert pickle.loads(pickle.dumps(View())).hash == View().hash
    for bad in (dict(sampling="random"), dict(num_frames=0), dict(resize="squash"), dict(number=1)):
        with pytest.raises(InputError): View(**bad)

def test_same_frames_same_file_pixels(tmp_path):
    for name, w in FORMATS:
        a, b = (write_video(tmp_path/d/name, numbered(12, w=w)) for d in map(lambda d: (tmp_path/d).mkdir(exist_ok=True) or d, "ab"))
        (x, _, _), (y, _, _) = (read_frames(p, lambda n: np.arange(n)) for p in (a, b))
        assert (x == y).all()
