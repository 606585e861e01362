"Markers, and the small real files that the tests share: made once per session, and only if a test asks."
import configparser, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}" # torchrun starts console scripts by their names

PARSER = configparser.ConfigParser(delimiters=["="])
PARSER.read(ROOT/"settings.ini", encoding="utf-8")
ENTRIES = dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in PARSER["DEFAULT"]["console_scripts"].splitlines() if line) # command -> module:function

def _absent(item):
    "Why a test of this machine cannot run, or nothing."
    if item.get_closest_marker("cuda"):
        import torch
        if not torch.cuda.is_available(): return "no NVIDIA GPU"
    if item.get_closest_marker("data") and not os.environ.get("STJEPA_DATA"): return "STJEPA_DATA is not set"

def pytest_collection_modifyitems(items):
    for item in items:
        if reason := _absent(item): item.add_marker(pytest.mark.skip(reason=reason))

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Nothing but `cuda` and `data` may be skipped: any other skip is a failure."
    report = yield
    if report.skipped and not (item.get_closest_marker("cuda") or item.get_closest_marker("data")):
        report.outcome, report.longrepr = "failed", f"skipped without being marked cuda or data: {report.longrepr}"
    return report

@pytest.fixture(scope="session")
def command():
    "Run a console script as a user does: `command(\"stjepa_toy\", \"--help\")` -> CompletedProcess with text output."
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")} | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    def run(name, *args, timeout=300, **kwargs):
        return subprocess.run([str(BIN/name), *map(str, args)], capture_output=True, text=True, timeout=timeout, env=env, **kwargs)
    return run

@pytest.fixture(scope="session")
def python():
    "Run a line of Python in a fresh interpreter; returns what it printed."
    def run(code):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    return run

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    "The four datasets and the small teacher, a few clips each, as real files. Not to be changed: copy what you break."
    from stjepa.toy import tiny_toy
    out = tmp_path_factory.mktemp("toy")
    tiny_toy(out, seed=0)
    return out

@pytest.fixture(scope="session")
def cache_dir(toy, tmp_path_factory):
    "A finished cache of the toy SSv2."
    from stjepa.build_cache import BuildConfig, build_cache
    out = tmp_path_factory.mktemp("cache")/"cache"
    build_cache(BuildConfig(str(toy/"ssv2"), str(out), teacher=str(toy/"teacher"), dim=32, num_workers=0, device="cpu"))
    return out

SMALL = dict(batch_size=4, mask_ratio=.5, embed_dim=48, depth_factorised=2, depth_joint=1, num_heads=4, predictor_dim=48,
             predictor_depth=1, holdout_share=.2, num_workers=0, device="cpu")

@pytest.fixture(scope="session")
def run_dir(toy, cache_dir, tmp_path_factory):
    "The run folder of a student trained for one epoch on that cache."
    from stjepa.pretrain import PretrainConfig, pretrain
    out = tmp_path_factory.mktemp("run")/"run"
    pretrain(PretrainConfig(str(toy/"ssv2"), str(cache_dir), out=str(out), epochs=1, **SMALL))
    return out
