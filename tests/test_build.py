"Building a cache: whatever is killed, stopped, split or started twice, the bytes are those of an undisturbed build."
import dataclasses, json, multiprocessing, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, torch

from stjepa.build_cache import BuildConfig, Calls, Job, build_cache, build_shards, fit, joined, open_or_create, read_dataset, teacher_calls
from stjepa.cache import Cache, finished_shards, is_cache, mark_name, read_meta
from stjepa.core import InputError
from stjepa.teacher import load_teacher, random_teacher
from stjepa.video import load_views

TINY = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
FORK = multiprocessing.get_context("forkserver") # imports once, then every build starts in milliseconds
FORK.set_forkserver_preload(["pytest", "stjepa.build_cache", "zarr", "av", "decord", "transformers.models.videomae.modeling_videomae"])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job(toy, tmp_path_factory):
    "24 toy clips, one of them no video; a tiny teacher; an undisturbed build to compare with."
    root = tmp_path_factory.mktemp("build"); shutil.copytree(toy/"ssv2", root/"ssv2"); random_teacher(root/"teacher", **TINY)
    config = BuildConfig(str(root/"ssv2"), str(root/"whole"), teacher=str(root/"teacher"), dim=16, num_workers=0, shard_rows=4, max_failed=.2, device="cpu")
    videos(config)[5].write_bytes(b"no video")
    build_cache(config)
    return config


def videos(config): return [r.path for r in read_dataset(config).records]
def contents(path): return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}
def arguments(config): return [x for f in dataclasses.fields(config) if type(f.default) is not bool for x in (f"--{f.name.replace('_', '-')}", str(getattr(config, f.name)))]


def _build(config, out):
    "A whole build in a process of its own; what it says goes to a file."
    with open(out, "a") as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    torch.set_num_threads(1); multiprocessing.set_start_method("fork", force=True) # of the decoding processes: a forkserver's children would take its own way
    try: build_cache(config)
    except InputError as e: sys.exit(f"error: {e}")

def start(config, out):
    p = FORK.Process(target=_build, args=(config, out)); p.start()
    return p

def whole(config, out, *others):
    "Build with one process per config, all at once; they must all end well."
    running = [start(c, out) for c in (config, *others)]
    for p in running: p.join(120)
    assert [p.exitcode for p in running] == [0] * len(running), Path(out).read_text()


# -- killed and stopped

def test_thirty_kills_at_random_instants(job, tmp_path):
    "SIGKILL after a random time, again and again; whenever a build gets through, all its files are those of the undisturbed one."
    draw, out, job = random.Random(0), tmp_path/"log", dataclasses.replace(job, limit=12, fit_clips=4) # few clips, so that a kill costs little
    whole(dataclasses.replace(job, cache_dir=str(tmp_path/"first")), out)
    began = time.time(); whole(dataclasses.replace(job, cache_dir=str(tmp_path/"whole")), out); takes = time.time() - began
    want, kills, finished, config = contents(tmp_path/"whole"), 0, 0, dataclasses.replace(job, cache_dir=str(tmp_path/"0"))
    while kills < 30:
        p = start(config, out); p.join(draw.uniform(0, takes))
        if p.exitcode is None: p.kill(); p.join(); kills += 1
        assert p.exitcode in (0, -signal.SIGKILL), out.read_text()
        if p.exitcode == 0:
            assert contents(config.cache_dir) == want; finished += 1
            config = dataclasses.replace(config, cache_dir=str(tmp_path/str(finished)))
    whole(config, out)
    assert contents(config.cache_dir) == want


def test_nothing_of_a_killed_build_is_read(job, tmp_path):
    "Whatever a killed build leaves: what opens is right, what is not finished says so."
    draw, out, config, cache = random.Random(1), tmp_path/"log", dataclasses.replace(job, cache_dir=str(tmp_path/"c")), Cache(job.cache_dir)
    for _ in range(6):
        p = start(config, out); p.join(draw.uniform(.2, .8)); p.kill(); p.join()
        if not is_cache(config.cache_dir): continue
        part = Cache(config.cache_dir, partial=True)
        assert all(torch.equal(part.targets(r), cache.targets(r)) for r in part.ok_rows)
        if part.missing_shards:
            with pytest.raises(InputError, match="unfinished"): Cache(config.cache_dir)


@pytest.mark.parametrize("sig,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_between_two_clips(job, tmp_path, sig, status):
    config, out = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), num_workers=2), tmp_path/"log"
    p = start(config, out)
    while not (Path(config.cache_dir)/"done").exists() and p.exitcode is None: time.sleep(.001)
    os.kill(p.pid, sig); p.join(60)
    assert p.exitcode == status, out.read_text()
    said = [l for l in out.read_text().splitlines() if l.startswith("stopped")]
    assert said == [f"stopped by {sig.name}: shards left to do: {6 - len(finished_shards(config.cache_dir))}, nothing is lost that was finished; run the same command again to continue"]
    assert not list(tmp_path.rglob("*.part")), "a shard that was being written is finished"
    whole(config, out)
    assert contents(config.cache_dir) == contents(job.cache_dir)


def test_a_signal_to_all_processes_is_no_decoding_error(job, tmp_path):
    "A scheduler signals the decoding processes too, and they die first."
    code = "import torch; torch.set_num_threads(1); from stjepa.build_cache import main; main()"
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), num_workers=2, fit_clips=0)
    p = subprocess.Popen([sys.executable, "-c", code, *arguments(config)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (Path(config.cache_dir)/"fit").exists() and p.poll() is None: time.sleep(.001)
    os.killpg(p.pid, signal.SIGTERM); _, err = p.communicate(timeout=60)
    assert p.returncode == 143 and "Traceback" not in err and "stopped by SIGTERM: " in err, err


# -- split among processes

def test_two_jobs_that_do_not_know_of_each_other(job, tmp_path):
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"))
    whole(config, tmp_path/"log", config)
    assert contents(config.cache_dir) == contents(job.cache_dir)


def test_an_array_of_jobs(job, tmp_path):
    "All at once on an empty folder; and one after the other, where the first must not wait for the second."
    for name in ("together", "apart"):
        first, second = (dataclasses.replace(job, cache_dir=str(tmp_path/name), shard=f"{i}/2") for i in (0, 1))
        if name == "together": whole(first, tmp_path/"log", second)
        else:
            whole(second, tmp_path/"log")
            assert finished_shards(second.cache_dir) == [1, 3, 5] and "shards left to other jobs: 3" in (tmp_path/"log").read_text()
            whole(first, tmp_path/"log")
        assert contents(tmp_path/name) == contents(job.cache_dir)


def test_two_ranks_of_one_of_two_jobs(job, tmp_path):
    "torchrun inside an array job: every shard is somebody's."
    first, second = (dataclasses.replace(job, cache_dir=str(tmp_path/"c"), shard=f"{i}/2") for i in (0, 1))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "stjepa_build_cache", *arguments(second)],
                          env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole(first, tmp_path/"log")
    assert contents(tmp_path/"c") == contents(job.cache_dir)


def test_torchrun_is_stopped(job, tmp_path):
    "The signal goes to torchrun, as a scheduler sends it: both ranks stop, one line says so, nothing half-written stays, and the next build finishes it."
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"))
    p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "stjepa_build_cache", *arguments(config)],
                         env=dict(os.environ, OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, text=True)
    while not (Path(config.cache_dir)/"fit").exists() and p.poll() is None: time.sleep(.001)
    p.send_signal(signal.SIGTERM); _, err = p.communicate(timeout=100)
    assert p.returncode != 0 and "stopped by SIGTERM: " in err and "run the same command again to continue" in err, err
    assert not list(tmp_path.rglob("*.part"))
    whole(config, tmp_path/"log")
    assert contents(config.cache_dir) == contents(job.cache_dir)


@pytest.mark.parametrize("change", [dict(batch_size="1"), dict(batch_size="3"), dict(batch_size="8", num_workers=2), dict(batch_size="auto", num_workers=1)], ids=str)
def test_bytes_do_not_depend_on(job, tmp_path, change):
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), **change); build_cache(config)
    assert contents(tmp_path/"c") == contents(job.cache_dir)


# -- grown

@pytest.fixture(scope="module")
def few(job, tmp_path_factory):
    "A finished cache of ten of the clips, so that its last shard is not full; and what becomes of it when it is extended to all, undisturbed."
    root = tmp_path_factory.mktemp("grow"); config = dataclasses.replace(job, cache_dir=str(root/"few"), limit=10)
    build_cache(config); shutil.copytree(root/"few", root/"all")
    grown = dataclasses.replace(job, cache_dir=str(root/"all")); build_cache(grown)
    return config, grown

def test_a_cache_grows(job, few):
    "Rows keep their places and their bytes, new clips come behind them, by the projection of the first ones."
    old, new = (Cache(c.cache_dir) for c in few); records = {r.id: r for r in read_dataset(job).records}
    assert (len(old), len(new), new.ids[:10], {*new.ids}) == (10, 24, old.ids, {*records}) and new.ids[10:] == [i for i in records if i not in old.ids]
    assert [g["rows"] for g in new.meta["grown"]] == [10] and new.projection.hash == old.projection.hash and old.fingerprint != new.fingerprint
    for shard in (0, 1): assert (Path(old.path)/f"targets/c/{shard}/0/0").read_bytes() == (Path(new.path)/f"targets/c/{shard}/0/0").read_bytes()
    calls = Calls(load_teacher(job.teacher), 1)
    for row in new.ok_rows.tolist():
        seen, = load_views(records[new.ids[row]].path, [calls.view], new.ids[row])
        assert torch.equal(new.targets(row), new.projection(calls(seen.frames[None])[0])[0].half()) and new.labels[row] == records[new.ids[row]].label
    assert len(new.failures) == 1 and build_cache(few[1])["clips"] == 0, "run again, there is nothing to do"

def test_a_cache_grows_in_steps_and_unfinished(job, few, tmp_path):
    "From ten to sixteen clips, from there to all while three shards are missing; and a smaller limit is refused."
    c = dataclasses.replace(job, cache_dir=str(shutil.copytree(few[0].cache_dir, tmp_path/"c")))
    build_cache(dataclasses.replace(c, limit=16, shard="1/2"))
    assert Cache(c.cache_dir, partial=True).missing_shards == [2]
    build_cache(c); cache, whole_ = Cache(c.cache_dir), Cache(few[1].cache_dir)
    assert [g["rows"] for g in cache.meta["grown"]] == [10, 16] and len(cache) == 24
    for row in cache.ok_rows: assert torch.equal(cache.targets(row), whole_.targets(whole_.ids.index(cache.ids[row])))
    with pytest.raises(InputError, match="rows is 24, asked for 10"): build_cache(dataclasses.replace(c, limit=10))

@pytest.mark.parametrize("change,message", [(dict(dim=8), "dim is 16, asked for 8"), (dict(projection="orthogonal"), "projection.kind"), (dict(fit_clips=3), "projection.fit_clips"), (dict(store_frames=True), "frames is False")], ids=str)
def test_nothing_but_the_clips_may_be_more(few, tmp_path, change, message):
    path = shutil.copytree(few[0].cache_dir, tmp_path/"c"); before = contents(path)
    with pytest.raises(InputError, match=message): build_cache(dataclasses.replace(few[1], cache_dir=str(path), **change))
    assert contents(path) == before

def test_more_clips_of_another_teacher_or_view_are_refused(few, tmp_path):
    "The same weights whose processor normalises otherwise, and other weights."
    path = shutil.copytree(few[0].cache_dir, tmp_path/"c"); before = contents(path)
    file = shutil.copytree(few[0].teacher, tmp_path/"view")/"preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(image_mean=[.5, .5, .5]))); random_teacher(tmp_path/"weights", seed=1, **TINY)
    for name, message in dict(view=r"view.mean is \[0.485, 0.456, 0.406\], asked for \[0.5, 0.5, 0.5\]", weights="teacher.weights_hash is .*, asked for ").items():
        with pytest.raises(InputError, match=message): build_cache(dataclasses.replace(few[1], cache_dir=str(path), teacher=str(tmp_path/name)))
    assert contents(path) == before

def test_growing_is_killed_and_done_by_two_jobs(few, tmp_path):
    draw, out, want = random.Random(2), tmp_path/"log", contents(few[1].cache_dir)
    for kill in range(5):
        config = dataclasses.replace(few[1], cache_dir=str(shutil.copytree(few[0].cache_dir, tmp_path/str(kill))))
        for _ in range(2): p = start(config, out); p.join(draw.uniform(0, .5)); p.kill(); p.join()
        whole(config, out, *[config] * (kill % 2))
        assert contents(config.cache_dir) == want

def test_training_on_a_grown_cache(few, tmp_path):
    from conftest import SMALL
    from stjepa.pretrain import PretrainConfig, pretrain
    pretrain(PretrainConfig(few[1].data_root, few[1].cache_dir, out=str(tmp_path/"run"), epochs=1, **SMALL))
    assert list((tmp_path/"run").glob("checkpoint_step*.pt"))


# -- options

@pytest.mark.parametrize("options", [dict(views=3, store_frames=True), dict(views=2, dtype="int8"), dict(projection="none", dim=384), dict(projection="pca_whiten"),
                                     dict(projection="orthogonal", store_frames=True), dict(teacher_dtype="bfloat16")], ids=lambda o: "-".join(o))
def test_what_is_cached_is_what_was_asked_for(job, tmp_path, options):
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), **options); said = build_cache(config)
    cache, k = Cache(config.cache_dir), config.views
    assert (len(cache), said["clips"], cache.views, cache.dim, cache.dtype) == (24 * k, 24, k, 48 if config.projection == "none" else 16, config.dtype)
    assert cache.shard_rows % k == 0 and len(cache.failures) == k and len({row // k for row in cache.failures}) == 1
    calls, projection = Calls(load_teacher(config.teacher, dtype=getattr(torch, cache.meta["compute_dtype"])), 1), cache.projection
    records = read_dataset(config).records
    for clip in (0, 13, 23):
        if clip * k in cache.failures: continue
        for row, seen in enumerate(load_views(records[clip].path, [calls.view.numbered(i) for i in range(k)], records[clip].id, config.seed), clip * k):
            want = projection(calls(seen.frames[None])[0])[0].half()
            if config.dtype == "float16": assert torch.equal(cache.targets(row), want)
            else: assert (cache.targets(row) - want).abs().max() <= want.abs().amax() / 127
            if config.store_frames: assert torch.equal(cache.frames(row), seen.frames)
            assert cache.frame_indices(row).tolist() == seen.indices.tolist() and cache.ids[row] == records[clip].id
    assert k == 1 or not torch.equal(cache.targets(0), cache.targets(1))


def test_videos_on_a_skip_list_are_not_opened(job, tmp_path):
    bad, good = (videos(job)[i].relative_to(job.data_root).as_posix() for i in (5, 8))
    (tmp_path/"skip.csv").write_text(f"file,reason\n{bad},broken\n{good},ugly\n")
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c"), skip=str(tmp_path/"skip.csv"), max_failed=0., views=2); build_cache(config)
    assert sorted(Cache(config.cache_dir).failures.values()) == ["skipped: broken"] * 2 + ["skipped: ugly"] * 2
    assert (tmp_path/"c/failed.csv").read_text().count("\n") == 3


def test_a_bucket_holds_what_a_folder_holds(job):
    import fsspec
    config = dataclasses.replace(job, cache_dir="memory://bucket/cache"); store = fsspec.filesystem("memory")
    assert build_cache(config)["ok"] == 23
    found = {p.removeprefix("/bucket/cache/"): store.cat_file(p) for p in store.find("/bucket/cache")}
    assert found == contents(job.cache_dir)


@pytest.mark.parametrize("change,message", [
    (dict(views=2), "views is 1, asked for 2"), (dict(seed=1), "seed is 0, asked for 1"), (dict(dtype="int8"), "dtype is float16, asked for int8"), (dict(store_frames=True), "frames is False, asked for True"),
    (dict(teacher_dtype="bfloat16"), "compute_dtype is float32, asked for bfloat16"), (dict(projection="pca_whiten"), "projection.kind is pca, asked for pca_whiten"),
    (dict(shard="2/2"), "--shard 2/2: expected i/n"), (dict(shard="one"), "--shard one: expected i/n"), (dict(batch_size="0"), "--batch-size 0: expected auto"), (dict(views=0), "--views 0: expected at least 1"), (dict(limit=-1), "--limit -1: expected at least 0"), (dict(max_failed=7.), "--max-failed 7.0: expected a share"),
    (dict(num_workers=-1), "--num-workers -1: expected at least 0"), (dict(fit_clips=-3), "--fit-clips -3"), (dict(shard_rows=0), "--shard-rows 0"), (dict(timeout_s=-1.), "--timeout-s -1"), (dict(dim=8), "dim is 16, asked for 8; use the same, or another folder"),
    (dict(device="cuda:77"), "cuda:77")], ids=str)
def test_what_does_not_go_together_is_refused(job, change, message):
    before = contents(job.cache_dir)
    with pytest.raises(InputError, match=message): build_cache(dataclasses.replace(job, **change))
    assert contents(job.cache_dir) == before


# -- what goes wrong

def test_videos_none_of_which_can_be_read(job, tmp_path):
    data = shutil.copytree(job.data_root, tmp_path/"ssv2")
    for p in data.rglob("*.webm"): p.write_bytes(b"<html>404</html>")
    config = dataclasses.replace(job, data_root=str(data), cache_dir=str(tmp_path/"c"), max_failed=1.)
    with pytest.raises(InputError, match="none of the clips drawn to fit the projection can be read, e.g. .+"): build_cache(config)
    for p in data.rglob("*.webm"): shutil.copy(Path(job.data_root)/p.relative_to(data), p)
    build_cache(config) # mended: nothing of the failed fit is left
    assert read_meta(config.cache_dir)["projection"] == read_meta(job.cache_dir)["projection"]


@pytest.mark.parametrize("number,says", [(28, "the disk is full"), (122, "the disk quota is used up"), (13, "permission denied")])
def test_a_place_that_takes_no_more(job, tmp_path, monkeypatch, number, says):
    "Whatever is refused by the system while a shard is written: one line that says why, and the build goes on later."
    config, fsync, calls = dataclasses.replace(job, cache_dir=str(tmp_path/"c")), os.fsync, []
    def full(fd):
        calls.append(fd)
        if finished_shards(config.cache_dir): raise OSError(number, os.strerror(number))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=says): build_cache(config)
    monkeypatch.setattr(os, "fsync", fsync)
    assert 0 < len(finished_shards(config.cache_dir)) < 6
    build_cache(config)
    assert contents(config.cache_dir) == contents(job.cache_dir)


def test_a_decode_that_hangs_is_a_failed_clip(job, tmp_path, monkeypatch):
    import stjepa.video
    read, stuck = stjepa.video._read_best, videos(job)[8]
    monkeypatch.setattr(stjepa.video, "_read_best", lambda path, *args: time.sleep(20) if Path(path) == stuck else read(path, *args))
    for workers in (0, 1):
        config = dataclasses.replace(job, cache_dir=str(tmp_path/str(workers)), timeout_s=.5, num_workers=workers); build_cache(config)
        assert Cache(config.cache_dir).failures[8] == "decoding took longer than 0.5 s"


def test_a_decoding_process_that_dies_names_the_videos(job, tmp_path, monkeypatch):
    import stjepa.video
    read, deadly = stjepa.video.load_views, videos(job)[8]
    monkeypatch.setattr(stjepa.video, "load_views", lambda path, *args: os._exit(9) if Path(path) == deadly else read(path, *args))
    with pytest.raises(InputError, match=f"decoding stopped .*{deadly.name}.*--skip"): build_cache(dataclasses.replace(job, cache_dir=str(tmp_path/"c"), num_workers=2))


def test_a_cache_that_was_begun_anew_is_left_alone(job, tmp_path):
    "Somebody deletes the folder and starts another build in it while this one runs."
    config = dataclasses.replace(job, cache_dir=str(tmp_path/"c")); calls = teacher_calls(load_teacher(job.teacher), config)
    mine = Job(config, read_dataset(config), calls); open_or_create(config, calls.teacher, mine.dataset); fit(mine)
    class Meddling(Calls):
        def once(self, frames):
            if is_cache(config.cache_dir) and read_meta(config.cache_dir)["seed"] == 0:
                shutil.rmtree(config.cache_dir); open_or_create(dataclasses.replace(config, seed=1), calls.teacher, mine.dataset)
            return super().once(frames)
    mine.calls = Meddling(calls.teacher, 1)
    with pytest.raises(InputError, match="was begun anew or extended by another job"): build_shards(mine, [0, 1])
    assert not finished_shards(config.cache_dir)


def test_calls_get_smaller_until_they_fit(job):
    class Narrow(torch.nn.Module):
        "A card for three clips."
        def __init__(self, teacher): super().__init__(); self.teacher, self.name, self.seen = teacher, teacher.name, []
        def view(self): return self.teacher.view()
        def forward(self, pixels):
            self.seen.append(len(pixels))
            if len(pixels) > 3: raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return self.teacher(pixels)
    teacher = Narrow(load_teacher(job.teacher)); calls = Calls(teacher, 16)
    frames = torch.randint(0, 256, (8, 8, 32, 32, 3), dtype=torch.uint8)
    assert torch.allclose(torch.cat(calls(frames)), torch.cat(Calls(teacher.teacher, 1)(frames)), atol=1e-5)
    assert teacher.seen == [8, 8, 4, 2, 2, 2, 2] and calls.size == 2


def test_joined_batches_keep_order_and_never_exceed_the_call():
    batch = lambda *rows: dict(rows=torch.tensor(rows, dtype=torch.int64), frames=torch.tensor(rows) if rows else None, indices=torch.tensor(rows), num_frames=torch.tensor(rows), errors=[] if rows else [(99, "bad")])
    given = [batch(0, 1), batch(2), batch(), batch(3, 4, 5), batch(6)]
    assert [b["rows"].tolist() for b in joined(given, 4)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [b["rows"].tolist() for b in joined(given, 1)] == [[0, 1], [2], [3, 4, 5], [6]]
    assert sum((b["errors"] for b in joined(given, 4)), []) == [(99, "bad")]
    assert next(joined([batch()], 4))["frames"] is None


@pytest.mark.cuda
def test_a_gpu_gives_nearly_the_targets_of_a_cpu(job, tmp_path):
    here, there = Cache(job.cache_dir), []
    for size in ("auto", "4"):
        config = dataclasses.replace(job, cache_dir=str(tmp_path/size), device="cuda", teacher_dtype="float32", batch_size=size); build_cache(config); there.append(Cache(config.cache_dir))
    for row in here.ok_rows:
        for cache in there: assert torch.cosine_similarity(cache.targets(row).float(), here.targets(row).float()).min() > .999
