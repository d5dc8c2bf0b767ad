"""Pack masked rows on the device into bitmask, kept bit patterns and row starts.

`pack` takes one [T, K] block; `pack_regions` takes a ring, one buffer that holds such a block for each of many matrices
of any widths. Both run two kernels over chunks of rows: the first counts kept entries and writes the bitmask, and after
a running sum over the counts, the second stores each chunk's kept patterns at the chunk's offset.
Oracles: `reference.pack_ref`, `reference.pack_regions_ref`.
"""

# Shape suffixes: T = tokens, K = features, M = ceil(K / 8) bitmask bytes, C = chunks, F = fields of a chunk's entry.

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels.checks import require

# entries that a program processes at a time: the fastest of 128 to 4,096 by 1 to 8 warps on an H200, with one program
# for each block
BLOCK_K = 1024
# entries of a program, a multiple of the block: four blocks share the cost of reading the table and starting a program
CHUNK_K = 4096
NUM_WARPS = 1

# of a chunk: first entry of its region; width of the region's rows; bitmask bytes of a row of all regions before, and
# of its own; number of the region; chunks in a row of all regions before; number of the chunk in its row; chunks in its
# row
NUM_FIELDS = 8

# grid dimension y
MAX_CHUNKS = (1 << 16) - 1

# 128 entries make 16 bytes of bitmask, the widest store
MAX_ALIGNMENT = 128

_PATTERNS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
_MAGNITUDES = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF}


@triton.jit
def _locate(
    chunks_ptr,  # [C, F] int64, or None for a single block
    row_stride,
    K,
    ALIGNMENT: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    CHUNK_K: tl.constexpr,
):
    """Locate the program's chunk.

    Returns:
        offset of its row in the input, [start, stop) of the chunk in the row, offset of the row in the bitmasks, its
        bytes there, offset of the chunk in the counts, offset of the row in the row starts.
    """
    i_t = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1)
    if chunks_ptr is None:
        o_first = i_t * row_stride
        width = K
        num_bytes = tl.cdiv(K, 8)
        o_mask = i_t * num_bytes
        i_q = i_c
        o_count = i_t * tl.num_programs(1) + i_c
        o_row = i_t
    else:
        rows = tl.num_programs(0).to(tl.int64)
        field_ptr = chunks_ptr + i_c * NUM_FIELDS
        # multiplied here, so that the compiler knows the alignment, which it cannot tell from loaded numbers
        BYTES: tl.constexpr = (ALIGNMENT + 7) // 8
        o_first = tl.load(field_ptr) * ALIGNMENT
        width = tl.load(field_ptr + 1).to(tl.int32) * ALIGNMENT
        o_mask = tl.load(field_ptr + 2) * BYTES
        num_bytes = tl.load(field_ptr + 3).to(tl.int32) * BYTES
        o_first += i_t * width
        o_mask = o_mask * rows + i_t * num_bytes
        o_row = tl.load(field_ptr + 4) * rows + i_t
        i_q = tl.load(field_ptr + 6).to(tl.int32)
        o_count = tl.load(field_ptr + 5) * rows + i_t * tl.load(field_ptr + 7) + i_q
    start = i_q * CHUNK_K
    return o_first, start, tl.minimum(start + CHUNK_K, width), o_mask, num_bytes, o_count, o_row


@triton.jit
def _is_used(num_rows_ptr):
    if num_rows_ptr is None:
        return True
    else:
        return tl.program_id(0) < tl.load(num_rows_ptr)


@triton.jit
def _count_kernel(
    bits_ptr,  # int16 or int32
    chunks_ptr,  # [C, F] int64 or None
    num_rows_ptr,  # [1] int64 or None
    masks_ptr,  # uint8
    counts_ptr,  # int64, one a chunk of every row
    nonfinite_ptr,  # [1] int32 or None
    infinity,
    row_stride,
    K,
    MAGNITUDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_first, begin, stop, o_mask, num_bytes, o_count, _ = _locate(
        chunks_ptr, row_stride, K, ALIGNMENT, NUM_FIELDS, CHUNK_K
    )
    used = _is_used(num_rows_ptr)
    # one sum yields a byte of the mask in bits 0 to 7, and the number of its set bits above them
    b_bit = (1 << tl.arange(0, 8)) | 256
    b_count = tl.zeros([BLOCK_K // 8], dtype=tl.int32)
    b_max = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in tl.range(begin, stop, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_bits = tl.load(bits_ptr + o_first + o_k, mask=(o_k < stop) & used, other=0)
        # without the sign, so that -0.0 counts as dropped
        b_magnitude = b_bits.to(tl.int32) & MAGNITUDE
        b_keep = tl.reshape(b_magnitude != 0, [BLOCK_K // 8, 8])
        b_byte = tl.sum(tl.where(b_keep, b_bit[None, :], 0), axis=1)
        o_m = start // 8 + tl.arange(0, BLOCK_K // 8)
        tl.store(masks_ptr + o_mask + o_m, b_byte.to(tl.uint8), mask=o_m < num_bytes)
        b_count += b_byte >> 8
        if nonfinite_ptr is not None:
            b_max = tl.maximum(b_max, b_magnitude)
    tl.store(counts_ptr + o_count, tl.sum(b_count, axis=0).to(tl.int64))
    if nonfinite_ptr is not None:
        tl.atomic_max(nonfinite_ptr, 1, mask=tl.max(b_max, axis=0) >= infinity, sem="relaxed")


@triton.jit
def _scatter_kernel(
    bits_ptr,  # int16 or int32
    chunks_ptr,  # [C, F] int64 or None
    num_rows_ptr,  # [1] int64 or None
    ends_ptr,  # int64, running sum of the counts
    packed_ptr,  # int16 or int32
    row_starts_ptr,  # int64, one a row of every region, and the end
    row_stride,
    K,
    MAGNITUDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_first, begin, stop, _, _, o_count, o_row = _locate(chunks_ptr, row_stride, K, ALIGNMENT, NUM_FIELDS, CHUNK_K)
    b_start = tl.load(ends_ptr + o_count - 1, mask=o_count > 0, other=0)
    if begin == 0:
        tl.store(row_starts_ptr + o_row, b_start)
    if o_count == tl.num_programs(0).to(tl.int64) * tl.num_programs(1) - 1:
        tl.store(row_starts_ptr + o_row + 1, tl.load(ends_ptr + o_count))
    if _is_used(num_rows_ptr):
        for start in tl.range(begin, stop, BLOCK_K):
            o_k = start + tl.arange(0, BLOCK_K)
            b_bits = tl.load(bits_ptr + o_first + o_k, mask=o_k < stop, other=0)
            b_one = tl.reshape(((b_bits & MAGNITUDE) != 0).to(tl.int32), [BLOCK_K // 8, 8])
            # place among the kept entries, from 1, and 0 if dropped; scanned by bytes of the mask, so that the scan
            # across threads is an eighth as long
            b_byte = tl.sum(b_one, axis=1)
            b_place = (tl.cumsum(b_byte, 0) - b_byte)[:, None] + tl.cumsum(b_one, 1)
            b_place = tl.reshape(tl.where(b_one != 0, b_place, 0).to(tl.int16), [BLOCK_K])
            # Coalesced stores need neighbouring entries in neighbouring threads. Triton 3.6 exchanges them where the
            # number is widened, 16 bits an entry: 776 instructions on sm_90. Triton 3.7 exchanges pointers: 1,016.
            b_place = b_place.to(tl.int32)
            tl.store(packed_ptr + b_start - 1 + b_place, b_bits, mask=b_place > 0)
            b_start += tl.sum(b_byte, axis=0)


def _launch(
    bits: Tensor,
    chunks_CF: Tensor | None,
    grid: tuple[int, int],
    num_rows: Tensor | None,
    packed: Tensor,
    masks: Tensor,
    row_starts: Tensor,
    nonfinite: Tensor | None,
    infinity: int,
    row_stride: int,
    K: int,
    alignment: int,
) -> None:
    """Launch both kernels, with the running sum between them."""
    constants = {
        "MAGNITUDE": _MAGNITUDES[bits.dtype], "ALIGNMENT": alignment, "NUM_FIELDS": NUM_FIELDS,
        "CHUNK_K": CHUNK_K, "BLOCK_K": BLOCK_K, "num_warps": NUM_WARPS,
    }  # fmt: skip
    counts = torch.empty(grid[0] * grid[1], dtype=torch.int64, device=bits.device)
    _count_kernel[grid](
        bits, chunks_CF, num_rows, masks, counts, nonfinite, infinity, row_stride, K, **constants
    )  # fmt: skip
    ends = torch.cumsum(counts, 0)
    _scatter_kernel[grid](bits, chunks_CF, num_rows, ends, packed, row_starts, row_stride, K, **constants)


@torch.library.custom_op("sparsetrace::pack", mutates_args=("packed", "mask_TM", "offsets"))
def pack(x_TK: Tensor, packed: Tensor, mask_TM: Tensor, offsets: Tensor) -> None:
    """Pack a masked block: an entry is kept if it is not zero.

    Args:
        x_TK: masked block, fp16, bf16 or fp32, contiguous rows at any distance.
        packed: takes the kept bit patterns row by row, int16 (int32 for fp32), at least T * K entries, since only the
            device knows how many are kept. Entries from `offsets[T]` on are not changed.
        mask_TM: takes the bitmask, uint8, M = ceil(K / 8), LSB first, trailing bits zero.
        offsets: [T + 1] int64, takes the start of each row in `packed`, and the end of the last.
    """
    op = "pack"
    if x_TK.ndim != 2 or x_TK.dtype not in _PATTERNS or x_TK.numel() == 0 or x_TK.stride(1) != 1:
        raise ValueError(
            f"{op}: x_TK must be a nonempty fp16, bf16 or fp32 matrix with contiguous rows, "
            f"got {x_TK.dtype} {tuple(x_TK.shape)} with strides {x_TK.stride()}"
        )
    T, K = x_TK.shape
    patterns = _PATTERNS[x_TK.dtype]
    require(op, "mask_TM", mask_TM, (T, triton.cdiv(K, 8)), torch.uint8, x_TK.device)
    require(op, "offsets", offsets, (T + 1,), torch.int64, x_TK.device)
    require(op, "packed", packed, (packed.numel(),), patterns, x_TK.device)
    if packed.numel() < T * K:
        raise ValueError(f"{op}: packed must hold at least T * K = {T * K} entries, got {packed.numel()}")
    grid = (T, triton.cdiv(K, CHUNK_K))
    _launch(x_TK.view(patterns), None, grid, None, packed, mask_TM, offsets, None, 0, x_TK.stride(0), K, 1)


@pack.register_fake
def _(x_TK, packed, mask_TM, offsets):
    return None


def _alignment(widths: list[int]) -> int:
    """Return the largest power of two, up to `MAX_ALIGNMENT`, that divides all widths."""
    return math.gcd(MAX_ALIGNMENT, *widths)


def _num_chunks(widths: list[int]) -> int:
    return sum(triton.cdiv(K, CHUNK_K) for K in widths)


def chunk_table(widths: list[int], capacity: int, device: torch.device, starts: list[int] | None = None) -> Tensor:
    """Tabulate where each chunk of a row lies in a ring of regions, and where its results go.

    Args:
        widths: entries in a row of each region, in the order of the results.
        capacity: rows of each region.
        device: of the ring.
        starts: first entry of each region, if the ring holds other regions between these; None if it holds these
            alone, one after the other.

    Returns:
        chunks_CF: int64, for `pack_regions` with the same widths and capacity.
    """
    alignment = _alignment(widths)
    byte_alignment = triton.cdiv(alignment, 8)
    if starts is None:
        starts = [capacity * entries for entries in itertools.accumulate(widths[:-1], initial=0)]
    if any(start % alignment for start in starts):
        raise ValueError(f"chunk_table: starts must be multiples of {alignment}, as the widths are, got {starts}")
    fields = []
    num_bytes = num_chunks = 0
    for region, (K, start) in enumerate(zip(widths, starts, strict=True)):
        M, Q = triton.cdiv(K, 8), triton.cdiv(K, CHUNK_K)
        # in units of the alignment, which the kernels multiply by
        sizes = (start // alignment, K // alignment, num_bytes // byte_alignment, M // byte_alignment)
        fields += [(*sizes, region, num_chunks, i_q, Q) for i_q in range(Q)]
        num_bytes, num_chunks = num_bytes + M, num_chunks + Q
    return torch.tensor(fields, dtype=torch.int64).to(device)


@torch.library.custom_op("sparsetrace::pack_regions", mutates_args=("packed", "masks", "row_starts", "nonfinite"))
def pack_regions(
    bits_flat: Tensor,
    chunks_CF: Tensor,
    widths: list[int],
    capacity: int,
    rows: int,
    num_rows: Tensor,
    packed: Tensor,
    masks: Tensor,
    row_starts: Tensor,
    nonfinite: Tensor,
    infinity: int,
) -> None:
    """Pack the first rows of every region of a ring: an entry is kept if its pattern without the sign is not zero.

    Args:
        bits_flat: ring of bit patterns, int16 or int32; regions of `capacity` rows each.
        chunks_CF: from `chunk_table`, for the same widths and capacity.
        widths: entries in a row of each region.
        capacity: rows of each region.
        rows: rows of each region to pack, at most `capacity`.
        num_rows: [1] int64, how many of these rows are used, known on the device only; the others count as dropped.
        packed: takes the kept patterns region by region, each row by row; dtype of `bits_flat`, at least `rows` times
            the sum of widths. Entries from `row_starts[-1]` on are not changed.
        masks: takes the bitmasks [rows, M] region by region, uint8, M = ceil(width / 8), LSB first, trailing bits
            zero; at least `rows` times the sum of all M.
        row_starts: [len(widths) * rows + 1] int64, takes the start in `packed` of each row, region by region, and the
            end of the last.
        nonfinite: [1] int32, set to 1 if a used row holds a magnitude of `infinity` or above, else not changed.
        infinity: bit pattern of positive infinity in the type of the patterns.
    """
    op = "pack_regions"
    if not widths or min(widths) < 1:
        raise ValueError(f"{op}: widths must be positive, one for each region, got {list(widths)}")
    if not 1 <= rows <= capacity:
        raise ValueError(f"{op}: rows must be in [1, capacity={capacity}], got {rows}")
    if bits_flat.dtype not in _MAGNITUDES:
        raise ValueError(f"{op}: bits_flat must be int16 or int32 bit patterns, got {bits_flat.dtype}")
    if not 0 < infinity <= _MAGNITUDES[bits_flat.dtype]:
        raise ValueError(f"{op}: infinity must be a positive pattern of {bits_flat.dtype}, got {infinity}")
    device = bits_flat.device
    num_chunks, row_entries = _num_chunks(widths), sum(widths)
    if num_chunks > MAX_CHUNKS:
        raise ValueError(
            f"{op}: widths must make at most {MAX_CHUNKS} chunks of {CHUNK_K}, got {num_chunks}: pack fewer regions"
        )
    require(op, "chunks_CF", chunks_CF, (num_chunks, NUM_FIELDS), torch.int64, device)
    require(op, "num_rows", num_rows, (1,), torch.int64, device)
    require(op, "row_starts", row_starts, (len(widths) * rows + 1,), torch.int64, device)
    require(op, "nonfinite", nonfinite, (1,), torch.int32, device)
    for name, flat, dtype, least in (
        ("bits_flat", bits_flat, bits_flat.dtype, capacity * row_entries),
        ("packed", packed, bits_flat.dtype, rows * row_entries),
        ("masks", masks, torch.uint8, rows * sum(triton.cdiv(K, 8) for K in widths)),
    ):
        require(op, name, flat, (flat.numel(),), dtype, device)
        if flat.numel() < least:
            raise ValueError(f"{op}: {name} must hold at least {least} entries, got {flat.numel()}")
    _launch(
        bits_flat, chunks_CF, (rows, num_chunks), num_rows, packed, masks, row_starts, nonfinite, infinity,
        0, 0, _alignment(widths),
    )  # fmt: skip


@pack_regions.register_fake
def _(
    bits_flat, chunks_CF, widths, capacity, rows,
    num_rows, packed, masks, row_starts, nonfinite, infinity,
):  # fmt: skip
    return None
