"""The list producers: lists and capture equal the oracle's for the result, whose error is within twice torch's."""

import pytest
import torch
from kernel_testing import assert_ring, assert_sum_close, make_input, make_ring, make_slot

from sparsetrace_kernels.add_rmsnorm import add_rmsnorm
from sparsetrace_kernels.compact import compact
from sparsetrace_kernels.reference import (
    add_rmsnorm_ref,
    compact_ref,
    keep_segments,
    silu_mul_ref,
)
from sparsetrace_kernels.silu_mul import silu_mul
from sparsetrace_kernels.torch_ops import mask_operand, pack_bits, threshold_bits_for

HALF = [torch.float16, torch.bfloat16]
SIZES = [1, 100, 513, 1600]
EPS = 1e-5


def make_ring_arguments(S, K, dtype, device):
    values_RSK, mask_RSM = make_ring(S, K, dtype, device)
    return values_RSK, mask_RSM, make_slot(1, device)


def assert_lists_and_ring(x_K, bits_S, scale_SK, list_SIL, counts_SI, ring):
    ref_SIL, ref_counts_SI = compact_ref(x_K, bits_S, scale_SK, length=list_SIL.shape[2])
    assert torch.equal(counts_SI, ref_counts_SI)
    valid_SIL = torch.arange(list_SIL.shape[2], device=x_K.device) < counts_SI[..., None]
    assert torch.equal(torch.where(valid_SIL, list_SIL, 0), ref_SIL)
    keep_SK = keep_segments(x_K, bits_S, scale_SK)
    operand_SK = mask_operand(x_K.expand_as(keep_SK), keep_SK)
    assert_ring(*ring[:2], 1, operand_SK, pack_bits(keep_SK))


def thresholds(x_K, sparsity, num_segments):
    return torch.cat([threshold_bits_for(x_K, sparsity * f) for f in (1.0, 0.8, 0.5)[:num_segments]])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("K", SIZES)
def test_compact(device, K, S, dtype, sparsity):
    x_K = make_input(K, dtype, device)
    bits_S = thresholds(x_K, sparsity, S)
    ring = make_ring_arguments(S, K, dtype, device)
    assert_lists_and_ring(x_K, bits_S, None, *compact(x_K, bits_S, None, *ring), ring)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_compact_scales_the_score(device, dtype):
    x_K = make_input(700, dtype, device)
    scale_SK = torch.rand(2, 700, generator=torch.Generator().manual_seed(3)).to(device)
    bits_S = torch.cat([threshold_bits_for(x_K.float().abs() * scale_K, 0.5) for scale_K in scale_SK])
    ring = make_ring_arguments(2, 700, dtype, device)
    assert_lists_and_ring(x_K, bits_S, scale_SK, *compact(x_K, bits_S, scale_SK, *ring), ring)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("has_delta", [True, False], ids=["delta", "first-layer"])
@pytest.mark.parametrize("K", SIZES)
def test_add_rmsnorm(device, K, has_delta, dtype, sparsity):
    residual_K = make_input(K, dtype, device)
    delta_K = make_input(K, dtype, device, seed=5) if has_delta else None
    weight_K = make_input(K, dtype, device, seed=6)
    ref_total_K, ref_K = add_rmsnorm_ref(residual_K, delta_K, weight_K, EPS)
    bits_S = thresholds(ref_K.to(dtype), sparsity, 3)
    ring = make_ring_arguments(3, K, dtype, device)

    total_K, normed_K, list_SIL, counts_SI = add_rmsnorm(residual_K, delta_K, weight_K, EPS, bits_S, None, *ring)

    unit_K = total_K.float() * torch.rsqrt(total_K.float().square().mean() + EPS)
    torch_K = unit_K.to(dtype) * weight_K
    if device.type == "cuda" or not has_delta:
        assert torch.equal(total_K, ref_total_K)
    else:
        # Triton's interpreter truncates where the GPU rounds to bf16
        assert_sum_close(total_K, ref_total_K.double(), ref_total_K)
        _, ref_K = add_rmsnorm_ref(total_K, None, weight_K, EPS)
    assert_sum_close(normed_K, ref_K, torch_K)
    assert_lists_and_ring(normed_K, bits_S, None, list_SIL, counts_SI, ring)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_silu_mul(device, K, dtype, sparsity):
    gate_up_K2 = make_input(2 * K, dtype, device)
    ref_K = silu_mul_ref(gate_up_K2)
    bits_S = thresholds(ref_K.to(dtype), sparsity, 1)
    ring = make_ring_arguments(1, K, dtype, device)

    product_K, list_SIL, counts_SI = silu_mul(gate_up_K2, bits_S, None, *ring)

    gate_K, up_K = gate_up_K2.chunk(2)
    assert_sum_close(product_K, ref_K, torch.nn.functional.silu(gate_K) * up_K)
    assert_lists_and_ring(product_K, bits_S, None, list_SIL, counts_SI, ring)


def test_ops_are_well_formed(device):
    x_K = make_input(128, torch.float16, device)
    bits_S = thresholds(x_K, 0.5, 1)
    values_RSK, mask_RSM = (ring.clone() for ring in make_ring(1, 64, torch.float16, device))
    ring = (None, values_RSK, mask_RSM, make_slot(1, device))
    # list entries behind the count are undefined, so outputs are not compared between runs
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(compact, (x_K[:64], bits_S, *ring), test_utils=tests)
    torch.library.opcheck(silu_mul, (x_K, bits_S, *ring), test_utils=tests)
    torch.library.opcheck(
        add_rmsnorm, (x_K[:64], x_K[64:].clone(), x_K[:64].clone(), EPS, bits_S, *ring), test_utils=tests
    )


def test_refuses(device):
    x_K = make_input(64, torch.float16, device)
    bits_S = thresholds(x_K, 0.5, 1)
    no_ring = (None, None, None, None)
    with pytest.raises(ValueError, match="K must be at most 65536, got 65537"):
        compact(torch.zeros(65537, dtype=torch.float16, device=device), bits_S, *no_ring)
    with pytest.raises(ValueError, match="must hold 1 to 3 thresholds"):
        compact(x_K, bits_S.expand(4).contiguous(), *no_ring)
    with pytest.raises(ValueError, match="gate_up_K2 must hold two halves, got 63 entries"):
        silu_mul(x_K[:63].clone(), bits_S, *no_ring)
    with pytest.raises(ValueError, match="delta_K must be contiguous"):
        add_rmsnorm(x_K, x_K.bfloat16(), x_K, EPS, bits_S, *no_ring)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [4096, 8192, 14336, 28672])
@pytest.mark.parametrize("use_pdl", [False, True])
def test_large_vectors_in_a_graph(device, K, use_pdl):
    dtype = torch.bfloat16
    residual_K, delta_K, weight_K = (make_input(K, dtype, device, seed=s) for s in range(3))
    gate_up_K2 = make_input(2 * K, dtype, device)
    bits_S = thresholds(residual_K, 0.5, 3)
    rings = [make_ring_arguments(S, K, dtype, device) for S in (3, 1, 3)]

    def run():
        return (
            add_rmsnorm(residual_K, delta_K, weight_K, EPS, bits_S, None, *rings[0], use_pdl),
            silu_mul(gate_up_K2, bits_S[:1], None, *rings[1], use_pdl),
            compact(residual_K, bits_S, None, *rings[2], use_pdl),
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (total_K, normed_K, *norm_lists), (product_K, *product_lists), lists = run()
    graph.replay()
    assert torch.equal(total_K, (residual_K.float() + delta_K.float()).to(dtype))
    assert_lists_and_ring(normed_K, bits_S, None, *norm_lists, rings[0])
    assert_lists_and_ring(product_K, bits_S[:1], None, *product_lists, rings[1])
    assert_lists_and_ring(residual_K, bits_S, None, *lists, rings[2])
