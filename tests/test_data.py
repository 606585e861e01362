"The check of a dataset's folder: what it recognises, what it finds bad, what no decoder can do to it, and who takes its list."
import csv, dataclasses, json, multiprocessing, os, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest
from stjepa.core import InputError
from stjepa.data import SIGNS, DataConfig, Verdict, Verdicts, check_data, check_file, need_whole, show_samples, signs, verify, write_csv
from stjepa.records import read_skip, scan_files, skipped_rows
from stjepa.ssv2 import ssv2
from stjepa.video import VideoError, View, load_clip, write_video

def check(root, **options): return check_data(DataConfig("check", str(root), num_workers=2, **options))
def bad_of(out): return read_skip(Path(out)/"bad_videos.csv")

def gone(pid):
    "Whether a process has ended, waited for as long as a loaded machine may need."
    for _ in range(600):
        try: os.kill(pid, 0)
        except ProcessLookupError: return True
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1][0] == "Z": return True # orphan that init has not reaped
        time.sleep(0.1)
    return False

# -- which dataset

LISTED = dict(ssv2=[24, 12, 4], ucf101=[36, 12] * 3, msrvtt=[16, 8], msvd=[16, 4, 8])

@pytest.mark.parametrize("name", LISTED)
def test_a_dataset_is_recognised_and_counted(name, toy, capsys):
    found = check(toy/name, verify=False)
    assert found["dataset"] == name and [s["listed"] for s in found["splits"]] == LISTED[name] and not found["refused"] and found["unlisted"] == 0
    assert all(s["missing"] == 0 for s in found["splits"])
    text = capsys.readouterr().out
    assert "no --out FOLDER: the findings are printed and not kept" in text and f"{name} " in text
    if name in ("msrvtt", "msvd"): assert all(s["captions"] >= s["with_video"] and s["captions_per_video"]["min"] >= 1 for s in found["splits"])
    else: assert {s["classes"] for s in found["splits"]} == {12}

def test_lists_in_a_folder_below_the_root(toy, tmp_path):
    root = shutil.copytree(toy/"msrvtt", tmp_path/"msrvtt")
    (root/"annotations").mkdir()
    for path in root.glob("*.json"): path.rename(root/"annotations"/path.name)
    assert check(root, verify=False)["dataset"] == "msrvtt"

def test_none_and_several_are_errors_that_say_what_was_looked_for(toy, tmp_path):
    with pytest.raises(InputError) as error: check(toy/"teacher")
    assert all(pattern in str(error.value) for patterns in SIGNS.values() for pattern in patterns) and "no dataset recognised" in str(error.value)
    both = shutil.copytree(toy/"msvd", tmp_path/"both"); shutil.copy(toy/"ssv2/labels.json", both)
    with pytest.raises(InputError, match="more than one dataset: ssv2 by labels.json; msvd by msvd_test.json"): check(both)
    assert check(both, dataset="msvd", verify=False)["dataset"] == "msvd"
    with pytest.raises(InputError, match="no such folder"): check(tmp_path/"gone")

@pytest.mark.parametrize("files, names", [
    (["something-something-v2-labels.json"], ["ssv2"]), (["labels/labels.json"], ["ssv2"]), (["a/b/labels.json"], []), (["train_val_videodatainfo.json"], ["msrvtt"]),
    (["MSRVTT_data.json.gz"], ["msrvtt"]), (["MSRVTT_JSFUSION_test.csv"], ["msrvtt"]), (["raw-captions.pkl"], ["msvd"]), (["ucfTrainTestlist/classInd.txt"], ["ucf101"]),
    (["MSRVTT_1.mp4"], []), (["train.json"], [])])
def test_signs_are_names_of_lists(files, names): assert list(signs(files)) == names

def test_a_refused_list_does_not_hide_the_others(toy, tmp_path, capsys):
    root = shutil.copytree(toy/"ssv2", tmp_path/"ssv2")
    (root/"validation.json").write_text("[1"); (root/"test.json").unlink()
    found = check(root, verify=False)
    assert [s["split"] for s in found["splits"]] == ["train"] and list(found["refused"]) == ["validation"] and found["absent"] == ["test"]
    assert "validation.json: not json" in found["refused"]["validation"] and "no list for test" in capsys.readouterr().out
    with pytest.raises(InputError, match="not json"): check(root, split="validation")
    with pytest.raises(InputError, match="not found, expected test.json"): check(root, split="test")
    with pytest.raises(InputError, match="--split dev: ssv2 has train, validation, test"): check(root, split="dev")

# -- what is bad about videos

def audio_only(path):
    import av
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono"); frame.rate = 8000
        container.mux(stream.encode(frame)); container.mux(stream.encode())

SPOILS = { # what happens to a file -> words of the reason
    "empty": (lambda p: p.write_bytes(b""), "empty file"),
    "html": (lambda p: p.write_text("<html>404 Not Found</html>" * 99), "not a readable video"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "not a readable video"),
    "header": (lambda p: p.write_bytes(p.read_bytes()[:300]), ""),
    "torn": (lambda p: p.write_bytes(p.read_bytes()[:3000]), "truncated"),
    "audio": (audio_only, "no video stream")}
ABSENT = {
    "folder": lambda p: (p.unlink(), p.mkdir()), "pipe": lambda p: (p.unlink(), os.mkfifo(p)), "link": lambda p: (p.unlink(), p.symlink_to("nowhere.webm")),
    "deleted": lambda p: p.unlink()}

@pytest.fixture(scope="module")
def spoiled(toy, tmp_path_factory):
    "A copy of the toy SSv2 with bad videos of many kinds, what they are, and what the check found."
    root = shutil.copytree(toy/"ssv2", tmp_path_factory.mktemp("spoiled")/"ssv2")
    records = iter(ssv2(root).records)
    bad = {kind: next(records) for kind in SPOILS}
    for kind, record in bad.items(): SPOILS[kind][0](record.path)
    lost = {kind: next(records) for kind in ABSENT}
    for kind, record in lost.items(): ABSENT[kind](record.path)
    out = root.parent/"found"
    return root, out, bad, lost, check(root, out=str(out))

@pytest.mark.parametrize("kind", SPOILS)
def test_a_spoiled_video_is_listed_with_its_reason(kind, spoiled):
    root, out, bad, _, _ = spoiled
    reason = bad_of(out)[bad[kind].path.relative_to(root).as_posix()]
    assert reason and SPOILS[kind][1] in reason and str(root) not in reason, reason

def test_nothing_else_is_listed(spoiled):
    root, out, bad, lost, found = spoiled
    assert set(bad_of(out)) == {r.path.relative_to(root).as_posix() for r in bad.values()}
    assert [tuple(row.values()) for row in csv.DictReader(open(out/"missing.csv", newline=""))] == [("train", r.id) for r in lost.values()]
    assert json.load(open(out/"summary.json")) == found
    v = found["verified"]
    assert (v["files"], v["bad"], v["readable"]) == (40 - len(lost), len(bad), 40 - len(lost) - len(bad)) and v["num_frames"]["min"] >= 16
    assert (out/"sample.png").read_bytes().startswith(b"\x89PNG")

def test_videos_are_found_as_every_job_finds_them(spoiled):
    "The loader agrees with the list, file by file."
    root, out, *_ = spoiled
    for record in ssv2(root).records:
        listed = record.path.relative_to(root).as_posix() in bad_of(out)
        try: load_clip(record.path, View()); assert not listed, record.id
        except VideoError: assert listed, record.id

@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_damage_between_the_sampled_frames_takes_a_full_decode(suffix, tmp_path):
    y, x = np.mgrid[:96, :128]
    frames = np.stack([np.stack([(x + 5 * i) % 256, (y * 2 + i) % 256, (x * y // 16 + 3 * i) % 256], -1) for i in range(48)]).astype(np.uint8)
    frames += np.random.default_rng(0).integers(0, 12, frames.shape, dtype=np.uint8)
    data = bytearray(write_video(tmp_path/f"whole{suffix}", frames).read_bytes())
    at = len(data) // 2; data[at:at + 3000] = np.random.default_rng(1).bytes(3000)
    (tmp_path/f"hurt{suffix}").write_bytes(data)
    need_whole(tmp_path/f"whole{suffix}")
    assert check_file(tmp_path, "sample", f"hurt{suffix}").reason == ""
    assert "frame" in check_file(tmp_path, "full", f"hurt{suffix}").reason
    assert check_file(tmp_path, "full", f"whole{suffix}") == Verdict(48)

# -- what a decoder may do

def note(folder, file): (Path(folder)/f"{file}.pid").write_text(str(os.getpid()))

def wild(folder, file):
    "A check whose file says what happens."
    note(folder, file)
    kind = file.split("-")[0]
    if kind == "hangs": time.sleep(3600)
    if kind == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT}); time.sleep(3600)
    if kind == "stopped": os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "segfault": import faulthandler; faulthandler.disable(); signal.raise_signal(signal.SIGSEGV)
    if kind == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exits": os._exit(3)
    if kind == "leaves": sys.exit(4)
    return Verdict(7)

KINDS = dict(hangs="decoding took longer than 1 s", stubborn="decoding took longer than 1 s", stopped="decoding took longer than 1 s",
             segfault="the decoder crashed (SIGSEGV)", killed="the decoder crashed (SIGKILL)", exits="the decoder ended its process (status 3)",
             leaves="the decoder ended its process (status 4)")

def test_no_decoder_stops_the_others(tmp_path):
    files = [f"{kind}-{i}" for i in range(2) for kind in ("good", *KINDS, "fine")]
    found = list(verify(files, partial(wild, tmp_path), num_workers=4, timeout_s=1))
    assert sorted(f for f, _ in found) == sorted(files), "every file gets one verdict"
    for file, verdict in found: assert verdict == (Verdict(0, KINDS[kind]) if (kind := file.split("-")[0]) in KINDS else Verdict(7)), file
    assert not multiprocessing.active_children()
    for file in files: assert gone(int((tmp_path/f"{file}.pid").read_text())), f"{file}: its process is still there"

@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_file_gets_one_verdict_whoever_dies(num_workers, tmp_path):
    files = [f"{'exits' if i % 7 == 3 else 'good'}-{i}" for i in range(60)]
    found = list(verify(iter(files), partial(wild, tmp_path), num_workers=num_workers, timeout_s=60))
    assert sorted(found) == sorted((f, Verdict(0, KINDS["exits"]) if f.startswith("exits") else Verdict(7)) for f in files)

def test_workers_end_when_nobody_wants_the_rest(tmp_path):
    verdicts = verify([f"good-{i}" for i in range(50)], partial(wild, tmp_path), num_workers=3)
    next(verdicts); verdicts.close()
    assert not multiprocessing.active_children()

def test_nothing_to_verify_starts_nothing(): assert list(verify([], None, num_workers=0)) == []

ORPHANS = """
import os, signal, time
from pathlib import Path
from stjepa.data import Verdict, verify
def check(file):
    Path(file).write_text(str(os.getpid()))
    if file.endswith("hangs"): time.sleep(3600)
    return Verdict(1)
for i, found in enumerate(verify([{hangs!r}, *[{folder!r} + f"/{{i}}" for i in range(99)]], check, num_workers=3, timeout_s=2)):
    if i == 20: os.kill(os.getpid(), signal.SIGKILL)
"""

def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    "Idle ones see the pipe closed; one that hangs is ended by its own alarm."
    done = subprocess.run([sys.executable, "-c", ORPHANS.format(folder=str(tmp_path), hangs=str(tmp_path/"hangs"))], timeout=120)
    assert done.returncode == -signal.SIGKILL
    pids = {int(p.read_text()) for p in tmp_path.iterdir()}
    assert len(pids) >= 2 and all(map(gone, pids))

# -- the command

def test_bad_videos_are_no_failure_unless_strict(command, spoiled, tmp_path):
    root, _, bad, lost, _ = spoiled
    done = command("stjepa_data", "check", root, "--split", "train", "--out", tmp_path/"out")
    assert done.returncode == 0, done.stderr
    assert f"{len(bad)} bad" in done.stdout and f"--skip {tmp_path}/out/bad_videos.csv" in done.stdout and f"{len(lost)} without" in done.stdout
    with pytest.raises(InputError, match=f"{len(lost)} videos missing, 0 bad, 0 lists refused"): check(root, split="train", strict=True, verify=False)

@pytest.mark.parametrize("options, says", [(dict(num_workers=0), "num-workers"), (dict(timeout_s=0), "timeout-s"), (dict(timeout_s=-1), "timeout-s")])
def test_options_out_of_range(options, says, toy):
    with pytest.raises(InputError, match=says): check_data(DataConfig("check", str(toy/"msvd"), **options))

def test_a_limit_takes_a_seeded_sample_and_a_larger_one_more_of_it(toy, tmp_path):
    found = [set(Verdicts(toy/"ssv2", out)) for limit in (4, 9) for out in [tmp_path/str(limit)] if check(toy/"ssv2", out=str(out), limit=limit)]
    assert [len(f) for f in found] == [4, 9] and found[0] < found[1]
    check(toy/"ssv2", out=str(tmp_path/"other"), limit=9, seed=1)
    assert set(Verdicts(toy/"ssv2", tmp_path/"other")) != found[1]

def sleeps(*_): time.sleep(3600)

def test_time_outs_are_asked_again(toy, tmp_path, monkeypatch):
    "What was too slow once is found good later; what is good is not asked again."
    options = dict(out=str(tmp_path/"out"), split="test")
    with monkeypatch.context() as slow:
        slow.setattr("stjepa.data.check_file", sleeps)
        assert check(toy/"ssv2", timeout_s=0.5, **options)["verified"]["bad"] == 4
    assert set(bad_of(tmp_path/"out").values()) == {"decoding took longer than 0.5 s"}
    assert check(toy/"ssv2", **options)["verified"]["bad"] == 0 and bad_of(tmp_path/"out") == {}
    with monkeypatch.context() as slow:
        slow.setattr("stjepa.data.check_file", sleeps)
        assert check(toy/"ssv2", timeout_s=0.5, **options)["verified"]["bad"] == 0
        assert check(toy/"ssv2", timeout_s=0.5, decode="full", **options)["verified"]["bad"] == 4, "a sample says nothing about every frame"

def test_a_run_killed_midway_ends_as_an_undisturbed_one(spoiled, tmp_path):
    root, undisturbed, *_ = spoiled
    line = "import os, signal, stjepa.data as d; add = d.Verdicts.add\n" \
           "def until(self, *a):\n    add(self, *a)\n    if len(self) == 15: os.kill(os.getpid(), signal.SIGKILL)\n" \
           f"d.Verdicts.add = until; d.check_data(d.DataConfig('check', {str(root)!r}, out={str(tmp_path/'out')!r}, num_workers=2))"
    assert subprocess.run([sys.executable, "-c", line], timeout=120, capture_output=True).returncode == -signal.SIGKILL
    log = tmp_path/"out/verified.jsonl"
    before = log.read_text(); assert before.count("\n") == 15
    log.write_text(before + '{"file": "torn')
    assert check(root, out=str(tmp_path/"out"))["verified"] == json.load(open(undisturbed/"summary.json"))["verified"]
    assert bad_of(tmp_path/"out") == bad_of(undisturbed)

def test_ctrl_c_leaves_the_list_so_far_and_no_process(spoiled, tmp_path, monkeypatch):
    root, undisturbed, *_ = spoiled
    add = Verdicts.add
    def until(self, *what):
        add(self, *what)
        if len(self) == 15: raise KeyboardInterrupt
    with monkeypatch.context() as pressed:
        pressed.setattr(Verdicts, "add", until)
        with pytest.raises(KeyboardInterrupt): check(root, out=str(tmp_path))
    assert not multiprocessing.active_children() and 0 < len(bad_of(tmp_path)) and set(bad_of(tmp_path)) <= set(bad_of(undisturbed))
    check(root, out=str(tmp_path))
    assert bad_of(tmp_path) == bad_of(undisturbed)

def test_a_mended_video_leaves_the_list_and_a_new_bad_one_enters(spoiled, toy, tmp_path):
    root, _, bad, _, _ = spoiled
    copy = shutil.copytree(toy/"ssv2", tmp_path/"ssv2"); out = str(tmp_path/"out")
    first, second = (r.path.relative_to(copy).as_posix() for r in ssv2(copy).records[:2])
    whole = (copy/first).read_bytes(); (copy/first).write_bytes(b"")
    check(copy, out=out); assert list(bad_of(out)) == [first]
    (copy/first).write_bytes(whole); (copy/second).write_bytes(b"x")
    check(copy, out=out); assert list(bad_of(out)) == [second]
    (copy/second).unlink()
    check(copy, out=out); assert bad_of(out) == {}

def test_a_log_that_is_not_one_is_named(toy, tmp_path):
    (tmp_path/"verified.jsonl").write_text("what is this\n")
    with pytest.raises(InputError, match="verified.jsonl: not a log of verdicts"): check(toy/"msvd", out=str(tmp_path))

# -- the list, and who takes it

@pytest.mark.parametrize("name", ["a,b.webm", 'say "hi".webm', "two\nlines.webm", "été 東京.webm", "-dash.webm", " space .webm", "'.webm", "a;b\tc.webm", "=1+1.webm"])
def test_names_survive_the_csv(name, tmp_path):
    write_csv(tmp_path/"bad_videos.csv", ("file", "reason"), [(name, 'a "reason", of\ntwo lines'), ("last.webm", "")])
    assert read_skip(tmp_path/"bad_videos.csv") == {name: 'a "reason", of\ntwo lines', "last.webm": ""}

def test_a_name_that_is_no_utf8_does_not_spoil_the_list(tmp_path):
    write_csv(tmp_path/"bad_videos.csv", ("file", "reason"), [(os.fsdecode(b"\xff.webm"), "odd"), ("plain.webm", "empty file")])
    assert read_skip(tmp_path/"bad_videos.csv")["plain.webm"] == "empty file"

FOLDER = 'clips, "raw"\né 東京'

@pytest.fixture(scope="module")
def oddly_named(toy, tmp_path_factory):
    "The toy SSv2 with its videos in a folder whose name holds all that a csv may stumble over, one of them empty; and the list of it."
    root = shutil.copytree(toy/"ssv2", tmp_path_factory.mktemp("odd")/"ssv2")
    (root/"20bn-something-something-v2").rename(root/FOLDER)
    bad = ssv2(root).records[3].path; bad.write_bytes(b"")
    check(root, out=str(root.parent/"out"))
    assert bad_of(root.parent/"out") == {f"{FOLDER}/{bad.name}": "empty file"}
    return root, root.parent/"out/bad_videos.csv"

@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}//", "{}/.", "{}/../ssv2"])
def test_the_list_holds_however_the_root_is_written(spelling, oddly_named):
    root, path = oddly_named
    assert skipped_rows(ssv2(spelling.format(root)), read_skip(path)) == {3: "empty file"}

def test_a_build_leaves_them_out(oddly_named, toy, tmp_path):
    from stjepa.build_cache import BuildConfig, build_cache
    from stjepa.cache import Cache
    root, path = oddly_named
    config = BuildConfig(str(root), str(tmp_path/"cache"), teacher=str(toy/"teacher"), dim=32, num_workers=0, device="cpu", limit=8, max_failed=0., skip=str(path))
    chosen = build_cache(dataclasses.replace(config, limit=0))
    assert chosen["failed"] == 1 and "empty file" in Cache(tmp_path/"cache").failures[3] and 3 not in Cache(tmp_path/"cache").ok_rows

@pytest.fixture(scope="module")
def checkpoint(run_dir): return str(run_dir/"checkpoint_step0.pt")

def test_ucf101_leaves_them_out_and_says_so(toy, checkpoint, tmp_path, capsys):
    from stjepa.ucf101 import ucf101
    from stjepa.ucf101_infer import UcfConfig, ucf101_eval
    root = shutil.copytree(toy/"ucf101", tmp_path/"ucf101")
    for subset in ("train", "test"): ucf101(root, subset=subset).records[0].path.write_bytes(b"no video")
    check(root, out=str(tmp_path/"found"))
    config = UcfConfig(str(root), checkpoint, out=str(tmp_path/"out"), rows="mean_pixel", num_workers=0, device="cpu", max_failed=0., skip=str(tmp_path/"found/bad_videos.csv"))
    summary = ucf101_eval(config)
    assert summary["skipped"] == dict(train=1, test=1) and summary["clips"] == dict(train=35, test=11) and summary["unreadable"] == 0
    assert "not those of the whole test list" in capsys.readouterr().out and "not those of the whole test list" in (tmp_path/"out/table.md").read_text()
    assert read_skip(tmp_path/"out/skipped.csv") == bad_of(tmp_path/"found")
    with pytest.raises(InputError, match="max-failed"): ucf101_eval(dataclasses.replace(config, skip="", out=str(tmp_path/"without")))
    with pytest.raises(InputError, match="no_such.csv"): ucf101_eval(dataclasses.replace(config, skip="no_such.csv"))

def test_retrieval_takes_one_list_or_two(toy, checkpoint, tmp_path, capsys):
    from stjepa.captions import msrvtt, msvd
    from stjepa.retrieval import RetrievalConfig, read_lists, retrieval_eval
    roots = {name: shutil.copytree(toy/name, tmp_path/name) for name in ("msrvtt", "msvd")}
    msrvtt(roots["msrvtt"], "train").records[2].path.write_bytes(b""); msvd(roots["msvd"], "test").records[1].path.write_bytes(b"")
    for name, root in roots.items(): check(root, out=str(tmp_path/f"{name}_found"))
    lists = [str(tmp_path/f"{name}_found/bad_videos.csv") for name in roots]
    config = RetrievalConfig(*map(str, roots.values()), checkpoint, out=str(tmp_path/"out"), rows="mean_pixel", head_steps=10, num_workers=0, device="cpu", max_failed=0., skip=",".join(lists))
    summary = retrieval_eval(config)
    assert summary["skipped"] == {"msrvtt train": 1, "msrvtt test": 0, "msvd train": 0, "msvd test": 1}
    assert summary["counts"]["msvd"]["test_videos"] == 7 and summary["counts"]["msrvtt"] == dict(train_videos=15, test_videos=8, test_captions=8, neighbours=3)
    text = capsys.readouterr().out
    assert "1 of msrvtt train, 1 of msvd test" in text and "not those of the whole test list" in text
    assert [sum(map(len, read_lists(dataclasses.replace(config, skip=skip))[1].values())) for skip in ("", lists[0], ", ".join(lists))] == [0, 1, 2]

def test_a_list_that_names_everything_is_refused(toy, tmp_path):
    from stjepa.features import leave_out
    dataset = ssv2(toy/"ssv2", "test")
    write_csv(tmp_path/"all.csv", ("file", "reason"), [(r.path.relative_to(toy/"ssv2").as_posix(), "no") for r in dataset.records])
    with pytest.raises(InputError, match="names every video of ssv2 test"): leave_out(dataset, str(tmp_path/"all.csv"))

# -- the picture

def test_titles_are_text_whatever_they_hold():
    figure = show_samples([("costs $5 and \\frac{1$ é", np.zeros((2, 8, 8, 3), np.uint8))])
    figure.canvas.draw()
    assert figure.axes[0].get_title(loc="left") == "costs $5 and \\frac{1$ é"
