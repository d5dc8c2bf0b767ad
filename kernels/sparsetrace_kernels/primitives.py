"""Device functions that several kernels share: thresholding, capture, list entries.

Masks are exact: magnitudes are compared as bit patterns of x as it is stored. An entry is kept if it is not zero and
its pattern, or that of its float32 score, is above the threshold's.
"""

# Shape suffixes: K = input features, N = output features, S = column segments, I = sections of a list, L = inputs of a
# section, R = ring slots, M = bitmask bytes of a row, ceil(K / 8).

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class RingArguments(NamedTuple):
    """Kernel arguments that say where an operand is captured, as `checks.ring_arguments` lays them out."""

    values_ptr: Any  # [R, S, K] or None
    mask_ptr: Any  # [R, S, M] or None
    slot_ptr: Any  # [1] int64 or None
    num_slots: Any
    values_slot_stride: Any
    values_segment_stride: Any
    mask_slot_stride: Any
    mask_segment_stride: Any


class ListArguments(NamedTuple):
    """Kernel arguments that say how a producer lists its output."""

    scale_ptr: Any  # [S, K] float32 or None
    entries_ptr: Any  # [S, I, L] int32
    counts_ptr: Any  # [S, I] int32


def pdl_options(use_pdl: bool) -> dict[str, bool]:
    """Launch options of a kernel that calls `wait_for_producer`."""
    return {"PDL": use_pdl, **({"launch_pdl": True} if use_pdl else {})}


@triton.jit
def wait_for_producer(PDL: tl.constexpr):
    """Under programmatic dependent launch, wait until the kernel before has finished and let the next one start.

    Every CTA waits before it triggers, so a kernel that starts early can rely on all but its direct predecessor.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def block_columns(i_n, N, end_0, end_1, NUM_SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Map a column block to its segment, its columns and their mask; no block spans two segments."""
    i_segment = 0
    first = 0
    lo = 0
    hi = N
    if NUM_SEGMENTS > 1:
        first_1 = tl.cdiv(end_0, BLOCK_N)
        first_2 = first_1 + tl.cdiv(end_1 - end_0, BLOCK_N)
        i_segment = (i_n >= first_1).to(tl.int32)
        first = tl.where(i_n >= first_1, first_1, 0)
        lo = tl.where(i_n >= first_1, end_0, 0)
        hi = tl.where(i_n >= first_1, end_1, end_0)
        if NUM_SEGMENTS > 2:
            i_segment += (i_n >= first_2).to(tl.int32)
            first = tl.where(i_n >= first_2, first_2, first)
            lo = tl.where(i_n >= first_2, end_1, lo)
            hi = tl.where(i_n >= first_2, N, hi)
    o_n = lo + (i_n - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    return i_segment, o_n, o_n < hi


@triton.jit
def load_threshold(threshold_ptr, i_segment):
    """Load a segment's threshold pattern; a negative one counts as 0, so zeros are never kept."""
    return tl.maximum(tl.load(threshold_ptr + i_segment), 0)


@triton.jit
def load_thresholds(threshold_ptr, NUM_SEGMENTS: tl.constexpr):
    """Load the thresholds of 1 to 3 segments; the first stands in for those that are missing.

    Producers call it before they wait: the L2 cache holds no thresholds any more, since the weights of a whole step
    have passed through it.
    """
    b_0 = load_threshold(threshold_ptr, 0)
    b_1 = b_0
    b_2 = b_0
    if NUM_SEGMENTS > 1:
        b_1 = load_threshold(threshold_ptr, 1)
    if NUM_SEGMENTS > 2:
        b_2 = load_threshold(threshold_ptr, 2)
    return b_0, b_1, b_2


@triton.jit
def load_slot(slot_ptr):
    """Load the ring slot to write, or a number outside every ring if there is none."""
    b_slot = tl.full([], -1, tl.int64)
    if slot_ptr is not None:
        b_slot = tl.load(slot_ptr).to(tl.int64)
    return b_slot


@triton.jit
def keep_entries(b_x, b_t, scale_ptr, i_segment, o_k, m_k, K):
    """Return which of a block of inputs are kept: the only definition of the mask on the device."""
    b_bits = b_x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    if scale_ptr is None:
        b_keep = (b_bits > b_t) & m_k
    else:
        b_scale = tl.load(scale_ptr + i_segment * K + o_k, mask=m_k, other=0.0)
        b_score = tl.abs(b_x.to(tl.float32)) * b_scale
        b_keep = ((b_score.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > b_t) & (b_bits != 0) & m_k
    return b_keep


@triton.jit
def mask_bytes(b_keep, BLOCK_K: tl.constexpr):
    """Pack a block of booleans into bytes, LSB first."""
    b_bits = tl.reshape(b_keep.to(tl.int32), [BLOCK_K // 8, 8]) << tl.arange(0, 8)[None, :]
    return tl.sum(b_bits, axis=1).to(tl.uint8)


@triton.jit
def store_capture(b_x, b_keep, ring, b_slot, i_segment, start, stop):
    """Write inputs [start, stop) of the operand and its bitmask into the ring slot; outside the ring, write nothing.

    With a mask ring, start is a multiple of 8, and so is stop unless it is the operand's end.
    """
    BLOCK_K: tl.constexpr = b_x.shape[0]
    in_ring = (b_slot >= 0) & (b_slot < ring.num_slots)
    if ring.values_ptr is not None:
        o_k = start + tl.arange(0, BLOCK_K)
        segment = tl.cast(i_segment, tl.int64) * ring.values_segment_stride
        row_ptr = ring.values_ptr + b_slot * ring.values_slot_stride + segment
        tl.store(row_ptr + o_k, tl.where(b_keep, b_x, 0.0), mask=(o_k < stop) & in_ring)
    if ring.mask_ptr is not None:
        o_m = start // 8 + tl.arange(0, BLOCK_K // 8)
        segment = tl.cast(i_segment, tl.int64) * ring.mask_segment_stride
        row_ptr = ring.mask_ptr + b_slot * ring.mask_slot_stride + segment
        tl.store(row_ptr + o_m, mask_bytes(b_keep, BLOCK_K), mask=(o_m < tl.cdiv(stop, 8)) & in_ring)


@triton.jit
def list_entry(b_row, b_x):
    """Build a list entry: the row in the upper half, the bit pattern of x in the lower."""
    return (b_row << 16) | (b_x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def entry_row(b_entry):
    # the mask undoes the sign extension of rows from 32,768 on
    return (b_entry >> 16) & 0xFFFF


@triton.jit
def entry_x(b_entry, dtype: tl.constexpr):
    return (b_entry & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def place_entries(o_list, b_ends, b_gaps):
    """Return where the entries o_list of a list lie, given that each section before an entry's own leaves a gap."""
    # sections along the slow axis, so that a thread holds all of them for its entries and adds without shuffles
    b_passed = o_list[None, :] >= b_ends[:, None]
    return o_list + tl.sum(tl.where(b_passed, b_gaps[:, None], 0), axis=0)


@triton.jit
def gather_sum(
    entries_ptr,  # list entries
    b_ends,  # [sections] number of entries up to the end of each section; None for a list without gaps
    b_gaps,  # [sections] unused entries of each section
    w_ptr,  # weight row that an entry calls row 0
    lo,
    count,
    step,
    N,
    o_n,
    m_n,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_DOT: tl.constexpr,
):
    """Sum x * weight row over tiles of BLOCK_K list entries that start at lo, lo + step, ...; float32 accumulation."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    # mma m16n8k16 needs 16 rows of A, of which the first holds x; the weights are then loaded by cp.async
    o_16 = tl.arange(0, 16)
    ROWS: tl.constexpr = 16 if USE_DOT else BLOCK_K
    b_acc = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for start in tl.range(lo, count, step, num_stages=NUM_STAGES):
        o_list = start + tl.arange(0, BLOCK_K)
        m_list = o_list < count
        o_entry = o_list
        if b_ends is not None:
            o_entry = place_entries(o_list, b_ends, b_gaps)
        b_entry = tl.load(entries_ptr + o_entry, mask=m_list, other=0)
        o_w = entry_row(b_entry).to(tl.int64)[:, None] * N + o_n[None, :]
        b_w = tl.load(w_ptr + o_w, mask=m_list[:, None] & m_n[None, :], other=0.0, eviction_policy="evict_first")
        if USE_DOT:
            b_a = tl.where(o_16[:, None] == 0, entry_x(b_entry, dtype)[None, :], 0.0)
            b_acc = tl.dot(b_a, b_w, b_acc)
        else:
            b_acc += b_w.to(tl.float32) * entry_x(b_entry, dtype).to(tl.float32)[:, None]
    if USE_DOT:
        # not a plain sum: 0 * Inf in the padding rows would turn an infinite weight into NaN
        b_acc = tl.where(o_16[:, None] == 0, b_acc, 0.0)
    return tl.sum(b_acc, axis=0)


@triton.jit
def finish_section(
    b_x,
    o_k,
    m_k,
    b_thresholds,  # from `load_thresholds`
    lists,  # ListArguments
    ring,  # RingArguments
    b_slot,  # from `load_slot`
    i_section,
    num_sections,
    K,
    NUM_SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Threshold, list and capture inputs o_k of a producer's output, where m_k: section i_section of LENGTH inputs."""
    for i_segment in tl.static_range(NUM_SEGMENTS):
        b_keep = keep_entries(b_x, b_thresholds[i_segment], lists.scale_ptr, i_segment, o_k, m_k, K)
        b_one = b_keep.to(tl.int32)
        i_list = i_segment * num_sections + i_section
        o_list = i_list * LENGTH + tl.cumsum(b_one, 0) - b_one
        tl.store(lists.entries_ptr + o_list, list_entry(o_k, b_x), mask=b_keep)
        tl.store(lists.counts_ptr + i_list, tl.sum(b_one, 0))
        start = i_section * LENGTH
        store_capture(b_x, b_keep, ring, b_slot, i_segment, start, tl.minimum(start + LENGTH, K))
