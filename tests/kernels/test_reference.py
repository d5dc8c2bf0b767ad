"""The reference ops against definitions spelled out in Python; the kernels are then tested against them."""

import math

import pytest
import torch

from sparsetrace_kernels import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_are_ordered_as_absolute_values(dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -0.5, 1.0, -2.5, math.inf, -math.inf, math.nan]).to(dtype)
    bits = reference.magnitude_bits(x)
    assert bits[0] == bits[1] == 0
    assert (bits[2:7].diff() > 0).all()
    assert bits[6] == bits[7] < bits[8]


def test_magnitudes_refuse_other_types():
    with pytest.raises(ValueError, match="x must be fp16, bf16 or fp32, got"):
        reference.magnitude_bits(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_is_strict_and_keeps_what_is_not_finite(dtype):
    x = torch.tensor([0.5, -0.5, 0.75, -0.75, math.nan, -math.inf]).to(dtype)
    t = int(reference.magnitude_bits(torch.tensor(0.5, dtype=dtype)))
    assert reference.keep_above(x, t).tolist() == [False, False, True, True, True, True]
    assert torch.equal(reference.keep_above(x, torch.tensor(t)), reference.keep_above(x, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operand_holds_no_negative_zero(dtype):
    x = torch.tensor([0.0, -0.0, -1.0, 2.0, math.nan]).to(dtype)
    keep = torch.tensor([True, True, True, False, True])
    operand = reference.mask_operand(x, keep)
    bits = operand.view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert (bits != 0).tolist() == [False, False, True, False, True]
    assert operand[2] == -1


@pytest.mark.parametrize("K", [1, 7, 8, 13])
def test_bits_are_packed_lsb_first_with_zero_tail(K):
    keep = torch.rand(2, K, generator=torch.Generator().manual_seed(K)) > 0.5
    packed = reference.pack_bits(keep)
    for row, bytes_ in zip(keep.tolist(), packed.tolist(), strict=True):
        number = sum(bit << i for i, bit in enumerate(row))
        assert bytes(bytes_) == number.to_bytes(-(-K // 8), "little")


def test_list_entry_of_high_rows_round_trips():
    K = 40000
    x_K = torch.zeros(K, dtype=torch.float16)
    x_K[[5, K - 1]] = torch.tensor([1.5, -2.0], dtype=torch.float16)
    list_SIL, counts_SI = reference.compact_ref(x_K, torch.zeros(1, dtype=torch.int32), length=30_000)
    weight_KN = torch.ones(K, 1, dtype=torch.float16)
    assert counts_SI.tolist() == [[1, 1]]
    assert reference.list_gemv_ref(list_SIL, counts_SI, weight_KN, [1]).tolist() == [-0.5]


def test_histogram_counts_signed_zeros_apart():
    counts = reference.histogram_ref(torch.tensor([[0.0, -0.0, 1.0, 1.0]], dtype=torch.bfloat16))
    assert counts.sum() == 4
    assert counts[0] == counts[0x8000] == 1
    assert counts[0x3F80] == 2
