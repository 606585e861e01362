"Teachers of every kind: parity with transformers, weights that must all be there, processors, and what is refused."
import http.server, json, os, shutil, subprocess, sys, threading
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F, transformers
from einops import rearrange
from safetensors.torch import load_file, save_file

from stjepa.core import InputError
from stjepa.teacher import KINDS, largest_batch, load_teacher, patch_tokens, random_teacher, resize_rules
from stjepa.video import View, resize_crop, to_pixels

TINY = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
PREDICTOR = dict(pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1)
TOWERS = dict(siglip=dict(VIT, intermediate_size=96, image_size=32), siglip2=dict(VIT, intermediate_size=96, num_patches=16), clip=dict(VIT, intermediate_size=96, image_size=32))
FAMILIES = dict(
    videomae=TINY, vjepa2=dict(VIT, crop_size=32, frames_per_clip=8, **PREDICTOR),
    dinov2=dict(VIT, image_size=56), dinov2_with_registers=dict(VIT, image_size=56), dinov3_vit=dict(VIT, intermediate_size=96, image_size=32, num_register_tokens=4),
    **{f"{k}_vision_model": v for k, v in TOWERS.items()}, **{k: dict(text_config=TEXT, vision_config=v) for k, v in TOWERS.items()})
IMAGE = [k for k in FAMILIES if not KINDS[k].video]
NEW = ("query.bias", "value.bias"); PUBLISHED = ("q_bias", "v_bias")
NORM = dict(image_mean=[.485, .456, .406], image_std=[.229, .224, .225])


def make(folder, kind="videomae", **kwargs): return random_teacher(folder, kind=kind, processor=dict(size=32), **FAMILIES[kind] | kwargs)

@pytest.fixture
def folder(tmp_path): return make(tmp_path/"teacher")

@pytest.fixture(params=FAMILIES)
def any_kind(request, tmp_path): return request.param, make(tmp_path/"teacher", request.param)

def edit(folder, change):
    "Rewrite the checkpoint's weights."
    weights = change(load_file(folder/"model.safetensors"))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder/"model.safetensors", metadata=dict(format="pt"))
    return weights

def clips(number=2, frames=8): return torch.randn(number, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# -- tokens

def direct(kind, folder, pixels, dtype):
    "What transformers gives for the same pixels, called as its documentation says, frame by frame for image encoders."
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    model = getattr(model, "vision_model", model)
    pixels = pixels.to(dtype)
    with torch.no_grad():
        if kind == "videomae": return model(pixel_values=pixels).last_hidden_state
        if kind == "vjepa2": return model.get_vision_features(pixels)
        def one(frames):
            if not kind.startswith("siglip2"): return model(pixel_values=frames).last_hidden_state
            from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches
            patches = torch.stack([torch.from_numpy(convert_image_to_patches(f.float().numpy(), 8)) for f in frames])
            return model(pixel_values=patches.to(dtype), pixel_attention_mask=torch.ones(len(frames), 16, dtype=torch.long), spatial_shapes=torch.tensor([[4, 4]] * len(frames))).last_hidden_state
        steps = [one(pixels[:, i])[:, -16:] for i in range(pixels.shape[1])] # (b, h w, d) of each frame
    return torch.cat(steps, 1)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tokens_equal_a_direct_transformers_call(any_kind, dtype):
    kind, folder = any_kind
    teacher = load_teacher(folder, dtype=dtype, num_frames=8)
    assert teacher.width == 48 and teacher.grid() == ((4, 4, 4) if KINDS[kind].video else (8, 4, 4))
    got, want = teacher(clips()), direct(kind, folder, clips(), dtype).float()
    assert got.dtype == torch.float32 and got.shape == want.shape
    if KINDS[kind].video: assert torch.equal(got, want)
    else: torch.testing.assert_close(got, want, **dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=.06, rtol=.02)) # other batch sizes, other sums

@pytest.mark.parametrize("pooled", [True, False])
def test_both_endings_of_videomae(tmp_path, pooled):
    "With mean pooling there is no final norm in the backbone, without there is."
    folder = make(tmp_path, use_mean_pooling=pooled)
    with torch.no_grad(): want = transformers.VideoMAEModel.from_pretrained(folder).eval()(clips()).last_hidden_state
    assert torch.equal(load_teacher(folder)(clips()), want)
    assert (want.std(-1).std() < 1e-3) == (not pooled)

@pytest.mark.parametrize("kind,prefix", [("dinov2", 1), ("dinov2_with_registers", 5), ("dinov3_vit", 5), ("siglip_vision_model", 0), ("clip_vision_model", 1)])
def test_prefix_tokens_of_real_models(tmp_path, kind, prefix):
    teacher, given = load_teacher(make(tmp_path, kind), num_frames=2), []
    teacher.model.register_forward_hook(lambda *args: given.append(args[-1].last_hidden_state))
    tokens = teacher(clips(1, 2))
    assert given[0].shape[1] == prefix + 16
    assert torch.equal(rearrange(tokens, "1 (f s) d -> f s d", f=2), given[0][:, prefix:])

def test_prefix_tokens_go_by_count():
    x = torch.randn(2, 64, 8)
    for prefix in (0, 1, 5): assert torch.equal(patch_tokens(torch.cat([torch.zeros(2, prefix, 8), x], 1), (4, 4, 4)), x)
    for wrong in (x[:, 1:], torch.cat([x, x], 1)):
        with pytest.raises(InputError, match="its grid .* has 64"): patch_tokens(wrong, (4, 4, 4))

def test_frames_of_image_encoders_do_not_see_each_other(tmp_path):
    teacher, pixels = load_teacher(make(tmp_path, "dinov3_vit"), num_frames=4), clips(1, 4)
    other = pixels.clone(); other[:, 2] += 1
    changed = (teacher(pixels) - teacher(other)).abs().amax((0, 2)).view(4, 16).amax(1) > 0
    assert changed.tolist() == [False, False, True, False]

def test_frozen_and_stays_in_eval_mode(any_kind):
    teacher = load_teacher(any_kind[1], num_frames=8).train()
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    probe = torch.nn.Linear(48, 2)
    probe(teacher(clips(1))).sum().backward() # its tokens can be trained on

def test_fused_attention_is_used(any_kind, monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    teacher = load_teacher(any_kind[1], num_frames=8)
    with_sdpa = teacher(clips(1)); assert len(calls) >= 2
    calls.clear(); teacher.model.set_attn_implementation("eager")
    torch.testing.assert_close(teacher(clips(1)), with_sdpa, atol=1e-4, rtol=1e-4)
    assert len(calls) < 2

def test_the_predictor_of_vjepa_is_gone(tmp_path):
    folder = make(tmp_path, "vjepa2")
    assert any(k.startswith("predictor") for k in load_file(folder/"model.safetensors"))
    teacher = load_teacher(folder)
    assert not any("predictor" in k for k in teacher.state_dict())
    edit(folder, lambda w: {k: v + 1 if k.startswith("predictor") else v for k, v in w.items()})
    assert load_teacher(folder).weights_hash == teacher.weights_hash
    edit(folder, lambda w: {k: v for k, v in w.items() if not k.startswith("predictor")})
    assert torch.equal(load_teacher(folder)(clips()), teacher(clips()))

@pytest.mark.parametrize("cls,kind", [("VJEPA2ForVideoClassification", "vjepa2"), ("Dinov2ForImageClassification", "dinov2"), ("VideoMAEForPreTraining", "videomae")])
def test_checkpoints_with_a_head(tmp_path, cls, kind):
    folder = make(tmp_path, kind)
    model = getattr(transformers, cls)(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    inner = getattr(model.eval(), model.base_model_prefix)
    loaded = load_teacher(folder).model.state_dict()
    assert loaded and all(torch.equal(v, inner.state_dict()[k]) for k, v in loaded.items())

@pytest.mark.slow
def test_compiled_tokens_agree(tmp_path):
    folder = make(tmp_path, num_hidden_layers=1)
    plain, compiled = load_teacher(folder), load_teacher(folder, compile=True)
    torch.testing.assert_close(compiled(clips()), plain(clips()), atol=1e-4, rtol=1e-4)
    assert compiled.weights_hash == plain.weights_hash and list(compiled.state_dict()) == list(plain.state_dict())
    assert compiled.model._compiled_call_impl is not None and plain.model._compiled_call_impl is None


# -- weights

def test_published_names_of_the_biases(folder):
    "Checkpoints on the hub say q_bias and v_bias, and have no key bias."
    edit(folder, lambda w: {k: torch.randn_like(v) if k.endswith(NEW) else v for k, v in w.items()})
    new = load_teacher(folder)
    def rename(w):
        for a, b in zip(NEW, PUBLISHED): w = {k.replace(a, b): v for k, v in w.items()}
        return {k: v for k, v in w.items() if not k.endswith("key.bias")}
    assert sum(k.endswith(PUBLISHED) for k in edit(folder, rename)) == 4
    old = load_teacher(folder)
    assert torch.equal(old(clips()), new(clips())) and old.weights_hash == new.weights_hash

def inner_weights(kind, weights):
    "Names of weights in the last layer of the encoder that teaches."
    return sorted(k for k in weights if "layer" in k and ".1." in k and "text_model" not in k and "predictor" not in k)

def test_a_missing_weight_is_refused(any_kind):
    kind, folder = any_kind
    lost = next(k for k in inner_weights(kind, load_file(folder/"model.safetensors")) if k.endswith("weight"))
    edit(folder, lambda w: {k: v for k, v in w.items() if k != lost})
    with pytest.raises(InputError, match=r"lacks 1 weights, e.g. \S*\.1\."): load_teacher(folder)

@pytest.mark.parametrize("lost", ["layer.0.attention.attention.query.weight", "layer.1.output.dense.bias", "patch_embeddings.projection.weight", "layer.0.attention.attention.v"])
def test_missing_weights_of_videomae(folder, lost):
    edit(folder, lambda w: {k: v for k, v in w.items() if lost not in k})
    with pytest.raises(InputError, match=r"lacks \d weights.*" + lost): load_teacher(folder)

def test_weights_without_a_place_are_refused(any_kind):
    "A checkpoint with a layer more than its config says."
    kind, folder = any_kind
    names = inner_weights(kind, load_file(folder/"model.safetensors"))
    edit(folder, lambda w: w | {k.replace(".1.", ".2.", 1): w[k].clone() for k in names})
    with pytest.raises(InputError, match=r"no place for \d+ of the checkpoint's weights"): load_teacher(folder)

def test_weights_of_another_shape_are_refused(any_kind):
    kind, folder = any_kind
    names = inner_weights(kind, load_file(folder/"model.safetensors"))
    edit(folder, lambda w: w | {names[0]: w[names[0]][:-1]})
    with pytest.raises(InputError, match="cannot be loaded|lacks") as e: load_teacher(folder)
    assert "\n" not in str(e.value)

def test_what_weights_are_stored_in_does_not_matter(folder):
    whole = load_teacher(folder); weights = load_file(folder/"model.safetensors")
    transformers.VideoMAEForVideoClassification.from_pretrained(folder).save_pretrained(sharded := folder.parent/"sharded", max_shard_size="60KB")
    assert len([*sharded.glob("model-*.safetensors")]) > 2
    shutil.copytree(folder, pickled := folder.parent/"pickled"); (pickled/"model.safetensors").unlink()
    torch.save(weights, pickled/"pytorch_model.bin")
    shutil.copy(folder/"preprocessor_config.json", sharded)
    for other in (sharded, pickled): assert load_teacher(other).weights_hash == whole.weights_hash and torch.equal(load_teacher(other)(clips()), whole(clips()))

@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(any_kind, stored):
    "Computed in float32 from the first operation on, rotary angles included."
    kind, folder = any_kind
    edit(folder, lambda w: {k: v.to(stored) if v.is_floating_point() else v for k, v in w.items()})
    config = json.loads((folder/"config.json").read_text()); (folder/"config.json").write_text(json.dumps(config | dict(dtype=str(stored).split(".")[1])))
    teacher = load_teacher(folder, num_frames=8)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    torch.testing.assert_close(teacher(clips()), direct(kind, folder, clips(), torch.float32), atol=1e-5, rtol=1e-5)

def test_a_pickle_is_not_executed(folder):
    (folder/"model.safetensors").unlink()
    class Evil:
        def __reduce__(self): return os.mkdir, (str(folder/"executed"),)
    torch.save(dict(evil=Evil()), folder/"pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded") as e: load_teacher(folder)
    assert "\n" not in str(e.value) and not (folder/"executed").exists()


# -- views

PROCESSORS = dict( # as published
    videomae=dict(do_center_crop=True, size=dict(shortest_edge=224), crop_size=dict(height=224, width=224), resample=2, **NORM),
    vjepa2=dict(do_center_crop=True, size=dict(shortest_edge=292), crop_size=dict(height=256, width=256), resample=2, **NORM),
    dinov2=dict(do_center_crop=True, size=dict(shortest_edge=256), crop_size=dict(height=224, width=224), resample=3, **NORM),
    dinov3_vit=dict(do_center_crop=None, crop_size=None, size=dict(height=224, width=224), resample=2, **NORM),
    siglip=dict(size=dict(height=224, width=224), resample=2, image_mean=[.5] * 3, image_std=[.5] * 3), # SigLIP 2 of fixed size
    clip=dict(do_center_crop=True, size=dict(shortest_edge=224), crop_size=dict(height=224, width=224), resample=3, image_mean=[.48, .46, .41], image_std=[.27, .26, .28]))
RULES = dict(
    videomae=dict(size_px=224, interpolation="bilinear_antialias"), vjepa2=dict(size_px=256, short_px=292, interpolation="bilinear_antialias"),
    dinov2=dict(size_px=224, short_px=256, interpolation="bicubic_antialias"), dinov3_vit=dict(size_px=224, resize="square", interpolation="bilinear_antialias"),
    siglip=dict(size_px=224, resize="square", interpolation="bilinear_antialias"), clip=dict(size_px=224, interpolation="bicubic_antialias"))

def can_say(rules):
    try: return View(**rules)
    except (TypeError, InputError): return None

def processed(kind, frame):
    "A frame through the checkpoint's own processor on PIL; those that transformers has for torchvision alone, by their steps with PIL."
    from PIL import Image
    p, steps = PROCESSORS[kind], dict(do_rescale=False, do_normalize=False)
    where = dict(videomae="videomae.image_processing_pil_videomae.VideoMAEImageProcessorPil", dinov2="bit.image_processing_pil_bit.BitImageProcessorPil",
                 siglip="siglip.image_processing_pil_siglip.SiglipImageProcessorPil", clip="clip.image_processing_pil_clip.CLIPImageProcessorPil").get(kind)
    if where:
        module, cls = where.rsplit(".", 1)
        out = getattr(__import__(f"transformers.models.{module}", fromlist=[cls]), cls)(**p | steps)([frame.numpy()])["pixel_values"][0]
        return rearrange(torch.from_numpy(np.asarray(out).squeeze()), "c h w -> h w c")
    (h, w, _), px = frame.shape, RULES[kind]["size_px"]
    short = p["size"].get("shortest_edge")
    size = (px, px) if not short else (short, short * w // h) if h <= w else (short * h // w, short)
    out = np.asarray(Image.fromarray(frame.numpy()).resize(size[::-1], p["resample"]))
    top, left = (size[0] - px) // 2, (size[1] - px) // 2
    return torch.from_numpy(out[top:top + px, left:left + px].copy())

@pytest.mark.parametrize("kind", PROCESSORS)
def test_published_processors(tmp_path, kind):
    "Their rules are read right; where a View can say them the pixels agree within one grey level, where it cannot the teacher is refused."
    assert resize_rules(PROCESSORS[kind], KINDS[kind].resample) == RULES[kind]
    sizes = dict(vjepa2=dict(crop_size=256, patch_size=64), siglip=dict(vision_config=dict(TOWERS["siglip"], image_size=224, patch_size=56)),
                 clip=dict(vision_config=dict(TOWERS["clip"], image_size=224, patch_size=56)))
    folder = make(tmp_path, kind, **sizes.get(kind, dict(image_size=224, patch_size=56)))
    (folder/"preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    if not can_say(RULES[kind]):
        with pytest.raises(InputError, match="its processor's size, crop_size or resample ask for .* which a View cannot do"): load_teacher(folder)
        return
    view = load_teacher(folder).view()
    assert view == View(num_frames=view.num_frames, mean=tuple(PROCESSORS[kind]["image_mean"]), std=tuple(PROCESSORS[kind]["image_std"]), **RULES[kind])
    for h, w in ((240, 427), (427, 240), (300, 300), (96, 130)):
        frame = torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
        off = (resize_crop(frame[None], view)[0].int() - processed(kind, frame).int()).abs()
        assert off.max() <= (1 if "bilinear" in view.interpolation else 2), f"{h}x{w}"

def test_naflex_pixels_are_its_processors(tmp_path):
    "A square frame gives the patches that NaFlex's own processor cuts."
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    folder = make(tmp_path, "siglip2")
    (folder/"preprocessor_config.json").write_text(json.dumps(dict(patch_size=8, max_num_patches=16, resample=2, image_mean=[.5] * 3, image_std=[.5] * 3)))
    teacher, frame = load_teacher(folder, num_frames=1), torch.randint(0, 256, (50, 50, 3), dtype=torch.uint8)
    inputs = processor([frame.numpy()], return_tensors="pt"); assert inputs["spatial_shapes"].tolist() == [[4, 4]]
    with torch.no_grad(): want = teacher.model(**inputs).last_hidden_state
    got = teacher(to_pixels(resize_crop(frame[None], teacher.view())[None], teacher.view()))
    torch.testing.assert_close(got, want, atol=.02, rtol=.02) # one grey level

def test_dinov2_at_another_size_than_its_config(tmp_path):
    "The config says 56 px, the processor 32: the grid is the processor's."
    teacher = load_teacher(make(tmp_path, "dinov2"))
    assert teacher.model.config.image_size == 56 and teacher.view().size_px == 32 and teacher.grid() == (16, 4, 4)

def test_number_of_frames(tmp_path):
    for kind, own in (("vjepa2", 8), ("dinov3_vit", 16)):
        folder = make(tmp_path/kind, kind); tubelet = 2 if kind == "vjepa2" else 1
        assert load_teacher(folder).view().num_frames == own
        for frames in (2, 6): assert load_teacher(folder, num_frames=frames)(clips(1, frames)).shape == (1, frames // tubelet * 16, 48)
    with pytest.raises(InputError, match="5 frames asked for, expected a multiple of the model's tubelet of 2"): load_teacher(tmp_path/"vjepa2", num_frames=5)
    with pytest.raises(InputError, match="4 frames asked for, the model takes 8"): load_teacher(make(tmp_path/"v"), num_frames=4)

@pytest.mark.parametrize("change,message", [
    (dict(config=dict(model_type="vivit")), "model_type 'vivit', expected one of videomae, vjepa2"),
    (dict(preprocessor_config=dict(size=40, **NORM)), "size 40, the model takes 32 px"),
    (dict(preprocessor_config=dict(size=32, image_mean=[0]*3)), "image_mean and image_std"),
    (dict(preprocessor_config=NORM), "size None"),
    (dict(preprocessor_config=dict(size=32, resample=0, **NORM)), "resample 0, expected 2 or 3"),
    (dict(preprocessor_config=dict(size=32, crop_size=64, **NORM)), "crop_size 64, expected a square that fits"),
    (dict(preprocessor_config=dict(size=dict(height=32, width=48), **NORM)), "expected a square"),
    (dict(preprocessor_config=dict(size=32, do_center_crop=False, **NORM)), "do_center_crop False"),
    (dict(preprocessor_config=dict(size=32, rescale_factor=1/127.5, **NORM)), "rescale_factor 0.0078.*expected 1/255"),
    (dict(preprocessor_config=dict(size=32, do_normalize=False, **NORM)), "do_normalize False")])
def test_configs_that_cannot_be_honoured(folder, change, message):
    for name, value in change.items(): (folder/f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message): load_teacher(folder)

def test_a_size_that_patches_do_not_divide(tmp_path):
    folder = make(tmp_path, "dinov3_vit")
    (folder/"preprocessor_config.json").write_text(json.dumps(dict(size=36, **NORM)))
    with pytest.raises(InputError, match="36 px cannot be cut into patches of 8"): load_teacher(folder)

@pytest.mark.parametrize("file,nested", [("preprocessor_config.json", ""), ("video_preprocessor_config.json", ""), ("processor_config.json", "image_processor"), ("processor_config.json", "video_processor")])
def test_mean_and_std_are_the_processors(folder, file, nested):
    said = dict(size=dict(shortest_edge=32), image_mean=[.5, .4, .3], image_std=[.1, .2, .3])
    (folder/"preprocessor_config.json").unlink()
    (folder/file).write_text(json.dumps({nested: said} if nested else said))
    assert load_teacher(folder).view() == View(num_frames=8, size_px=32, mean=(.5, .4, .3), std=(.1, .2, .3))

def test_pixels_of_another_view(folder):
    with pytest.raises(InputError, match="expected .8, 3, 32, 32."): load_teacher(folder)(torch.zeros(1, 16, 3, 32, 32))


# -- names

def test_a_name_that_is_nowhere(tmp_path, monkeypatch, capfd):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("someone/no-such-videomae", str(tmp_path/"none"), "videomae"):
        with pytest.raises(InputError, match=f"teacher {name}: no such folder") as e: load_teacher(name)
        assert "\n" not in str(e.value)
    assert capfd.readouterr().err == ""

class Hub(http.server.SimpleHTTPRequestHandler):
    "Serves a folder as the Hugging Face hub serves a repository's files, and counts the requests."
    seen = []
    def end_headers(self):
        for k, v in {"X-Repo-Commit": "0123456789" * 4, "ETag": f'"{abs(hash(self.path))}"'}.items(): self.send_header(k, v)
        super().end_headers()
    def translate_path(self, path):
        self.seen.append(path)
        return super().translate_path("/" + path.split("/")[-1] if path.startswith("/someone/videomae/resolve/") else "/none")
    def send_error(self, code, *args):
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound" if "/someone/videomae/" in self.path else "RepoNotFound")
        self.end_headers()
    def log_message(self, *args): pass

@pytest.mark.slow
def test_a_name_on_the_hub(folder, tmp_path):
    "By name from the hub, again when the hub is gone, and what another name or a hub that never answers says: in one try, without waiting."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path/"home"), no_proxy="127.0.0.1",
        HF_HUB_DISABLE_XET="1", DISABLE_SAFETENSORS_CONVERSION="1")
    code = "import sys, time; from stjepa.teacher import load_teacher; time.sleep = lambda s: sys.exit(f'waited {s} s')\n" \
           "for name in ('someone/videomae', 'someone/other'):\n" \
           "    try: t = load_teacher(name); print(t.weights_hash, t.revision)\n" \
           "    except ValueError as e: print(e)"
    def ask():
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    known = f"{load_teacher(folder).weights_hash} {'0123456789' * 4}"
    first, second = ask()
    assert first == known and second.startswith("teacher someone/other: no such folder, nor such a model on the Hugging Face hub (")
    server.shutdown(); server.server_close()
    assert ask() == [known, "teacher someone/other: no such folder, and the Hugging Face hub cannot be reached"]

def test_importing_the_teacher_does_not_import_transformers():
    code = "import sys, stjepa.teacher, stjepa.build_cache; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- batches

def test_largest_batch_tries_no_more_than_it_must():
    tried = []
    def call(size):
        tried.append(size)
        if size > 48: raise torch.OutOfMemoryError("out of memory")
    assert largest_batch(call) == 32 and tried == [1, 2, 4, 8, 16, 32, 64]
    tried.clear(); assert largest_batch(call, start=8, limit=16) == 16 and tried == [8, 16]
    tried.clear(); assert largest_batch(call, start=64) == 32 and tried == [64, 32]

def test_largest_batch_passes_other_errors_on():
    def call(size): raise RuntimeError("CUDA error: device-side assert")
    with pytest.raises(RuntimeError, match="device-side assert"): largest_batch(call)

def test_largest_batch_frees_what_a_failed_try_held():
    import weakref
    alive = []
    def call(size):
        assert not any(r() is not None for r in alive), "the try before is still in memory"
        held = torch.zeros(size); alive.append(weakref.ref(held))
        if size > 4: raise torch.OutOfMemoryError("out of memory")
    assert largest_batch(call, start=16) == 4 and len(alive) == 3

@pytest.mark.cuda
def test_largest_batch_on_a_gpu(folder):
    teacher = load_teacher(folder, "cuda", torch.bfloat16)
    free = torch.cuda.mem_get_info()[0]
    def call(size): torch.empty(size, free // 20, dtype=torch.uint8, device="cuda"); teacher(clips(1).expand(size, -1, -1, -1, -1))
    assert largest_batch(call) == 16
