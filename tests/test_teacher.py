"Teacher and projection: shapes, parity with transformers, and what is refused."
import json, subprocess, sys

import pytest, torch
from safetensors.torch import load_file, save_file

from stjepa.core import InputError
from stjepa.projection import Projection, TokenStats, fit_projection
from stjepa.teacher import load_teacher, patch_tokens, random_teacher
from stjepa.video import View, to_pixels

TINY = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
NEW = ("query.bias", "value.bias"); PUBLISHED = ("q_bias", "v_bias")


@pytest.fixture
def folder(tmp_path): return random_teacher(tmp_path/"teacher", **TINY)


def edit(folder, change):
    "Rewrite the checkpoint's weights."
    weights = change(load_file(folder/"model.safetensors"))
    save_file(weights, folder/"model.safetensors", metadata=dict(format="pt"))
    return weights


def test_token_and_projection_shapes(folder):
    teacher = load_teacher(folder)
    assert teacher.grid() == (4, 4, 4) and teacher.width == 48
    assert teacher.view() == View(num_frames=8, size_px=32)
    tokens = teacher(to_pixels(torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8), teacher.view()))
    assert tokens.shape == (3, 64, 48) and tokens.dtype == torch.float32
    projected = fit_projection(TokenStats(48).update(tokens), dim=16)(tokens)
    assert projected.shape == (3, 64, 16) and projected.half().isfinite().all()


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_equal_a_direct_transformers_call(tmp_path, pooled, dtype):
    from transformers import VideoMAEModel
    folder, pixels = random_teacher(tmp_path, **TINY, use_mean_pooling=pooled), torch.randn(2, 8, 3, 32, 32)
    direct = VideoMAEModel.from_pretrained(folder).to(dtype).eval()
    with torch.no_grad(): want = direct(pixels.to(dtype)).last_hidden_state
    assert torch.equal(load_teacher(folder, dtype=dtype)(pixels), want.float())


def test_frozen_and_stays_in_eval_mode(folder):
    teacher = load_teacher(folder).train()
    assert not teacher.training and not teacher.model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    probe = torch.nn.Linear(48, 2)
    probe(teacher(torch.zeros(1, 8, 3, 32, 32))).sum().backward() # its tokens can be trained on


def test_published_names_of_the_biases(folder):
    "Checkpoints on the hub say q_bias and v_bias, and have no key bias."
    edit(folder, lambda w: {k: torch.randn_like(v) if k.endswith(NEW) else v for k, v in w.items()})
    pixels, new = torch.randn(1, 8, 3, 32, 32), load_teacher(folder)
    def rename(w):
        for a, b in zip(NEW, PUBLISHED): w = {k.replace(a, b): v for k, v in w.items()}
        return {k: v for k, v in w.items() if not k.endswith("key.bias")}
    assert sum(k.endswith(PUBLISHED) for k in edit(folder, rename)) == 4
    old = load_teacher(folder)
    assert torch.equal(old(pixels), new(pixels)) and old.weights_hash == new.weights_hash


@pytest.mark.parametrize("lost", ["layer.0.attention.attention.query.weight", "layer.1.output.dense.bias", "patch_embeddings.projection.weight", "layer.0.attention.attention.v"])
def test_missing_weights_are_refused(folder, lost):
    edit(folder, lambda w: {k: v for k, v in w.items() if lost not in k})
    with pytest.raises(InputError, match=r"lacks \d weights.*" + lost): load_teacher(folder)


def test_weights_of_another_shape_are_refused(folder):
    edit(folder, lambda w: {k: v[:-1] if k.endswith("layer.0.output.dense.bias") else v for k, v in w.items()})
    with pytest.raises(InputError, match="cannot be loaded|lacks"): load_teacher(folder)


@pytest.mark.parametrize("change,message", [
    (dict(config=dict(model_type="vivit")), "model_type 'vivit', expected 'videomae'"),
    (dict(preprocessor_config=dict(size=40, image_mean=[0]*3, image_std=[1]*3)), "size 40, the model takes 32 px"),
    (dict(preprocessor_config=dict(image_mean=[0]*3)), "image_mean and image_std"),
    (dict(preprocessor_config=dict(image_mean=[0]*3, image_std=[1]*3, do_normalize=False)), "do_normalize False")])
def test_configs_that_cannot_be_honoured(folder, change, message):
    for name, value in change.items(): (folder/f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message): load_teacher(folder)


def test_mean_and_std_are_the_processors(folder):
    (folder/"preprocessor_config.json").write_text(json.dumps(dict(size=dict(height=32, width=32), image_mean=[.5, .4, .3], image_std=[.1, .2, .3])))
    assert load_teacher(folder).view() == View(num_frames=8, size_px=32, mean=(.5, .4, .3), std=(.1, .2, .3))


def test_a_name_that_is_nowhere(tmp_path, monkeypatch, capfd):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("someone/no-such-videomae", str(tmp_path/"none"), "videomae"):
        with pytest.raises(InputError, match=f"teacher {name}: no such folder") as e: load_teacher(name)
        assert "\n" not in str(e.value)
    assert capfd.readouterr().err == ""


def test_pixels_of_another_view(folder):
    with pytest.raises(InputError, match="expected .8, 3, 32, 32."): load_teacher(folder)(torch.zeros(1, 16, 3, 32, 32))


def test_prefix_tokens_go_by_count():
    x = torch.randn(2, 64, 8)
    for prefix in (0, 1, 5): assert torch.equal(patch_tokens(torch.cat([torch.zeros(2, prefix, 8), x], 1), (4, 4, 4)), x)


def test_projection_is_pca_of_normalised_tokens():
    from sklearn.decomposition import PCA
    tokens = torch.randn(4, 200, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, .1, 40)
    stats = TokenStats(40)
    for part in tokens: stats.update(part[None])
    projection, x = fit_projection(stats, dim=10), torch.nn.functional.layer_norm(tokens, (40,)).flatten(0, 1)
    reference = PCA(10, svd_solver="full").fit(x.double().numpy())
    assert torch.allclose(projection(tokens).flatten(0, 1).abs(), torch.from_numpy(reference.transform(x.double().numpy())).float().abs(), atol=1e-4)
    assert torch.allclose(projection.explained, torch.from_numpy(reference.explained_variance_ratio_).float(), atol=1e-5)
    again = Projection.from_tensors(projection.to_tensors())
    assert again.hash == projection.hash and torch.equal(again(tokens), projection(tokens))


def test_importing_the_teacher_does_not_import_transformers():
    code = "import sys, stjepa.teacher, stjepa.build_cache; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
