"""The row producers: operands and ring equal the oracle's bit for bit; sums lie within twice torch's error."""

# Shape suffixes: T = rows, K = features, S = segments, R = ring slots.

import pytest
import torch
from kernel_testing import assert_sum_close, make_input

from sparsetrace_kernels.masked_rows import (
    CHUNK_K,
    DENSE,
    add_rmsnorm_rows,
    launch_add_rmsnorm_rows,
    launch_mask_rows,
    launch_silu_mul_rows,
    mask_rows,
    silu_mul_rows,
)
from sparsetrace_kernels.reference import add_rmsnorm_ref, mask_rows_ref, silu_mul_ref
from sparsetrace_kernels.torch_ops import threshold_bits_for

HALF = [torch.float16, torch.bfloat16]
EPS = 1e-5
NUM_SLOTS = 4

# captured, left dense, masked but not captured, the last slot, the first number beyond the ring, one far beyond
DESTS = [1, DENSE, -1, NUM_SLOTS - 1, NUM_SLOTS, 1 << 40]

CASES = [
    # T, K, S
    (1, 1, 1),
    (6, 100, 1),
    (7, 513, 3),
    (2, 256, 2),
]
case_ids = "T{0[0]}-K{0[1]}-S{0[2]}".format


def make_rows(T, K, dtype, device, seed=0):
    """Draw rows that hold zeros of both signs and a subnormal, as the first columns of a wider matrix."""
    wide = torch.full((T, K + 16), float("nan"), dtype=dtype, device=device)
    wide[:, :K] = torch.stack([make_input(K, dtype, device, seed=100 * seed + t) for t in range(T)])
    return wide[:, :K]


def make_thresholds(x_TK, S, sparsity):
    """Derive a threshold for each segment, of ascending sparsity up to the wanted one."""
    return torch.cat([threshold_bits_for(x_TK.flatten(), sparsity * (s + 1) / S) for s in range(S)])


def make_dests(T, device):
    # captured rows must have different slots
    return torch.tensor([DESTS[t] if t < len(DESTS) else -1 for t in range(T)], device=device)


def make_regions(S, K, dtype, device):
    """Make a poisoned ring in which each segment is a region of one buffer, with its rows one after the other."""
    capacity = NUM_SLOTS + 3
    flat = torch.full((capacity * K * (S + 1),), float("nan"), dtype=dtype, device=device)
    # the first region belongs to another site
    return flat, flat[capacity * K :].as_strided((NUM_SLOTS, S, K), (K, capacity * K, 1))


def norm_ref(residual_TK, delta_TK, weight_K):
    deltas = [None] * residual_TK.shape[0] if delta_TK is None else delta_TK
    rows = [add_rmsnorm_ref(residual_TK[t], deltas[t], weight_K, EPS) for t in range(residual_TK.shape[0])]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def assert_same_bits(ours, ref):
    assert ours.shape == ref.shape
    assert torch.equal(ours.view(torch.int16), ref.contiguous().view(torch.int16))


def assert_masked(x_TK, bits_S, scale_SK, dest_T, operand_STK, ring):
    """The operands equal the oracle's, and so does the ring's whole buffer, which must be poisoned elsewhere."""
    flat, _ = make_regions(len(bits_S), x_TK.shape[1], x_TK.dtype, x_TK.device)
    values_RSK = torch.as_strided(flat, ring[1].shape, ring[1].stride(), ring[1].storage_offset())
    assert_same_bits(operand_STK, mask_rows_ref(x_TK, bits_S, scale_SK, dest_T, values_RSK))
    assert_same_bits(ring[0], flat)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_mask_rows(device, case, dtype, sparsity):
    T, K, S = case
    x_TK = make_rows(T, K, dtype, device)
    bits_S, dest_T = make_thresholds(x_TK, S, sparsity), make_dests(T, device)
    ring = make_regions(S, K, dtype, device)
    operand_STK = mask_rows(x_TK, bits_S, None, dest_T, ring[1])
    assert_masked(x_TK, bits_S, None, dest_T, operand_STK, ring)
    if sparsity == 1.0:
        assert not operand_STK[-1, dest_T != DENSE].view(torch.int16).any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_wider_than_a_chunk_keep_every_pattern(device, dtype):
    K = CHUNK_K + 77
    patterns = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16)
    x_TK = patterns[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(8)).to(device)]
    x_TK = x_TK.view(dtype)[: 6 * K].view(6, K)
    # the least and a negative threshold keep all but the zeros, including NaN, Inf and subnormals
    bits_S = torch.tensor([0, -5], dtype=torch.int32, device=device)
    dest_T = make_dests(6, device)
    ring = make_regions(2, K, dtype, device)
    operand_STK = mask_rows(x_TK, bits_S, None, dest_T, ring[1])
    assert_masked(x_TK, bits_S, None, dest_T, operand_STK, ring)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_mask_rows_scales_the_score(device, dtype):
    T, K = 4, 300
    x_TK = make_rows(T, K, dtype, device)
    scale_SK = torch.rand(2, K, generator=torch.Generator().manual_seed(3)).to(device)
    bits_S = torch.cat([threshold_bits_for((x_TK.float().abs() * scale_K).flatten(), 0.5) for scale_K in scale_SK])
    dest_T = make_dests(T, device)
    ring = make_regions(2, K, dtype, device)
    operand_STK = mask_rows(x_TK, bits_S, scale_SK, dest_T, ring[1])
    assert_masked(x_TK, bits_S, scale_SK, dest_T, operand_STK, ring)


def test_mask_rows_without_a_ring(device):
    x_TK = make_rows(6, 40, torch.float16, device)
    bits_S, dest_T = make_thresholds(x_TK, 1, 0.5), make_dests(6, device)
    operand_STK = launch_mask_rows(x_TK, bits_S, None, dest_T, None)
    assert_same_bits(operand_STK, mask_rows_ref(x_TK, bits_S, None, dest_T, None))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("has_delta", [True, False], ids=["delta", "first-layer"])
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_add_rmsnorm_rows(device, case, has_delta, dtype, sparsity):
    T, K, S = case
    residual_TK = make_rows(T, K, dtype, device)
    delta_TK = make_rows(T, K, dtype, device, seed=5) if has_delta else None
    weight_K = make_input(K, dtype, device, seed=6)
    bits_S, dest_T = make_thresholds(residual_TK, S, sparsity), make_dests(T, device)
    ring = make_regions(S, K, dtype, device)

    total_TK, normed_TK, operand_STK = add_rmsnorm_rows(
        residual_TK, delta_TK, weight_K, EPS, bits_S, None, dest_T, ring[1]
    )

    ref_total_TK, ref_TK = norm_ref(residual_TK, delta_TK, weight_K)
    if device.type == "cuda" or not has_delta:
        assert_same_bits(total_TK, ref_total_TK)
    else:
        # Triton's interpreter truncates where the GPU rounds to bf16
        assert_sum_close(total_TK, ref_total_TK.double(), ref_total_TK)
        _, ref_TK = norm_ref(total_TK, None, weight_K)
    unit_TK = total_TK.float() * torch.rsqrt(total_TK.float().square().mean(1, keepdim=True) + EPS)
    assert_sum_close(normed_TK, ref_TK, unit_TK.to(dtype) * weight_K)
    assert_masked(normed_TK, bits_S, None, dest_T, operand_STK, ring)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("T", "K"), [(1, 1), (7, 100), (3, 513), (2, CHUNK_K + 3)])
def test_silu_mul_rows(device, T, K, dtype, sparsity):
    gate_up_T2K = make_rows(T, 2 * K, dtype, device)
    ref_TK = silu_mul_ref(gate_up_T2K)
    bits_S, dest_T = make_thresholds(ref_TK.to(dtype), 1, sparsity), make_dests(T, device)
    ring = make_regions(1, K, dtype, device)

    product_TK, operand_TK = silu_mul_rows(gate_up_T2K, bits_S, None, dest_T, ring[1])

    gate_TK, up_TK = gate_up_T2K.chunk(2, dim=1)
    assert_sum_close(product_TK, ref_TK, torch.nn.functional.silu(gate_TK) * up_TK)
    assert_masked(product_TK, bits_S, None, dest_T, operand_TK[None], ring)


def test_ops_are_well_formed(device):
    x_TK, delta_TK = (make_input(6 * 64, torch.float16, device, seed=s).view(6, 64) for s in (0, 1))
    dest_T = make_dests(6, device)
    bits_S = make_thresholds(x_TK, 2, 0.5)
    values_RSK = torch.zeros(NUM_SLOTS, 2, 64, dtype=torch.float16, device=device)
    where = (dest_T, values_RSK)
    torch.library.opcheck(mask_rows, (x_TK, bits_S, None, *where))
    torch.library.opcheck(mask_rows, (x_TK, bits_S, None, dest_T, None))
    torch.library.opcheck(add_rmsnorm_rows, (x_TK, delta_TK, x_TK[0].clone(), EPS, bits_S, None, *where))
    torch.library.opcheck(silu_mul_rows, (x_TK, bits_S[:1], None, dest_T, values_RSK[:, :1, :32].contiguous()))


def test_launches_equal_their_ops(device):
    x_TK = make_rows(6, 64, torch.bfloat16, device)
    bits_S, dest_T = make_thresholds(x_TK, 1, 0.5), make_dests(6, device)
    norm = (x_TK, None, make_input(64, torch.bfloat16, device), EPS, bits_S, None, dest_T, None)
    gated = (x_TK, bits_S, None, dest_T, None)
    outputs = [*launch_add_rmsnorm_rows(*norm), *launch_silu_mul_rows(*gated)]
    for ours, ref in zip(outputs, [*add_rmsnorm_rows(*norm), *silu_mul_rows(*gated)], strict=True):
        assert_same_bits(ours, ref)


def test_refuses(device):
    x_TK = make_input(6 * 64, torch.float16, device).view(6, 64)
    bits_S, dest_T = make_thresholds(x_TK, 1, 0.5), make_dests(6, device)
    values_RSK = torch.zeros(NUM_SLOTS, 1, 64, dtype=torch.float16, device=device)

    def refused(match, x_TK=x_TK, bits_S=bits_S, scale_SK=None, dest_T=dest_T, values_RSK=values_RSK):
        with pytest.raises(ValueError, match=r"^mask_rows: " + match):
            mask_rows(x_TK, bits_S, scale_SK, dest_T, values_RSK)

    refused("x_TK must be a nonempty fp16 or bf16 matrix with contiguous rows, got torch.float32", x_TK=x_TK.float())
    refused("x_TK must be .* matrix with contiguous rows", x_TK=x_TK.T)
    for number in (0, 4):
        wrong = bits_S.new_zeros(number)
        refused(rf"threshold_bits_S must hold 1 to 3 thresholds, got \({number},\)", bits_S=wrong)
    refused(r"threshold_bits_S must be contiguous torch.int32 \(1,\)", bits_S=bits_S.long())
    refused(r"scale_SK must be contiguous torch.float32 \(1, 64\)", scale_SK=x_TK)
    refused(r"dest_T must be contiguous torch.int64 \(6,\)", dest_T=dest_T.int())
    refused(r"values_RSK must be torch.float16 \[R, 1, 64\]", values_RSK=values_RSK.bfloat16())
    refused("values_RSK must have contiguous rows", values_RSK=values_RSK.repeat(1, 1, 2)[..., ::2])

    wide_TK = torch.zeros(1, (1 << 15) + 1, dtype=torch.float16, device=device)
    rest = (bits_S, None, dest_T[:1], None)
    with pytest.raises(ValueError, match="^add_rmsnorm_rows: K must be at most 32768, got 32769"):
        add_rmsnorm_rows(wide_TK, None, wide_TK[0], EPS, *rest)
    with pytest.raises(ValueError, match=r"^add_rmsnorm_rows: delta_TK must be torch.float16 \(6, 64\) with"):
        add_rmsnorm_rows(x_TK, x_TK.bfloat16(), x_TK[0], EPS, bits_S, None, dest_T, None)
    with pytest.raises(ValueError, match="^silu_mul_rows: gate_up_T2K must hold two halves a row, got 63 entries"):
        silu_mul_rows(x_TK[:, :63], bits_S, None, dest_T, None)
    with pytest.raises(
        ValueError, match="^silu_mul_rows: threshold_bits_S must hold one threshold, got 2: only `down`"
    ):
        silu_mul_rows(x_TK, bits_S.repeat(2), None, dest_T, None)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [4096, 11008, 28672])
def test_many_rows_in_a_graph(device, K):
    T, dtype = 70_000 if K == 4096 else 512, torch.bfloat16
    x_TK = torch.randn(T, K, device=device, dtype=dtype)
    gate_up_T2K = torch.randn(512, 2 * K, device=device, dtype=dtype)
    weight_K = make_input(K, dtype, device)
    bits_S = make_thresholds(x_TK[:8], 2, 0.5)
    dest_T = make_dests(T, device)
    # one row for each slot, so that the order of the programs does not matter
    dest_T[len(DESTS) :] = -1
    rings = [make_regions(S, K, dtype, device) for S in (2, 2, 1)]

    def run():
        return (
            mask_rows(x_TK, bits_S, None, dest_T, rings[0][1]),
            add_rmsnorm_rows(x_TK, x_TK, weight_K, EPS, bits_S, None, dest_T, rings[1][1]),
            silu_mul_rows(gate_up_T2K, bits_S[:1], None, dest_T[:512], rings[2][1]),
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operand_STK, (total_TK, normed_TK, normed_STK), (product_TK, operand_TK) = run()
    graph.replay()
    # rows with each kind of destination, and the last rows
    some = torch.cat([torch.arange(16), torch.arange(496, 512)]).to(device)
    assert_masked(x_TK[some], bits_S, None, dest_T[some], operand_STK[:, some], rings[0])
    assert_same_bits(total_TK, x_TK + x_TK)
    assert_masked(normed_TK[some], bits_S, None, dest_T[some], normed_STK[:, some], rings[1])
    assert_masked(product_TK[some], bits_S[:1], None, dest_T[some], operand_TK[None, some], rings[2])
    assert_same_bits(operand_STK[:, -4:], mask_rows_ref(x_TK[-4:], bits_S, None, dest_T[-4:], None))
