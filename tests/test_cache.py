"The target cache: bytes in are bytes out; damage is noticed; builds restart and run in parallel with the same result."
import dataclasses, json, os, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pytest, torch, zarr

from stjepa.build_cache import BuildConfig, build_cache
from stjepa.cache import Cache, create_cache, mark_path, write_shard
from stjepa.core import InputError
from stjepa.teacher import random_teacher
from stjepa.toy import ACTIONS, SSV2_SHAPES, draw_scene, render
from stjepa.video import View, write_video

META = dict(teacher=dict(name="t", revision="", weights_hash="0"), projection=dict(kind="pca", hash="0"), dataset=dict(name="ssv2", split="train", fingerprint="0"), dtype="float32")
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path):
    "A cache of 10 rows in shards of 4, and what was written into it."
    truth = np.random.default_rng(0).integers(0, 2**16, (10, 12, 6), dtype=np.uint16).view(np.float16) # any bit pattern, NaNs included
    frames = np.random.default_rng(1).integers(0, 256, (10, 4, 8, 8, 3), dtype=np.uint8)
    create_cache(tmp_path/"c", [f"é{i}" for i in range(10)], [None, *range(9)], (3, 2, 2), 6, View(num_frames=4, size_px=8), META, shard_rows=4, store_frames=True)
    for shard in range(3):
        s = slice(4*shard, 4*shard + 4)
        write_shard(tmp_path/"c", shard, dict(targets=truth[s], frames=frames[s], frame_indices=np.arange(40).reshape(10, 4)[s], num_frames=np.arange(10)[s]), {})
    return tmp_path/"c", truth, frames


def row_bytes(cache, row): return cache.targets(row).numpy().tobytes()


def test_round_trip_is_byte_exact(small):
    path, truth, frames = small
    cache, plain = Cache(path), zarr.open_group(path, mode="r")
    for row in range(10):
        assert row_bytes(cache, row) == truth[row].tobytes() == plain["targets"][row].tobytes()
        assert torch.equal(cache.frames(row), torch.from_numpy(frames[row]))
    assert cache.ids == [f"é{i}" for i in range(10)] and cache.labels.tolist() == [-1, *range(9)] and cache.num_frames(7) == 7
    assert cache.targets(0).dtype == torch.float16 and cache.targets(0).shape == (12, 6)
    targets = plain["targets"]
    assert targets.metadata.zarr_format == 3 and targets.chunks == (1, 12, 6) and targets.shards == (4, 12, 6) and np.isnan(targets.fill_value)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_the_same_in_other_processes(small, method):
    path, truth, _ = small
    cache = Cache(path); row_bytes(cache, 0)
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool: assert list(pool.map(row_bytes, [cache]*10, range(10))) == [t.tobytes() for t in truth]


def test_every_flipped_bit_is_noticed(small):
    path, truth, _ = small
    file = path/"targets"/"c"/"1"/"0"/"0"; data = file.read_bytes(); rng = np.random.default_rng(2)
    for at in rng.choice(len(data)*8, 80, replace=False):
        hurt = bytearray(data); hurt[at // 8] ^= 1 << at % 8; file.write_bytes(hurt)
        cache, refused = Cache(path), 0
        for row in range(4, 8):
            try: assert row_bytes(cache, row) == truth[row].tobytes()
            except InputError: refused += 1
        assert refused, f"bit {at} flipped and every row was read"


@pytest.mark.parametrize("damage,message", [
    (lambda c: mark_path(c, 1).unlink(), "unfinished, 1 of 3 shards are missing"),
    (lambda c: (c/"targets/c/1/0/0").unlink(), "missing or empty"),
    (lambda c: os.truncate(c/"targets/c/1/0/0", 0), "missing or empty"),
    (lambda c: os.truncate(c/"targets/c/1/0/0", 40), "damaged"),
    (lambda c: (c/"status/c/1").unlink(), "contradicts the done-marks"),
    (lambda c: (c/"zarr.json").unlink(), "not a target cache"),
    (lambda c: (c/"zarr.json").write_text("{"), "not json"),
    (lambda c: (c/"zarr.json").write_text((c/"zarr.json").read_text().replace('"schema": 1', '"schema": 9')), "schema 9")])
def test_damage_is_refused(small, damage, message):
    damage(small[0])
    with pytest.raises(InputError, match=message): Cache(small[0]).targets(5)


def test_an_unfinished_cache_gives_its_finished_rows(small):
    mark_path(small[0], 1).unlink(); cache = Cache(small[0], partial=True)
    assert cache.ok_rows.tolist() == [0, 1, 2, 3, 8, 9] and cache.missing_shards == [1]
    with pytest.raises(InputError, match="its shard is not finished"): cache.targets(5)


# Builds, on real video files and a small real teacher.

@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "An SSv2 folder of 18 clips, one of them no video; a teacher; a finished build to compare with."
    root = tmp_path_factory.mktemp("build"); data = root/"ssv2"; data.mkdir()
    (data/"labels.json").write_text(json.dumps({a.template.replace("[", "").replace("]", ""): str(i) for i, a in enumerate(ACTIONS)}))
    (data/"train.json").write_text(json.dumps([dict(id=str(i), label="", template=ACTIONS[i % 12].template, placeholders=[]) for i in range(18)]))
    for i in range(18): write_video(data/f"{i}.webm", render(draw_scene(np.random.default_rng(i), i % 12, SSV2_SHAPES), 14, 40, 53))
    (data/"7.webm").write_bytes(b"no video")
    random_teacher(root/"teacher", image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    config = BuildConfig(str(data), str(root/"whole"), teacher=str(root/"teacher"), dim=16, batch_size=3, num_workers=0, shard_rows=4, max_failed=.1)
    torch.set_num_threads(1); build_cache(config)
    return config


def contents(path): return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}
def arguments(config): return [x for f in dataclasses.fields(config) if type(f.default) is not bool for x in (f"--{f.name.replace('_', '-')}", str(getattr(config, f.name)))]


def run(config, *prefix):
    command = ["stjepa_build_cache", *arguments(config)]
    return subprocess.run([*prefix, *command] if prefix else [sys.executable, "-c", "from stjepa.build_cache import main; main()", *command[1:]], env=ENV, capture_output=True, text=True, timeout=120)


def test_what_was_built(job):
    cache = Cache(job.cache_dir)
    assert len(cache.ok_rows) == 17 and list(cache.failures) == [7] and cache.grid == (4, 4, 4) and cache.dim == 16
    assert (Path(job.cache_dir)/"failed.csv").read_text().startswith("file,reason\n7.webm,")
    assert cache.projection.hash == cache.meta["projection"]["hash"] and cache.view == View(num_frames=8, size_px=32)
    assert all(cache.targets(r).isfinite().all() for r in cache.ok_rows)


def test_two_processes_build_what_one_builds(job, tmp_path):
    done = run(dataclasses.replace(job, cache_dir=str(tmp_path/"two")), sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path/"two") == contents(job.cache_dir)


KILLS = { # where -> a patch that kills the process there
    "while the projection is fitted": "b.TokenStats.to_tensors = after(4, b.TokenStats.to_tensors)",
    "before the projection's hash is written": "b.read_meta = after(2, b.read_meta)",
    "when a shard is written but not marked": "c.save_json = after(2, c.save_json)"}

@pytest.mark.parametrize("where", KILLS)
def test_a_killed_build_ends_like_an_undisturbed_one(job, tmp_path, where):
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"killed"))
    code = f"""if 1:
    import os, signal, stjepa.build_cache as b, stjepa.cache as c
    def after(n, f):
        calls = []
        def g(*args):
            calls.append(1)
            if len(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args)
        return g
    {KILLS[where]}
    b.main()"""
    assert subprocess.run([sys.executable, "-c", code, *arguments(config)], env=ENV, capture_output=True).returncode == -9
    with pytest.raises(InputError, match="unfinished"): Cache(config.cache_dir)
    build_cache(config)
    assert contents(config.cache_dir) == contents(job.cache_dir)


def test_a_lost_shard_is_made_again_with_decoding_workers(job, tmp_path):
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), num_workers=2); build_cache(config)
    assert contents(config.cache_dir) == contents(job.cache_dir)
    mark_path(config.cache_dir, 2).unlink(); (tmp_path/"c/targets/c/2/0/0").unlink()
    assert build_cache(config)["clips"] == 4 and contents(config.cache_dir) == contents(job.cache_dir)


def test_mended_videos_are_tried_again(job, tmp_path):
    video = Path(job.data_root)/"7.webm"; config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), max_failed=0.)
    with pytest.raises(InputError, match="1 of 18 clips have failed, --max-failed allows 0%"): build_cache(config)
    try:
        tolerant = dataclasses.replace(config, cache_dir=str(tmp_path/"t"), max_failed=.1)
        assert build_cache(tolerant)["ok"] == 17
        video.write_bytes((Path(job.data_root)/"6.webm").read_bytes())
        assert build_cache(config)["ok"] == 18
        assert build_cache(tolerant)["ok"] == 17
        assert build_cache(dataclasses.replace(tolerant, retry_failed=True))["ok"] == 18
    finally: video.write_bytes(b"no video")


def test_too_many_videos_without_a_file(job, tmp_path):
    data = tmp_path/"ssv2"; data.mkdir()
    for p in Path(job.data_root).iterdir():
        if p.name not in ("1.webm", "2.webm"): (data/p.name).symlink_to(p)
    with pytest.raises(InputError, match="2 of the 18 videos listed for train have no file, e.g. 1, 2"): build_cache(dataclasses.replace(job, data_root=str(data), cache_dir=str(tmp_path/"c")))


@pytest.mark.parametrize("change,message", [
    (dict(dim=8), "dim is 16, asked for 8"), (dict(limit=5), "rows is 18, asked for 5"), (dict(dtype="bfloat16"), "dtype is float32, asked for bfloat16"),
    (dict(projection="orthogonal"), "projection.kind is pca, asked for orthogonal"), (dict(dim=64), "expected 1 to 48"), (dict(data_root="/nowhere"), "/nowhere: no such folder")])
def test_other_settings_are_refused_and_nothing_is_changed(job, change, message):
    before = contents(job.cache_dir)
    with pytest.raises(InputError, match=message): build_cache(dataclasses.replace(job, **change))
    assert contents(job.cache_dir) == before


def test_another_teacher_is_refused(job, tmp_path):
    tiny = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    with pytest.raises(InputError, match="teacher.weights_hash is .*, asked for"): build_cache(dataclasses.replace(job, teacher=str(random_teacher(tmp_path/"t", seed=1, **tiny))))
    with pytest.raises(InputError, match="view.size_px is 32, asked for 40"): build_cache(dataclasses.replace(job, teacher=str(random_teacher(tmp_path/"u", **tiny | dict(image_size=40)))))


def test_a_folder_with_other_things_is_left_alone(job, tmp_path):
    (tmp_path/"thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a cache, and not empty .thesis.tex."): build_cache(dataclasses.replace(job, cache_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_line_says_it_in_one_line(job, tmp_path):
    done = run(dataclasses.replace(job, data_root=str(tmp_path/"none"), cache_dir=str(tmp_path/"c")))
    assert done.returncode == 1 and done.stderr.strip() == f"stjepa_build_cache: error: SSv2 root {tmp_path/'none'}: no such folder"
    assert not (tmp_path/"c").exists()
