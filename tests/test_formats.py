"Every container, codec and oddity that a video file may have: the right frame, told by the number burnt into its pixels."
import os, struct
from fractions import Fraction

import av, numpy as np, pytest
from av.stream import Disposition
import stjepa.video as video
from stjepa.video import VideoError, View, frame_indices, load_clip, probe, read_frames

BLOCK, BITS, N, JUMPS = 16, 6, 40, np.array([2, 26, 39]) # a bit is a block of so many pixels; numbers below 2**BITS; frames of a clip; few of them, where key frames every 12 make jumping pay

def coded(n=N, h=64, w=112, first=0):
    "Grey frames with their number as black and white blocks, its complement below them, and a bar that is white on the left only when upright."
    frames = np.full((n, h, w, 3), 110, np.uint8)
    for frame, number in zip(frames, range(first, first + n)):
        bits = np.repeat([235 if number >> b & 1 else 20 for b in range(BITS)], BLOCK)[:, None]
        frame[:BLOCK, :BITS*BLOCK], frame[BLOCK:2*BLOCK, :BITS*BLOCK] = bits, 255 - bits
        frame[2*BLOCK:3*BLOCK, :BITS*BLOCK] = np.repeat([235, 20], BITS*BLOCK//2)[:, None]
    return frames

def numbers(frames):
    "The numbers that `coded` painted; refuses pictures that are turned, mirrored or smeared."
    grid = np.asarray(frames)[:, :3*BLOCK, :BITS*BLOCK].astype(float).mean(-1).reshape(-1, 3, BLOCK, BITS, BLOCK)[:, :, 4:-4, :, 4:-4].mean((2, 4)) > 128
    assert (grid[:, 0] != grid[:, 1]).all() and (grid[:, 2] == (np.arange(BITS) < BITS//2)).all(), "not upright"
    return (grid[:, 0] << np.arange(BITS)).sum(1).tolist()

def encode(path, frames, codec="libx264", pix_fmt="yuv420p", options=None, pts=None, rate=12, setup=None, container=None):
    "Encode with PyAV; `setup` gets the stream before its first frame, `pts` are in frames."
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.thread_count, stream.codec_context.options = 1, dict(options or {})
        if setup: setup(stream)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = i if pts is None else pts[i], Fraction(1, rate)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path

def reference(path, stream=0):
    "What PyAV gives when the stream is decoded from its start to its end."
    with av.open(str(path)) as file: return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=stream)])

def every(path): return read_frames(path, np.arange)

def check(path, shown=range(N), same=True):
    "The right frames at full sampling, at the View's indices, and where jumping to key frames pays; as `reference` has them."
    frames, _, n = every(path)
    assert numbers(frames) == list(shown) and n == len(shown)
    if same: assert np.array_equal(frames, reference(path))
    for indices in frame_indices(View(), n), frame_indices(View().numbered(1), n, "clip"), JUMPS * n // N:
        some, _, m = read_frames(path, lambda n: indices)
        assert m == n and np.array_equal(some, frames[indices])

def x264(**more): return dict(preset="veryfast", g="12", bf="2") | more
X265 = {"preset": "ultrafast", "g": "12", "bf": "3", "x265-params": "log-level=none"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "12", "b": "300k"}
MPEG = dict(g="12", qmax="4", bf="2")

CODECS = { # file name -> encoder, pixel format, its options, frames per second, whether decord may be trusted with it
    "vp9.webm": ("libvpx-vp9", "yuv420p", VPX, 12, True), "vp9.mkv": ("libvpx-vp9", "yuv420p", VPX, 12, True), "vp8.webm": ("libvpx", "yuv420p", VPX, 12, False),
    "av1.webm": ("libsvtav1", "yuv420p", dict(preset="8", g="12", crf="30"), 12, False), "av1.mp4": ("libsvtav1", "yuv420p", dict(preset="8", g="12", crf="30"), 12, False),
    **{f"h264.{suffix}": ("libx264", "yuv420p", x264(), 12, True) for suffix in ("mp4", "mov", "mkv")},
    "h264.avi": ("libx264", "yuv420p", x264(), 12, False), "h264_no_b.avi": ("libx264", "yuv420p", x264(bf="0"), 12, False),
    "h264_open_groups.mp4": ("libx264", "yuv420p", x264(bf="3", **{"x264-params": "open-gop=1"}), 12, False),
    **{f"h265.{suffix}": ("libx265", "yuv420p", X265, 12, False) for suffix in ("mp4", "mov", "mkv")},
    "mpeg4.avi": ("mpeg4", "yuv420p", MPEG | dict(bf="0"), 12, False), "mpeg4_b.avi": ("mpeg4", "yuv420p", MPEG, 12, False),
    **{f"mpeg4.{suffix}": ("mpeg4", "yuv420p", MPEG, 12, False) for suffix in ("mp4", "mov", "mkv")},
    "mpeg1.mpg": ("mpeg1video", "yuv420p", MPEG, 25, False), "mpeg2.mpg": ("mpeg2video", "yuv420p", MPEG, 25, False),
    "clip.gif": ("gif", "rgb8", {}, 10, False), "mjpeg.avi": ("mjpeg", "yuvj420p", {}, 12, False),
    # pixel formats
    "10bit_h265.mp4": ("libx265", "yuv420p10le", X265, 12, False), "10bit_h264.mkv": ("libx264", "yuv420p10le", x264(), 12, False), "10bit_av1.webm": ("libsvtav1", "yuv420p10le", dict(preset="8", g="12", crf="30"), 12, False),
    "444_h264.mp4": ("libx264", "yuv444p", x264(), 12, False), "444_vp9.webm": ("libvpx-vp9", "yuv444p", VPX | dict(profile="1"), 12, False), "422_10bit.mov": ("prores_ks", "yuv422p10le", {}, 12, False),
    "full_range.mp4": ("libx264", "yuvj420p", x264(), 12, False), "rgb.mkv": ("libx264rgb", "rgb24", x264(), 12, False), "grey.mkv": ("ffv1", "gray", {}, 12, False),
    "alpha_vp9.webm": ("libvpx-vp9", "yuva420p", VPX | {"auto-alt-ref": "0"}, 12, None), "alpha_prores.mov": ("prores_ks", "yuva444p10le", {}, 12, False), "alpha_ffv1.mkv": ("ffv1", "bgra", {}, 12, False)}

@pytest.mark.parametrize("name", CODECS)
def test_codecs_containers_and_pixel_formats(tmp_path, monkeypatch, name):
    codec, pix_fmt, options, rate, plain = CODECS[name]
    path = encode(tmp_path/name, coded(), codec, pix_fmt, options, rate=rate)
    check(path)
    frames, _, _ = every(path)
    assert np.abs(frames.astype(int) - coded()).mean() < (20 if name == "clip.gif" else 6) # a gif has 256 colours
    calls, decord = [], video._read_decord
    monkeypatch.setattr(video, "_read_decord", lambda *a: calls.append(a) or decord(*a))
    read_frames(path, lambda n: JUMPS)
    if plain is not None: assert bool(calls) == plain
    every(path); assert len(calls) <= 1 # jumping does not pay where every frame is wanted

# time stamps

@pytest.mark.parametrize("suffix,codec", [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9"), (".mov", "libx265"), (".gif", "gif")])
def test_variable_frame_rate(tmp_path, suffix, codec):
    "Pauses and bursts: every frame counts once."
    steps = np.random.default_rng(0).choice([1, 1, 2, 7], N)
    options = {"libx264": x264(), "libvpx-vp9": VPX, "libx265": X265, "gif": {}}[codec]
    check(encode(tmp_path/f"vfr{suffix}", coded(), codec, "rgb8" if codec == "gif" else "yuv420p", options, pts=np.cumsum(steps).tolist(), rate=25))

@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_delayed_start(tmp_path, suffix):
    "The first frame comes after two seconds, in mp4 by an empty edit."
    check(encode(tmp_path/f"late{suffix}", coded(), options=x264(), pts=range(24, 24 + N)))

def cut(source, path, at):
    "A stream copy from the key frame before frame `at`, as `ffmpeg -ss -c copy` makes it: an edit list hides what comes before `at`."
    with av.open(str(source)) as a, av.open(str(path), "w") as b:
        stream = a.streams.video[0]; out = b.add_stream_from_template(stream)
        packets = [p for p in a.demux(stream) if p.size]; step = packets[0].duration
        start = max(i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= at * step)
        for p in packets[start:]: p.pts -= at * step; p.dts -= at * step; p.stream = out; b.mux(p)
    return path

@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("at", [1, 6, 12, 17, 30])
def test_edit_lists(tmp_path, suffix, at):
    path = cut(encode(tmp_path/f"source{suffix}", coded(), options=x264()), tmp_path/f"cut{suffix}", at)
    check(path, range(at, N))

@pytest.mark.parametrize("shown", [40, 24, 2])
def test_an_edit_list_that_hides_the_end(tmp_path, shown):
    "As a phone trims a clip: all frames are in the file, the edit ends early."
    path = encode(tmp_path/"trimmed.mp4", coded(), options=x264())
    data = bytearray(path.read_bytes()); at = data.index(b"elst") + 12 # its duration, in milliseconds
    assert struct.unpack(">I", data[at:at + 4]) == (3333,)
    data[at:at + 4] = struct.pack(">I", shown * 1000 // 12); path.write_bytes(data)
    check(path, range(len(reference(path)))); assert abs(every(path)[2] - shown) < 2

# orientation, shape and size

TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)} # degrees clockwise -> a, b, c, d of `tkhd`, as phones write them

def turned(path, a, b, c, d):
    "Patch the display matrix in the track header of an mp4."
    data = bytearray(path.read_bytes()); at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[at:at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path

@pytest.mark.parametrize("degrees", TURNS)
def test_phones_that_were_held_sideways(tmp_path, degrees):
    "Stored turned the other way, shown upright."
    stored = np.rot90(coded(), degrees // 90, axes=(1, 2)) # anticlockwise
    path = turned(encode(tmp_path/"phone.mp4", stored, options=x264()), *TURNS[degrees])
    check(path, same=degrees == 0)
    assert probe(path)[2:] == (64, 112)

@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_as_pyav_writes_it(tmp_path, suffix, degrees):
    "`degrees` anticlockwise, in containers that store it their own way."
    stored = np.rot90(coded(), -degrees // 90, axes=(1, 2))
    check(encode(tmp_path/f"turned{suffix}", stored, options=x264(), setup=lambda s: s.set_display_rotation(degrees)), same=False)

@pytest.mark.parametrize("matrix,flip", [((-1, 0, 0, 1), np.s_[:, :, ::-1]), ((1, 0, 0, -1), np.s_[:, ::-1])])
def test_mirrored(tmp_path, matrix, flip):
    check(turned(encode(tmp_path/"selfie.mp4", coded()[flip], options=x264()), *matrix), same=False)

def test_pixels_that_are_not_square_stay_as_stored(tmp_path):
    for suffix in (".mp4", ".mkv", ".avi"):
        path = encode(tmp_path/f"wide{suffix}", coded(), "mpeg4", options=MPEG | dict(bf="0"), setup=lambda s: setattr(s.codec_context, "sample_aspect_ratio", Fraction(2)))
        with av.open(str(path)) as file: assert file.streams.video[0].sample_aspect_ratio == 2
        check(path); assert probe(path)[2:] == (64, 112)

SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (17, 31), (33, 8), (64, 1), (101, 67)]

@pytest.mark.parametrize("codec,suffix,pix_fmt", [("libvpx-vp9", ".webm", "yuv420p"), ("mpeg4", ".avi", "yuv420p"), ("libx264", ".mp4", "yuv444p"), ("gif", ".gif", "rgb8")])
def test_odd_and_tiny_sizes(tmp_path, codec, suffix, pix_fmt):
    levels, view = np.arange(8) * 36, View(num_frames=8, size_px=32)
    for h, w in SIZES:
        frames = np.broadcast_to(levels[:, None, None, None], (8, h, w, 3)).astype(np.uint8)
        path = encode(tmp_path/f"{h}x{w}{suffix}", frames, codec, pix_fmt)
        if max(h, w) > 32 * min(h, w):
            with pytest.raises(VideoError, match=f"{h}x{w}{suffix}: frames of {w}x{h}"): every(path)
            continue
        got, _, n = every(path)
        assert n == 8 and got.shape == (8, h, w, 3) and np.array_equal(got, reference(path))
        assert np.abs(got.astype(int) - frames).max() < (90 if codec == "gif" else 40) and (np.diff(got.mean((1, 2, 3))) > 15).all()
        assert (np.diff(load_clip(path, view).frames.float().mean((1, 2, 3))) > 15).all()

@pytest.mark.parametrize("n", [1, 2, 5, 15, 16, 17])
@pytest.mark.parametrize("suffix,codec", [(".webm", "libvpx-vp9"), (".mp4", "libx264"), (".avi", "mpeg4")])
def test_fewer_frames_than_asked_repeat(tmp_path, suffix, codec, n):
    path = encode(tmp_path/f"short{suffix}", coded(n), codec, options={"libx264": x264(), "libvpx-vp9": VPX, "mpeg4": MPEG}[codec])
    frames, indices, m = read_frames(path, lambda n: frame_indices(View(), n))
    assert m == n and numbers(frames) == indices.tolist() == [(2*i + 1)*n//32 for i in range(16)]
    assert np.array_equal(load_clip(path, View(size_px=64)).indices, indices)

def test_a_size_that_changes_on_the_way(tmp_path):
    "A stream that switches to half the size, as conferences record it: all frames have the first one's size."
    parts = [encode(tmp_path/f"{i}.webm", frames, "libvpx", options=VPX) for i, frames in enumerate((coded(20), coded(20, first=20).repeat(2, 1).repeat(2, 2)))]
    with av.open(str(tmp_path/"both.webm"), "w") as out:
        for i, part in enumerate(parts):
            with av.open(str(part)) as file:
                if not i: stream = out.add_stream_from_template(file.streams.video[0])
                for p in file.demux(video=0):
                    if p.size: p.pts = p.dts = p.pts + i * 20_000 // 12; p.stream = stream; out.mux(p)
    check(tmp_path/"both.webm", same=False)
    assert every(tmp_path/"both.webm")[0].shape == (40, 64, 112, 3)

# streams

def with_streams(path, *streams, dispositions=(), sound=False):
    "A file of several H.264 streams, one after the other."
    with av.open(str(path), "w") as file:
        out = [file.add_stream("libx264", rate=12, options=x264()) for _ in streams]
        audio = file.add_stream("aac", rate=16000, layout="mono") if sound else None
        for stream, frames, disposition in zip(out, streams, [*dispositions, *[None] * len(streams)]):
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            if disposition is not None: stream.disposition = disposition
        for stream, frames in zip(out, streams):
            for frame in frames: file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
        if sound:
            for i in range(70):
                frame = av.AudioFrame.from_ndarray(np.full((1, 1024), .1, np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000); file.mux(audio.encode(frame))
            file.mux(audio.encode())
    return path

@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_sound_beside_the_picture(tmp_path, suffix): check(with_streams(tmp_path/f"sound{suffix}", coded(), sound=True))

def test_several_video_streams(tmp_path):
    "The one flagged default, else the first, whatever their sizes."
    small, large = coded(20), np.pad(coded(20, first=20), ((0, 0), (0, 64), (0, 64), (0, 0)))
    none, default = Disposition(0), Disposition.default
    for name, dispositions, shown in [("first.mkv", (none, none), range(20)), ("second.mkv", (none, default), range(20, 40)), ("both.mp4", (default, default), range(20))]:
        check(with_streams(tmp_path/name, small, large, dispositions=dispositions), shown, same=False)

def audio(path, cover=False):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libmp3lame" if path.suffix == ".mp3" else "aac", rate=16000, layout="mono")
        if cover:
            picture = file.add_stream("mjpeg"); picture.height, picture.width, picture.pix_fmt, picture.disposition = 64, 112, "yuvj420p", Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(coded(1)[0], format="rgb24"); frame.pts = 0; still = picture.encode(frame) + picture.encode()
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono"); sound.sample_rate, sound.pts = 16000, 0
        file.mux(stream.encode(sound)); file.mux(stream.encode())
        if cover: file.mux(still)
    return path

@pytest.mark.parametrize("name,cover", [("sound.m4a", False), ("sound.mp4", False), ("sound.mka", False), ("song.mp3", True), ("song.mp4", True)])
def test_sound_and_cover_art_are_no_video(tmp_path, name, cover):
    audio(tmp_path/name, cover)
    with av.open(str(tmp_path/name)) as file: assert bool(file.streams.video) == cover
    for read in every, probe, lambda p: load_clip(p, View()):
        with pytest.raises(VideoError, match=f"{name}: no video stream"): read(tmp_path/name)

def rewritten(source, path, change):
    "A copy of a file whose packets went through `change(position, bytes)`; `None` drops one."
    with av.open(str(source)) as a, av.open(str(path), "w") as b:
        stream = a.streams.video[0]; out = b.add_stream_from_template(stream)
        for i, p in enumerate(p for p in a.demux(stream) if p.size):
            if (data := change(i, bytearray(bytes(p)))) is None: continue
            q = av.Packet(bytes(data)); q.pts, q.dts, q.time_base, q.duration, q.is_keyframe, q.stream = p.pts, p.dts, p.time_base, p.duration, p.is_keyframe, out
            b.mux(q)
    return path

def test_packets_that_show_nothing(tmp_path):
    "VP8's reference frames may be hidden: their show bit is off. The packets are then more than the frames."
    hidden = (5, 11, 23, 35)
    def hide(i, data): data[0] &= 0xef if i in hidden else 0xff; return data
    path = rewritten(encode(tmp_path/"all.webm", coded(), "libvpx", options=VPX | dict(g="6")), tmp_path/"hidden.webm", hide)
    check(path, [i for i in range(N) if i not in hidden])

# broken files

@pytest.mark.parametrize("name,codec,options", [("a.webm", "libvpx-vp9", VPX), ("a.mkv", "libx264", x264()), ("a.avi", "mpeg4", MPEG), ("a.mp4", "libx264", x264()), ("fast.mp4", "libx264", x264())])
@pytest.mark.parametrize("share", [.3, .6, .8])
def test_truncated_files_are_refused_with_both_lengths(tmp_path, name, codec, options, share):
    noise = np.random.default_rng(0).integers(0, 255, (N, 64, 112, 3), dtype=np.uint8)
    path = encode(tmp_path/name, noise, codec, options=options, container=dict(movflags="faststart") if name == "fast.mp4" else None)
    data = path.read_bytes(); path.write_bytes(data[:int(len(data) * share)])
    reason = "not a readable video" if name == "a.mp4" else r"truncated, the (header promises \d.* and the f(ile has|rames end at) \d|last of its \d+ packets is torn)"
    for read in every, probe, lambda p: load_clip(p, View()):
        with pytest.raises(VideoError, match=f"{name}: {reason}"): read(path)

def test_what_promises_nothing_counts_what_decodes(tmp_path):
    "A live recording has no lengths; a program stream and a gif never have."
    for name, codec, options in ("a.mpg", "mpeg2video", MPEG | dict(bf="0")), ("a.gif", "gif", {}):
        path = encode(tmp_path/name, coded(), codec, "rgb8" if codec == "gif" else "yuv420p", options, rate=25)
        data = path.read_bytes(); path.write_bytes(data[:int(len(data) * .5)])
        frames, _, n = every(path)
        assert 10 < n < 36 and numbers(frames[:-1]) == list(range(n - 1)) and np.array_equal(frames, reference(path))
    live = encode(tmp_path/"live.webm", coded(), "libvpx-vp9", options=VPX, container=dict(live="1"))
    check(live); live.write_bytes(live.read_bytes()[:-2000]); frames, _, n = every(live)
    assert n < N and numbers(frames) == list(range(n))

def test_damage_inside(tmp_path):
    "A broken packet is left out as players do; a tenth of the frames lost is too many."
    source = encode(tmp_path/"whole.webm", coded(), "libvpx-vp9", options=VPX | dict(g="4"))
    broken = lambda which: lambda i, data: data[:2] + bytes(len(data) - 2) if i in which else data
    frames, _, n = every(rewritten(source, tmp_path/"one.webm", broken([7])))
    assert numbers(frames) == [i for i in range(N) if i != 7] and n == 39
    for read in every, probe:
        with pytest.raises(VideoError, match=r"many.webm: damaged, \d+ of \d+ frames can be decoded"): read(rewritten(source, tmp_path/"many.webm", broken((9, 10, 11, 13, 14, 15))))
        with pytest.raises(VideoError, match=r"all.webm: damaged, \d+ of \d+ frames can be decoded"): read(rewritten(source, tmp_path/"all.webm", broken([i for i in range(N) if i % 4])))

def test_damage_at_the_start_where_jumping_would_pay(tmp_path):
    source = encode(tmp_path/"whole.mkv", coded(), options=x264())
    path = rewritten(source, tmp_path/"start.mkv", lambda i, data: data[:4] + bytes(len(data) - 4) if i == 0 else data)
    for pick in np.arange, lambda n: JUMPS * n // N:
        with pytest.raises(VideoError, match="start.mkv: damaged, 28 of 40 frames can be decoded"): read_frames(path, pick)

def test_what_is_no_video_file(tmp_path):
    encode(tmp_path/"whole.mp4", coded(5), options=x264())
    (tmp_path/"page.mp4").write_text("<!DOCTYPE html><html>Sign in</html>"); (tmp_path/"empty.mp4").touch(); (tmp_path/"folder.mp4").mkdir(); os.mkfifo(tmp_path/"pipe.mp4")
    (tmp_path/"zeros.mp4").write_bytes(bytes(9999)); (tmp_path/"link.mp4").symlink_to("nowhere"); (tmp_path/"list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    for name, reason in dict(page="not a readable video", empty="empty file", folder="a folder, not a video file", pipe="a pipe or device, not a video file", zeros="not a readable video",
                             link="no such video file", gone="no such video file", list="not a readable video").items():
        for read in every, probe, lambda p: load_clip(p, View()):
            with pytest.raises(VideoError, match=f"{name}.mp4: {reason}"): read(tmp_path/f"{name}.mp4")

@pytest.mark.parametrize("name", ["-dash.mp4", "a b'c\"&?=+.mp4", "été-视频.mp4", "100%d.mp4", "a:b.mp4", "concat:x.mp4", "http:x.mp4"])
def test_names_that_mean_something_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.rename(encode(tmp_path/"plain.mp4", coded(5), options=x264()), name)
    assert every(name)[2] == every(tmp_path/name)[2] == 5

def test_tags_in_another_alphabet(tmp_path):
    path = encode(tmp_path/"tag.avi", coded(5), "mpeg4", options=MPEG | dict(bf="0"))
    data = path.read_bytes(); assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"L\xe9vf"))
    assert numbers(every(path)[0]) == list(range(5))

def test_decoders_print_nothing(tmp_path, capfd):
    source = encode(tmp_path/"a.mp4", coded(), options=x264(), container=dict(movflags="faststart"))
    webm = encode(tmp_path/"b.webm", coded(), "libvpx-vp9", options=VPX)
    (tmp_path/"c.mp4").write_bytes(source.read_bytes()[:-500]); rewritten(webm, tmp_path/"d.webm", lambda i, data: bytes(len(data)) if i == 7 else data)
    (tmp_path/"e.mp4").write_text("<html>"); capfd.readouterr()
    for path in sorted(tmp_path.iterdir()):
        for pick in np.arange, lambda n: JUMPS * n // N:
            try: read_frames(path, pick)
            except VideoError: pass
    assert capfd.readouterr() == ("", "")
