"A study as a job: what it writes, what it refuses, and that it takes nobody along when it is killed."
import os, signal, subprocess, time
from pathlib import Path
import pytest
from conftest import BIN
from stjepa.ablations import read_study
from stjepa.core import InputError, read_jsonl

STUDY = '''
steps = 6
seeds = [0]
[toy]
ssv2_train = 24
[judge]
seed = 1
ucf101_groups = 4
ucf101_clips = 1
[build_cache]
dim = 32
[pretrain]
batch_size = 4
mask_ratio = 0.5
embed_dim = 48
depth_factorised = 1
depth_joint = 1
num_heads = 4
predictor_dim = 48
predictor_depth = 1
holdout_share = 0.2
[arms."mask/two masks"]
masks_per_clip = 2
'''

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder/"study.toml").write_text(STUDY)
    return folder

def ablate(command, study, *more): return command("stjepa_ablate", study/"study.toml", "--out", study/"out", *more)

def test_a_study_goes_on_where_it_stopped(command, study):
    done = ablate(command, study, "--arms", "base")
    assert done.returncode == 0, done.stderr
    first = read_jsonl(study/"out"/"results.jsonl")
    assert {r["arm"] for r in first} == {"base", "floor/random_init", "floor/mean_pixel", "ceiling/teacher", "ceiling/teacher_projected"}
    again = ablate(command, study)
    assert again.returncode == 0, again.stderr
    rows = read_jsonl(study/"out"/"results.jsonl")
    assert rows[:len(first)] == first and len(rows) == len(first) + 1
    ours = rows[-1]
    assert ours["options"] == dict(masks_per_clip=2) and ours["steps"] == round(6 / ours["step_ratio"]) and 0 <= ours["linear_predicted"] <= 1
    assert "| mask/two masks | 1 |" in again.stdout and not list((study/"out"/"runs").rglob("*.pt"))

def test_a_study_of_real_data_takes_a_finished_cache(command, tmp_path, toy, cache_dir):
    rendered, recipe = STUDY.index("[toy]"), STUDY.index("[pretrain]")
    (tmp_path/"real.toml").write_text(STUDY[:rendered] + f'''
[data]
ssv2 = "{toy}/ssv2"
ucf101 = "{toy}/ucf101"
per_class = 2
num_workers = 1
[build_cache]
cache_dir = "{cache_dir}"
teacher = "{toy}/teacher"
''' + STUDY[recipe:])
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(cache_dir).rglob("*"))
    done = command("stjepa_ablate", tmp_path/"real.toml", "--out", tmp_path/"out", "--arms", "base")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path/"out"/"results.jsonl")
    assert len(rows) == 5 and all(0 <= r["linear"] <= 1 for r in rows)
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(cache_dir).rglob("*")) == before and not list((tmp_path/"out").glob("cache-*"))

def test_results_of_another_base_are_refused(command, study):
    done = ablate(command, study, "--steps", 7)
    assert done.returncode == 1 and "was run with another base" in done.stderr.strip().splitlines()[-1]

def test_nobody_trains_on_when_the_command_is_killed(study):
    job = subprocess.Popen([BIN/"stjepa_ablate", study/"study.toml", "--out", study/"out", "--seeds", "1,2", "--arms", "base,mask"], start_new_session=True,
                           env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mine = lambda: [pid for pid in os.listdir("/proc") if pid.isdigit() and _session(pid) == job.pid and "spawn_main" in _command(pid)]
    _until(lambda: mine() or job.poll() is not None)
    assert mine()
    job.send_signal(signal.SIGKILL); job.wait()
    _until(lambda: not mine())
    assert not mine()

def _until(true, seconds:float=120):
    end = time.time() + seconds
    while not true() and time.time() < end: time.sleep(.05)

def _command(pid):
    try: return open(f"/proc/{pid}/cmdline").read()
    except OSError: return ""

def _session(pid):
    try: return os.getsid(int(pid))
    except OSError: return None

@pytest.mark.parametrize("was, now, said", [("steps = 6\n", "", "steps missing"), ("masks_per_clip", "masks_pre_clip", "unknown option masks_pre_clip"),
                                            ("seed = 1", "seed = 0", "toy and judge have the same seed"), ("steps = 6", "steps = ", "not toml"),
                                            ("[toy]", '[data]\nssv2 = "nowhere"\n[toy]', "both real data"), ("[toy]\nssv2_train = 24\n[judge]\nseed = 1\nucf101_groups = 4\nucf101_clips = 1",
                                             '[data]\nssv2 = "nowhere"\nucf101 = "nowhere"', "section data: ssv2 nowhere: no such folder")])
def test_a_study_that_makes_no_sense_is_refused(tmp_path, was, now, said):
    (tmp_path/"study.toml").write_text(STUDY.replace(was, now))
    with pytest.raises(InputError, match=said): read_study(tmp_path/"study.toml")
