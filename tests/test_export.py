"Exported students: bit-identical, loaded strictly or not at all, usable with neither transformers nor the teacher."
import json, pickle, re, shutil
import numpy as np, pytest, torch
from conftest import ROOT
from huggingface_hub import HfApi
from safetensors.torch import save_file
from stjepa.core import InputError
from stjepa.export import Encoded, ExportConfig, VideoEncoder, export, frames_like, public_name, read_results, read_weights, relative_error, run_onnx, run_torch_export
from stjepa.pretrain import PretrainConfig, load_student, pretrain
from stjepa.student import Student
from stjepa.video import View

torch.set_num_threads(1)

@pytest.fixture(scope="module")
def checkpoint(run_dir): return max(run_dir.glob("checkpoint_step*.pt"), key=lambda p: int(p.stem.split("step")[1]))

@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")/"student"
    export(ExportConfig(str(checkpoint), str(out), onnx=True, torch_export=True))
    return out

@pytest.fixture
def broken(folder, tmp_path):
    "A copy of the folder, changed by `change(config, tensors, marks)`."
    def make(change):
        out = shutil.copytree(folder, tmp_path/"broken", dirs_exist_ok=True)
        config, (tensors, marks) = json.loads((out/"config.json").read_text()), read_weights(out/"model.safetensors")
        change(config, tensors, marks)
        (out/"config.json").write_text(json.dumps(config)); save_file(tensors, out/"model.safetensors", marks)
        return out
    return make

# ---- the same numbers

def test_every_format_gives_what_the_checkpoint_gives(checkpoint, folder):
    student, predictor, _, _ = load_student(checkpoint)
    encoder = VideoEncoder.from_pretrained(folder)
    for b in (1, 3):
        x = frames_like(encoder, b, seed=b); tokens = student(x); predicted = torch.nn.functional.normalize(predictor(tokens), dim=-1)
        wanted = Encoded(predicted.mean(1), predicted, tokens, tokens.mean(1))
        for name, found in encoder(x)._asdict().items(): assert torch.equal(found, getattr(wanted, name)), name
        assert relative_error(run_onnx(folder/"model.onnx", x), wanted) < 1e-4
        assert relative_error(run_torch_export(folder/"model.pt2", x), wanted) < 1e-4

def test_relative_error_sees_an_error():
    x = [torch.tensor([1., -4.])]
    assert relative_error(x, x) == 0 and relative_error([torch.tensor([1., -4.4])], x) == pytest.approx(.1)

@pytest.mark.parametrize("options", [dict(prediction="joint", positions="rotary"), dict(prediction="tail", positions="learned", pattern="F J2")], ids=lambda o: o["prediction"])
def test_other_students(toy, cache_dir, tmp_path, options):
    small = dict(epochs=1, batch_size=4, mask_ratio=.5, embed_dim=48, depth_factorised=1, depth_joint=1, num_heads=4, predictor_dim=48, predictor_depth=1, holdout_share=.2, num_workers=0, device="cpu")
    path = pretrain(PretrainConfig(str(toy/"ssv2"), str(cache_dir), out=str(tmp_path/"run"), **small, **options))["checkpoint"]
    export(ExportConfig(path, str(tmp_path/"out"))) # compares bit by bit
    raw, averaged = VideoEncoder.from_checkpoint(path, ema=False), VideoEncoder.from_pretrained(tmp_path/"out")
    assert not torch.equal(raw(x := frames_like(raw, 1)).pooled, averaged(x).pooled) and "not averaged" in raw.about["weights"]

def test_it_needs_neither_transformers_nor_the_teacher(folder, toy, python):
    video = next((toy/"ucf101").rglob("*.avi"))
    said = python(f"import sys; from stjepa.export import VideoEncoder; print(tuple(VideoEncoder.from_pretrained({str(folder)!r}).encode({str(video)!r}).pooled.shape), "
                  "[m for m in ('transformers', 'stjepa.teacher', 'onnx', 'matplotlib') if m in sys.modules])")
    assert said == "(1, 32) []"

def test_the_example_on_the_card_works(folder, toy, monkeypatch):
    text = (folder/"README.md").read_text(); monkeypatch.chdir(folder.parent)
    shutil.copy(next((toy/"ucf101").rglob("*.avi")), "clip.mp4")
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], where := {})
    assert where["features"].pooled.shape == (1, 32) and "(1, 32)" in text

def test_frames_in_memory_are_as_good_as_the_file(folder, toy):
    from stjepa.video import read_frames
    video, encoder = next((toy/"ucf101").rglob("*.avi")), VideoEncoder.from_pretrained(folder)
    frames = read_frames(video, lambda n: np.arange(n))[0]
    for some in (frames, torch.from_numpy(frames)): assert torch.equal(encoder.encode(some, str(video)).pooled[0], encoder.encode(video).pooled[0])
    for bad in (frames / 255, frames[0], frames[..., :2]):
        with pytest.raises(InputError, match="expected .frames, height, width, 3. uint8"): encoder.encode(bad)
    with pytest.raises(InputError, match="no such video file"): encoder.encode(folder/"none.mp4")

# ---- strict

@pytest.mark.parametrize("change, says", [
    (lambda c, t, m: c["student"].update(embed_dim=64), "student embed_dim is 64, the weights were saved with 48"),
    (lambda c, t, m: c["student"].pop("num_heads"), "student num_heads is None, the weights were saved with 4"),
    (lambda c, t, m: c["student"].update(dept=3), "student dept is 3"),
    (lambda c, t, m: c["predictor"].update(prediction="joint"), "predictor prediction is joint, the weights were saved with cross"),
    (lambda c, t, m: c["view"].update(mean=[.5, .5, .5]), "view mean is"),
    (lambda c, t, m: c.pop("view"), "missing or unknown view"),
    (lambda c, t, m: c.update(extra=1), "missing or unknown extra"),
    (lambda c, t, m: c.update(student=[]), "student is .., expected an object"),
    (lambda c, t, m: c.update(format="stjepa encoder 9"), "not an exported student"),
    (lambda c, t, m: t.pop("predictor.head.weight"), "tensor predictor.head.weight is missing"),
    (lambda c, t, m: t.update(more=torch.zeros(1)), "tensor more belongs to no part"),
    (lambda c, t, m: t.update({"student.norm.bias": torch.zeros(7)}), r"student.norm.bias is \(7,\)"),
    (lambda c, t, m: t.update({"student.norm.bias": t["student.norm.bias"].half()}), "torch.float16, expected"),
    (lambda c, t, m: t["student.norm.bias"].add_(1e-6), "is the file damaged"),
    (lambda c, t, m: m.clear(), "missing|damaged|saved with")])
def test_what_does_not_fit_is_named(broken, change, says):
    with pytest.raises(InputError, match=says): VideoEncoder.from_pretrained(broken(change))

def test_other_files_are_refused(folder, tmp_path, toy):
    out = shutil.copytree(folder, tmp_path/"torn"); (out/"model.safetensors").write_bytes((folder/"model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read as safetensors"): VideoEncoder.from_pretrained(out)
    (out/"config.json").unlink(); shutil.copy(folder/"model.safetensors", out)
    with pytest.raises(InputError, match="no config.json in it"): VideoEncoder.from_pretrained(out)
    with pytest.raises(InputError, match="no model.safetensors in it"): VideoEncoder.from_pretrained(toy/"ucf101")
    with pytest.raises(InputError, match="not a name on the hub"): VideoEncoder.from_pretrained(tmp_path/"a"/"b"/"c")
    with pytest.raises(InputError, match="cannot be had from the hub"): VideoEncoder.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path/"cache")

def test_another_view_is_refused(folder):
    assert VideoEncoder.from_pretrained(folder, view=View(size_px=64)).view == View(size_px=64)
    with pytest.raises(InputError, match="View num_frames 16, asked for 8"): VideoEncoder.from_pretrained(folder, view=View(size_px=64, num_frames=8))

def test_the_encoder_alone(folder):
    student, encoder = Student.from_pretrained(folder), VideoEncoder.from_pretrained(folder)
    assert type(student) is Student and torch.equal(student(x := frames_like(encoder, 1)), encoder(x).tokens) and not student.training

def test_a_student_loads_without_another_import(folder, python):
    said = python(f"import sys; from stjepa.student import Student; before = 'stjepa.export' in sys.modules; s = Student.from_pretrained({str(folder)!r}); "
                  "print(before, type(s).__name__, s.training, [m for m in ('transformers', 'stjepa.teacher', 'onnx', 'matplotlib') if m in sys.modules])")
    assert said == "False Student False []"

@pytest.mark.parametrize("change, says", [
    (lambda c, t, m: c["student"].update(num_heads=2), "student num_heads is 2, the weights were saved with 4"),
    (lambda c, t, m: c["view"].update(num_frames=8), "view num_frames is 8"),
    (lambda c, t, m: t.pop("student.patch_embed.weight"), "tensor student.patch_embed.weight is missing"),
    (lambda c, t, m: t.update({"student.head.weight": torch.zeros(1)}), "tensor student.head.weight belongs to no part"),
    (lambda c, t, m: t["predictor.head.bias"].add_(1), "is the file damaged")])
def test_a_student_is_as_strict(broken, change, says):
    with pytest.raises(InputError, match=says): Student.from_pretrained(broken(change))

def test_a_student_of_another_view_is_refused(folder):
    assert Student.from_pretrained(folder, view=View(size_px=64)).config.size_px == 64
    for view, says in ((View(size_px=64, mean=(.5, .5, .5)), "View mean .*asked for"), (View(size_px=64).placed(0, 5, 0, 1), r"View moment None, asked for \[0, 5\]")):
        with pytest.raises(InputError, match=says): Student.from_pretrained(folder, view=view)

def test_a_changed_student_is_saved_as_it_is(folder, tmp_path):
    student = Student.from_pretrained(folder)
    with torch.no_grad(): student.norm.bias.add_(1)
    student.save_pretrained(tmp_path/"out")
    again = Student.from_pretrained(tmp_path/"out")
    assert torch.equal(again.norm.bias, student.norm.bias) and set(student.state_dict()) == set(again.state_dict()) and "whole" not in str(student)
    for lost in (Student(student.config), pickle.loads(pickle.dumps(Student(student.config)))):
        with pytest.raises(InputError, match="was not loaded by from_pretrained"): lost.save_pretrained(tmp_path/"none")
    assert not (tmp_path/"none").exists()

# ---- the hub and the card

@pytest.mark.parametrize("kind", [VideoEncoder, Student])
def test_a_push_uploads_what_loads_again(folder, tmp_path, monkeypatch, kind):
    class Made: repo_id = "someone/student"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **k: Made)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, repo_id, folder_path, **k: str(shutil.copytree(folder_path, tmp_path/"uploaded")))
    encoder = VideoEncoder.from_pretrained(folder)
    kind.from_pretrained(folder).push_to_hub("someone/student", model_card_kwargs=dict(name="someone/student"))
    again = VideoEncoder.from_pretrained(tmp_path/"uploaded")
    assert torch.equal(again(x := frames_like(encoder, 1)).pooled, encoder(x).pooled)
    assert 'from_pretrained("someone/student")' in (tmp_path/"uploaded"/"README.md").read_text()

def test_a_name_on_the_hub_is_fetched_from_there(folder, monkeypatch):
    from stjepa import export as module
    asked = []
    monkeypatch.setattr(module, "hf_hub_download", lambda name, file, **k: asked.append((name, file, k)) or str(folder/file))
    VideoEncoder.from_pretrained("someone/student", revision="v1")
    assert {*((n, f) for n, f, _ in asked)} == {("someone/student", "config.json"), ("someone/student", "model.safetensors")} and all(k == dict(revision="v1") for *_, k in asked)

def test_the_card_warns_of_non_commercial_teachers(folder):
    encoder = VideoEncoder.from_pretrained(folder)
    assert encoder.generate_model_card().data.license == "other"
    encoder.about["teacher"]["name"] = "MCG-NJU/videomae-huge-finetuned-kinetics"
    card = encoder.generate_model_card()
    assert card.data.license == "cc-by-nc-4.0" and "excludes commercial use" in card.text
    for word in ("ssv2 train", "16 frames", "64 x 64", "0.485", "`pooled`", "`predicted`", "`tokens`", "step"): assert word in card.text, word

def test_no_path_of_this_machine_is_published(folder, toy):
    for name in ("README.md", "config.json"): assert str(toy) not in (folder/name).read_text() and "/tmp" not in (folder/name).read_text()
    assert public_name("C/d/teacher") == "teacher" and public_name("facebook/vjepa2") == "facebook/vjepa2"

def test_results_of_this_checkpoint_alone_go_on_the_card(checkpoint, run_dir, tmp_path):
    def results(**summary):
        (tmp_path/"summary.json").write_text(json.dumps(summary)); (tmp_path/"table.md").write_text("| | top-1 |\n")
        return str(tmp_path)
    assert read_results(results(temporal={}, checkpoint=str(checkpoint)), checkpoint) == {"Temporal tests": "| | top-1 |"}
    assert read_results(str(tmp_path/"summary.json"), checkpoint) == {"Temporal tests": "| | top-1 |"} and read_results("", checkpoint) == {}
    with pytest.raises(InputError, match="results of .*step0.pt, not of"): read_results(results(ucf101={}, checkpoint=str(run_dir/"checkpoint_step0.pt")), checkpoint)
    with pytest.raises(InputError, match="not the results of an evaluation"): read_results(results(checkpoint=str(checkpoint)), checkpoint)

# ---- the command

def test_exporting_again_and_elsewhere(checkpoint, folder, tmp_path, capsys):
    out = shutil.copytree(folder, tmp_path/"again")
    assert export(ExportConfig(str(checkpoint), str(out))) == {} and "bit-identical" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"notes.txt").write_text("keep")
    with pytest.raises(InputError, match="holds something else"): export(ExportConfig(str(checkpoint), str(tmp_path/"mine")))
    assert [p.name for p in (tmp_path/"mine").iterdir()] == ["notes.txt"]

def test_onnx_without_its_extra_is_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"--onnx: onnxscript is not installed; pip install -e .\[onnx\]"): export(ExportConfig(str(checkpoint), str(tmp_path/"out"), onnx=True))
    assert not (tmp_path/"out").exists()

def test_the_command(checkpoint, tmp_path, command):
    done = command("stjepa_export", checkpoint, tmp_path/"out")
    assert done.returncode == 0 and not done.stderr and "bit-identical" in done.stdout, done.stderr
    done = command("stjepa_export", tmp_path/"none.pt", tmp_path/"out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none.pt" in done.stderr
