"Student, masks, predictors and objective: what must hold for every form of them."
import copy
from dataclasses import replace
import pytest, torch
from einops import rearrange
from torch import nn
from stjepa.attention import FactorisedBlock, JointBlock, seed_drop_path
from stjepa.core import InputError, generator
from stjepa.masking import DRAWS, MASKS, clip_masks, num_hidden, split_idx
from stjepa.objective import PREDICTORS, Jepa, Objective, feature_health, feature_std, rankme, take_targets
from stjepa.student import Student, StudentConfig, load_weights, regrid, student_config
from stjepa.video import View

SMALL = StudentConfig(8, 64, embed_dim=48, depth_factorised=2, depth_joint=1, num_heads=4)
PATTERNS = ("F2 J", "J3", "F3", "F J2", "J F J")
POSITIONS = ("sincos", "learned", "rotary")

def random_frames(b=2, config=SMALL, key="frames"):
    return torch.randint(256, (b, config.num_frames, config.size_px, config.size_px, 3), dtype=torch.uint8, generator=generator(key))

def batch_of(b=2, draws=2, kind="random", share=.5):
    "Frames, targets of width 32, and `draws` masks per clip."
    masks = (torch.stack(o) for o in zip(*(clip_masks(kind, (4, 4), .75, draws, share, 0, 0, row) for row in range(b))))
    return random_frames(b), torch.randn(b, 64, 32, generator=generator("targets")).half(), *masks

def elsewhere(frames, visible_idx):
    "The clips, once per mask, with other pixels wherever the mask hides."
    each = frames.repeat_interleave(len(visible_idx) // len(frames), 0)
    hidden = torch.ones(len(each), 16, dtype=torch.bool).scatter(1, visible_idx, False).view(-1, 4, 4)
    where = hidden.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None, :, :, None]
    return torch.where(where, 255 - each, each)

def make(form="cross", seed=0, **more):
    "A small Jepa in eval mode, with positions and mask tokens that are not zero."
    torch.manual_seed(seed)
    config = replace(SMALL, **more)
    jepa = Jepa(Student(config), PREDICTORS[form](config, 32, 48, 2, 4)).eval().requires_grad_(False)
    jepa.predictor.mask_token.normal_()
    return jepa

# -- nothing leaks

@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_pixels_change_no_bit_of_the_encoder(pattern, positions):
    frames, _, visible_idx, _ = batch_of()
    visible_idx = visible_idx.flatten(0, 1)
    student = make(pattern=pattern, positions=positions).student
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            several, single = student(frames, visible_idx), student(elsewhere(frames, visible_idx), visible_idx)
            assert torch.equal(several, single)
            assert not torch.equal(several, student(255 - frames, visible_idx))

@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("form", PREDICTORS)
def test_hidden_pixels_change_no_bit_of_a_prediction(form, positions, kind):
    frames, _, visible_idx, query_idx = batch_of(kind=kind)
    visible_idx, query_idx = visible_idx.flatten(0, 1), query_idx.flatten(0, 1)
    jepa = make(form, positions=positions)
    predict = lambda f: jepa.predictor.predict(jepa.student, f, visible_idx, query_idx, with_visible=True)
    assert torch.equal(predict(frames), predict(elsewhere(frames, visible_idx)))
    assert not torch.equal(predict(frames), predict(255 - frames))

@pytest.mark.parametrize("form", PREDICTORS)
def test_targets_of_visible_tokens_do_not_count(form):
    "The gradient of the loss in the targets is zero exactly where nothing was asked."
    frames, targets, visible_idx, query_idx = batch_of(draws=1)
    for weight in (0., .5):
        jepa, t = make(form), targets.float().requires_grad_()
        jepa.objective = Objective(visible_weight=weight)
        jepa(frames, t, visible_idx, query_idx).backward()
        counted = rearrange(t.grad, "b (t s) d -> b s t d", t=4).abs().amax((2, 3)) > 0
        asked = torch.zeros(2, 16, dtype=torch.bool).scatter(1, query_idx[:, 0], True)
        if weight: asked = asked.scatter(1, visible_idx[:, 0], True)
        assert torch.equal(counted, asked)

# -- attention

@pytest.mark.parametrize("axis, t, s", (("time", 1, 6), ("space", 5, 1)))
def test_factorised_is_joint_where_an_axis_has_length_one(axis, t, s):
    "Attention along the axis of length 1 is a linear map of the token; without its output the block is a joint one."
    torch.manual_seed(0)
    factorised, joint, x = FactorisedBlock(48, 4), JointBlock(48, 4), torch.randn(3, t, s, 48)
    idle, busy = ("attn_t", "attn") if axis == "time" else ("attn", "attn_t")
    nn.init.zeros_(getattr(factorised, idle).proj.weight); nn.init.zeros_(getattr(factorised, idle).proj.bias)
    joint.attn, joint.norm1 = getattr(factorised, busy), factorised.norm1 if busy == "attn" else factorised.norm_t
    joint.norm2, joint.mlp = factorised.norm2, factorised.mlp
    assert torch.allclose(factorised(x), joint(x), atol=1e-6)
    assert not torch.allclose(FactorisedBlock(48, 4)(x), joint(x), atol=1e-3)

@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_permuted_visible_positions_permute_the_output(pattern, positions):
    frames, _, visible_idx, _ = batch_of(draws=1)
    student, order = make(pattern=pattern, positions=positions).student, torch.tensor([2, 0, 3, 1])
    plain, permuted = (rearrange(student(frames, i), "b (t v) d -> b t v d", t=4) for i in (visible_idx[:, 0], visible_idx[:, 0][:, order]))
    assert torch.allclose(plain[:, :, order], permuted, atol=1e-5) and not torch.allclose(plain, permuted, atol=1e-2)

@pytest.mark.parametrize("form", PREDICTORS)
def test_permuted_queries_permute_the_predictions(form):
    frames, _, visible_idx, query_idx = batch_of(draws=1)
    for positions in POSITIONS:
        jepa, order = make(form, positions=positions), torch.tensor([5, 2, 0, 3, 1, 4])
        plain, permuted = (rearrange(jepa.predictor.predict(jepa.student, frames, visible_idx[:, 0], i), "b (t q) d -> b t q d", t=4)
                           for i in (query_idx[:, 0], query_idx[:, 0][:, order]))
        assert torch.allclose(plain[:, :, order], permuted, atol=1e-5) and not torch.allclose(plain, permuted, atol=1e-2)

def test_all_positions_listed_are_the_full_clip():
    frames, every = random_frames(), torch.arange(16).expand(2, -1)
    for form in PREDICTORS:
        for positions in POSITIONS:
            jepa = make(form, positions=positions)
            assert torch.allclose(jepa.student(frames), jepa.student(frames, every), atol=1e-5)
            assert torch.allclose(jepa.predictor.predict(jepa.student, frames), jepa.predictor.predict(jepa.student, frames, every, every), atol=1e-5)

def test_rotary_positions_tell_only_distances():
    "Moved by the same steps, visible tubes keep their tokens; with sines and cosines they do not."
    idx = torch.tensor([[0, 1, 4]])
    patches = torch.randint(256, (1, 8, 3, 16, 16, 3), dtype=torch.uint8, generator=generator("patches"))
    def placed(at):
        frames = torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)
        for k, i in enumerate(at[0].tolist()): frames[:, :, i // 4 * 16:i // 4 * 16 + 16, i % 4 * 16:i % 4 * 16 + 16] = patches[:, :, k]
        return frames
    for positions, same in (("rotary", True), ("sincos", False)):
        student = make(positions=positions).student
        assert torch.allclose(student(placed(idx), idx), student(placed(idx + 6), idx + 6), atol=1e-4) == same

# -- masks

@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", ((1, 2), (3, 5), (4, 4), (14, 14), (24, 16)))
def test_masks_hide_exactly_as_many_as_asked(kind, grid):
    for ratio in (.01, .3, .5, .75, .9, .99):
        for more in DRAWS[kind]:
            hidden = MASKS[kind](5, grid, ratio, generator(grid, ratio), **more)
            assert hidden.dtype == torch.bool and hidden.shape == (5, grid[0] * grid[1])
            assert hidden.sum(1).eq(num_hidden(grid, ratio)).all()

@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_a_function_of_their_key_alone(kind):
    torch.manual_seed(0); first = clip_masks(kind, (14, 14), .9, 3, .25, 7, 1, 12)
    torch.manual_seed(1); torch.rand(3); clip_masks(kind, (14, 14), .9, 1, 1., 7, 1, 13)
    again = clip_masks(kind, (14, 14), .9, 3, .25, 7, 1, 12)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(a[:1], b) for a, b in zip(first, clip_masks(kind, (14, 14), .9, 1, .25, 7, 1, 12))), "the first draw does not depend on how many follow"
    assert len({tuple(v.tolist()) for v in first[0]}) == 3
    assert not any(torch.equal(a, b) for key in ((8, 1, 12), (7, 2, 12), (7, 1, 13)) for a, b in zip(first, clip_masks(kind, (14, 14), .9, 3, .25, *key)))

@pytest.mark.parametrize("kind", MASKS)
def test_asked_positions_are_hidden_ones(kind):
    visible_idx, query_idx = clip_masks(kind, (14, 14), .9, 4, .25, 0, 0, 0)
    assert query_idx.shape == (4, 44) and visible_idx.shape == (4, 20)
    for visible, query in zip(visible_idx.tolist(), query_idx.tolist()):
        assert not set(visible) & set(query) and visible == sorted(set(visible)) and query == sorted(set(query))

def test_every_position_gets_hidden_and_shown():
    "No mask family has a blind spot over many clips."
    for kind, more in ((kind, more) for kind in MASKS for more in DRAWS[kind]):
        share = MASKS[kind](400, (4, 4), .5, generator("spots"), **more).float().mean(0)
        assert .2 < share.min() and share.max() < .95, (kind, more, share)

# -- weights

def test_names_of_the_default_student_stay():
    "Checkpoints are read by these names."
    layer = lambda name: [f"{name}.weight", f"{name}.bias"]
    attention = lambda name: [*layer(f"{name}.qkv"), *layer(f"{name}.proj")]
    tail = lambda b: [*layer(f"{b}.norm1"), *attention(f"{b}.attn"), *layer(f"{b}.norm2"), *layer(f"{b}.mlp.0"), *layer(f"{b}.mlp.2")]
    factorised = lambda b: [*layer(f"{b}.norm_t"), *attention(f"{b}.attn_t"), *tail(b)]
    assert list(Student(SMALL).state_dict()) == [*layer("patch_embed"), *factorised("blocks.0"), *factorised("blocks.1"), *tail("blocks.2"), *layer("norm")]
    cross = lambda b: [*layer(f"{b}.norm1"), *layer(f"{b}.attn.q"), *layer(f"{b}.attn.kv"), *layer(f"{b}.attn.proj"),
                       *layer(f"{b}.norm2"), *layer(f"{b}.mlp.0"), *layer(f"{b}.mlp.2")]
    assert set(make().predictor.state_dict()) == {"mask_token", *layer("context"), *cross("blocks.0"), *cross("blocks.1"), *layer("norm"), *layer("head")}

@pytest.mark.parametrize("positions", POSITIONS)
def test_weights_go_to_another_grid_and_back(positions):
    one = make(positions=positions).student
    there, back = (Student(c).eval().requires_grad_(False) for c in (regrid(one.config, 16, 128), one.config))
    load_weights(there, one.state_dict(), one.config)
    assert there(random_frames(config=there.config)).shape == (2, 8 * 64, 48)
    load_weights(back, there.state_dict(), there.config)
    unchanged = {n for n, p in back.named_parameters() if torch.equal(p, one.get_parameter(n))}
    assert unchanged >= {n for n, _ in one.named_parameters()} - {"pos_embed"}
    if positions != "learned": assert torch.equal(back(random_frames()), one(random_frames()))

def test_positions_keep_their_place_on_a_finer_grid():
    "Twice the frames: rows and columns stay, time steps lie between the old ones; learned positions are interpolated."
    coarse, fine = Student(SMALL), Student(regrid(SMALL, 16, 64))
    assert torch.allclose(fine.pos_embed.view(4, 2, 16, 48).mean(1)[:, :, 32:], coarse.pos_embed[:, :, 32:], atol=1e-5), "rows and columns do not move"
    assert not torch.allclose(fine.pos_embed[:4, :, :16], coarse.pos_embed[:, :, :16], atol=1e-2)
    learned = replace(SMALL, positions="learned")
    constant, larger = Student(learned), Student(regrid(learned, 16, 96))
    nn.init.constant_(constant.pos_embed, 3.)
    load_weights(larger, constant.state_dict(), learned)
    assert torch.allclose(larger.pos_embed, torch.tensor(3.))

@pytest.mark.parametrize("change, message", ((dict(embed_dim=96), "embed_dim 48, its weights have 96"), (dict(patch=8), "patch 16, its weights have 8"),
    (dict(pattern="F4"), "blocks FFJ, its weights have FFFF"), (dict(positions="learned"), "positions sincos, its weights have learned")))
def test_what_does_not_fit_is_named(change, message):
    was = Student(replace(SMALL, **change))
    with pytest.raises(InputError, match=message): load_weights(Student(SMALL), was.state_dict(), was.config)

def test_loading_is_strict():
    student, state = Student(SMALL), Student(SMALL).state_dict()
    for broken, message in ((dict(state, more=torch.zeros(1)), "Unexpected key"), ({k: v for k, v in state.items() if k != "norm.bias"}, "Missing key"),
                            (dict(state, **{"norm.bias": torch.zeros(3)}), "size mismatch for norm.bias")):
        with pytest.raises(InputError, match=message): load_weights(student, broken, SMALL)

def test_any_grid():
    for frames, size, tubelet, patch in ((4, 32, 1, 16), (6, 48, 3, 8), (2, 20, 2, 10), (16, 16, 2, 16)):
        config = student_config(View(num_frames=frames, size_px=size), (frames // tubelet, size // patch, size // patch), embed_dim=48, depth_factorised=1, depth_joint=1, num_heads=4)
        student = Student(config).eval()
        n = (frames // tubelet) * (size // patch)**2
        assert student(random_frames(config=config)).shape == (2, n, 48)
        assert student(random_frames(config=config), torch.zeros(2, 1, dtype=torch.long)).shape == (2, frames // tubelet, 48)

# -- training

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", PREDICTORS)
def test_every_parameter_learns(form, dtype):
    frames, targets, visible_idx, query_idx = batch_of()
    for positions in POSITIONS:
        torch.manual_seed(0)
        config = replace(SMALL, positions=positions)
        jepa = Jepa(Student(config), PREDICTORS[form](config, 32, 48, 2, 4), Objective(visible_weight=.1))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32): loss = jepa(frames, targets, visible_idx, query_idx)
        assert loss.dtype == torch.float32
        loss.backward()
        idle = [n for n, p in jepa.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not idle, idle

def test_several_masks_are_the_mean_of_single_ones():
    frames, targets, visible_idx, query_idx = batch_of(draws=3, kind="multiblock")
    for form in PREDICTORS:
        jepa = make(form).requires_grad_()
        grad = lambda *idx: torch.cat([g.flatten() for g in torch.autograd.grad(jepa(frames, targets, *idx), list(jepa.parameters()))])
        single = torch.stack([grad(visible_idx[:, k:k + 1], query_idx[:, k:k + 1]) for k in range(3)]).mean(0)
        assert torch.allclose(grad(visible_idx, query_idx), single, atol=1e-6)

def test_drop_path_is_a_function_of_its_key():
    frames, targets, visible_idx, query_idx = batch_of()
    jepa = make(drop_path=.5).train()
    def loss(model, *key): seed_drop_path(model, *key); return model(frames, targets, visible_idx, query_idx)
    first = loss(jepa, 0, 5)
    torch.manual_seed(99)
    assert torch.equal(first, loss(copy.deepcopy(jepa), 0, 5)) and not torch.equal(first, loss(jepa, 0, 6))
    assert torch.equal(jepa.eval()(frames, targets, visible_idx, query_idx), make()(frames, targets, visible_idx, query_idx))

@pytest.mark.slow
@pytest.mark.parametrize("form, positions", (("cross", "sincos"), ("joint", "rotary"), ("tail", "rotary")))
def test_a_step_is_one_graph(form, positions):
    "torch.compile finds nothing that it has to leave to Python."
    inputs, jepa = batch_of(), make(form, positions=positions)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(jepa, backend="eager", fullgraph=True, dynamic=False)(*inputs), jepa(*inputs))

# -- objective and diagnostics

def test_losses_are_what_they_say():
    predicted, targets = torch.randn(3, 7, 16), torch.randn(3, 7, 16).half()
    mean, std = torch.randn(16), torch.rand(16) + .5
    for loss in ("cosine", "l1", "smooth_l1"):
        for channels in (dict(), dict(mean=mean, std=std)):
            objective = Objective(loss, **channels)
            t = (targets.double() - channels.get("mean", 0.)) / channels.get("std", 1.)
            if loss != "cosine": t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            gap = (predicted.double() - t).abs()
            wanted = dict(cosine=1 - (predicted * t).sum(-1) / predicted.norm(dim=-1) / t.norm(dim=-1), l1=gap.mean(-1),
                          smooth_l1=torch.where(gap < 1, gap**2 / 2, gap - .5).mean(-1))[loss]
            assert torch.allclose(objective(predicted, objective.target(targets)).double(), wanted, atol=1e-5)

def test_half_precision_predictions_are_compared_in_float32():
    predicted = torch.full((1, 4), 300.).half() # its square does not fit into float16
    for loss in ("cosine", "l1", "smooth_l1"): assert Objective(loss)(predicted, torch.ones(1, 4)).isfinite().all()

def test_targets_are_taken_in_time_major_order():
    targets = torch.arange(2 * 3 * 5).view(2, 15, 1).float() # 3 time steps of 5 positions
    taken = take_targets(targets, torch.tensor([[4, 0], [1, 1], [2, 3], [0, 4]]), 3)
    assert taken[..., 0].tolist() == [[4, 0, 9, 5, 14, 10], [1, 1, 6, 6, 11, 11], [17, 18, 22, 23, 27, 28], [15, 19, 20, 24, 25, 29]]

def test_effective_rank_and_spread():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 64)).Q
    for d in (1, 7, 64): assert abs(rankme(basis[:, :d]).item() - d) < .01 * d
    x = torch.randn(300, 5) @ torch.randn(5, 40)
    assert rankme(x) < 5.01 and torch.allclose(rankme(x), rankme(7 * x @ torch.linalg.qr(torch.randn(40, 40)).Q), atol=1e-2)
    assert abs(rankme(torch.ones(50, 8)).item() - 1) < 1e-3 and feature_std(torch.ones(50, 8)) < 1e-6
    assert abs(rankme(torch.randn(50_000, 16)).item() - 16) < .05 and abs(feature_std(torch.randn(50_000, 16)).item() - 1) < .01
    many = torch.randn(10, 1000, 16)
    assert feature_health(many, limit=500)["rankme"] == rankme(many.flatten(0, 1)[::20]).item()

# -- the benchmark of a step

TINY = dict(batch=2, ratio=.5, predictor_dim=48, vit_decoder=(24, 1, 2))

def test_all_sides_of_the_bench_hide_the_same():
    from stjepa.bench_step import SIDES, Step, step_inputs
    inputs = step_inputs(step := Step(SMALL, **TINY))
    model, loss = SIDES["videomae"](step, inputs)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["bool_masked_pos"]), with_kwargs=True)
    loss(model)
    hidden = seen[0].view(2, 4, 16)
    assert hidden.sum(2).eq(8).all() and all(torch.equal(split_idx(hidden[:, t])[0], inputs[2][:, 0]) for t in range(4))

def test_bench_rows():
    from stjepa.bench import BenchConfig
    from stjepa.bench_step import Step, rows
    made = rows(BenchConfig("step", repeats=1, device="cpu"), Step(SMALL, **TINY))
    assert [r["name"] for r in made] == [n + suffix for suffix in ("", "_bf16") for n in ("step_vs_videomae_s", "step_vs_videomae_s_all", "step_vs_fullgrid")]
    for row in made:
        assert row["ratio"] == row["ours"] / row["reference"] and row["unit"].startswith("clips/s, higher is better; ")
        assert ("bfloat16" in row["unit"]) == row["name"].endswith("_bf16")
    ours, full = made[2]["gflop_per_clip"]
    assert full > ours

@pytest.mark.cuda
def test_a_step_on_the_gpu():
    from stjepa.bench import BenchConfig
    from stjepa.bench_step import Step, gpu_rows
    inputs = batch_of()
    for form in PREDICTORS:
        jepa = make(form)
        assert torch.allclose(jepa(*inputs), jepa.cuda()(*(x.cuda() for x in inputs)).cpu(), atol=1e-3)
    share, memory = gpu_rows(BenchConfig("step", repeats=2, device="cuda"), Step(SMALL, **TINY))
    assert 0 < share["ratio"] < 1 and 0 < memory["ours"] < memory["reference"]
