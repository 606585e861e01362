"The target cache: bytes in are bytes out, for everyone's zarr too; every kind of damage is noticed, and the message says what to do."
import dataclasses, gc, itertools, json, os, shutil, subprocess, sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pytest, torch, zarr
from torch.utils.data import DataLoader, Dataset

from stjepa.build_cache import BuildConfig, build_cache
from stjepa.cache import (Cache, Damaged, clean_partials, create_cache, dequantise, drop_shards, finished_shards, mark_name, quantise, read_meta,
                          restore_arrays, schema, unmark, update_meta, write_shard)
from stjepa.core import InputError
from stjepa.projection import Projection
from stjepa.storage import _MAPS, Storage
from stjepa.teacher import random_teacher
from stjepa.toy import ACTIONS, SSV2_SHAPES, draw_scene, render
from stjepa.video import View, write_video

PROJECTION = Projection(torch.zeros(8), torch.eye(8)[:, :6], torch.full((6,), 1 / 8))
META = dict(teacher=dict(name="t", revision="", weights_hash="0"), projection=dict(kind="pca", hash=PROJECTION.hash), dataset=dict(name="ssv2", split="train", fingerprint="0"), compute_dtype="float32")
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(shape, seed):
    "Every finite float16 there is, at random."
    x = np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16).view(np.float16)
    return np.where(np.isfinite(x), x, np.float16(1))


def make(path, failed=(), **options):
    "A cache of 10 clips in shards of 4 rows, and what was written into it."
    views = options.get("views", 1); rows = 10 * views
    truth, frames = bits((rows, 12, 6), 0), np.random.default_rng(1).integers(0, 256, (rows, 4, 8, 8, 3), dtype=np.uint8)
    create_cache(path, [f"é{i}" for i in range(10)], [None, *range(9)], (3, 2, 2), 6, View(num_frames=4, size_px=8), META, shard_rows=4, store_frames=True, **options)
    Storage(path).write("projection.safetensors", PROJECTION.to_bytes())
    for shard in range(-(-rows // 4)):
        s = range(4*shard, min(4*shard + 4, rows))
        arrays = dict(targets=truth[s], frames=frames[s], frame_indices=np.arange(4*rows).reshape(rows, 4)[s], num_frames=np.arange(rows)[s])
        write_shard(path, shard, arrays, {r: f"{r}.webm: no video" for r in failed if r in s})
    return path, truth, frames


@pytest.fixture
def small(tmp_path): return make(tmp_path/"c")


def row_bytes(cache, row): return cache.targets(row).numpy().tobytes()


# -- the same bytes for everyone

def test_round_trip_is_byte_exact(small):
    path, truth, frames = small
    cache, plain = Cache(path), zarr.open_group(path, mode="r")
    for row in range(10):
        assert row_bytes(cache, row) == truth[row].tobytes() == plain["targets"][row].tobytes()
        assert torch.equal(cache.frames(row), torch.from_numpy(frames[row])) and (plain["frames"][row] == frames[row]).all()
        assert cache.frame_indices(row).tolist() == plain["frame_indices"][row].tolist() == [4*row, 4*row + 1, 4*row + 2, 4*row + 3] and cache.num_frames(row) == row == plain["num_frames"][row]
    assert cache.ids == plain["ids"][:].tolist() == [f"é{i}" for i in range(10)] and cache.labels.tolist() == plain["labels"][:].tolist() == [-1, *range(9)]
    assert cache.targets(0).dtype == torch.float16 and cache.targets(0).shape == (12, 6) and plain["status"][:].tolist() == [1]*10
    targets = plain["targets"]
    assert targets.metadata.zarr_format == 3 and targets.chunks == (1, 12, 6) and targets.shards == (4, 12, 6) and np.isnan(targets.fill_value)
    assert torch.equal(cache.targets_of([9, 0, 9, 4]), torch.from_numpy(truth[[9, 0, 9, 4]])) and cache.targets_of([]).shape == (0, 12, 6)
    assert cache.targets(3).is_contiguous() and cache.targets(3).add_(1) is not None and row_bytes(cache, 3) == truth[3].tobytes() # a copy, not the file


@pytest.mark.parametrize("failed", [(), (0,), (6,), (4, 5, 6, 7), (8, 9), range(10)])
def test_the_files_are_those_that_zarr_writes(tmp_path, failed):
    path, truth, frames = make(tmp_path/"ours", failed)
    create_cache(tmp_path/"zarr", [f"é{i}" for i in range(10)], [None, *range(9)], (3, 2, 2), 6, View(num_frames=4, size_px=8), META, shard_rows=4, store_frames=True)
    theirs, ok = zarr.open_group(tmp_path/"zarr", mode="r+"), np.array([r not in failed for r in range(10)])
    with zarr.config.set({"array.write_empty_chunks": True}):
        theirs["frame_indices"][:] = np.arange(40).reshape(10, 4); theirs["num_frames"][:] = np.arange(10); theirs["status"][:] = np.where(ok, 1, 2)
    theirs["targets"][:] = np.where(ok[:, None, None], truth, np.float16("nan"))
    theirs["frames"][:] = np.where(ok[:, None, None, None, None], frames, np.uint8(0))
    files = lambda p: {n: (p/n).read_bytes() for n in Storage(p).files() if not n.startswith(("done/", "projection"))}
    assert files(path) == {n: data for n, data in files(tmp_path/"zarr").items()}


def test_int8_and_views(tmp_path):
    x = torch.randn(20, 12, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 20)[:, None, None]; path = tmp_path/"c"
    create_cache(path, [f"{i}" for i in range(10)], range(10), (3, 2, 2), 6, View(num_frames=4, size_px=8), META, shard_rows=4, views=2, dtype="int8", seed=7)
    for s in range(5): write_shard(path, s, dict(targets=x[4*s:][:4], frame_indices=np.zeros((4, 4)), num_frames=np.zeros(4)), {13: "bad"} if s == 3 else {})
    cache, plain = Cache(path), zarr.open_group(path, mode="r")
    assert plain["targets"].dtype == np.int8 and plain["targets"].chunks == (1, 12, 6) and plain["scales"].chunks == (1, 12)
    for row in cache.ok_rows:
        want = dequantise(*quantise(x[row]))
        assert torch.equal(cache.targets(row), want) and torch.equal(dequantise(torch.from_numpy(plain["targets"][row]), torch.from_numpy(plain["scales"][row])), want)
        assert ((want.float() - x[row]).abs() <= x[row].abs().amax(-1, keepdim=True) * (.5 / 127 + 2**-11) + 1e-7).all() # half a step, and what float16 rounds
    assert np.isnan(plain["scales"][13]).all() and (cache.views, cache.seed, cache.clip_of(13)) == (2, 7, 6) and [cache.view_of(r).number for r in (12, 13)] == [0, 1]
    assert cache.ids[12:14] == ["6", "6"] and cache.labels[12:14].tolist() == [6, 6]
    ok = cache.ok_rows; share = (cache.targets_of(ok).double() - x[ok].double()).norm(dim=-1) / x[ok].double().norm(dim=-1)
    assert abs(cache.error["relative"] - share.square().mean().sqrt()) < 1e-5 and .999 < cache.error["cosine"] <= 1
    cache.need_view(cache.view_of(13))
    with pytest.raises(InputError, match="holds views 0 to 1, asked for 2"): cache.need_view(dataclasses.replace(cache.view, number=2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_cannot_be_stored_is_not(tmp_path, dtype, value):
    path, truth, frames = make(tmp_path/"c", dtype=dtype); before = contents(path); x = truth[:4].astype(np.float32); x[2, 3, 4] = value
    arrays = dict(targets=x, frames=frames[:4], frame_indices=np.zeros((4, 4)), num_frames=np.zeros(4))
    with pytest.raises(ValueError, match="not finite"): write_shard(path, 0, arrays, {})
    assert contents(path) == before
    write_shard(path, 0, arrays, {2: "not finite"})
    assert Cache(path).ok_rows.tolist() == [0, 1, 3, *range(4, 10)]


# -- processes

class Rows(Dataset):
    def __init__(self, cache): self.cache = cache
    def __len__(self): return len(self.cache)
    def __getitem__(self, row): return self.cache.targets(row), self.cache.frames(row)


@pytest.mark.parametrize("method,verify", [("fork", "always"), ("fork", "first"), ("fork", "never"), ("spawn", "first")])
def test_reads_the_same_in_loader_workers(small, method, verify):
    path, truth, frames = small; cache = Cache(path, verify=verify); row_bytes(cache, 0)
    loader = DataLoader(Rows(cache), batch_size=3, num_workers=2, multiprocessing_context=get_context(method))
    for _ in range(2):
        x, y = map(torch.cat, zip(*loader))
        assert x.numpy().tobytes() == truth.tobytes() and (y.numpy() == frames).all()


def no_more_open(monkeypatch, more=0):
    "Let memory maps keep only so many `more` files open."
    gc.collect(); limit = 2 * (len(_MAPS) + more)
    monkeypatch.setattr("stjepa.storage.resource.getrlimit", lambda which: (limit, -1))


@pytest.mark.parametrize("more", [0, 2])
def test_few_files_are_kept_open(small, monkeypatch, more):
    "A full cache has thousands of shards; a process may have a thousand open files."
    no_more_open(monkeypatch, more); count = lambda: len(os.listdir("/dev/fd"))
    before, cache = count(), Cache(small[0])
    for row in range(10): assert row_bytes(cache, row) == small[1][row].tobytes() and (cache.frames(row).numpy() == small[2][row]).all()
    assert count() == before + more
    del cache
    assert count() == before


def test_the_other_crc32c_piece_by_piece(small, python):
    "On a machine without awscrt, and with rows of several pieces: the same rows, and a flipped bit in any piece is noticed."
    code = "import sys; sys.modules['awscrt'] = None; import stjepa.cache as c; c._PIECE = 100; cache = c.Cache({!r}); print(c.crc32c.__module__, sum(int(x.view(c.torch.int16).long().sum()) for x in ({})))"
    want = sum(int(torch.from_numpy(small[1][r]).view(torch.int16).long().sum()) for r in range(10))
    assert python(code.format(str(small[0]), "cache.targets(r) for r in range(10)")) == f"stjepa.cache {want}"
    file = small[0]/"targets/c/1/0/0"; whole = file.read_bytes()
    with pytest.MonkeyPatch.context() as m:
        m.setattr("stjepa.cache._PIECE", 100)
        for at in (0, 99, 100, 143): file.write_bytes(flipped(file, at * 8)); assert reads(small[0], 4) is None; file.write_bytes(whole)
        assert reads(small[0], 4) == small[1][4].tobytes()


# -- damage

def flipped(file, at):
    data = bytearray(file.read_bytes()); data[at // 8] ^= 1 << at % 8
    return data


def reads(path, row, **options):
    "A row's bytes, or nothing where it is refused."
    try: return row_bytes(Cache(path, **options), row)
    except Damaged: return None


@pytest.mark.parametrize("dtype,number", [("float16", 1000), ("int8", 300)])
def test_a_thousand_flipped_bits_are_a_thousand_messages(tmp_path, dtype, number):
    "In payload, checksums and index of a shard: always noticed by a row of it, and no row is ever wrong."
    path, _, _ = make(tmp_path/"c", failed=(5,), dtype=dtype); cache = Cache(path); rng = np.random.default_rng(2)
    want, rows = {r: row_bytes(cache, r) for r in (4, 6, 7)}, (4, 6, 7)
    files = [path/f"{name}/c/1" / "/".join("0" * (len(schema(cache.meta)[name].shape) - 1)) for name in (["targets"] if dtype == "float16" else ["targets", "scales"])]
    places = [(f, at) for f in files for at in range(len(f.read_bytes()) * 8)]
    for i in rng.choice(len(places), number, replace=False):
        file, at = places[i]; whole = file.read_bytes(); file.write_bytes(flipped(file, at))
        for reader in cache.readers.values(): reader._shards.clear() # as a process that has not looked at the shard yet
        refused = 0
        for row in rows:
            try: assert row_bytes(cache, row) == want[row]
            except Damaged as e: refused += 1; assert "run stjepa_cache repair" in str(e) and "\n" not in str(e)
        assert refused, f"bit {at} of {file} flipped and every row was read"
        file.write_bytes(whole)
    assert all(row_bytes(cache, r) == want[r] for r in rows)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(small):
    "In marks, small arrays, ids, attributes, descriptions of arrays: what can be read is what was written."
    path, truth, frames = small; rng = np.random.default_rng(3); cache = Cache(path); noticed = 0
    want = (cache.ids, cache.labels.tolist(), cache.status.tolist(), [cache.frame_indices(r).tolist() for r in range(10)], [cache.num_frames(r) for r in range(10)], cache.fingerprint, cache.view, cache.grid, cache.projection.hash)
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.parts[-5] not in ("targets", "frames") and p.parts[-6] != "frames"]
    for _ in range(300):
        file = files[rng.integers(len(files))]; whole = file.read_bytes(); file.write_bytes(flipped(file, rng.integers(len(whole) * 8)))
        try:
            c = Cache(path)
            assert want == (c.ids, c.labels.tolist(), c.status.tolist(), [c.frame_indices(r).tolist() for r in range(10)], [c.num_frames(r) for r in range(10)], c.fingerprint, c.view, c.grid, c.projection.hash), file
            assert row_bytes(c, 5) == truth[5].tobytes()
        except InputError as e: noticed += 1; assert "\n" not in str(e)
        file.write_bytes(whole)
    assert noticed > 200 # the rest are blanks between words of a json file, and the like


def test_shards_in_each_others_place(small):
    path, truth, _ = small; a, b = path/"targets/c/0/0/0", path/"targets/c/1/0/0"
    one, two = a.read_bytes(), b.read_bytes(); a.write_bytes(two); b.write_bytes(one)
    for verify in ("always", "first", "never"): assert all(reads(path, r, verify=verify) is None for r in range(8))
    marks = [(path/mark_name(s)).read_bytes() for s in (0, 1)] # with their marks, too
    for s in (0, 1): (path/mark_name(s)).write_bytes(marks[1 - s])
    with pytest.raises(Damaged, match=r"shard-00000.json: the mark of shard 1, rows \[4, 8\]; run stjepa_cache repair"): Cache(path)


def test_rows_in_each_others_place_with_their_checksums(small):
    "A file that is right in itself, but not what was written."
    file = small[0]/"targets/c/1/0/0"; data = file.read_bytes(); n = 12*6*2 + 4
    file.write_bytes(data[n:2*n] + data[:n] + data[2*n:])
    assert zarr.open_group(small[0], mode="r")["targets"][4].tobytes() == small[1][5].tobytes() # zarr cannot know
    for verify in ("always", "first", "never"): assert reads(small[0], 4, verify=verify) is None and reads(small[0], 6, verify=verify) == small[1][6].tobytes()


def test_a_shard_of_another_cache_with_its_mark(small, tmp_path):
    other = make(tmp_path/"other", seed=1)[0]
    for name in (mark_name(1), "targets/c/1/0/0"): shutil.copy(other/name, small[0]/name)
    with pytest.raises(Damaged, match="of another cache"): Cache(small[0])


def test_never_means_the_payload_alone(small):
    file = small[0]/"targets/c/1/0/0"; file.write_bytes(flipped(file, 9))
    assert reads(small[0], 4, verify="never") not in (None, small[1][4].tobytes()) and reads(small[0], 4, verify="first") is None


def test_first_means_once_in_a_process(small):
    file, cache = small[0]/"targets/c/1/0/0", Cache(small[0], verify="first"); whole = row_bytes(cache, 4)
    with open(file, "r+b") as f: f.write(b"\xff\xff")
    assert row_bytes(cache, 4) != whole
    with pytest.raises(Damaged): row_bytes(Cache(small[0], verify="first"), 4)
    for bad in (True, False, "sometimes"):
        with pytest.raises(InputError, match="expected one of always, first, never"): Cache(small[0], verify=bad)


def cut(file, size): os.truncate(file, size)
def edit(file, old, new): text = file.read_text(); assert old in text; file.write_text(text.replace(old, new, 1))

@pytest.mark.parametrize("damage,message", [
    (lambda c: (c/mark_name(1)).unlink(), "unfinished, 1 of 3 shards are missing; run stjepa_build_cache again"),
    (lambda c: cut(c/mark_name(1), 40), "shard-00001.json: missing or torn; run stjepa_cache repair"),
    (lambda c: cut(c/mark_name(1), 0), "shard-00001.json: missing or torn; run stjepa_cache repair"),
    (lambda c: edit(c/mark_name(1), '"failed": {}', '"failed": {"5": "bad"}'), "shard-00001.json: not what was written; run stjepa_cache repair"),
    (lambda c: (c/"targets/c/1/0/0").unlink(), "targets/c/1/0/0: no such file, though its shard is marked done; run stjepa_cache repair"),
    (lambda c: cut(c/"targets/c/1/0/0", 0), "length is not what was written; run stjepa_cache repair"),
    (lambda c: cut(c/"targets/c/1/0/0", 40), "length is not what was written; run stjepa_cache repair"),
    (lambda c: cut(c/"targets/c/1/0/0", 659), "length is not what was written; run stjepa_cache repair"),
    (lambda c: open(c/"targets/c/1/0/0", "ab").write(b"x"), "length is not what was written; run stjepa_cache repair"),
    (lambda c: (c/"status/c/1").unlink(), "status/c/1: missing, though its shard is marked done; run stjepa_cache repair"),
    (lambda c: (c/"frame_indices/c/1/0").write_bytes((c/"frame_indices/c/0/0").read_bytes()), "frame_indices/c/1/0: its checksum does not match; run stjepa_cache repair"),
    (lambda c: (c/"ids/c/0").unlink(), "ids: damaged: not the ids that were written"),
    (lambda c: (c/"labels/c/0").write_bytes(b""), "labels: damaged: not the labels that were written"),
    (lambda c: ((c/"targets/c/1/0/0").unlink(), (c/"targets/c/1/0/0").mkdir()), "targets/c/1/0/0: a folder, expected a file, though its shard is marked done; run stjepa_cache repair"),
    (lambda c: (shutil.rmtree(c/"done"), (c/"done").write_text("")), "/done: a file stands where a folder is expected"),
    (lambda c: (c/"zarr.json").unlink(), "not a target cache .*, though it has finished shards; restore that file, or build the cache again in a new folder"),
    (lambda c: (c/"zarr.json").write_text("{"), "zarr.json: not json .*; restore that file, or build"),
    (lambda c: (c/"zarr.json").write_bytes(b"\xff\xfe\x00"), "zarr.json: not json .*; restore that file, or build"),
    (lambda c: (c/"zarr.json").write_text("[1]"), "expected a json object"),
    (lambda c: (c/"zarr.json").write_text('{"attributes": {"schema": 2}}'), "zarr.json: schema: not what was written"),
    (lambda c: edit(c/"zarr.json", '"schema": 2', '"schema": 1'), "schema 1, this version of stjepa reads 2; build it again in a new folder"),
    (lambda c: edit(c/"zarr.json", '"dim": 6', '"dim": 3'), "zarr.json: dim: not what was written; put the old value back"),
    (lambda c: edit(c/"zarr.json", '"dtype": "float16"', '"dtype": "int8"'), "zarr.json: dtype: not what was written"),
    (lambda c: edit(c/"zarr.json", '"size_px": 8', '"size_px": 16'), "zarr.json: view: not what was written"),
    (lambda c: edit(c/"zarr.json", '"rows": 10', '"rows": 9'), "zarr.json: rows: not what was written"),
    (lambda c: edit(c/"zarr.json", '"grid": [\n      3', '"grid": [\n      6'), "zarr.json: grid: not what was written"),
    (lambda c: edit(c/"targets/zarr.json", "10", "20"), "targets/zarr.json: shape is .20, 12, 6., was written as .10, 12, 6.; run stjepa_cache repair"),
    (lambda c: edit(c/"targets/zarr.json", "float16", "bfloat16"), "targets/zarr.json: data_type is bfloat16, was written as float16; run stjepa_cache repair"),
    (lambda c: edit(c/"targets/zarr.json", "NaN", "0.0"), "targets/zarr.json: fill_value is 0.0, was written as NaN; run stjepa_cache repair"),
    (lambda c: (c/"frames/zarr.json").unlink(), "frames/zarr.json: missing or not json; run stjepa_cache repair")])
def test_damage_is_refused(small, damage, message):
    damage(small[0])
    with pytest.raises(InputError, match=message) as e: Cache(small[0]).targets(5)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage,message", [
    (lambda f: f.unlink(), "no such file"), (lambda f: cut(f, 0), "not a projection"), (lambda f: cut(f, 100), "not a projection"), (lambda f: f.write_bytes(flipped(f, 16)), "not a projection"),
    (lambda f: f.write_bytes(flipped(f, -9)), f"hash [0-9a-f]+, the cache was made with {PROJECTION.hash}"), (lambda f: Projection(*PROJECTION.buffers(), "orthogonal").save(f), "hash")])
def test_a_damaged_projection_is_named(small, damage, message):
    assert Cache(small[0]).projection.hash == PROJECTION.hash; damage(small[0]/"projection.safetensors")
    with pytest.raises(InputError, match=f"projection.safetensors: {message}.*; restore that file, or build the cache again in a new folder$"): Cache(small[0]).projection


@pytest.mark.parametrize("opened", [True, False])
def test_a_file_cut_or_lost_while_it_is_read(small, monkeypatch, opened):
    "A mapped file that is cut short would kill the process."
    if not opened: no_more_open(monkeypatch)
    cache = Cache(small[0]); row_bytes(cache, 5); cut(small[0]/"targets/c/1/0/0", 100)
    with pytest.raises(Damaged, match="shard 1, row 5"): row_bytes(cache, 5)
    (small[0]/"targets/c/1/0/0").unlink()
    with pytest.raises(Damaged, match="shard 1, row 5"): row_bytes(cache, 5)


def test_an_unfinished_cache_gives_its_finished_rows(small):
    unmark(small[0], [1]); cache = Cache(small[0], partial=True)
    assert cache.ok_rows.tolist() == [0, 1, 2, 3, 8, 9] and cache.missing_shards == [1]
    with pytest.raises(InputError, match="its shard is not finished"): cache.targets(5)
    with pytest.raises(IndexError): cache.targets(10)


# -- writing

def test_a_shard_is_marked_last_and_unmarked_first(small, monkeypatch):
    path, truth, frames = small; done, whole = [], Storage.write
    arrays = dict(targets=truth[4:8], frames=frames[4:8], frame_indices=np.zeros((4, 4)), num_frames=np.zeros(4))
    def write(self, name, data): done.append((name, finished_shards(path))); whole(self, name, data)
    monkeypatch.setattr(Storage, "write", write); write_shard(path, 1, arrays, {})
    assert [name for name, _ in done] == ["targets/c/1/0/0", "frames/c/1/0/0/0/0", "frame_indices/c/1/0", "num_frames/c/1", "status/c/1", mark_name(1)]
    assert all(marked == [0, 2] for _, marked in done)


@pytest.mark.parametrize("at", range(6))
def test_a_disk_that_fills_up_leaves_the_shard_unmarked(small, monkeypatch, at):
    path, truth, frames = small; arrays = dict(targets=truth[4:8], frames=frames[4:8], frame_indices=np.zeros((4, 4)), num_frames=np.zeros(4))
    calls, fsync = itertools.count(), os.fsync
    def full(fd):
        if os.path.isfile(f"/proc/self/fd/{fd}") and next(calls) == at: raise OSError(28, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full: free some space and run again"): write_shard(path, 1, arrays, {})
    assert finished_shards(path) == [0, 2] and not list(path.rglob("*.part"))
    monkeypatch.undo(); write_shard(path, 1, arrays, {}); assert row_bytes(Cache(path), 5) == truth[5].tobytes()


def test_attributes_change_by_update_meta_alone(small):
    path = small[0]; drop_shards(path, [0, 1, 2]); before = Cache(path, partial=True).fingerprint
    update_meta(path, projection=dict(kind="pca", hash="new")); cache = Cache(path, partial=True)
    assert cache.meta["projection"]["hash"] == "new" and cache.fingerprint != before
    zarr.open_group(path, mode="r+").attrs["dim"] = 7
    with pytest.raises(InputError, match="zarr.json: dim: not what was written"): read_meta(path)


def test_descriptions_of_arrays_are_restored(small):
    path, truth, _ = small; before = contents(path)
    edit(path/"targets/zarr.json", "float16", "bfloat16"); (path/"status/zarr.json").unlink()
    assert restore_arrays(path) == ["status", "targets"] and contents(path) == before and restore_arrays(path) == []


def test_creating_again(small, tmp_path):
    with pytest.raises(InputError, match="not a cache, and not empty .other.txt."): (tmp_path/"x").mkdir(); (tmp_path/"x/other.txt").write_text(""); make(tmp_path/"x")
    (small[0]/"zarr.json").unlink()
    with pytest.raises(InputError, match="has finished shards but no zarr.json with a schema in it; restore that file"): make(small[0])
    assert clean_partials(small[0]) == []
    with pytest.raises(InputError, match="no clips to cache"): create_cache(tmp_path/"n", [], [], (1, 1, 1), 1, View(num_frames=4, size_px=8), META)


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


def test_a_lost_shard_is_made_again_with_decoding_workers(job, tmp_path):
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), num_workers=2); build_cache(config)
    assert contents(config.cache_dir) == contents(job.cache_dir)
    unmark(config.cache_dir, [2]); (tmp_path/"c/targets/c/2/0/0").unlink()
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
    (dict(dim=8), "dim is 16, asked for 8"), (dict(limit=5), "rows is 18, asked for 5"), (dict(dtype="int8"), "dtype is float16, asked for int8"),
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
