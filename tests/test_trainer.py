"The trainer under trouble: killed, stopped, resized, on a full disk, on bad numbers. On caches of noise that store their frames."
import contextlib, io, json, os, random, resource, signal, subprocess, sys, time, types
from dataclasses import replace
from pathlib import Path
import pytest, torch
from conftest import BIN, SMALL
from stjepa.bench_scaling import noise_cache
from stjepa.cache import Cache
from stjepa.checkpoint import checkpoints, load_checkpoint, step_of
from stjepa.core import InputError, StopSignal, read_json, read_jsonl
from stjepa.pretrain import PretrainConfig, open_run, pretrain, training_batches

TINY = dict(batch_size=4, mask_ratio=.5, embed_dim=24, depth_factorised=1, depth_joint=1, num_heads=2, predictor_dim=24, predictor_depth=1, drop_path=.2,
            holdout_share=.2, num_workers=0, log_steps=2, device="cpu")

@pytest.fixture(scope="module")
def cache(tmp_path_factory): return noise_cache(tmp_path_factory.mktemp("noise")/"cache", clips=25, grid=(2, 2, 2), dim=8, views=2)

def config(cache, out, **more): return PretrainConfig("none", str(cache), out=str(out), **{**TINY, "epochs": 4, **more})

def tensors(value, name=""):
    "Every tensor of nested dicts and lists, by its path."
    if isinstance(value, torch.Tensor): return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: t for key, v in items for k, t in tensors(v, f"{name}.{key}").items()}

def same(a, b):
    "Two checkpoints hold the same numbers, bit for bit: weights, average, optimiser."
    a, b = tensors(load_checkpoint(a)), tensors(load_checkpoint(b))
    assert a.keys() == b.keys() and len(a) > 50
    for k in a: assert torch.equal(a[k], b[k]), k

def last(out): return checkpoints(out)[-1]

# -- in processes of their own: forked from one that has everything imported, so that they start at once

def fresh(name, *args, timeout=300):
    "Run a function of this file in a fresh interpreter; what it printed."
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_trainer; test_trainer.{name}(*{tuple(map(str, args))!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return done.stdout

def fork(config, **env):
    "Train in a child process; its id."
    if pid := os.fork(): return pid
    status = 1
    try:
        torch.set_num_threads(1); os.environ.update(env)
        with contextlib.redirect_stdout(io.StringIO()): pretrain(config)
        status = 0
    finally: os._exit(status)

def together(config, world, port):
    "Train on `world` gloo processes."
    pids = [fork(config, RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for r in range(world)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0] * world

def job_kills(cache, folder):
    import matplotlib.backends.backend_agg, torch._dynamo
    folder, rng, landed, runs = Path(folder), random.Random(0), [], 0
    base = config(cache, folder/"whole", epochs=8, save_steps=3, save_epochs=2, keep_last=2, resume="auto")
    begun = time.perf_counter(); assert os.waitpid(fork(base), 0)[1] == 0
    whole = time.perf_counter() - begun
    while len(landed) < 20:
        now = replace(base, out=str(folder/f"run{runs}"))
        pid, end, done = fork(now), time.perf_counter() + rng.uniform(0, whole), 0
        while time.perf_counter() < end and not done: time.sleep(.001); done = os.waitpid(pid, os.WNOHANG)[0]
        if done: same(last(now.out), last(base.out)); runs += 1; continue
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        landed.append(step_of(last(now.out)) if checkpoints(now.out) else -1)
    assert os.waitpid(fork(now), 0)[1] == 0
    same(last(now.out), last(base.out))
    steps = [r["step"] for r in read_jsonl(Path(now.out)/"metrics.jsonl") if "hidden_loss" in r]
    assert len(steps) == len(set(steps)), "a judgement is logged twice"
    print(*landed)

def test_killed_at_twenty_random_instants(cache, tmp_path):
    landed = [int(s) for s in fresh("job_kills", cache, tmp_path).split()]
    assert len(landed) == 20 and len(set(landed)) > 3, f"the kills landed at too few places: {landed}"

def job_ranks(cache, folder):
    folder, save = Path(folder), dict(log_steps=1, drop_path=0., save_steps=7, keep_last=0)
    alone, two = config(cache, folder/"one", **save), config(cache, folder/"two", **save)
    assert os.waitpid(fork(alone), 0)[1] == 0
    together(two, 2, 29571)
    (folder/"moved").mkdir(); (folder/"moved"/"checkpoint_step7.pt").symlink_to(folder/"two"/"checkpoint_step7.pt")
    assert os.waitpid(fork(config(cache, folder/"moved", **save, resume="auto")), 0)[1] == 0
    together(config(cache, folder/"parts", **save, accumulate=2), 2, 29572)

def test_one_two_and_again_one_process_train_the_same_student(cache, tmp_path):
    "The same clips and masks at every step; gradients are added in another order, so the losses agree to 1e-4 and not to the bit."
    fresh("job_ranks", cache, tmp_path)
    lines = {d: [r for r in read_jsonl(tmp_path/d/"metrics.jsonl") if "loss" in r] for d in ("one", "two", "moved", "parts")}
    wanted = {r["step"]: r["loss"] for r in lines["one"]}
    assert len(wanted) == 20 and min(r["step"] for r in lines["moved"]) == 8
    for d in ("two", "moved", "parts"):
        for r in lines[d]: assert r["loss"] == pytest.approx(wanted[r["step"]], abs=1e-4), f"{d}, step {r['step']}"
    assert sorted(p.name for p in (tmp_path/"two").iterdir()) == sorted(p.name for p in (tmp_path/"one").iterdir())

def job_sliced(cache, folder, optimizer):
    import matplotlib.backends.backend_agg, torch._dynamo, torch.distributed.device_mesh, torch.distributed.fsdp, torch.distributed.tensor
    folder, save = Path(folder), dict(optimizer=optimizer, epochs=2, log_steps=1, drop_path=0., save_steps=4, keep_last=0, probe_steps=10)
    def at(name, **more): return config(cache, folder/name, **{**save, "parallel": "fsdp", **more})
    assert os.waitpid(fork(at("one", parallel="ddp")), 0)[1] == 0
    together(at("sliced"), 2, 29573)
    for name, start in dict(again="sliced", alone="sliced", parts="one").items():
        (folder/name).mkdir(); (folder/name/"checkpoint_step4.pt").symlink_to(folder/start/"checkpoint_step4.pt")
    together(at("again", resume="auto"), 2, 29574)
    if optimizer == "muon": return
    together(at("parts", resume="auto", accumulate=2), 2, 29575)
    assert os.waitpid(fork(at("alone", resume="auto", parallel="ddp")), 0)[1] == 0

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_in_slices_trains_the_same_student(cache, tmp_path, optimizer):
    """FSDP2 on two gloo processes: losses agree with those of one process to 1e-4, its checkpoint is like any other, and a run moves between
    slices and one piece. Slices continued as slices are the same run, bit for bit."""
    fresh("job_sliced", cache, tmp_path, optimizer)
    lines = {p.parent.name: [r for r in read_jsonl(p) if "loss" in r] for p in tmp_path.glob("*/metrics.jsonl")}
    wanted = {r["step"]: (r["loss"], r["grad_norm"]) for r in lines["one"]}
    assert len(lines) == (5 if optimizer == "adamw" else 3) and len(wanted) == len(lines["sliced"]) == 10 and len(lines["again"]) == 6
    for d in lines:
        for r in lines[d]: assert (r["loss"], r["grad_norm"]) == pytest.approx(wanted[r["step"]], abs=1e-4), f"{d}, step {r['step']}"
    same(last(tmp_path/"again"), last(tmp_path/"sliced"))
    one, sliced = (tensors(load_checkpoint(last(tmp_path/d))) for d in ("one", "sliced"))
    assert {k: (v.shape, v.dtype, type(v)) for k, v in one.items()} == {k: (v.shape, v.dtype, type(v)) for k, v in sliced.items()}
    judged = [[r["hidden_loss"] for r in read_jsonl(tmp_path/d/"metrics.jsonl") if "hidden_loss" in r] for d in ("one", "sliced")]
    assert judged[0] == pytest.approx(judged[1], abs=1e-4) and len(judged[0]) == 3

def test_a_failing_process_ends_the_job_with_its_message(cache, tmp_path):
    "One row is damaged: whichever process reads it says so."
    import shutil
    shutil.copytree(cache, tmp_path/"cache")
    shard = next(p for p in (tmp_path/"cache"/"frames").rglob("0") if p.is_file())
    raw = bytearray(shard.read_bytes()); raw[20 * len(raw) // 50] ^= 1; shard.write_bytes(raw)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dict(TINY, epochs=2, out=tmp_path/"run").items()]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", BIN/"stjepa_pretrain", "none", tmp_path/"cache", *flags],
                          capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode != 0 and "stjepa_pretrain: error:" in done.stderr and "checksum does not match" in done.stderr, done.stderr[-2000:]

# -- asked to stop

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(cache, tmp_path, number):
    """It saves in the middle of an epoch, exits 0 with the line that goes on, and that line ends at the same weights.
    The signal goes to the workers too, as from a terminal or a scheduler."""
    long = dict(TINY, epochs=30, log_steps=1, keep_last=1, num_workers=1)
    words = ["none", str(cache), *(f"--{k.replace('_', '-')}={v}" for k, v in long.items()), f"--out={tmp_path/'run'}"]
    job = subprocess.Popen([BIN/"stjepa_pretrain", *words], stdout=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True)
    while not (tmp_path/"run"/"metrics.jsonl").exists() or len(read_jsonl(tmp_path/"run"/"metrics.jsonl")) < 13: time.sleep(.01)
    os.killpg(job.pid, number)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and f"stopped by {number.name} at step" in said, said
    assert said[said.index("to go on: ") + 10:].split() == ["stjepa_pretrain", *words, "--resume", "auto"]
    assert 10 <= step_of(last(tmp_path/"run")) < 150
    torch.set_num_threads(1)
    for run in ("run", "whole"): pretrain(config(cache, tmp_path/run, resume="auto", **{**long, "num_workers": 0}))
    same(last(tmp_path/"run"), last(tmp_path/"whole"))
    first, second = ([(r["step"], r.get("loss")) for r in read_jsonl(tmp_path/d/"metrics.jsonl")] for d in ("run", "whole"))
    assert first == second

def alive(pid):
    with contextlib.suppress(ProcessLookupError): os.kill(pid, 0); return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False

@pytest.mark.parametrize("whom", ["torchrun", "process", "both"])
def test_two_processes_asked_to_stop(cache, tmp_path, whom):
    """They agree on the step, one file is saved, nobody is left behind, and the line that is printed continues the run.
    torchrun itself ends with 1 when it gets the signal, whatever its processes do; sent to a process of it, all end with 0."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dict(TINY, epochs=400, log_steps=1, keep_last=1, out=tmp_path/"run").items()]
    job = subprocess.Popen([BIN/"torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "stjepa_pretrain", "none", cache, *flags],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    while not (tmp_path/"run"/"metrics.jsonl").exists() or len(read_jsonl(tmp_path/"run"/"metrics.jsonl")) < 13: time.sleep(.01); assert job.poll() is None
    workers = [int(p) for p in subprocess.run(["ps", "--ppid", str(job.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()]
    for pid in dict(torchrun=[job.pid], process=workers[:1], both=[*workers, job.pid])[whom]: os.kill(pid, signal.SIGTERM); time.sleep(.03)
    said, err = job.communicate(timeout=100)
    assert len(workers) == 2 and not any(map(alive, workers)) and job.returncode == (whom != "process"), err[-2000:]
    assert said.count("stopped by SIGTERM at step") == 1 and f"saved {last(tmp_path/'run')}; to go on: torchrun --nproc-per-node 2 --no-python stjepa_pretrain none" in said
    assert [r["step"] for r in read_jsonl(tmp_path/"run"/"metrics.jsonl") if "loss" in r] == list(range(1, step_of(last(tmp_path/"run")) + 1))
    with contextlib.redirect_stdout(io.StringIO()): again = pretrain(config(cache, tmp_path/"run", **dict(TINY, epochs=400, steps=0, log_steps=1), resume="auto"), Later(2))
    assert again["steps"] == step_of(last(tmp_path/"run")) > 10

# -- resuming

class Later(StopSignal):
    "A stop asked for after so many looks."
    def __init__(self, looks): self.looks = looks
    @property
    def name(self): self.looks -= 1; return "SIGTERM" if self.looks < 0 else ""

@pytest.fixture
def half(cache, tmp_path):
    "A run folder with checkpoints at steps 0, 3, 5, 6, 9, 10, 12, 15, 18 and 20."
    pretrain(config(cache, tmp_path/"run", save_steps=3, keep_last=0))
    return tmp_path/"run"

def test_the_newest_readable_checkpoint_is_taken(cache, half, capsys):
    whole = load_checkpoint(last(half)); raw = last(half).read_bytes()
    last(half).write_bytes(raw[:len(raw) // 2])
    pretrain(config(cache, half, resume="auto"))
    said = capsys.readouterr()
    assert "resuming checkpoint_step18.pt" in said.out and "checkpoint_step20.pt: cannot be read" in said.err and "trying an earlier one" in said.err
    for k, v in tensors(whole).items(): assert torch.equal(tensors(load_checkpoint(half/"checkpoint_step20.pt"))[k], v)

def test_nothing_is_overwritten_when_no_checkpoint_can_be_read(cache, half):
    for p in checkpoints(half): p.write_bytes(b"torn")
    with pytest.raises(InputError, match="none of its 10 checkpoints can be read"): pretrain(config(cache, half, resume="auto"))

def test_continued_from_an_earlier_one(cache, half, tmp_path):
    "Later checkpoints are set aside, later lines of the log go, and the end is the same."
    end = tmp_path/"end.pt"; end.write_bytes(last(half).read_bytes())
    before = [r["step"] for r in read_jsonl(half/"metrics.jsonl")]
    class Now(StopSignal): name = "SIGTERM"
    pretrain(config(cache, half, save_steps=3, keep_last=0, resume=str(half/"checkpoint_step6.pt")), Now())
    assert [step_of(p) for p in checkpoints(half)] == [0, 3, 5, 6, 7] and (half/"checkpoint_step20.aside").exists()
    assert max(r["step"] for r in read_jsonl(half/"metrics.jsonl")) == 7
    pretrain(config(cache, half, save_steps=3, keep_last=0, resume="auto"))
    same(last(half), end)
    assert [s for s in before if s % 2 == 0] == [r["step"] for r in read_jsonl(half/"metrics.jsonl") if r["step"] % 2 == 0]

def test_which_checkpoints_are_kept(cache, tmp_path):
    pretrain(config(cache, tmp_path/"run", save_steps=1, keep_last=2, keep_every=6))
    assert [step_of(p) for p in checkpoints(tmp_path/"run")] == [0, 6, 12, 18, 19, 20]

def test_other_clips_are_not_the_same_run(cache, half, tmp_path):
    (tmp_path/"bad.csv").write_text("file,reason\nvideos/clip3.webm,empty file\n")
    with pytest.raises(InputError, match="trained on other clips"): pretrain(config(cache, half, resume="auto", skip=str(tmp_path/"bad.csv"), batch_size=4))

# -- trouble

def test_a_full_disk_leaves_the_earlier_checkpoint(cache, tmp_path, command):
    "A limit on the size of files stands in for the full disk."
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in dict(TINY, epochs=4, save_steps=5).items()]
    whole = pretrain(config(cache, tmp_path/"whole"))
    class Now(StopSignal): name = "SIGTERM"
    pretrain(config(cache, tmp_path/"run"), Now())
    before = {p.name: p.read_bytes() for p in checkpoints(tmp_path/"run")}
    size = min(map(len, before.values())) // 2
    done = command("stjepa_pretrain", "none", cache, *flags, f"--out={tmp_path/'run'}", "--resume", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "checkpoint_step5.pt: cannot be written, is the disk full?" in done.stderr
    assert {p.name: p.read_bytes() for p in checkpoints(tmp_path/"run")} == before and not list((tmp_path/"run").glob(".*"))
    pretrain(config(cache, tmp_path/"run", resume="auto"))
    same(last(tmp_path/"run"), whole["checkpoint"])

def test_a_checkpoint_that_would_run_code_is_refused(cache, half, tmp_path):
    class Trap:
        def __reduce__(self): return open, (str(tmp_path/"sprung"), "w")
    torch.save(dict(load_checkpoint(last(half)), result=Trap()), half/"checkpoint_step19.pt")
    with pytest.raises(InputError, match="more than tensors and plain values"): pretrain(config(cache, half, resume=str(half/"checkpoint_step19.pt")))
    assert not (tmp_path/"sprung").exists()

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_numbers_that_are_not_finite(cache, tmp_path, monkeypatch, optimizer):
    "Now and then: skipped and counted. Always: the run ends and names the rows."
    from stjepa.clips import CachedClips
    whole, targets, odd = CachedClips.__getitem__, [], set()
    def item(self, key):
        found = whole(self, key)
        if isinstance(self.masks.seed, int) and (found["row"] in odd): found["targets"] = found["targets"] * float("nan")
        return found
    monkeypatch.setattr(CachedClips, "__getitem__", item)
    run = open_run(config(cache, tmp_path/"x"), torch.device("cpu"))
    odd.add(run.steps.clips[0][0])
    result = pretrain(config(cache, tmp_path/"some", log_steps=1, optimizer=optimizer))
    lines = read_jsonl(tmp_path/"some"/"metrics.jsonl")
    ckpt = load_checkpoint(result["checkpoint"])
    assert sum(r.get("skipped", 0) for r in lines) == ckpt["skipped"] == 2 and all(t.isfinite().all() for t in tensors(ckpt["model"]).values())
    odd |= {r for rows in run.steps.clips for r in rows}
    with pytest.raises(InputError, match=r"not finite in 3 steps in a row \(--max-nonfinite 3\); the rows in them: \[\d+, .*\d+\]"): pretrain(config(cache, tmp_path/"all", max_nonfinite=3, log_steps=1, optimizer=optimizer))
    assert [step_of(p) for p in checkpoints(tmp_path/"all")] == [0]

def test_a_loss_that_does_not_fall_is_called_a_collapse(cache, tmp_path, monkeypatch, capsys):
    "Not during the warm-up, and once; a student that has learnt something is left in peace."
    from stjepa import pretrain as module
    judged = module.held_out_loss
    monkeypatch.setattr(module, "held_out_loss", lambda run, *args: judged(run, *args) | dict(hidden_loss=.99, mean_token_loss=.98))
    pretrain(config(cache, tmp_path/"run", warmup_share=.5, log_steps=50))
    said = [r for r in read_jsonl(tmp_path/"run"/"metrics.jsonl") if "warning" in r]
    assert [r["step"] for r in said] == [15] and "collapse?" in said[0]["warning"] and capsys.readouterr().err.count("collapse?") == 1
    monkeypatch.setattr(module, "held_out_loss", lambda run, *args: judged(run, *args) | dict(hidden_loss=.5, mean_token_loss=.98, rankme=10. / (1 + run.steps.total)))
    pretrain(config(cache, tmp_path/"well", warmup_share=.5, log_steps=50))
    assert "collapse?" not in capsys.readouterr().err

# -- what it leaves behind

def job_long(cache, out):
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config(cache, Path(out).parent/"short", epochs=1))
        fds = os.listdir("/proc/self/fd")
        pretrain(config(cache, out, epochs=400, log_steps=100, save_epochs=100))
    assert len(os.listdir("/proc/self/fd")) == len(fds)

def test_memory_does_not_grow_over_two_thousand_steps(cache, tmp_path):
    "Peak memory after the first judgements and checkpoints, and at the end."
    fresh("job_long", cache, tmp_path/"run")
    peak = {r["step"]: r["host_mb"] for r in read_jsonl(tmp_path/"run"/"metrics.jsonl") if "host_mb" in r}
    assert len(peak) == 20 and peak[2000] - peak[600] <= 4, peak

def children(): return set(subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid="], capture_output=True, text=True).stdout.split())

def test_workers_and_files_are_gone_afterwards(cache, tmp_path):
    fds, before = len(os.listdir("/proc/self/fd")), children()
    pretrain(config(cache, tmp_path/"run", num_workers=1, epochs=1))
    time.sleep(.2)
    assert len(os.listdir("/proc/self/fd")) <= fds + 1 and len(children()) <= len(before)

def test_a_trace_that_perfetto_opens(cache, tmp_path):
    pretrain(config(cache, tmp_path/"run", profile=True, epochs=2))
    events = json.loads((tmp_path/"run"/"trace.json").read_text())["traceEvents"]
    names = {e.get("name", "") for e in events}
    assert {"X", "M"} <= {e["ph"] for e in events} and any(n.startswith("aten::scaled_dot_product") for n in names) and "ProfilerStep#3" in names

def test_tensorboard_gets_every_line(cache, tmp_path, monkeypatch):
    "A stand-in with TensorBoard's two methods: what is written, and from where a resumed run purges."
    seen = []
    class Writer:
        def __init__(self, folder, purge_step): seen.append(("purge", purge_step))
        def add_scalar(self, key, value, step): seen.append((key, step))
        def close(self): seen.append(("closed", None))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    pretrain(config(cache, tmp_path/"run", log_steps=10))
    assert seen[0] == ("purge", 1) and seen[-1] == ("closed", None) and {("loss", 10), ("loss", 20), ("hidden_loss", 0), ("hidden_loss", 20)} <= set(seen)

def test_times_and_figures_of_a_line(cache, tmp_path):
    pretrain(config(cache, tmp_path/"run", probe_steps=10))
    lines = read_jsonl(tmp_path/"run"/"metrics.jsonl")
    line, judged = next(r for r in lines if "loss" in r), next(r for r in lines if "hidden_loss" in r)
    assert {"data_s", "compute_s", "other_s", "data_share", "clips_per_s", "host_mb", "grad_norm", "lr", "epoch", "skipped"} <= line.keys()
    assert {"hidden_loss", "mean_token_loss", "feature_std", "rankme", "probe_top1"} <= judged.keys() and judged["step"] == 0
    assert [r["step"] for r in lines if "probe_top1" in r] == [0, 5, 10, 15, 20]

# -- options

def test_options_from_a_file(cache, tmp_path, command):
    "The file fills in, the command line wins, and the run's own config.json is such a file."
    (tmp_path/"run.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in dict(TINY, epochs=3, cache_dir=str(cache), data_root="none").items()))
    done = command("stjepa_pretrain", "--config", tmp_path/"run.toml", "--epochs", 1, "--out", tmp_path/"run")
    assert done.returncode == 0, done.stderr
    stored = read_json(tmp_path/"run"/"config.json")
    assert (stored["epochs"], stored["embed_dim"], stored["cache_dir"]) == (1, 24, str(cache)) and stored["run"]["steps"] == 5
    done = command("stjepa_pretrain", "--config", tmp_path/"run"/"config.json", "--out", tmp_path/"again")
    assert done.returncode == 0, done.stderr
    same(last(tmp_path/"run"), last(tmp_path/"again"))

@pytest.mark.parametrize("text, says", [("epoch = 3", "unknown option epoch"), ('epochs = "3"', "epochs is '3', expected int"), ("mask = 'all'", "expected random or multiblock"),
                                        ("num_heads = 5", "embed_dim 384 cannot be divided by num_heads 5"), ("epochs =", "not toml")])
def test_a_file_with_odd_options(text, says, tmp_path, monkeypatch, capsys):
    from stjepa.core import parse_config
    (tmp_path/"run.toml").write_text(text)
    with pytest.raises(SystemExit) as exit: parse_config(PretrainConfig, ["here", "there", "--config", str(tmp_path/"run.toml")], "stjepa_pretrain")
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and says in err, err

def test_videos_left_out(cache, tmp_path, capsys):
    (tmp_path/"bad.csv").write_text("file,reason\nvideos/clip3.webm,empty file\nvideos/clip8.webm,no video stream\n")
    pretrain(config(cache, tmp_path/"run", epochs=1, skip=str(tmp_path/"bad.csv")))
    assert "2 left out by --skip" in capsys.readouterr().out
    run = open_run(config(cache, tmp_path/"run", skip=str(tmp_path/"bad.csv")), torch.device("cpu"))
    used = {Cache(cache).ids[r] for r in [*sum(run.steps.clips, []), *run.steps.held]}
    (tmp_path/"more.csv").write_text("file,reason\nvideos/clip9.webm,empty file\n")
    assert open_run(config(cache, tmp_path/"run", skip=f"{tmp_path/'bad.csv'},{tmp_path/'more.csv'}"), torch.device("cpu")).steps.skipped == 3
    with pytest.raises(InputError, match="gone.csv"): open_run(config(cache, tmp_path/"run", skip=f"{tmp_path/'bad.csv'},{tmp_path/'gone.csv'}"), torch.device("cpu"))
    assert len(used) == 23 and not used & {"clip3", "clip8"}

@pytest.mark.parametrize("options", [dict(prediction="joint"), dict(prediction="tail"), dict(loss="l1", whiten=True), dict(loss="smooth_l1", visible_weight=.5),
    dict(mask="multiblock", masks_per_clip=2), dict(mask_ratio=.75, mask_ratio_end=.25, mask_schedule="cosine", epochs=3), dict(pattern="J2", positions="rotary", embed_dim=48, predictor_dim=48),
    dict(positions="learned", predict_share=.5), dict(dtype="bfloat16"), dict(accumulate=2), dict(optimizer="muon")], ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_every_way_to_train_can_be_stopped_and_continued(cache, tmp_path, options):
    torch.set_num_threads(1)
    small = dict(epochs=2, **options) if "epochs" not in options else options
    whole = pretrain(config(cache, tmp_path/"whole", **small))
    assert pretrain(config(cache, tmp_path/"cut", **small), Later(3))["stopped"]
    pretrain(config(cache, tmp_path/"cut", **small, resume="auto"))
    same(last(tmp_path/"cut"), whole["checkpoint"])
    assert 0 < whole["hidden_loss"] < 3

def test_a_compiled_student_is_the_same_student(cache, tmp_path, monkeypatch):
    "Through the compiler's front end (no C++ is compiled here); its checkpoint is like any other."
    compiled, plain = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(plain(self, backend="aot_eager", **options)))
    whole = [pretrain(config(cache, tmp_path/name, epochs=1, drop_path=0., compile=flag)) for name, flag in (("plain", False), ("compiled", True))]
    assert len(compiled) == 1
    a, b = (tensors(load_checkpoint(w["checkpoint"])["model"]) for w in whole)
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-4)

@pytest.mark.cuda
@pytest.mark.parametrize("options", [dict(), dict(compile=True), dict(optimizer="muon"), dict(num_workers=1)], ids=str)
def test_on_a_gpu(cache, tmp_path, options):
    "In bfloat16: it learns what the CPU learns but for rounding, and can be stopped and continued."
    small = dict(epochs=2, device="cuda", drop_path=0., **options)
    whole = pretrain(config(cache, tmp_path/"whole", **small))
    alone = pretrain(config(cache, tmp_path/"cpu", **dict(small, device="cpu", compile=False)))
    assert whole["hidden_loss"] == pytest.approx(alone["hidden_loss"], abs=.02)
    assert pretrain(config(cache, tmp_path/"cut", **small), Later(3))["stopped"]
    assert pretrain(config(cache, tmp_path/"cut", **small, resume="auto"))["hidden_loss"] == pytest.approx(whole["hidden_loss"], abs=.01)
    assert any(r.get("gpu_mb", 0) > 0 for r in read_jsonl(tmp_path/"cut"/"metrics.jsonl"))

# -- the size of the real thing

def test_a_run_over_an_index_of_ssv2s_size(tmp_path):
    "168,913 records, a few real files, a cache of those: it starts, and takes its videos from the right files."
    from stjepa.ssv2 import ssv2
    from stjepa.video import View, write_video
    ids, few = [str(i) for i in range(1, 168_914)], [str(i) for i in range(7, 168_914, 8000)]
    records = [dict(id=i, label="", template="Pushing [something]", placeholders=[]) for i in ids]
    (tmp_path/"train.json").write_text(json.dumps(records)); (tmp_path/"labels.json").write_text('{"Pushing something": "0"}')
    (tmp_path/"videos").mkdir()
    for n, i in enumerate(few): write_video(tmp_path/"videos"/f"{i}.webm", torch.full((9, 32, 40, 3), 8 * n, dtype=torch.uint8).numpy(), fps=12)
    data = ssv2(tmp_path)
    assert len(data) == len(few) and len(data.missing) == len(ids) - len(few)
    noise_cache(tmp_path/"cache", clips=len(few), grid=(2, 2, 2), dim=8, ids=few, frames=False, num_frames=9)
    run = open_run(replace(config(tmp_path/"cache", tmp_path/"run"), data_root=str(tmp_path), batch_size=8), torch.device("cpu"))
    batch = next(iter(training_batches(run, 0)))
    assert batch["count"] == 8 and not batch["errors"]
    for row, frames in zip(batch["rows"], batch["frames"]): assert abs(float(frames.float().mean()) - 8 * row) < 4

def test_a_split_of_ssv2s_size(monkeypatch):
    "168,913 clips of two views each: which are held out depends on ids alone, and an epoch shows every other clip once."
    import numpy as np
    from stjepa.clips import split_rows, step_keys
    n = 168_913
    big = types.SimpleNamespace(ok_rows=np.arange(2 * n), ids=[str(i // 2) for i in range(2 * n)], clip_of=lambda r: r // 2, path="big")
    clips, held = split_rows(big, types.SimpleNamespace(skip="", holdout_share=.02, holdout_limit=2000))
    assert (len(clips), len(held)) == (n - 2000, 2000) and all(r % 2 == 0 for r in held)
    per_epoch = len(clips) // 256
    keys = [r for k in step_keys(clips, 256, 0, range(per_epoch)) for _, r in k]
    assert len({r // 2 for r in keys}) == len(keys) == per_epoch * 256 and not {r // 2 for r in keys} & {r // 2 for r in held}
