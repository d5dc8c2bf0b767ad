"""pack and add_histogram against their oracles: all results are integers or bit patterns, so all must be equal."""

import pytest
import torch
from kernel_testing import make_input

from sparsetrace_kernels.histogram import NUM_PATTERNS, add_histogram
from sparsetrace_kernels.pack import pack
from sparsetrace_kernels.reference import histogram_ref, magnitude_bits, pack_ref

PACK_CASES = [
    # T, K
    (1, 1),
    (3, 100),
    (5, 513),
    (2, 1024),
]


def make_block(T, K, dtype, device, sparsity):
    x_TK = make_input(T * K, dtype, device).reshape(T, K)
    dropped_TK = torch.rand(T, K, generator=torch.Generator().manual_seed(4)).to(device) < sparsity
    return x_TK.masked_fill(dropped_TK, 0.0)


def run_pack(x_TK):
    T, K = x_TK.shape
    packed = torch.empty(T * K, dtype=magnitude_bits(x_TK).dtype, device=x_TK.device)
    mask_TM = torch.empty(T, -(-K // 8), dtype=torch.uint8, device=x_TK.device)
    offsets = torch.empty(T + 1, dtype=torch.int64, device=x_TK.device)
    pack(x_TK, packed, mask_TM, offsets)
    return packed, mask_TM, offsets


def assert_packed(x_TK):
    packed, mask_TM, offsets = run_pack(x_TK)
    ref_mask_TM, ref_values, ref_offsets = pack_ref(x_TK)
    assert torch.equal(mask_TM, ref_mask_TM)
    assert torch.equal(offsets, ref_offsets)
    assert torch.equal(packed[: ref_values.shape[0]], ref_values)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", PACK_CASES, ids="T{0[0]}-K{0[1]}".format)
def test_pack(device, case, dtype, sparsity):
    assert_packed(make_block(*case, dtype, device, sparsity))


def test_pack_reads_rows_of_a_wider_block(device):
    assert_packed(make_block(4, 200, torch.bfloat16, device, 0.5)[:, 30:130])


def test_pack_keeps_nan_and_leaves_the_rest_alone(device):
    x_TK = torch.tensor([[0.0, float("nan"), -0.0, 1.0]], dtype=torch.float16, device=device)
    packed, mask_TM, offsets = run_pack(x_TK)
    assert mask_TM.tolist() == [[0b1010]]
    assert offsets.tolist() == [0, 2]
    assert packed.view(torch.float16)[1] == 1.0
    assert (packed[2:] == -1).all()


def test_pack_refuses_too_little_room(device):
    x_TK = torch.zeros(2, 8, dtype=torch.float16, device=device)
    mask_TM = torch.zeros(2, 1, dtype=torch.uint8, device=device)
    offsets = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"packed must hold at least T \* K = 16 entries, got 15"):
        pack(x_TK, torch.zeros(15, dtype=torch.int16, device=device), mask_TM, offsets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_entries", [1, 1023, 3000])
def test_histogram(device, num_entries, dtype):
    x = make_input(num_entries, dtype, device)
    counts = torch.full((NUM_PATTERNS,), 3, dtype=torch.int64, device=device)
    add_histogram(x, counts)
    add_histogram(x, counts)
    assert torch.equal(counts, 3 + 2 * histogram_ref(x))


def test_histogram_of_every_pattern(device):
    patterns = torch.arange(NUM_PATTERNS, device=device).to(torch.int32).to(torch.int16)
    counts = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
    add_histogram(patterns.view(torch.bfloat16).reshape(256, 256), counts)
    assert (counts == 1).all()


def test_ops_are_well_formed(device):
    x_TK = make_block(2, 16, torch.float16, device, 0.5)
    packed = torch.zeros(32, dtype=torch.int16, device=device)
    mask_TM = torch.zeros(2, 2, dtype=torch.uint8, device=device)
    torch.library.opcheck(pack, (x_TK, packed, mask_TM, torch.zeros(3, dtype=torch.int64, device=device)))
    torch.library.opcheck(add_histogram, (x_TK, torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)))


@pytest.mark.gpu
def test_large_block(device):
    assert_packed(make_block(4096, 4100, torch.bfloat16, device, 0.5))
    x = make_block(4096, 4096, torch.bfloat16, device, 0.5)
    counts = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
    add_histogram(x, counts)
    assert torch.equal(counts, histogram_ref(x))
