"""Each method against a float64 formula in numpy, written here: masks must be equal, and k exact."""

import math

import numpy as np
import pytest
import torch

from sparsetrace.formats.sites import Site
from sparsetrace.methods import METHODS, NM, Cats, ExactZeros, Griffin, MatrixRule, Teal, TopK, Wina
from sparsetrace_kernels.torch_ops import magnitude_bits

# Of one layer; the head lies in none, and no method decides about it.
SITES = [
    Site("attn_in", 0, ("q", "k", "v"), 6, (6, 4, 4)),
    Site("attn_out", 0, ("o",), 6, (6,)),
    Site("mlp_in", 0, ("gate", "up"), 6, (10, 10)),
    Site("mlp_mid", 0, ("down",), 10, (6,)),
    Site("head_in", None, ("lm_head",), 6, (20,)),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SPARSITIES = [0.0, 0.1, 0.25, 0.5, 0.65, 0.999]


def vectors(dtype, *shape):
    """Ordinary numbers with many equal magnitudes, zeros of both signs and denormals."""
    x = (torch.randn(*shape) * 4).round() / 4 * torch.exp(torch.randn(shape[-1]))
    x[..., 1::5] = torch.randn(x[..., 1::5].shape)
    x[..., 3::7] = 0.0
    x[..., 4::11] = -0.0
    x[..., 5::13] = 6e-8
    return x.to(dtype)


def exact(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def bits_of(value: torch.Tensor) -> int:
    return int(magnitude_bits(value))


def largest(score: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row one by one, the lower index first among equals."""
    keep = np.zeros(score.shape, bool)
    for row, out in zip(score.reshape(-1, score.shape[-1]), keep.reshape(-1, score.shape[-1]), strict=True):
        for j in sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]:
            out[j] = True
    return keep


def kept(D: int, sparsity: float) -> int:
    dropped = math.floor(round(sparsity * 1000) * D / 1000)
    return D - dropped


def as_mask(keep, x) -> np.ndarray:
    return np.ones(x.shape, bool) if keep is None else np.broadcast_to(keep.numpy(), x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_teal(rng, dtype):
    x = vectors(dtype, 6, 5, 43)
    for t in (0.0, 0.25, 0.5, 3.1):
        threshold = torch.tensor(t, dtype=dtype)
        keep = Teal(sparsity=0.5).keep(x, MatrixRule(0, "q", bits_of(threshold)))
        assert np.array_equal(keep.numpy(), np.abs(exact(x)) > float(threshold))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk(rng, dtype, sparsity):
    x = vectors(dtype, 4, 3, 43)
    mask = as_mask(TopK(sparsity=sparsity).keep(x, MatrixRule(0, "q", None)), x)
    assert (mask.sum(-1) == kept(43, sparsity)).all()
    assert np.array_equal(mask, largest(np.abs(exact(x)), kept(43, sparsity)))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "8:16", "16:32", "3:3", "1:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nm(rng, dtype, pattern):
    n, m = map(int, pattern.split(":"))
    x = vectors(dtype, 5, 3 * m)
    mask = as_mask(NM(pattern=pattern).keep(x, MatrixRule(0, "q", None)), x)
    groups = mask.reshape(5, 3, m)
    assert (groups.sum(-1) == n).all()
    assert np.array_equal(groups, largest(np.abs(exact(x)).reshape(5, 3, m), n))


def wina_score(x, weight_KN) -> np.ndarray:
    """float32(|x|) * float32(norm of the input's weights), rounded once."""
    norms = np.sqrt((weight_KN.double().numpy() ** 2).sum(1)).astype(np.float32)
    return (np.abs(exact(x)) * norms.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wina_topk(rng, dtype, sparsity):
    x, weight_KN = vectors(dtype, 4, 3, 43), vectors(dtype, 43, 9)
    rule = MatrixRule(0, "q", None, Wina.scale(weight_KN))
    mask = as_mask(Wina(sparsity=sparsity).keep(x, rule), x)
    assert (mask.sum(-1) == kept(43, sparsity)).all()
    assert np.array_equal(mask, largest(wina_score(x, weight_KN), kept(43, sparsity)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wina_threshold(rng, dtype):
    x, weight_KN = vectors(dtype, 4, 3, 43), vectors(dtype, 43, 9)
    for t in (0.3, 1.0, 7.7):
        bits = bits_of(torch.tensor(t, dtype=torch.float32))
        rule = MatrixRule(0, "q", bits, Wina.scale(weight_KN))
        mask = as_mask(Wina(sparsity=0.5, select="threshold").keep(x, rule), x)
        assert np.array_equal(mask, wina_score(x, weight_KN) > np.float32(t))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cats(rng, dtype):
    active, up = vectors(dtype, 2, 3, 43), vectors(dtype, 2, 3, 43)
    method = Cats(sparsity=0.5)
    for t in (0.25, 1.0):
        rule = MatrixRule(0, "up", bits_of(torch.tensor(t, dtype=dtype)))
        keep = method.keep_outputs(active, up, rule, None, {})
        assert np.array_equal(keep.numpy(), np.abs(exact(active)) > float(torch.tensor(t, dtype=dtype)))
    assert method.keep_outputs(active, up, MatrixRule(0, "up", 0), None, {}) is None
    assert method.keep(active, MatrixRule(0, "down", 0)) is None


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_griffin(rng, dtype, sparsity):
    """Two sequences in two passes, with padding between; then decoding, which changes nothing."""
    N, method, memory = 43, Griffin(sparsity=sparsity), {}
    active, up = vectors(dtype, 2, 9, N), vectors(dtype, 2, 9, N)
    dense = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    rule = MatrixRule(0, "up", None)
    method.keep_outputs(active[:, :5], up[:, :5], rule, dense[:, :5], memory)
    keep = method.keep_outputs(active[:, 5:], up[:, 5:], rule, dense[:, 5:], memory)
    later = method.keep_outputs(vectors(dtype, 2, 1, N), vectors(dtype, 2, 1, N), rule, None, memory)
    z = exact(active * up)
    share = z / np.linalg.norm(z, axis=-1, keepdims=True)
    for sequence in range(2):
        score = np.linalg.norm(share[sequence][dense[sequence].numpy()], axis=0)
        if keep is None:
            assert kept(N, sparsity) == N
            assert later is None
            continue
        mask = keep[sequence, 0].numpy()
        assert mask.sum() == kept(N, sparsity)
        assert score[mask].min() >= score[~mask].max() * (1 - 1e-12)
        assert np.array_equal(later[sequence, 0].numpy(), mask)


def test_griffin_ties_and_silent_positions(rng):
    active = torch.tensor([[[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]])
    keep = Griffin(sparsity=0.25).keep_outputs(active, active, MatrixRule(0, "up", None), torch.ones(1, 2).bool(), {})
    assert keep[0, 0].tolist() == [True, True, False, True]


def test_exact_zeros_drops_nothing(rng):
    x = vectors(torch.float32, 3, 43)
    assert ExactZeros().keep(x, MatrixRule(0, "q", None)) is None


def test_what_each_method_needs():
    """The table of docs/methods.md."""
    needs = {
        "dense": (),
        "exact_zeros": (),
        "topk": (),
        "nm": (),
        "griffin": (),
        "teal": ("attn_in", "attn_out", "mlp_in", "mlp_mid"),
        "cats": ("cats",),
        "wina": (),
    }
    parameters = {"dense": {}, "exact_zeros": {}, "nm": {"pattern": "2:4"}}
    assert needs.keys() == METHODS.keys()
    for name, expected in needs.items():
        method = METHODS[name](**parameters.get(name, {"sparsity": 0.5}))
        assert method.needs(SITES) == tuple((0, name) for name in expected)
        assert method.needs_thresholds == bool(expected)
    threshold = Wina(sparsity=0.5, select="threshold")
    assert threshold.needs(SITES) == tuple(
        (0, f"wina.{matrix}") for matrix in ("q", "k", "v", "o", "gate", "up", "down")
    )


@pytest.mark.parametrize("pattern", [124, "2-4", "0:4", "5:4", ":4", None])
def test_patterns_that_are_none(pattern):
    with pytest.raises(ValueError, match=r"pattern must be N:M"):
        NM(pattern=pattern)


def test_allocation_and_sparsity_go_together():
    per_layer = {"per_layer": [0.5, dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0.25)]}
    method = Teal(allocation=per_layer)
    assert (method.label, method.target(0, "q"), method.target(1, "down")) == ("teal-per_layer", 0.5, 0.25)
    assert Teal(allocation={"file": "x.csv"}).label == "teal-file"
    assert Teal(allocation="greedy", sparsity=0.4).label == "teal-greedy-0.4"
    assert Wina(sparsity=0.4, select="threshold").label == "wina-threshold-0.4"
    for wrong, message in (
        ({"sparsity": 0.5, "allocation": per_layer}, "sparsity must not be given"),
        ({"allocation": "greedy"}, "sparsity must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            Teal(**wrong)
    with pytest.raises(ValueError, match="allocation must be uniform with select topk"):
        Wina(sparsity=0.5, allocation="greedy")
