"Bad input on the command line: one clear line, non-zero exit, no traceback, and nothing left that a later run would trust."
import json, pickle, shutil, sys
from importlib.metadata import EntryPoint
import pytest
from conftest import ENTRIES, SMALL

FLAGS = [word for k, v in SMALL.items() for word in (f"--{k.replace('_', '-')}", str(v))]

@pytest.fixture
def ssv2(toy, tmp_path):
    "A copy of the toy SSv2 that a test may break."
    return shutil.copytree(toy/"ssv2", tmp_path/"ssv2")

@pytest.fixture
def refused(monkeypatch, capfd):
    """Run a command that must fail; its one line on stderr has to contain every word given.
    In this process, as importing torch fifty times would take minutes: what `sys.exit` is given is what a shell would see."""
    def run(name, *words, says):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit: EntryPoint(name, ENTRIES[name], "console_scripts").load()()
        err = capfd.readouterr().err + (f"{exit.value.code}\n" if isinstance(exit.value.code, str) else "")
        lines = [l for l in err.splitlines() if l.strip() and "|" not in l]
        assert exit.value.code not in (0, None)
        assert len(lines) == 1 and lines[0].startswith(f"{name}: error:"), err
        for word in says: assert str(word) in lines[0], lines[0]
    return run

def test_a_shell_sees_the_same(command, tmp_path):
    "One refusal as a real process: status, one line, no traceback."
    done = command("stjepa_ucf101", tmp_path/"gone", tmp_path/"none.pt")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("stjepa_ucf101: error:"), done.stderr

@pytest.fixture
def build(refused, toy, tmp_path):
    "A build that must be refused and leave nothing that opens as a cache."
    def run(root, *flags, says):
        refused("stjepa_build_cache", root, tmp_path/"cache", "--teacher", toy/"teacher", "--dim", 32, "--num-workers", 0, "--device", "cpu", *flags, says=says)
        from stjepa.core import InputError
        from stjepa.cache import Cache
        with pytest.raises(InputError): Cache(tmp_path/"cache")
    return run

@pytest.fixture
def train(refused, tmp_path):
    "A training that must be refused and leave no checkpoint."
    def run(root, cache, *flags, says):
        refused("stjepa_pretrain", root, cache, "--out", tmp_path/"run", "--epochs", 1, *FLAGS, *flags, says=says)
        assert not list((tmp_path/"run").glob("*.pt"))
    return run

@pytest.fixture
def evaluate(refused, tmp_path):
    "An evaluation that must be refused and leave no summary."
    def run(name, *words, says):
        refused(name, *words, "--out", tmp_path/"eval", "--num-workers", 0, "--device", "cpu", says=says)
        assert not (tmp_path/"eval/summary.json").exists()
    return run

# -- folders and lists

def test_a_missing_root_is_named(build, train, evaluate, cache_dir, run_dir, toy, tmp_path):
    gone, checkpoint = tmp_path/"gone", run_dir/"checkpoint_step0.pt"
    build(gone, says=[gone])
    train(gone, cache_dir, says=[gone])
    evaluate("stjepa_ucf101", gone, checkpoint, says=[gone])
    evaluate("stjepa_retrieval", gone, toy/"msvd", checkpoint, says=[gone])
    evaluate("stjepa_retrieval", toy/"msrvtt", gone, checkpoint, says=[gone])

def test_an_empty_folder_is_named(build, evaluate, run_dir, toy, tmp_path):
    (empty := tmp_path/"empty").mkdir(); checkpoint = run_dir/"checkpoint_step0.pt"
    build(empty, says=[empty])
    evaluate("stjepa_ucf101", empty, checkpoint, says=[empty])
    evaluate("stjepa_retrieval", empty, toy/"msvd", checkpoint, says=[empty])

@pytest.mark.parametrize("text", ["[1,", "{}", "[3]", '[{"id": "1"}]', '[{"id": "1", "label": "x", "template": "No such [thing]", "placeholders": []}]'])
def test_a_json_that_is_not_what_it_should_be(text, build, ssv2):
    (ssv2/"train.json").write_text(text)
    build(ssv2, says=["train.json"])

def test_labels_that_are_not_labels(build, ssv2):
    (ssv2/"labels.json").write_text('["a", "b"]')
    build(ssv2, says=["labels.json"])

def test_ucf_lists_that_are_not_lists(evaluate, toy, run_dir, tmp_path):
    root = shutil.copytree(toy/"ucf101", tmp_path/"ucf101")
    (root/"ucfTrainTestlist/trainlist01.txt").write_text("what is this\n")
    evaluate("stjepa_ucf101", root, run_dir/"checkpoint_step0.pt", says=["trainlist01.txt"])

# -- videos

def test_unreadable_videos_are_refused_in_number(build, ssv2):
    for path in list(ssv2.rglob("*.webm"))[::2]: path.write_bytes(b"not a video" * 100)
    build(ssv2, says=["max-failed"])

def test_one_unreadable_video_is_listed_and_nothing_takes_its_place(command, toy, ssv2, tmp_path):
    from stjepa.cache import Cache
    bad = next(r["id"] for r in json.loads((ssv2/"train.json").read_text()))
    next(ssv2.rglob(f"{bad}.webm")).write_bytes(b"not a video" * 100)
    done = command("stjepa_build_cache", ssv2, tmp_path/"cache", "--teacher", toy/"teacher", "--dim", 32, "--num-workers", 0, "--device", "cpu", "--max-failed", 0.5)
    assert done.returncode == 0, done.stderr
    cache = Cache(tmp_path/"cache")
    assert [cache.ids[i] for i in sorted(set(range(len(cache.ids))) - set(cache.ok_rows.tolist()))] == [bad]
    assert any(bad in p.read_text() for p in (tmp_path/"cache").rglob("*") if p.suffix in (".csv", ".txt", ".json", ".jsonl") and p.name != "zarr.json"), "it is not listed in a file"

def test_a_cached_clip_without_its_video(train, cache_dir, ssv2):
    for path in list(ssv2.rglob("*.webm")): path.unlink()
    train(ssv2, cache_dir, says=["no video"])

# -- teachers

def test_a_teacher_that_is_not_there_or_not_one(build, ssv2, tmp_path):
    build(ssv2, "--teacher", tmp_path/"teacher", says=[tmp_path/"teacher"])
    (tmp_path/"teacher").mkdir(); (tmp_path/"teacher/config.json").write_text('{"model_type": "bert"}')
    build(ssv2, "--teacher", tmp_path/"teacher", says=[tmp_path/"teacher"])

# -- caches

def test_a_cache_that_is_not_one(train, toy, tmp_path):
    train(toy/"ssv2", tmp_path/"gone", says=[tmp_path/"gone"])
    (tmp_path/"empty").mkdir()
    train(toy/"ssv2", tmp_path/"empty", says=[tmp_path/"empty"])
    train(toy/"ssv2", toy/"ssv2", says=[toy/"ssv2"])

def test_a_file_is_no_cache(train, toy):
    train(toy/"ssv2", toy/"ssv2/train.json", says=["train.json"])

# -- checkpoints

class Trap:
    "Unpickled, it would leave a file behind."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")

@pytest.fixture(params=["missing", "text", "empty", "truncated", "trap", "other"])
def not_a_checkpoint(request, run_dir, tmp_path):
    "Files that are no checkpoint of this package."
    import torch
    path = tmp_path/"checkpoint_step7.pt"
    whole = (run_dir/"checkpoint_step0.pt").read_bytes()
    if request.param == "text": path.write_text("hello")
    if request.param == "empty": path.write_bytes(b"")
    if request.param == "truncated": path.write_bytes(whole[:len(whole)//2])
    if request.param == "trap": path.write_bytes(pickle.dumps(Trap(tmp_path/"sprung")))
    if request.param == "other": torch.save(dict(weights=torch.ones(3)), path)
    yield path
    assert not (tmp_path/"sprung").exists(), "code of a checkpoint was run"

def test_a_checkpoint_that_is_not_one(evaluate, train, toy, cache_dir, not_a_checkpoint):
    evaluate("stjepa_ucf101", toy/"ucf101", not_a_checkpoint, says=["checkpoint_step7.pt"])
    evaluate("stjepa_retrieval", toy/"msrvtt", toy/"msvd", not_a_checkpoint, says=["checkpoint_step7.pt"])
    train(toy/"ssv2", cache_dir, "--resume", not_a_checkpoint, says=["checkpoint_step7.pt"])

# -- a cache made with another View

def test_a_cache_made_with_another_view(build, train, refused, toy, cache_dir, run_dir, tmp_path):
    import torch
    ckpt = torch.load(run_dir/"checkpoint_step0.pt", weights_only=True)
    ckpt["view"]["size_px"] = 32
    torch.save(ckpt, tmp_path/"checkpoint_step0.pt")
    train(toy/"ssv2", cache_dir, "--resume", tmp_path/"checkpoint_step0.pt", says=["trained on View", "size_px=32", "size_px=64"])

def test_a_cache_edited_by_hand(train, toy, cache_dir, tmp_path):
    shutil.copytree(cache_dir, tmp_path/"other")
    meta = json.loads((tmp_path/"other/zarr.json").read_text())
    meta["attributes"]["view"]["size_px"] = 32
    (tmp_path/"other/zarr.json").write_text(json.dumps(meta))
    train(toy/"ssv2", tmp_path/"other", says=["zarr.json", "view"])

# -- options

@pytest.mark.parametrize("name", [e for e in ENTRIES if e != "stjepa"])
def test_a_misspelt_flag(name, refused): refused(name, "--no-such-flag", "1", says=["--no-such-flag"])

@pytest.mark.parametrize("words, says", [
    (["stjepa_build_cache"], ["DATA_ROOT", "CACHE_DIR"]),
    (["stjepa_pretrain", "here"], ["CACHE_DIR"]),
    (["stjepa_ucf101", "here", "there", "elsewhere"], ["elsewhere"]),
    (["stjepa_pretrain", "here", "there", "--mask", "none"], ["mask", "none"]),
    (["stjepa_build_cache", "here", "there", "many"], ["many"])], ids=lambda v: " ".join(v))
def test_a_wrong_command_line(words, says, refused): refused(*words, says=says)

def test_a_device_that_is_not_there(train, toy, cache_dir):
    import torch
    if not torch.cuda.is_available(): train(toy/"ssv2", cache_dir, "--device", "cuda", says=["CUDA"])
