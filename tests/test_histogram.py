"""Counts and thresholds against brute force: `numpy.unique` on the bit patterns, and sorting the raw magnitudes."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sparsetrace.calibration.counter import ActivationCounter
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.histogram import Histograms, Provenance
from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Site
from sparsetrace.methods import Teal, Wina

DTYPES = ["float16", "bfloat16", "float32"]
SITES = {"attn_in": ("q", "k", "v"), "attn_out": ("o",), "mlp_in": ("gate", "up"), "mlp_mid": ("down",)}


def model_sites(layers: int) -> tuple[Site, ...]:
    """Sites of a model; the last lies in no layer and is not counted."""
    inside = [
        Site(name, layer, matrices, 5, (3,) * len(matrices))
        for layer in range(layers)
        for name, matrices in SITES.items()
    ]
    return (*inside, Site("head_in", None, ("lm_head",), 5, (7,)))


PROVENANCE = Provenance("m" * 64, "t" * 64, "bfloat16", 123, 2, model_sites(2))


def tensor_of(patterns: np.ndarray, dtype: str) -> torch.Tensor:
    signed = np.int32 if dtype == "float32" else np.int16
    return torch.from_numpy(patterns.astype(FORMATS[dtype].bits).view(signed).copy()).view(getattr(torch, dtype))


def counted(patterns: np.ndarray, dtype: str) -> Histograms:
    counter = ActivationCounter(model_sites(1), dtype)
    counter.count(0, "attn_in", tensor_of(patterns, dtype))
    return counter.histograms()


def every_kind(rng, dtype: str, count: int) -> np.ndarray:
    """Patterns of ordinary numbers, zeros of both signs, denormals and the largest."""
    number = FORMATS[dtype]
    ordinary = torch.randn(count).to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16)
    special = np.array([0, number.sign, 1, number.sign | 1, 5, number.infinity - 1, number.sign | 0x40])
    patterns = np.concatenate([ordinary.numpy().view(number.bits), rng.choice(special, count // 3).astype(number.bits)])
    return rng.permutation(patterns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_are_numpy_unique(rng, dtype, device):
    number = FORMATS[dtype]
    counter = ActivationCounter(model_sites(2), dtype, device)
    batches = [every_kind(rng, dtype, 3 * 7 * 11).reshape(-1, 7, 4) for _ in range(3)]
    for patterns in batches:
        counter.count(1, "mlp_in", tensor_of(patterns, dtype).to(device))
    histograms = counter.histograms()
    every = np.concatenate(batches).ravel()
    patterns, counts = np.unique(every >> (16 if dtype == "float32" else 0), return_counts=True)
    found = histograms.counts[1, "mlp_in"]
    assert found.dtype == np.int64
    assert found.shape == (65536,)
    assert np.array_equal(np.flatnonzero(found), patterns)
    assert np.array_equal(found[patterns], counts)
    assert histograms.zeros[1, "mlp_in"] == np.isin(every, [0, number.sign]).sum()
    others = [key for key in histograms.counts if key != (1, "mlp_in")]
    assert len(others) == 7
    assert not any(histograms.counts[key].any() or histograms.zeros[key] for key in others)


def test_counts_what_is_not_contiguous(rng):
    patterns = every_kind(rng, "bfloat16", 300).reshape(20, 20)
    counter = ActivationCounter(model_sites(1), "bfloat16")
    counter.count(0, "attn_in", tensor_of(patterns, "bfloat16")[:, 3:].T)
    expected = np.bincount(patterns[:, 3:].ravel(), minlength=65536)
    assert np.array_equal(counter.histograms().counts[0, "attn_in"], expected)


def check_threshold(patterns: np.ndarray, dtype: str, sparsity: float) -> None:
    """The rule P(|x| < t) < s <= P(|x| <= t), and the counts it claims, on the raw numbers."""
    number = FORMATS[dtype]
    found = counted(patterns, dtype).threshold(0, "attn_in", sparsity)
    magnitudes = patterns.astype(np.int64) & (number.sign - 1)
    assert found.counted == len(patterns)
    assert found.dropped == (magnitudes <= found.bits).sum()
    if sparsity == 0:
        assert found.bits == 0
        return
    # a float32 is counted by its top 16 bits, and its threshold is the upper edge of a bucket
    shift = 16 if dtype == "float32" else 0
    assert found.bits & ((1 << shift) - 1) == (1 << shift) - 1
    ranked, t = np.sort(magnitudes >> shift), found.bits >> shift
    asked = Fraction(str(sparsity)) * len(patterns)
    assert np.searchsorted(ranked, t, side="left") < asked <= np.searchsorted(ranked, t, side="right")
    # that magnitude was seen
    assert t in ranked


@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 0.1, 0.25, 0.5, 0.65, 0.9, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_is_that_of_sorting(rng, dtype, sparsity):
    check_threshold(every_kind(rng, dtype, 997).ravel(), dtype, sparsity)
    check_threshold(every_kind(rng, dtype, 1).ravel(), dtype, sparsity)


@examples(deadline=None, max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), sparsity=st.integers(0, 999))
def test_threshold_on_any_finite_numbers(data, dtype, sparsity):
    number = FORMATS[dtype]
    magnitude = st.one_of(st.integers(0, 3), st.integers(0, number.infinity - 1))
    pairs = data.draw(st.lists(st.tuples(magnitude, st.booleans()), min_size=1, max_size=12))
    patterns = np.array([m | (number.sign if negative else 0) for m, negative in pairs], dtype=number.bits)
    check_threshold(patterns, dtype, sparsity / 1000)


def test_sparsity_is_the_decimal_that_was_written():
    """0.1 of 10 is one, though the nearest binary fraction to 0.1 lies above it."""
    patterns = np.arange(1, 11, dtype=np.uint16)
    assert counted(patterns, "float16").threshold(0, "attn_in", 0.1).dropped == 1
    assert counted(patterns, "float16").threshold(0, "attn_in", 0.7).dropped == 7
    assert counted(patterns, "float16").threshold(0, "attn_in", 0.7000001).dropped == 8


def test_zero_sparsity_drops_zeros_only():
    """Float32 denormals share the zero's bucket, and are told apart from it."""
    patterns = np.array([0, 1 << 31, 1, (1 << 31) | 7, 0x3F80_0000], np.uint32)
    found = counted(patterns, "float32").threshold(0, "attn_in", 0.0)
    assert (found.bits, found.dropped, found.counted) == (0, 2, 5)
    found = counted(patterns, "float32").threshold(0, "attn_in", 0.2)
    assert (found.bits, found.dropped) == (0xFFFF, 4)


@pytest.mark.parametrize("bad", ["infinity", "-infinity", "nan"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_says_where_a_number_is_not_finite(rng, dtype, bad):
    counter = ActivationCounter(model_sites(3), dtype)
    x = torch.randn(5, 9, dtype=getattr(torch, dtype))
    for layer in range(3):
        for site in SITES:
            counter.count(layer, site, x)
    assert counter.not_finite() is None
    x[4, 8] = float(bad)
    counter.count(2, "attn_in", x)
    counter.count(1, "mlp_mid", x)
    assert counter.not_finite() == (1, "mlp_mid")


def test_largest_finite_float32_is_finite():
    counter = ActivationCounter(model_sites(1), "float32")
    counter.count(0, "attn_in", tensor_of(np.array([0x7F7F_FFFF, 0xFF7F_FFFF], np.uint32), "float32"))
    assert counter.not_finite() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_keeps_everything(rng, tmp_path, dtype):
    counter = ActivationCounter(model_sites(2), dtype)
    for key in counter.histograms().counts:
        counter.count(*key, tensor_of(every_kind(rng, dtype, 50), dtype))
    histograms = counter.histograms()
    provenance = Provenance("m" * 64, "t" * 64, dtype, 123, 2, model_sites(2))
    histograms.save(tmp_path / "a.safetensors", provenance)
    histograms.save(tmp_path / "b.safetensors", provenance)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded, found = Histograms.load(tmp_path / "a.safetensors")
    assert found == provenance
    for key in histograms.counts:
        assert np.array_equal(loaded.counts[key], histograms.counts[key])
        assert loaded.zeros[key] == histograms.zeros[key]
        for sparsity in (0.0, 0.3):
            assert loaded.threshold(*key, sparsity) == histograms.threshold(*key, sparsity)


def test_zeros_lie_in_the_documented_order(rng, tmp_path):
    """By layer; in a layer the sites, then the scores of each method by matrix."""
    names = ["attn_in", "attn_out", "mlp_in", "mlp_mid", "cats"]
    names += [f"wina.{matrix}" for matrix in ("q", "k", "v", "o", "gate", "up", "down")]
    keys = [(layer, name) for layer in range(2) for name in names]
    counter = ActivationCounter(model_sites(2), "bfloat16", scores=("cats", "wina"))
    for count, key in enumerate(keys, start=1):
        x = torch.cat([torch.zeros(count), -torch.zeros(2), torch.ones(3)])
        counter.count(*key, x if key[1].startswith("wina") else x.bfloat16())
    counter.histograms().save(tmp_path / "h", PROVENANCE)
    arrays = load_file(tmp_path / "h")
    assert arrays.pop("zeros").tolist() == list(range(3, 3 + len(keys)))
    assert set(arrays) == {f"L{layer:02d}.{name}" for layer, name in keys}


def test_names_and_order_are_those_of_the_sites(tmp_path):
    """No matrix or site is known by name: thresholds come in the order of the sites, and of layers alone."""
    sites = (
        Site("mixer", 0, ("z", "a"), 4, (2, 2)),
        Site("ffn", 0, ("b",), 4, (2,)),
        Site("only", 1, ("b", "z"), 4, (2, 2)),
        Site("head_in", None, ("lm_head",), 4, (9,)),
    )
    counter = ActivationCounter(sites, "float16", scores=("wina",))
    for place, (layer, name) in enumerate(counter.histograms().row):
        x = torch.arange(1, 11) * 10**place
        counter.count(layer, name, x.float() if name.startswith("wina") else (torch.arange(1, 11) + place).half())
    histograms = counter.histograms()
    layer_names = [(0, "mixer"), (0, "ffn"), (0, "wina.z"), (0, "wina.a"), (0, "wina.b")]
    assert list(histograms.row) == [*layer_names, (1, "only"), (1, "wina.b"), (1, "wina.z")]
    histograms.save(tmp_path / "h", Provenance("m", "t", "float16", 10, 2, sites, ("wina",)))
    leaves = [(0, "z"), (0, "a"), (0, "b"), (1, "b"), (1, "z")]
    result = derive_thresholds("x", Teal(sparsity=0.5), tmp_path / "h", tmp_path / "t")
    assert [(row["layer"], row["matrix"]) for row in result.rows] == leaves
    # the fifth of ten numbers that begin at one more than the histogram's place
    assert [row["threshold"] for row in result.rows] == [5, 5, 6, 10, 10]
    result = derive_thresholds("x", Wina(sparsity=0.5, select="threshold"), tmp_path / "h", tmp_path / "t")
    assert [(row["layer"], row["matrix"]) for row in result.rows] == leaves
    thresholds = [row["threshold"] for row in result.rows]
    assert thresholds == pytest.approx([5e2, 5e3, 5e4, 5e6, 5e7], rel=2**-7)
    per_layer = Teal(allocation={"per_layer": [{"a": 0.1, "z": 0.2, "b": 0.3}, {"z": 0.4, "b": 0.6}]})
    result = derive_thresholds("x", per_layer, tmp_path / "h", tmp_path / "t")
    assert [row["target_sparsity"] for row in result.rows] == [0.2, 0.1, 0.3, 0.6, 0.4]


def test_refuses_files_that_are_no_histograms(tmp_path):
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="must be a histogram file of sparsetrace, got another"):
        Histograms.load(tmp_path / "other.safetensors")
    for version, named in ((1, {}), (3, {"version": 3})):
        metadata = {"sparsetrace_histograms": json.dumps(named | {"model_hash": "m"})}
        save_file({"x": np.zeros(3)}, tmp_path / "version.safetensors", metadata=metadata)
        with pytest.raises(InputError, match=f"must have version 2, got {version}: calibrate again"):
            Histograms.load(tmp_path / "version.safetensors")
    Histograms(model_sites(2), "bfloat16").save(tmp_path / "whole.safetensors", PROVENANCE)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-9])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("cut", "empty", "absent"):
        with pytest.raises(InputError, match=f"{name}.safetensors must be a readable histogram file"):
            Histograms.load(tmp_path / f"{name}.safetensors")
