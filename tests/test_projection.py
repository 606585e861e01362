"Projections: PCA as scikit-learn has it, every kind's invariants, float16, and files that are something else."
import pytest, torch
from safetensors.torch import save

from stjepa.core import InputError
from stjepa.projection import FLOAT16_MAX, FLOOR, KINDS, Projection, TokenStats, fit_projection, projected_dim


def sample(b=4, n=200, width=40, seed=0): return torch.randn(b, n, width, generator=torch.Generator().manual_seed(seed)) * torch.linspace(3, .1, width)

def fitted(kind, dim=10): return fit_projection(TokenStats(40).update(sample()), 40 if kind == "none" else dim, kind)

@pytest.fixture(params=KINDS)
def projection(request): return fitted(request.param)

@pytest.mark.parametrize("whiten", [False, True])
def test_pca_is_scikit_learns(whiten):
    from sklearn.decomposition import PCA
    tokens, stats = sample(), TokenStats(40)
    for part in tokens: stats.update(part[None])
    projection, x = fit_projection(stats, 10, "pca_whiten" if whiten else "pca"), torch.nn.functional.layer_norm(tokens, (40,)).flatten(0, 1).double().numpy()
    reference = PCA(10, svd_solver="full", whiten=whiten).fit(x)
    torch.testing.assert_close(projection(tokens).flatten(0, 1).abs(), torch.from_numpy(reference.transform(x)).float().abs(), atol=1e-2 if whiten else 1e-4, rtol=1e-3) # whitened by n - 1 there, by n here
    torch.testing.assert_close(projection.explained, torch.from_numpy(reference.explained_variance_ratio_).float(), atol=1e-5, rtol=1e-4)

def test_shapes_and_invariants(projection):
    y = projection(sample(seed=1))
    assert y.shape == (4, 200, projection.dim) and projection.dim == (40 if projection.kind == "none" else 10) and 0 < projection.explained.sum() <= 1.00001
    if projection.kind in ("pca", "orthogonal"): torch.testing.assert_close(projection.weight.T @ projection.weight, torch.eye(10), atol=1e-5, rtol=0)
    if projection.kind == "pca_whiten": torch.testing.assert_close(projection(sample()).flatten(0, 1).var(0, correction=0), torch.ones(10), atol=1e-3, rtol=0)
    if projection.kind == "none": assert torch.equal(y, torch.nn.functional.layer_norm(sample(seed=1), (40,)))

def test_float16_holds_the_worst_of_tokens(projection):
    "One-hot and constant tokens, huge and tiny ones: nothing leaves the bound, and the bound is far inside float16."
    worst = torch.cat([torch.eye(40) * 1e6, -torch.eye(40), torch.full((1, 40), 7.), torch.zeros(1, 40), torch.randn(50, 40) * 1e-6])[None]
    y = projection(worst)
    assert y.isfinite().all() and y.abs().max() <= projection.bound * 1.0001 < FLOAT16_MAX
    assert y.half().isfinite().all()

def test_the_floor_of_whitening():
    "Two directions carry everything: the others are scaled by the floor, not by their nothing."
    tokens = torch.randn(8, 500, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    projection = fit_projection(TokenStats(40).update(tokens), 40, "pca_whiten")
    variance = projection(tokens).flatten(0, 1).var(0)
    assert variance[:2].sub(1).abs().max() < 1e-2 and variance[10:].max() < 1e-3
    total = torch.nn.functional.layer_norm(tokens, (40,)).flatten(0, 1).var(0).sum()
    torch.testing.assert_close(projection.weight.norm(dim=0).max(), (FLOOR * total / 40).rsqrt(), rtol=1e-3, atol=0)

def test_file_bytes_and_tensors_give_it_back(projection, tmp_path):
    projection.save(tmp_path/"p.safetensors")
    for again in (Projection.load(tmp_path/"p.safetensors"), Projection.from_bytes(projection.to_bytes()), Projection.from_tensors(projection.to_tensors())):
        assert (again.kind, again.hash) == (projection.kind, projection.hash) and torch.equal(again(sample()), projection(sample()))
    assert (tmp_path/"p.safetensors").read_bytes() == projection.to_bytes()

def test_the_hash_covers_everything():
    kinds = [fitted(k) for k in KINDS]; p = kinds[0]
    others = [Projection(p.mean + 1, p.weight, p.explained), Projection(p.mean, p.weight * 2, p.explained), Projection(p.mean, p.weight, p.explained, "orthogonal"), fitted("pca", 9)]
    assert len({x.hash for x in kinds + others}) == 8 and fitted("pca").hash == p.hash
    stats = TokenStats(40).update(sample())
    assert fit_projection(stats, 10, "orthogonal", seed=1).hash != fit_projection(stats, 10, "orthogonal", seed=0).hash

def test_files_of_an_older_version_keep_their_kind():
    "Kinds are stored by position."
    assert KINDS[:2] == ("pca", "orthogonal")

@pytest.mark.parametrize("data", [b"", b"no", save(dict(mean=torch.zeros(3))), fitted("pca").to_bytes()[:-1]])
def test_what_is_no_projection(data, tmp_path):
    (tmp_path/"p").write_bytes(data)
    with pytest.raises(InputError, match="p: not a projection"): Projection.load(tmp_path/"p")

def test_a_kind_of_a_later_version():
    tensors = fitted("pca").to_tensors() | dict(kind=torch.tensor(99))
    with pytest.raises(InputError, match="not a projection"): Projection.from_bytes(save(tensors))

@pytest.mark.parametrize("kind,dim,message", [("pca", 0, "--dim 0: expected 1 to 40"), ("orthogonal", 41, "--dim 41: expected 1 to 40"), ("none", 10, "--dim 10 with --projection none: it keeps the teacher's 40"), ("ica", 10, "'ica': expected one of pca")])
def test_dims_that_cannot_be(kind, dim, message):
    with pytest.raises(InputError, match=message): fit_projection(TokenStats(40).update(sample()), dim, kind)

def test_none_takes_the_width_when_dim_is_left_alone():
    assert projected_dim("none", 384, 40) == 40 and fit_projection(TokenStats(40).update(sample()), kind="none").dim == 40

def test_parts_add_up_in_any_order():
    parts = [TokenStats(40).update(sample(seed=s)) for s in range(4)]; whole = TokenStats(40)
    for s in (2, 0, 3, 1): whole.merge(parts[s].to_tensors())
    for a, b in zip(whole.moments(), TokenStats(40).update(torch.cat([sample(seed=s) for s in range(4)])).moments()): torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
