"""Sampling against a brute-force inverse of the cumulative distribution, and the keying of its random draws."""

import math

import numpy as np
import pytest
import torch

from sparsetrace.generation.decode_state import uniforms
from sparsetrace_kernels.torch_ops import sample


def by_hand(logits: list[float], u: float, temperature: float, top_k: int) -> int:
    """One draw, in plain python: the first token at which the running sum exceeds u times the whole."""
    least = sorted(logits)[-top_k] if 0 < top_k < len(logits) else -math.inf
    largest = max(logits)
    weights = [math.exp((x - largest) / temperature) if x >= least else 0.0 for x in logits]
    target, running = u * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > target:
            return token
    raise AssertionError("a uniform draw lies below 1")


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 97, 200])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_sample_is_the_inverse_distribution(rng, device, temperature, top_k):
    logits_BV = torch.randn(60, 97, device=device) * 3
    uniform_B1 = torch.from_numpy(rng.random((60, 1))).to(device)
    found = sample(logits_BV, uniform_B1, temperature, top_k)
    assert found.dtype == torch.int64
    expected = [
        by_hand(logits, u, temperature, top_k)
        for logits, (u,) in zip(logits_BV.tolist(), uniform_B1.tolist(), strict=True)
    ]
    assert found.tolist() == expected


def test_greedy_is_the_first_of_the_largest(device):
    logits_BV = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-1.0, -2.0, -3.0, -1.0]], device=device)
    assert sample(logits_BV, torch.full((2, 1), 0.99, device=device), 0.0, 0).tolist() == [1, 0]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_no_draw_leaves_the_vocabulary_or_the_top_k(device, u):
    """The ends of the unit interval: no token of probability zero, none beyond the last."""
    logits_BV = torch.tensor([[-1e4, 0.0, 1.0, 2.0, -1e4], [-50.0] * 5], device=device)
    uniform_B1 = torch.full((2, 1), u, dtype=torch.float64, device=device)
    for temperature in (1e-3, 1.0, 100.0):
        found = sample(logits_BV, uniform_B1, temperature, 3).tolist()
        assert found[0] in (1, 2, 3)
        assert found[1] in range(5)


def test_frequencies_are_the_probabilities(rng):
    logits_V = torch.randn(7)
    draws = torch.from_numpy(rng.random((200_000, 1)))
    counts = torch.bincount(sample(logits_V.expand(len(draws), -1), draws, 0.8, 0), minlength=7)
    p = (logits_V.double() / 0.8).softmax(-1)
    # six standard deviations
    assert ((counts / len(draws) - p).abs() <= 6 * (p * (1 - p) / len(draws)).sqrt()).all()


def test_draws_are_keyed_by_seed_sequence_and_position(rng):
    """Neither batch, slot nor the number of positions moves a draw; seed, sequence and position do."""
    one = uniforms(7, [3, 11, 5], 20, 4)
    assert one.dtype == torch.float64
    assert one.shape == (4, 20)
    assert ((one >= 0) & (one < 1)).all()
    other = uniforms(7, [5, 3], 50, 2)
    assert torch.equal(one[2], other[0, :20])
    assert torch.equal(one[0], other[1, :20])
    many = torch.cat([uniforms(seed, list(range(6)), 20, 6) for seed in range(4)])
    assert len(np.unique(many.numpy())) == many.numel()
    # Philox is specified, so these never change: a data set can be made again years later
    philox = np.random.Generator(np.random.Philox(key=[7, 11])).random(20)
    assert np.array_equal(one[1].numpy(), philox)
