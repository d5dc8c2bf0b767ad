"""The torch operations against definitions spelled out in Python; the kernels are tested against them in turn."""

import math
import subprocess
import sys

import pytest
import torch

from sparsetrace_kernels import torch_ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_are_ordered_as_absolute_values(dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -0.5, 1.0, -2.5, math.inf, -math.inf, math.nan]).to(dtype)
    bits = torch_ops.magnitude_bits(x)
    assert bits[0] == bits[1] == 0
    assert (bits[2:7].diff() > 0).all()
    assert bits[6] == bits[7] < bits[8]


def test_magnitudes_refuse_other_types():
    with pytest.raises(ValueError, match="x must be fp16, bf16 or fp32, got"):
        torch_ops.magnitude_bits(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_is_strict_and_keeps_what_is_not_finite(dtype):
    x = torch.tensor([0.5, -0.5, 0.75, -0.75, math.nan, -math.inf]).to(dtype)
    t = int(torch_ops.magnitude_bits(torch.tensor(0.5, dtype=dtype)))
    assert torch_ops.keep_above(x, t).tolist() == [False, False, True, True, True, True]
    assert torch.equal(torch_ops.keep_above(x, torch.tensor(t)), torch_ops.keep_above(x, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sparsity", "num_kept"), [(0.0, 9), (0.1, 9), (0.5, 5), (0.9, 1), (1.0, 0)])
def test_threshold_for_a_sparsity_drops_that_many(dtype, sparsity, num_kept):
    x_K = torch.tensor([3.0, -0.0, 1.0, -2.0, 9.0, -8.0, 7.0, 4.0, -6.0, 5.0]).to(dtype)
    bits = torch_ops.threshold_bits_for(x_K, sparsity)
    assert bits.dtype == torch.int32 and bits.shape == (1,)
    assert torch_ops.keep_above(x_K, bits).sum() == num_kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operand_holds_no_negative_zero(dtype):
    x = torch.tensor([0.0, -0.0, -1.0, 2.0, math.nan]).to(dtype)
    keep = torch.tensor([True, True, True, False, True])
    operand = torch_ops.mask_operand(x, keep)
    bits = operand.view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert (bits != 0).tolist() == [False, False, True, False, True]
    assert operand[2] == -1


@pytest.mark.parametrize("K", [1, 7, 8, 13])
def test_bits_are_packed_lsb_first_with_zero_tail(K):
    keep = torch.rand(2, K, generator=torch.Generator().manual_seed(K)) > 0.5
    packed = torch_ops.pack_bits(keep)
    for row, bytes_ in zip(keep.tolist(), packed.tolist(), strict=True):
        number = sum(bit << i for i, bit in enumerate(row))
        assert bytes(bytes_) == number.to_bytes(-(-K // 8), "little")


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import sparsetrace_kernels.{}"
    for module in ("torch_ops", "reference"):
        subprocess.run([sys.executable, "-c", code.format(module)], check=True)
    assert subprocess.run([sys.executable, "-c", code.format("compact")], capture_output=True).returncode == 1
