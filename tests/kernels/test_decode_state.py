"""place_rows and advance, by Triton and by torch, against oracles that take one row at a time: all must be equal."""

import pytest
import torch

from sparsetrace_kernels import decode_state, torch_ops
from sparsetrace_kernels.decode_state import advance, place_rows
from sparsetrace_kernels.reference import advance_ref, place_rows_ref


@pytest.mark.parametrize(("n", "every", "block"), [(1, 1, 1024), (5, 1, 1024), (37, 3, 8), (64, 2, 1024), (300, 1, 64)])
def test_place_rows(device, rng, monkeypatch, n, every, block):
    monkeypatch.setattr(decode_state, "BLOCK", block)
    arguments = (
        torch.rand(n, device=device) < 0.6,
        torch.randint(0, 9, (n,), device=device),
        torch.randint(0, 1 << 40, (n,), device=device),
        torch.randint(0, 1 << 20, (n,), device=device),
        every,
    )
    found = []
    for place in (place_rows_ref, place_rows, torch_ops.place_rows):
        labels_R3 = torch.full((2 * n + 3, 3), -7, device=device)
        filled = torch.tensor([2], device=device)
        rows = [place(*arguments, labels_R3, filled) for _ in range(2)]
        # the last row stands for rows that are not captured
        found.append([*rows, labels_R3[:-1], filled])
    for theirs, *ours in zip(*found, strict=True):
        assert all(torch.equal(one, theirs) for one in ours)


@pytest.mark.parametrize("B", [1, 3, 64, 130])
@pytest.mark.parametrize("num_eos", [0, 1, 3])
def test_advance(device, rng, B, num_eos):
    limits_B = torch.randint(0, 5, (B,), device=device)
    found = []
    draws = [(torch.randint(0, 6, (B,), device=device), torch.rand(B, device=device) < 0.9) for _ in range(4)]
    for step in (advance_ref, advance, torch_ops.advance):
        chosen_PB, tokens_B = torch.full((6, B), -1, device=device), torch.full((B,), -1, device=device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        running_B, all_finite_B = (torch.ones(B, dtype=torch.bool, device=device) for _ in range(2))
        eos_V = torch.arange(num_eos, device=device)
        states = []
        for next_B, finite_B in draws:
            step(next_B, finite_B, eos_V, limits_B, chosen_PB, count, tokens_B, running_B, all_finite_B)
            states += [t.clone() for t in (chosen_PB, count, tokens_B, running_B, all_finite_B)]
        found.append(states)
    for theirs, *ours in zip(*found, strict=True):
        assert all(torch.equal(one, theirs) for one in ours)


def test_are_well_formed_ops(device):
    ints, flags = torch.arange(3, device=device), torch.tensor([True, False, True], device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    torch.library.opcheck(
        place_rows, (flags, ints, ints, ints, 1, torch.zeros(5, 3, dtype=torch.int64).to(device), one)
    )
    chosen_PB = torch.zeros(4, 3, dtype=torch.int64, device=device)
    state = (chosen_PB, one.clone(), ints.clone(), flags.clone(), flags.clone())
    torch.library.opcheck(advance, (ints, flags, ints[:1].clone(), ints, *state))


def test_refusals(device):
    ints, flags = torch.arange(3, device=device), torch.ones(3, dtype=torch.bool, device=device)
    labels_R3, one = (
        torch.zeros(5, 3, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    with pytest.raises(ValueError, match="place_rows: every must be at least 1, got 0"):
        place_rows(flags, ints, ints, ints, 0, labels_R3, one)
    with pytest.raises(ValueError, match=r"place_rows: bases_n must be contiguous torch\.int64 \(3,\)"):
        place_rows(flags, ints, ints[:2], ints, 1, labels_R3, one)
    with pytest.raises(ValueError, match=r"advance: limits_B must be contiguous torch\.int64 \(3,\)"):
        advance(ints, flags, ints, ints[:1], labels_R3, one, ints, flags, flags)
