"""Threshold, list and capture a vector that is already in memory, such as the attention output.

Every program counts the kept entries before its chunk anew instead of waiting for the others, so one launch lists
all rows in ascending order, bitwise repeatably.  Oracle: `reference.compact_ref`.
"""

# Shape suffixes: K = input features, S = column segments (1 to 3), R = ring slots, M = ceil(K / 8) bitmask bytes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.primitives import finish_chunk, keep_entries, load_threshold, wait_for_producer

# inputs listed by one program
CHUNK_K = 512


@triton.jit
def _compact_kernel(
    x_ptr,  # [K]
    threshold_ptr,  # [S] int32
    scale_ptr,  # [S, K] float32 or None
    lists_ptr,  # [S, K] int32
    counts_ptr,  # [S] int32
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
    NUM_CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    i_chunk = tl.program_id(0)
    wait_for_producer(PDL)
    o_all = tl.arange(0, NUM_CHUNKS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    m_before = o_all < i_chunk * BLOCK_K
    b_all = tl.load(x_ptr + o_all, mask=m_before, other=0.0)
    o_k = i_chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
    for i_segment in tl.static_range(NUM_SEGMENTS):
        b_t = load_threshold(threshold_ptr, i_segment)
        b_before = keep_entries(b_all, b_t, scale_ptr, i_segment, o_all, m_before, K)
        b_num_before = tl.sum(tl.sum(b_before.to(tl.int32), axis=1), axis=0)
        b_keep = keep_entries(b_x, b_t, scale_ptr, i_segment, o_k, m_k, K)
        finish_chunk(
            b_x,
            b_num_before,
            b_keep,
            lists_ptr,
            counts_ptr,
            values_ptr,
            mask_ptr,
            slot_ptr,
            num_slots,
            values_slot_stride,
            values_segment_stride,
            mask_slot_stride,
            mask_segment_stride,
            i_segment,
            i_chunk,
            K,
            BLOCK_K,
        )


def chunk_grid(K: int) -> tuple[tuple[int], dict[str, int]]:
    """Cut K into chunks: the grid and block sizes that all producers take."""
    num_chunks = triton.cdiv(K, CHUNK_K)
    meta = {"NUM_CHUNKS": triton.next_power_of_2(num_chunks), "BLOCK_K": CHUNK_K}
    return (num_chunks,), {**meta, "num_warps": 4 if num_chunks <= 16 else 8}


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
    """Refuse arguments that no producer takes; returns the number of segments."""
    if K > checks.MAX_LIST_ROWS:
        raise ValueError(
            f"{op}: K must be at most {checks.MAX_LIST_ROWS}, got {K}: an entry holds the row in 16 bits; "
            "use sparse_gemv"
        )
    S = threshold_bits_S.shape[0] if threshold_bits_S.ndim == 1 else 0
    if not 1 <= S <= 3:
        raise ValueError(f"{op}: threshold_bits_S must hold 1 to 3 thresholds, got {tuple(threshold_bits_S.shape)}")
    checks.require_thresholds(op, threshold_bits_S, scale_SK, S, K, x_K.device)
    checks.require_ring(op, values_RSK, mask_RSM, slot, S, K, x_K.dtype, x_K.device)
    return S


def empty_lists(S: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate list_SK and counts_S."""
    return (
        torch.empty(S, K, dtype=torch.int32, device=device),
        torch.empty(S, dtype=torch.int32, device=device),
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
        use_pdl: launch while the kernel before still drains (Hopper and later).

    Returns:
        list_SK: int32, `row << 16 | bit pattern of x`, rows ascending; entries from the count on are undefined.
        counts_S: int32.
    """
    checks.require_half_vector("compact", "x_K", x_K)
    (K,) = x_K.shape
    S = check_producer("compact", x_K, K, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot)
    list_SK, counts_S = empty_lists(S, K, x_K.device)
    grid, meta = chunk_grid(K)
    _compact_kernel[grid](
        x_K, threshold_bits_S, scale_SK, list_SK, counts_S, *checks.ring_arguments(values_RSK, mask_RSM, slot), K,
        NUM_SEGMENTS=S, PDL=use_pdl, **meta, **({"launch_pdl": True} if use_pdl else {}),
    )  # fmt: skip
    return list_SK, counts_S


@compact.register_fake
def _(x_K, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot, use_pdl=False):
    S = threshold_bits_S.shape[0]
    return (
        threshold_bits_S.new_empty(S, x_K.shape[0]),
        threshold_bits_S.new_empty(S),
    )
