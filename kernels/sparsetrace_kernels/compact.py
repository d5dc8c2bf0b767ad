"""Threshold, list and capture a vector that is already in memory.

A list has sections, one for the inputs of each program, with the entries at the section's start and their count beside
it, so that no program waits for another or repeats its work. Oracle: `reference.compact_ref`.
"""

# Shape suffixes: K = input features, S = column segments (1 to 3), I = sections of a list, L = inputs of a section,
# R = ring slots, M = ceil(K / 8) bitmask bytes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.primitives import (
    ListArguments,
    RingArguments,
    finish_section,
    load_slot,
    load_thresholds,
    pdl_options,
    wait_for_producer,
)

# inputs of a section are at least the first, and for wide vectors as many as leave at most the second of sections
MIN_SECTION, FEW_SECTIONS = 512, 16

# inputs of a section for each warp
ENTRIES_PER_WARP = 128


@triton.jit
def _compact_kernel(
    x_ptr,  # [K]
    threshold_ptr,  # [S] int32
    scale_ptr,  # [S, K] float32 or None
    lists_ptr,  # [S, I, L] int32
    counts_ptr,  # [S, I] int32
    values_ptr,  # [R, S, K] or None
    mask_ptr,  # [R, S, M] or None
    slot_ptr,  # [1] int64 or None
    num_slots,
    values_slot_stride,
    values_segment_stride,
    mask_slot_stride,
    mask_segment_stride,
    K,
    NUM_SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
    PDL: tl.constexpr,
):
    i_section = tl.program_id(0)
    ring = RingArguments(
        values_ptr, mask_ptr, slot_ptr, num_slots, values_slot_stride, values_segment_stride, mask_slot_stride,
        mask_segment_stride,
    )  # fmt: skip
    lists = ListArguments(scale_ptr, lists_ptr, counts_ptr)
    b_thresholds = load_thresholds(threshold_ptr, NUM_SEGMENTS)
    b_slot = load_slot(slot_ptr)
    wait_for_producer(PDL)
    o_k = i_section * LENGTH + tl.arange(0, LENGTH)
    m_k = o_k < K
    b_x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
    finish_section(
        b_x, o_k, m_k, b_thresholds, lists, ring, b_slot, i_section, tl.num_programs(0), K, NUM_SEGMENTS, LENGTH
    )


def section_length(K: int) -> int:
    """Number of inputs in a section, a power of two."""
    return max(MIN_SECTION, triton.next_power_of_2(triton.cdiv(K, FEW_SECTIONS)))


def section_grid(list_SIL: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid, with a program for each section, and the sizes that producers take."""
    S, num_sections, length = list_SIL.shape
    meta = {"NUM_SEGMENTS": S, "LENGTH": length, "num_warps": min(8, length // ENTRIES_PER_WARP)}
    return (num_sections,), meta


def check_producer(
    op: str,
    x_K: Tensor,
    K: int,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
) -> int:
    """Refuse arguments that no producer takes, and return the number of segments."""
    if K > checks.MAX_LIST_ROWS:
        raise ValueError(
            f"{op}: K must be at most {checks.MAX_LIST_ROWS}, got {K}: an entry holds the row in 16 bits; "
            "use sparse_gemv"
        )
    S = checks.count_thresholds(op, "threshold_bits_S", threshold_bits_S)
    checks.require_thresholds(op, threshold_bits_S, scale_SK, S, K, x_K.device)
    checks.require_ring(op, values_RSK, mask_RSM, slot, S, K, x_K.dtype, x_K.device)
    return S


def empty_lists(S: int, K: int, device: torch.device, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Allocate list_SIL and counts_SI, with sections of `length` inputs; None takes `section_length`."""
    length = length or section_length(K)
    num_sections = triton.cdiv(K, length)
    return (
        torch.empty(S, num_sections, length, dtype=torch.int32, device=device),
        torch.empty(S, num_sections, dtype=torch.int32, device=device),
    )


# no default for a written argument: torch 2.11 counts its version by position and fails if it was left out
@torch.library.custom_op("sparsetrace::compact", mutates_args=("values_RSK", "mask_RSM"))
def compact(
    x_K: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """List the inputs above each segment's threshold, and capture them.

    Args:
        x_K: input, fp16 or bf16, K at most 65,536.
        threshold_bits_S: int32, as `sparse_gemv` takes them, 1 to 3.
        scale_SK: float32 scale of |x| before the comparison, or None.
        values_RSK: ring that takes each segment's operand, dtype of `x_K`; or None.
        mask_RSM: ring that takes the operand's bitmask, uint8, LSB first; or None.
        slot: [1] int64, the ring slot to write; outside [0, R) nothing is captured; None without a ring.
        use_pdl: start while the kernel before still runs (Hopper and later); that kernel may write none of these
            tensors but the first.

    Returns:
        list_SIL: int32, `row << 16 | bit pattern of x`, rows ascending; section i holds rows in [i L, (i + 1) L), and
            its entries from its count on are undefined.
        counts_SI: int32, number of entries in each section.
    """
    checks.require_half_vector("compact", "x_K", x_K)
    (K,) = x_K.shape
    S = check_producer("compact", x_K, K, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot)
    list_SIL, counts_SI = empty_lists(S, K, x_K.device)
    grid, meta = section_grid(list_SIL)
    _compact_kernel[grid](
        x_K, threshold_bits_S, scale_SK, list_SIL, counts_SI, *checks.ring_arguments(values_RSK, mask_RSM, slot), K,
        **meta, **pdl_options(use_pdl),
    )  # fmt: skip
    return list_SIL, counts_SI


@compact.register_fake
def _(x_K, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot, use_pdl=False):
    return empty_lists(threshold_bits_S.shape[0], x_K.shape[0], x_K.device)
