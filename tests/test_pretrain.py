"The training job as a process: killed and resumed, on two processes, on bad input."
import os, signal, subprocess, time
from pathlib import Path
import pytest, torch
from conftest import BIN, SMALL
from stjepa.core import read_jsonl
from stjepa.pretrain import PretrainConfig, load_checkpoint, pretrain

EPOCHS, RUN = 6, {**SMALL, "patch_start": "whiten"}

def flags(toy, cache_dir, out, **more):
    "The command line of a small run."
    options = {**RUN, "epochs": EPOCHS, "out": out, **more}
    return [str(toy/"ssv2"), str(cache_dir), *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]

def same(a, b):
    "Two checkpoints hold the same weights, bit for bit."
    for part in ("model", "predictor", "ema", "ema_predictor"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]: assert torch.equal(a[part][name], b[part][name]), f"{part} {name}"

@pytest.fixture(scope="module")
def whole(toy, cache_dir, tmp_path_factory):
    "Result and final checkpoint of a run that nobody disturbed."
    out = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    result = pretrain(PretrainConfig(str(toy/"ssv2"), str(cache_dir), out=str(out/"run"), epochs=EPOCHS, **RUN))
    return result, load_checkpoint(result["checkpoint"])

def test_killed_and_resumed_is_the_same_run(toy, cache_dir, tmp_path, whole, command):
    out = tmp_path/"run"
    env = dict(os.environ, OMP_NUM_THREADS="1")
    job = subprocess.Popen([BIN/"stjepa_pretrain", *flags(toy, cache_dir, out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while len(list(out.glob("checkpoint_step*.pt"))) < 2 and job.poll() is None and time.time() < deadline: time.sleep(.01)
    job.send_signal(signal.SIGKILL); job.wait()
    done = command("stjepa_pretrain", *flags(toy, cache_dir, out), "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming checkpoint_step" in done.stdout
    same(load_checkpoint(out/Path(whole[0]["checkpoint"]).name), whole[1])

def test_two_processes_make_the_same_student(toy, cache_dir, tmp_path, whole):
    "Half of every batch on each of two processes, clips decoded by each: sums in another order, so equal to 1e-4 and not to the bit."
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([BIN/"torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", BIN/"stjepa_pretrain",
                           *flags(toy, cache_dir, tmp_path/"two", log_steps=1)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    last = [r for r in read_jsonl(tmp_path/"two"/"metrics.jsonl") if "hidden_loss" in r][-1]
    assert last["step"] == whole[0]["steps"]
    assert last["hidden_loss"] == pytest.approx(whole[0]["hidden_loss"], abs=1e-4)
    assert done.stdout.count("step 0: student") == 1

def test_the_loss_falls_below_the_mean_token(whole):
    result, ckpt = whole
    assert 0 < result["hidden_loss"] < result["mean_token_loss"]
    assert all(torch.isfinite(t).all() for t in ckpt["model"].values())

def test_an_unreadable_video_is_listed_and_too_many_end_the_job(toy, tmp_path, cache_dir, command):
    import shutil
    shutil.copytree(toy/"ssv2", tmp_path/"ssv2")
    for video in (tmp_path/"ssv2").rglob("*.webm"): video.write_bytes(b"<html>not found</html>")
    done = command("stjepa_pretrain", tmp_path/"ssv2", *flags(toy, cache_dir, tmp_path/"run", patch_start="random")[1:])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be decoded" in done.stderr or "could be decoded" in done.stderr

def test_a_changed_video_is_refused(toy, tmp_path, cache_dir, command):
    import shutil
    shutil.copytree(toy/"ssv2", tmp_path/"ssv2")
    from stjepa.ssv2 import ssv2
    from stjepa.video import write_video
    for r in ssv2(tmp_path/"ssv2", "train").records: write_video(r.path, torch.zeros(9, 64, 65, 3, dtype=torch.uint8).numpy(), fps=12)
    done = command("stjepa_pretrain", tmp_path/"ssv2", *flags(toy, cache_dir, tmp_path/"run")[1:])
    assert done.returncode == 1 and "Traceback" not in done.stderr and "the file has 9" in done.stderr

def test_views_take_turns(toy, tmp_path):
    "A cache of two views without frames: every pair of epochs shows each view once, and its pixels are those the target was made of."
    from stjepa.build_cache import BuildConfig, build_cache
    from stjepa.cache import Cache
    from stjepa.pretrain import open_run, training_batches
    build = dict(teacher=str(toy/"teacher"), dim=32, num_workers=0, device="cpu", views=2)
    for name, more in (("bare", {}), ("stored", dict(store_frames=True))): build_cache(BuildConfig(str(toy/"ssv2"), str(tmp_path/name), **build, **more))
    run = open_run(PretrainConfig(str(toy/"ssv2"), str(tmp_path/"bare"), out=str(tmp_path/"run"), epochs=2, **SMALL), torch.device("cpu"))
    stored, seen = Cache(tmp_path/"stored"), []
    for batch in training_batches(run, 0):
        assert not batch["errors"]
        for row, frames in zip(batch["rows"], batch["frames"]): assert torch.equal(frames, stored.frames(row))
        seen += batch["rows"]
    assert len(set(seen)) == len(seen) and {r % 2 for r in seen} == {0, 1}
    assert all(r % 2 == 0 for r in run.steps.held) and not {r // 2 for r in seen} & {r // 2 for r in run.steps.held}
