"The list of runs as a command."
import json, shutil
import pytest
from stjepa.core import read_jsonl
from stjepa.runs import differing, draw_run, find_runs, read_run

@pytest.fixture
def runs(run_dir, tmp_path):
    "Two copies of a run, of which one is said to have had another seed, and one was cut off."
    for name in ("a", "deep/b"): shutil.copytree(run_dir, tmp_path/"runs"/name)
    config = tmp_path/"runs/deep/b/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(seed=7)))
    log = tmp_path/"runs/deep/b/metrics.jsonl"
    log.write_text(log.read_text().splitlines(True)[0] + '{"step": 3, "lo')
    (tmp_path/"runs/other").mkdir(); (tmp_path/"runs/other/config.json").write_text("{}")
    return tmp_path/"runs"

def test_the_table(runs, command):
    done = command("stjepa_runs", runs, "--draw", runs/"held_out.png")
    assert done.returncode == 0, done.stderr
    head, a, b = done.stdout.strip().split("\n")
    assert head.split()[-1] == "seed" and a.split()[0] == "a" and b.split()[0] == "deep/b" and (a.split()[-1], b.split()[-1]) == ("0", "7")
    assert b.split()[1].startswith("0/") and a.split()[1] == "/".join([a.split()[1].split("/")[0]] * 2)
    assert (runs/"held_out.png").read_bytes().startswith(b"\x89PNG")

def test_what_a_run_says(runs):
    a, b = find_runs(runs)
    assert differing([a, b]) == ["seed"] and a.finished and not b.finished and b.step == 0
    assert a.last("hidden_loss") == [r["hidden_loss"] for r in read_jsonl(runs/"a/metrics.jsonl") if "hidden_loss" in r][-1]
    assert b.last("loss") is None
    for run in (a, b, read_run(runs/"a")): assert draw_run(run).axes[0].lines

def test_no_runs(tmp_path, command):
    done = command("stjepa_runs", tmp_path)
    assert done.returncode == 1 and done.stderr == f"stjepa_runs: error: {tmp_path}: no training run in it\n"
    done = command("stjepa_runs", tmp_path/"gone")
    assert done.returncode == 1 and "Traceback" not in done.stderr
