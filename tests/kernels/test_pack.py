"""Packing and add_histogram against their oracles: integers and bit patterns, so all results must be equal."""

import pytest
import torch
from kernel_testing import make_input

from sparsetrace_kernels.histogram import NUM_PATTERNS, add_histogram
from sparsetrace_kernels.pack import BLOCK_K, CHUNK_K, chunk_table, pack, pack_regions
from sparsetrace_kernels.reference import histogram_ref, pack_ref, pack_regions_ref
from sparsetrace_kernels.torch_ops import magnitude_bits

PACK_CASES = [
    # T, K
    (1, 1),
    (3, 100),
    (5, 513),
    (2, 1024),
    (2, CHUNK_K + BLOCK_K + 9),
]

REGION_CASES = [
    # widths, capacity, rows; widths above and below a chunk, a block and a byte
    ([1], 1, 1),
    ([7, 100, 1, 513], 5, 4),
    ([CHUNK_K + BLOCK_K + 9, 24], 2, 2),
    ([256, 128, CHUNK_K + 128], 3, 2),
    ([16, 48], 3, 3),
]
region_ids = "widths{0[0]}-rows{0[2]}of{0[1]}".format

PATTERNS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


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


def make_regions(widths, capacity, dtype, device, sparsity):
    """Draw a ring of finite values, followed by some unused room."""
    bits = make_block(capacity, sum(widths), dtype, device, sparsity).flatten().view(PATTERNS[dtype])
    return torch.cat([bits, bits.new_full((11,), -1)])


def run_pack_regions(bits_flat, widths, capacity, rows, num_rows, infinity):
    device = bits_flat.device
    packed = torch.empty(rows * sum(widths) + 3, dtype=bits_flat.dtype, device=device)
    masks = torch.empty(rows * sum(-(-K // 8) for K in widths) + 3, dtype=torch.uint8, device=device)
    row_starts = torch.empty(len(widths) * rows + 1, dtype=torch.int64, device=device)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
    chunks_CF = chunk_table(widths, capacity, device)
    used = torch.tensor([num_rows], device=device)
    outputs = (packed, masks, row_starts, nonfinite)
    pack_regions(bits_flat, chunks_CF, widths, capacity, rows, used, *outputs, infinity)
    return outputs


def assert_regions_packed(bits_flat, widths, capacity, rows, num_rows, infinity):
    packed, masks, row_starts, nonfinite = run_pack_regions(bits_flat, widths, capacity, rows, num_rows, infinity)
    ref_packed, ref_masks, ref_starts, ref_nonfinite = pack_regions_ref(
        bits_flat, widths, capacity, rows, num_rows, infinity
    )
    assert torch.equal(row_starts, ref_starts)
    # the poison after the results must remain
    for ours, ref, poison in ((packed, ref_packed, -1), (masks, ref_masks, 255)):
        assert torch.equal(ours[: ref.shape[0]], ref)
        assert (ours[ref.shape[0] :] == poison).all()
    assert nonfinite.item() == ref_nonfinite


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REGION_CASES, ids=region_ids)
def test_pack_regions(device, case, dtype, sparsity):
    widths, capacity, rows = case
    bits_flat = make_regions(widths, capacity, dtype, device, sparsity)
    for num_rows in sorted({0, 1, rows - 1, rows}):
        assert_regions_packed(bits_flat, widths, capacity, rows, num_rows, INFINITY[dtype])


def test_pack_regions_reads_no_row_beyond_its_bound(device):
    bits_flat = make_regions([100, 30], 4, torch.float16, device, 0.5)
    assert_regions_packed(bits_flat, [100, 30], 4, 2, 3, INFINITY[torch.float16])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_pack_regions_reports_values_that_are_not_finite(device, dtype, value):
    widths, capacity = [40, 300], 3
    finite = make_regions(widths, capacity, dtype, device, 0.5)
    # the greatest finite magnitude must not count
    finite[0] = INFINITY[dtype] - 1
    at = capacity * widths[0] + 1 * widths[1] + 299
    for num_rows, flag in ((1, 0), (2, 1)):
        bits_flat = finite.clone()
        bits_flat[at] = torch.tensor(value, dtype=dtype).view(finite.dtype).item()
        assert run_pack_regions(bits_flat, widths, capacity, 3, num_rows, INFINITY[dtype])[3].item() == flag
        assert_regions_packed(bits_flat, widths, capacity, 3, num_rows, INFINITY[dtype])


def test_pack_regions_refuses(device):
    widths, capacity, rows = [8, 20], 4, 3
    good = {
        "bits_flat": torch.zeros(4 * 28, dtype=torch.int16, device=device),
        "chunks_CF": chunk_table(widths, capacity, device),
        "widths": widths,
        "capacity": capacity,
        "rows": rows,
        "num_rows": torch.zeros(1, dtype=torch.int64, device=device),
        "packed": torch.zeros(3 * 28, dtype=torch.int16, device=device),
        "masks": torch.zeros(3 * 4, dtype=torch.uint8, device=device),
        "row_starts": torch.zeros(7, dtype=torch.int64, device=device),
        "nonfinite": torch.zeros(1, dtype=torch.int32, device=device),
        "infinity": 0x7C00,
    }
    for bad, match in (
        ({"widths": [8, 0]}, r"widths must be positive, one for each region, got \[8, 0\]"),
        ({"widths": [1] * 65536}, "widths must make at most 65535 chunks of .*, got 65536"),
        ({"rows": 5}, r"rows must be in \[1, capacity=4\], got 5"),
        ({"bits_flat": good["bits_flat"].half()}, "bits_flat must be int16 or int32 bit patterns, got torch.float16"),
        ({"bits_flat": good["bits_flat"][1:]}, "bits_flat must hold at least 112 entries, got 111"),
        ({"bits_flat": good["bits_flat"].int()}, "packed must be contiguous torch.int32"),
        ({"infinity": 0x7F800000}, "infinity must be a positive pattern of torch.int16, got 2139095040"),
        ({"packed": good["packed"][1:]}, "packed must hold at least 84 entries, got 83"),
        ({"masks": good["masks"][1:]}, "masks must hold at least 12 entries, got 11"),
        ({"chunks_CF": good["chunks_CF"][1:]}, r"chunks_CF must be contiguous torch.int64 \(2, 8\)"),
        ({"num_rows": good["nonfinite"]}, r"num_rows must be contiguous torch.int64 \(1,\)"),
        ({"row_starts": good["row_starts"][1:]}, r"row_starts must be contiguous torch.int64 \(7,\)"),
        ({"nonfinite": good["num_rows"]}, r"nonfinite must be contiguous torch.int32 \(1,\)"),
    ):
        with pytest.raises(ValueError, match="^pack_regions: " + match):
            pack_regions(**(good | bad))


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
    widths, capacity, rows = [16, 5], 2, 2
    bits_flat = make_regions(widths, capacity, torch.float16, device, 0.5)
    ring = (bits_flat, chunk_table(widths, capacity, device), widths, capacity, rows)
    num_rows, row_starts = (torch.ones(n, dtype=torch.int64, device=device) for n in (1, 5))
    nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
    outputs = (torch.zeros_like(bits_flat), mask_TM.flatten().repeat(2), row_starts, nonfinite)
    torch.library.opcheck(pack_regions, (*ring, num_rows, *outputs, 0x7C00))
    torch.library.opcheck(add_histogram, (x_TK, torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)))


@pytest.mark.gpu
def test_large_block(device):
    assert_packed(make_block(4096, 4100, torch.bfloat16, device, 0.5))
    x = make_block(4096, 4096, torch.bfloat16, device, 0.5)
    counts = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
    add_histogram(x, counts)
    assert torch.equal(counts, histogram_ref(x))


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [[4096] * 6 + [11008], [4096, 1111, 14336]], ids=["aligned", "odd"])
def test_large_regions_in_a_graph(device, widths):
    widths, capacity, dtype = widths * 4, 448, torch.bfloat16
    bits_flat = make_regions(widths, capacity, dtype, device, 0.5)
    rows, num_rows = capacity, torch.tensor([capacity - 5], device=device)
    packed, row_starts = (
        torch.empty_like(bits_flat),
        torch.empty(len(widths) * rows + 1, dtype=torch.int64, device=device),
    )
    masks = torch.empty(rows * sum(-(-K // 8) for K in widths), dtype=torch.uint8, device=device)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
    outputs = (packed, masks, row_starts, nonfinite)
    arguments = (bits_flat, chunk_table(widths, capacity, device), widths, capacity, rows, num_rows)
    pack_regions(*arguments, *outputs, INFINITY[dtype])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack_regions(*arguments, *outputs, INFINITY[dtype])
    for used in (capacity, capacity - 5):
        num_rows.fill_(used)
        graph.replay()
        refs = pack_regions_ref(bits_flat, widths, capacity, rows, used, INFINITY[dtype])
        for ours, ref in zip(outputs[:3], refs[:3], strict=True):
            assert torch.equal(ours[: ref.shape[0]], ref)
        assert not nonfinite.item()
