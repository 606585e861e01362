"Benchmarks: what a row says, that the file holds what was measured, and that the committed figures add up."
import json
import numpy as np, pytest
from conftest import ROOT
from stjepa import bench, bench_data
from stjepa.bench import BenchConfig, bench_row, show_rows, side_by_side
from stjepa.core import InputError, cores, hardware
from stjepa.video import View, load_clip, probe

KEYS = ["name", "ours", "reference", "ratio", "unit", "hardware", "command"]

def need_row(row):
    assert list(row)[:7] == KEYS # more may follow, e.g. operations per clip
    assert all(isinstance(row[k], (int, float)) and row[k] > 0 for k in ("ours", "reference", "ratio")) and abs(row["ratio"] - row["ours"] / row["reference"]) < 1e-9
    assert ("lower is better" in row["unit"]) != ("higher is better" in row["unit"])
    assert "cores" in row["hardware"] and "torch" in row["hardware"] and row["command"]

@pytest.mark.parametrize("path", sorted((ROOT/"nbs/results").glob("bench_*.json")), ids=lambda p: p.stem)
def test_committed_rows_add_up(path):
    rows = json.loads(path.read_text())
    assert len({row["name"] for row in rows}) == len(rows) > 0
    for row in rows: need_row(row); assert row["command"].startswith("stjepa_bench ") and "/tmp" not in row["command"]
    assert path.stem != "bench_data" or {"clip_ready_vs_decode", "worker_scaling"} <= {row["name"] for row in rows}

def test_sides_take_turns_and_alternate():
    calls = []
    side_by_side(lambda: calls.append("a"), lambda: calls.append("b"), repeats=4, warmup=1)
    assert calls[:2] == ["a", "b"] and calls.count("a") == calls.count("b") == 5
    assert {"".join(calls[i:i + 2]) for i in range(2, 10, 2)} == {"ab", "ba"}

def test_a_median_is_not_moved_by_one_slow_call():
    slow = iter([1., 1., 1., 99., 1.])
    assert side_by_side(lambda: next(slow), lambda: 2., repeats=5, warmup=0, timed=lambda f: f()) == (1., 2.)
    same = lambda: 1.
    assert side_by_side(same, same, repeats=3, timed=lambda f: f()) == (1., 1.)

def test_a_row_names_machine_and_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/stjepa_bench", "data", "--json", "two words.json"])
    row = bench_row("x", 3., 2., "ms, lower is better")
    need_row(row); assert row["ratio"] == 1.5 and row["command"] == "stjepa_bench data --json 'two words.json'" and row["hardware"] == hardware()
    assert f"{cores()} cores" in hardware() and "x " in show_rows([row])

def test_a_result_file_holds_what_was_printed(monkeypatch, tmp_path, capsys):
    made = [bench_row("one", 1., 2., "ms, lower is better"), bench_row("two", 3., 2., "clips/s, higher is better")]
    monkeypatch.setattr(bench_data, "rows", lambda config: made)
    assert bench.bench(BenchConfig("data", json=str(tmp_path/"rows.json"), device="cpu")) == made
    assert json.loads((tmp_path/"rows.json").read_text()) == made
    out = capsys.readouterr().out
    assert all(word in out for word in ("one", "two", "0.5", "1.5", hardware()))
    for wrong in (dict(repeats=0), dict(threads=0)):
        with pytest.raises(InputError, match="expected positive numbers"): bench.bench(BenchConfig("data", device="cpu", **wrong))

def test_rooms_are_found_by_their_names():
    assert {"data"} <= set(bench.rooms()) and bench.rooms("data") == ["data"]
    with pytest.raises(InputError, match="date: expected one of .*data.*, or all"): bench.bench(BenchConfig("date", device="cpu"))

@pytest.fixture(scope="module")
def clips(tmp_path_factory): return bench_data.write_clips(tmp_path_factory.mktemp("clips"), number=2)

def test_the_clips_are_like_ssv2s(clips, tmp_path):
    for path in clips:
        assert probe(path)[:4] == (48, 12, 240, 427) and 5e4 < path.stat().st_size < 2e5
        x = load_clip(path, View()).frames.float()
        assert x[1:].sub(x[:-1]).abs().mean() > 1, "nothing moves"
    assert clips[0].read_bytes() != clips[1].read_bytes()
    assert np.array_equal(load_clip(bench_data.write_clips(tmp_path, 1)[0], View()).frames, load_clip(clips[0], View()).frames), "not the same clips again"

def test_rows_of_the_data_room(clips, tmp_path):
    config = BenchConfig("data", repeats=1)
    root = bench_data.write_index(tmp_path/"index", number=300)
    made = [bench_data.clip_ready(config, clips), bench_data.views_together(config, clips, 2), bench_data.list_reading(config, root)]
    for row in made: need_row(row)
    assert [r["name"] for r in made] == ["clip_ready_vs_decode", "views_in_one_decode", "ssv2_index_vs_json"]

def test_worker_scaling_is_clips_per_second_of_all_beside_one(monkeypatch):
    monkeypatch.setattr(bench_data, "loading_time", lambda paths, n: 0.1 / n)
    row = bench_data.worker_scaling(BenchConfig("data"), [])
    need_row(row); assert abs(row["ratio"] - cores()) < 1e-9 and abs(row["reference"] - 10) < 1e-9 and f"{cores()} workers" in row["unit"]

@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_clock_counts_what_comes_after_every_workers_first_batch(num_workers, clips, monkeypatch):
    "With a clock that ticks once per batch taken, the time is that of the batches counted."
    ticks = iter(range(1000)); taken = []
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: float(next(ticks)))
    loader = bench_data.loader
    def counted(records, *args, **kwargs):
        for batch in loader(records, *args, **kwargs): taken.append(len(batch["rows"])); yield batch
    monkeypatch.setattr(bench_data, "loader", counted)
    found = bench_data.loading_time(clips, num_workers, batches=3, batch_size=2)
    assert sum(taken) == num_workers * 6 and abs(found - 1 / (num_workers * 4)) < 1e-9

def test_rows_of_the_gpu_room(tmp_path, capsys):
    "On the CPU with a tiny student: read from the log of a real run; without a GPU the room is empty."
    from dataclasses import replace
    from stjepa import bench_gpu
    from stjepa.bench_scaling import noise_cache
    from stjepa.bench_step import Step
    from stjepa.student import StudentConfig
    small = Step(StudentConfig(num_frames=4, size_px=32, embed_dim=24, depth_factorised=1, depth_joint=1, num_heads=2), batch=4, ratio=.5, share=1.,
                 predictor_dim=24, predictor_depth=1)
    cache, config = noise_cache(tmp_path/"cache", clips=25, grid=(2, 2, 2), dim=24), BenchConfig("gpu", device="cpu")
    made = bench_gpu.every_batch(config, small, (2, 4), 1e12, clips=25, steps=9, log_steps=3)
    for row in made: need_row(row)
    assert [row["name"] for row in made] == [f"train_{what}_b{b}" for b in (2, 4) for what in ("share_of_matmul", "peak_memory", "data_wait")]
    share, peak, wait = made[3:]
    speed = float(share["unit"].split("; ")[1].split()[0])
    assert share["ours"] == pytest.approx(speed * bench_gpu.flops_per_clip(small, bench_gpu.our_side) / 1e12, rel=.05) and share["reference"] == 1
    assert .1 < peak["ours"] < 4 and 0 < wait["ours"] < 1
    with pytest.raises(InputError, match="batch_size 400"): bench_gpu.training_rows(config, replace(small, batch=400), cache, 1e12)
    assert bench_gpu.rows(config) == [] and "no CUDA GPU" in capsys.readouterr().out

@pytest.mark.cuda
def test_the_gpu_room_on_a_gpu(tmp_path):
    "At full size: ten rows, a step that is not waiting for data, and a cache that saves time."
    from stjepa import bench_gpu
    made = {row["name"]: row for row in bench_gpu.rows(BenchConfig("gpu", repeats=10, device="cuda"))}
    for row in made.values(): need_row(row)
    assert set(made) == {f"train_{what}_b{b}" for what in ("share_of_matmul", "peak_memory", "data_wait") for b in (32, 64, 128)} | {"cached_vs_online"}
    assert made["cached_vs_online"]["ratio"] > 1 and all(0 < made[f"train_share_of_matmul_b{b}"]["ratio"] < 1 for b in (32, 64, 128))
