"`stjepa_features` as a user runs it: any folder, broken videos, kills, several processes, every kind of model and output."
import csv, json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
import pytest, torch
from conftest import BIN
from safetensors.torch import load_file
from stjepa import embed as module
from stjepa.core import InputError, parse_config
from stjepa.embed import EmbedConfig, embed, encoder_of, find_videos, load_model, read_embeddings
from stjepa.export import OUTPUTS, ExportConfig, export
from stjepa.features import features
from stjepa.ucf101 import ucf101
from stjepa.video import load_clip

torch.set_num_threads(1)

@pytest.fixture(scope="module")
def checkpoint(run_dir): return max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))

@pytest.fixture(scope="module")
def mine(toy, tmp_path_factory):
    "Somebody's folder: videos in folders, in a deep one, with odd names; one broken, one empty, and files that are none."
    root = tmp_path_factory.mktemp("mine")/"my videos"; (root/"a b"/"c").mkdir(parents=True)
    found = sorted((toy/"ucf101").rglob("*.avi"))
    for i in range(70): shutil.copy(found[i % len(found)], root/("a b" if i % 2 else "a b/c")/f"é {i}.AVI") # more than a part of the store
    (root/"broken.mp4").write_bytes(b"no video"); (root/"a b"/"empty.webm").touch(); (root/"notes.txt").write_text("no video")
    return root

@pytest.fixture(scope="module")
def config(checkpoint, mine, tmp_path_factory):
    return EmbedConfig(str(checkpoint), str(mine), out=str(tmp_path_factory.mktemp("out")/"e.safetensors"), num_workers=0, device="cpu")

@pytest.fixture(scope="module")
def whole(config):
    embed(config)
    return open(config.out, "rb").read()

def words(config, **more):
    return [w for k, v in {**dict(model=config.model, videos=config.videos, out=config.out, num_workers=0, device="cpu"), **more}.items() for w in (f"--{k.replace('_', '-')}", str(v))]

# ---- what is in the file

def test_a_row_per_readable_video_and_a_reason_for_the_others(config, whole, mine):
    found = read_embeddings(config.out)
    assert found.ids == [r.id for r in find_videos(mine).records if r.id not in found.errors] and len(found.ids) == 70
    assert set(found.errors) == {"broken.mp4", "a b/empty.webm"} and "empty file" in found.errors["a b/empty.webm"]
    rows = list(csv.DictReader(open(f"{config.out}.failed.csv")))
    assert {r["file"]: r["reason"] for r in rows} == found.errors
    model = load_model(config.model)
    for i in (0, 33, 69): assert torch.equal(found.x[i], model.encode(mine/found.ids[i]).pooled[0])
    assert list(load_file(config.out)) == ["pooled"] and found.about["meaning"] == OUTPUTS["pooled"] and found.about["view"] == model.view.to_dict()
    assert str(mine) not in json.dumps(found.about)

def test_the_list_of_failures_is_a_skip_list(config, whole, tmp_path):
    failed = f"{config.out}.failed.csv"
    embed(replace(config, out=str(tmp_path/"e.safetensors"), skip=failed, max_failed=0.))
    found = read_embeddings(tmp_path/"e.safetensors")
    assert torch.equal(found.x, read_embeddings(config.out).x) and not found.errors and not list(tmp_path.glob("*.csv"))

@pytest.mark.parametrize("options", [dict(batch_size=1), dict(batch_size=7, num_workers=2)], ids=str)
def test_the_same_bytes_however_videos_are_batched(config, whole, tmp_path, options):
    embed(replace(config, out=str(tmp_path/"e.safetensors"), **options))
    assert (tmp_path/"e.safetensors").read_bytes() == whole and sorted(p.name for p in tmp_path.iterdir()) == ["e.safetensors", "e.safetensors.failed.csv"]

def test_two_processes_write_the_bytes_of_one(config, whole, tmp_path):
    done = subprocess.run([BIN/"torchrun", "--standalone", "--nproc-per-node=2", "--no-python", BIN/"stjepa_features", *words(config, out=tmp_path/"e.safetensors")],
                          capture_output=True, text=True, timeout=250, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"e.safetensors").read_bytes() == whole and done.stdout.count("pooled 70 x 32 of 70 of 72 videos") == 1

# ---- killed and started again

SLOW = """
import sys, time
from stjepa import export, embed
from stjepa.core import console
was = export.VideoEncoder.forward
def slow(*args): time.sleep(.03); return was(*args)
export.VideoEncoder.forward = slow
sys.argv[0] = "stjepa_features"
embed.PART = 8
embed.main()
"""

@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_killed_it_goes_on_and_writes_the_same_bytes(config, whole, tmp_path, monkeypatch, suffix):
    out, parts = tmp_path/f"e{suffix}", tmp_path/f"e{suffix}.parts"
    job = subprocess.Popen([sys.executable, "-c", SLOW, *words(config, out=out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 100
    while len(list(parts.glob("*.safetensors"))) < 3 and job.poll() is None and time.time() < deadline: time.sleep(.01)
    job.send_signal(signal.SIGKILL); job.wait()
    kept = len(list(parts.glob("videos_*.safetensors")))
    assert kept >= 3 and not out.exists()
    seen, was = [], module.VideoEncoder.forward
    monkeypatch.setattr(module.VideoEncoder, "forward", lambda self, frames: (seen.append(len(frames)), was(self, frames))[1])
    (tmp_path/f".e{suffix}.99999.part").write_bytes(b"of a job that was killed while it wrote")
    embed(replace(config, out=str(out)))
    assert sum(seen) <= 70 - 7 * kept and sorted(p.name for p in tmp_path.iterdir()) == [out.name, f"{out.name}.failed.csv"]
    if suffix == ".safetensors": assert out.read_bytes() == whole
    else:
        embed(replace(config, out=str(tmp_path/"at_once.parquet")))
        assert out.read_bytes() == (tmp_path/"at_once.parquet").read_bytes() and torch.equal(read_embeddings(out).x, read_embeddings(config.out).x)

def test_a_finished_job_does_nothing_and_leaves_others_alone(config, whole, monkeypatch, capsys):
    monkeypatch.setattr(module, "fill_store", None)
    assert embed(config) == () and "is complete already" in capsys.readouterr().out
    for change in (dict(ema=False), dict(crops=3), dict(output="pooled_tokens"), dict(half=True), dict(layer=0, output="pooled_tokens")):
        with pytest.raises(InputError, match="exists and holds something else"): embed(replace(config, **change))
    assert open(config.out, "rb").read() == whole

def test_a_store_is_reused_and_grows(config, whole, mine, tmp_path, monkeypatch):
    ids = read_embeddings(config.out).ids
    root = shutil.copytree(mine, tmp_path/"mine"); (root/"few.txt").write_text("\n".join(ids[:20]))
    kept = replace(config, store=str(tmp_path/"store"))
    embed(replace(kept, videos=str(root/"few.txt"), out=str(tmp_path/"few.safetensors")))
    seen, was = [], module.VideoEncoder.forward
    monkeypatch.setattr(module.VideoEncoder, "forward", lambda self, frames: (seen.append(len(frames)), was(self, frames))[1])
    embed(replace(kept, videos=str(root), out=str(tmp_path/"all.safetensors")))
    assert sum(seen) == 50 and torch.equal(read_embeddings(tmp_path/"all.safetensors").x, read_embeddings(config.out).x)
    embed(replace(kept, videos=str(root), out=str(tmp_path/"all.parquet")))
    assert sum(seen) == 50 and read_embeddings(tmp_path/"all.parquet").errors == read_embeddings(tmp_path/"all.safetensors").errors

# ---- models and outputs

@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    export(ExportConfig(str(checkpoint), str(out := tmp_path_factory.mktemp("export")/"student")))
    return out

@pytest.fixture(scope="module")
def three(mine, tmp_path_factory):
    files = [str(r.path) for r in find_videos(mine).records if r.id.endswith(".AVI")][:3]
    (path := tmp_path_factory.mktemp("list")/"three.txt").write_text("\n".join(files))
    return path

@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_every_output_in_both_formats(config, exported, three, tmp_path, output, suffix):
    embed(replace(config, model=str(exported), videos=str(three), out=str(tmp_path/f"e{suffix}"), output=output))
    found, model = read_embeddings(tmp_path/f"e{suffix}"), load_model(str(exported))
    assert torch.equal(found.x, torch.cat([getattr(model.encode(id), output) for id in found.ids])) and found.about["model"] == "student"

def test_layers_raw_weights_and_views(config, checkpoint, three, tmp_path):
    def run(**options): embed(replace(config, videos=str(three), out=str(out := tmp_path/f"{len(list(tmp_path.iterdir()))}.safetensors"), **options)); return read_embeddings(out)
    files = three.read_text().split("\n"); raw = load_model(str(checkpoint), ema=False)
    assert torch.equal(run(ema=False).x, raw.encode(*files).pooled)
    tokens = raw.student.intermediates(torch.stack([raw.read(f) for f in files]), ["blocks.0"])["blocks.0"]
    assert torch.equal(run(ema=False, output="tokens", layer=0, half=True).x, tokens.half())
    assert torch.allclose(run(ema=False, output="pooled_tokens", layer=0).x, tokens.mean(1), atol=1e-6)
    views = [torch.cat([raw(load_clip(f, v).frames[None]).pooled for v in raw.view.spread(5, 3)]).mean(0) for f in files]
    assert torch.allclose(run(ema=False, clips=5, crops=3).x, torch.stack(views), atol=1e-6)

def test_a_teacher_embeds_too(config, toy, three, tmp_path):
    embed(replace(config, model=str(toy/"teacher"), videos=str(three), out=str(tmp_path/"e.safetensors")))
    teacher, found = encoder_of(load_model(str(toy/"teacher"))), read_embeddings(tmp_path/"e.safetensors")
    assert torch.equal(found.x, torch.cat([teacher(load_clip(id, teacher.view).frames[None]) for id in found.ids])) and "teacher" in found.about["meaning"]
    with pytest.raises(InputError, match="a teacher gives its last tokens"): embed(replace(config, model=str(toy/"teacher"), output="predicted"))

def test_probes_and_embeddings_know_a_student_by_one_key(checkpoint, exported, toy, tmp_path):
    "What an evaluation has stored is found by the exported student, and the other way round."
    from stjepa.features import student_encoders
    train = ucf101(toy/"ucf101", split=1, subset="train")
    was = features(list(student_encoders(checkpoint).values()), train, tmp_path)
    for row, output in (("student", "pooled"), ("student_encoder", "pooled_tokens")):
        blind = replace(encoder_of(load_model(str(exported)), output), encode=None)
        assert torch.equal(features([blind], train, tmp_path)[output].x, was[row].x)

# ---- what goes wrong

@pytest.mark.parametrize("change,says", [
    (dict(videos="nowhere"), "--videos nowhere: no such folder or file"), (dict(model="nowhere/x.pt"), "checkpoint nowhere/x.pt: no such file"),
    (dict(model="/nowhere"), "/nowhere: no such folder"), (dict(model="RUN"), "the folder of a run; name one of its checkpoint_step*.pt"), (dict(max_failed=.01), "2 of 72 videos cannot be read, more than --max-failed 0.01; the first: "),
    (dict(output="tokens", layer=7), "--layer 7: the student has blocks 0 to 2"), (dict(output="tokens", layer=-1), "--layer -1: the student has blocks 0 to 2"),
    (dict(skip="nowhere.csv"), "nowhere.csv")], ids=str)
def test_one_line_says_what_is_wrong(config, whole, run_dir, tmp_path, change, says):
    if change.get("model") == "RUN": change = dict(model=str(run_dir))
    with pytest.raises(InputError) as e: embed(replace(config, **{**dict(out=str(tmp_path/"e.safetensors")), **change}))
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"e.safetensors").exists()
    if "max_failed" in change: assert len(list(csv.DictReader(open(tmp_path/"e.safetensors.failed.csv")))) == 2

@pytest.mark.parametrize("more,says", [(dict(out="e.npy"), "expected a name that ends in .safetensors or .parquet"), (dict(output="pool"), "invalid choice: 'pool'"),
                                       (dict(output="tokens", clips=2), "tokens of several views are of different places"), (dict(crops=0), "expected 1 or more of each")], ids=str)
def test_options_are_refused_in_one_line(config, capsys, more, says):
    with pytest.raises(SystemExit) as e: parse_config(EmbedConfig, words(config, **more), prog="stjepa_features")
    said = capsys.readouterr().err
    assert e.value.code == 2 and says in said and len(said.strip().splitlines()) == 1

def test_parquet_without_pyarrow_is_one_line(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"e.parquet: parquet needs pyarrow; pip install -e .\[parquet\], or name a .safetensors file"): replace(config, out="e.parquet")

def test_another_file_of_that_name_is_left_alone(config, tmp_path):
    (tmp_path/"e.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists and holds something else"): embed(replace(config, out=str(tmp_path/"e.safetensors")))
    assert (tmp_path/"e.safetensors").read_bytes() == b"mine"

def test_lists(toy, tmp_path):
    video = sorted((toy/"ucf101").rglob("*.avi"))[0]; shutil.copy(video, tmp_path/"v.avi")
    for name, text in (("a.txt", "\ufeffv.avi\r\n\r\n"), ("a.csv", "label,file\n3,v.avi\n"), ("b.txt", f"{video}\n")):
        (tmp_path/name).write_text(text)
        assert find_videos(tmp_path/name).records[0].path.read_bytes() == video.read_bytes()
    for name, text, says in (("c.csv", "path\nv.avi\n", "expected the header file"), ("c.txt", "v.avi\nv.avi\n", "c.txt line 2: 'v.avi', expected a path that is listed once"), ("d.txt", "", "the list is empty")):
        (tmp_path/name).write_text(text)
        with pytest.raises(InputError, match=says): find_videos(tmp_path/name)
