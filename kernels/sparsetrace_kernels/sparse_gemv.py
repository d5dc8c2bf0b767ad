"""Sparse GEMV with fused capture in one launch: y_n = sum_k keep_sk x_k W_kn, where s is the column segment of n.

keep_sk = (score of x_k > threshold of s), so q|k|v or gate|up take one launch with a threshold for each matrix.
The configuration chooses between two kernels: `predicated` loads the kept rows of a tile by predicate, and each program
has one tile; `compacting` first lists the kept rows of a chunk, then gathers them in full tiles, which is faster where
few rows are kept.

No engine launches this op: `list_gemv`, after a producer, is faster. Benchmarks compare both with TEAL's kernel.
Source: TEAL, arXiv:2408.14690 (predicated row loads).  Oracle: `reference.sparse_gemv_ref`.
No floating-point atomics: sums along K are added in one fixed order (`partials`).
"""

# Shape suffixes: K = input features, N = output features, S = column segments (1 to 3), R = ring slots,
# M = bitmask bytes of a row, ceil(K / 8); W = words of `new_partials`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.configs import MAX_CHUNK_K, GemvConfig, config_for, segment_ends
from sparsetrace_kernels.partials import block_of_partials, store_sum
from sparsetrace_kernels.primitives import (
    RingArguments,
    block_columns,
    gather_sum,
    keep_entries,
    list_entry,
    load_slot,
    load_threshold,
    pdl_options,
    store_capture,
    wait_for_producer,
)

# inputs captured at a time; a multiple of 8, since one program writes each byte of the bitmask
CAPTURE_BLOCK_K = 128


@triton.jit
def _capture_rows(x_ptr, threshold_ptr, scale_ptr, ring, i_segment, k_lo, k_hi, K, CAPTURE_K: tl.constexpr):
    """Capture inputs [k_lo, k_hi) of one segment."""
    b_t = load_threshold(threshold_ptr, i_segment)
    b_slot = load_slot(ring.slot_ptr)
    for start in tl.range(k_lo, k_hi, CAPTURE_K):
        o_k = start + tl.arange(0, CAPTURE_K)
        m_k = o_k < K
        b_x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
        b_keep = keep_entries(b_x, b_t, scale_ptr, i_segment, o_k, m_k, K)
        store_capture(b_x, b_keep, ring, b_slot, i_segment, start, K)


@triton.jit(do_not_specialize_on_alignment=["num_blocks", "split"])
def _predicated_kernel(
    x_ptr,  # [K]
    w_ptr,  # [K, N], row-major: a dropped input skips one contiguous row
    threshold_ptr,  # [S] int32
    scale_ptr,  # [S, K] float32 or None
    y_ptr,  # [N]
    values_ptr,  # [R, S, K] or None
    mask_ptr,  # [R, S, M] or None
    slot_ptr,  # [1] int64 or None
    num_slots,
    values_slot_stride,
    values_segment_stride,
    mask_slot_stride,
    mask_segment_stride,
    partials_ptr,  # [W] int32
    K,
    N,
    end_0,
    end_1,
    num_blocks,
    split,
    NUM_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CAPTURE_K: tl.constexpr,
    PDL: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_k = tl.program_id(1)
    ring = RingArguments(
        values_ptr, mask_ptr, slot_ptr, num_slots, values_slot_stride, values_segment_stride, mask_slot_stride,
        mask_segment_stride,
    )  # fmt: skip
    wait_for_producer(PDL)
    k_lo = i_k * BLOCK_K
    if i_n < num_blocks:
        i_segment, o_n, m_n = block_columns(i_n, N, end_0, end_1, NUM_SEGMENTS, BLOCK_N)
        b_t = load_threshold(threshold_ptr, i_segment)
        o_tile = tl.arange(0, BLOCK_K)
        o_k = k_lo + o_tile
        m_k = o_k < K
        b_x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
        b_keep = keep_entries(b_x, b_t, scale_ptr, i_segment, o_k, m_k, K)
        # int64 base, int32 offsets within the tile: half the address registers
        tile_ptr = w_ptr + k_lo.to(tl.int64) * N
        # kept entries are never zero, so the operand, converted to the tile's layout once, is the mask too
        b_operand = tl.where(b_keep, b_x, 0.0).to(tl.float32)[:, None]
        b_w = tl.load(
            tile_ptr + (o_tile[:, None] * N + o_n[None, :]),
            mask=(b_operand != 0.0) & m_n[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        b_y = tl.sum(b_w.to(tl.float32) * b_operand, axis=0)
        store_sum(b_y, y_ptr, partials_ptr, i_k, o_n, m_n, N, split, BLOCK_S)
    else:
        # in programs of their own, since the capture's registers made the product spill
        k_hi = tl.minimum(k_lo + BLOCK_K, K)
        _capture_rows(x_ptr, threshold_ptr, scale_ptr, ring, i_n - num_blocks, k_lo, k_hi, K, CAPTURE_K)


@triton.jit(do_not_specialize_on_alignment=["num_blocks", "split"])
def _compacting_kernel(
    x_ptr,  # [K]
    w_ptr,  # [K, N], row-major
    threshold_ptr,  # [S] int32
    scale_ptr,  # [S, K] float32 or None
    y_ptr,  # [N]
    values_ptr,  # [R, S, K] or None
    mask_ptr,  # [R, S, M] or None
    slot_ptr,  # [1] int64 or None
    num_slots,
    values_slot_stride,
    values_segment_stride,
    mask_slot_stride,
    mask_segment_stride,
    partials_ptr,  # [W] int32
    lists_ptr,  # [programs, chunk_k] int32
    K,
    N,
    end_0,
    end_1,
    num_blocks,
    split,
    chunk_k,
    NUM_SEGMENTS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CAPTURE_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_k = tl.program_id(1)
    ring = RingArguments(
        values_ptr, mask_ptr, slot_ptr, num_slots, values_slot_stride, values_segment_stride, mask_slot_stride,
        mask_segment_stride,
    )  # fmt: skip
    wait_for_producer(PDL)
    k_lo = i_k * chunk_k
    if i_n < num_blocks:
        i_segment, o_n, m_n = block_columns(i_n, N, end_0, end_1, NUM_SEGMENTS, BLOCK_N)
        b_t = load_threshold(threshold_ptr, i_segment)
        o_chunk = tl.arange(0, CHUNK_K)
        o_k = k_lo + o_chunk
        m_k = (o_chunk < chunk_k) & (o_k < K)
        b_x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
        b_keep = keep_entries(b_x, b_t, scale_ptr, i_segment, o_k, m_k, K)
        b_one = b_keep.to(tl.int32)
        o_list = tl.cumsum(b_one, 0) - b_one
        count = tl.sum(b_one, 0)
        list_ptr = lists_ptr + (i_k.to(tl.int64) * num_blocks + i_n) * chunk_k
        tl.store(list_ptr + o_list, list_entry(o_chunk, b_x), mask=b_keep)
        # each thread reads entries that other threads of this program stored
        tl.debug_barrier()
        chunk_ptr = w_ptr + k_lo.to(tl.int64) * N
        b_y = gather_sum(
            list_ptr, None, None, chunk_ptr, 0, count, BLOCK_K, N, o_n, m_n, BLOCK_K, BLOCK_N, NUM_STAGES, USE_DOT
        )
        store_sum(b_y, y_ptr, partials_ptr, i_k, o_n, m_n, N, split, BLOCK_S)
    else:
        # in programs of their own, since the capture's registers made the product spill
        k_hi = tl.minimum(k_lo + chunk_k, K)
        _capture_rows(x_ptr, threshold_ptr, scale_ptr, ring, i_n - num_blocks, k_lo, k_hi, K, CAPTURE_K)


def count_blocks(segments: list[int], block_n: int) -> int:
    """Number of column blocks of a launch; no block spans two segments."""
    return sum(triton.cdiv(width, block_n) for width in segments)


def chunk_inputs(K: int, split: int) -> int:
    """Number of inputs in a chunk of the compacting kernel."""
    return triton.cdiv(triton.cdiv(K, split), CAPTURE_BLOCK_K) * CAPTURE_BLOCK_K


def count_splits(K: int, config: GemvConfig) -> int:
    """Number of programs along K in a launch of `sparse_gemv`."""
    return triton.cdiv(K, config.block_k if config.kernel == "predicated" else chunk_inputs(K, config.split))


def launch_sparse_gemv(
    x_K: Tensor,
    weight_KN: Tensor,
    threshold_bits_S: Tensor,
    partials_W: Tensor,
    segments: list[int],
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
    config: GemvConfig,
) -> Tensor:
    """Launch `sparse_gemv` on checked arguments."""
    K, N = weight_KN.shape
    end_0, end_1 = segment_ends(segments, N)
    num_blocks = count_blocks(segments, config.block_n)
    num_programs = num_blocks + (len(segments) if slot is not None else 0)
    y_N = torch.empty(N, dtype=x_K.dtype, device=x_K.device)
    meta = {
        "NUM_SEGMENTS": len(segments),
        "BLOCK_K": config.block_k,
        "BLOCK_N": config.block_n,
        "BLOCK_S": block_of_partials(config.block_n, config.num_warps),
        "num_warps": config.num_warps,
        **pdl_options(config.use_pdl),
    }
    ring = checks.ring_arguments(values_RSK, mask_RSM, slot)
    if config.kernel == "predicated":
        split = count_splits(K, config)
        _predicated_kernel[(num_programs, split)](
            x_K, weight_KN, threshold_bits_S, scale_SK, y_N, *ring, partials_W, K, N, end_0, end_1,
            num_blocks, split, CAPTURE_K=min(config.block_k, CAPTURE_BLOCK_K), **meta,
        )  # fmt: skip
    else:
        chunk_k, split = chunk_inputs(K, config.split), count_splits(K, config)
        lists = torch.empty(split * num_blocks * chunk_k, dtype=torch.int32, device=x_K.device)
        _compacting_kernel[(num_programs, split)](
            x_K, weight_KN, threshold_bits_S, scale_SK, y_N, *ring, partials_W, lists, K, N, end_0, end_1,
            num_blocks, split, chunk_k, CHUNK_K=triton.next_power_of_2(chunk_k), CAPTURE_K=CAPTURE_BLOCK_K,
            NUM_STAGES=config.num_stages, USE_DOT=config.use_dot, **meta,
        )  # fmt: skip
    return y_N


# no default for a written argument: torch 2.11 counts its version by position and fails if it was left out
@torch.library.custom_op("sparsetrace::sparse_gemv", mutates_args=("partials_W", "values_RSK", "mask_RSM"))
def sparse_gemv(
    x_K: Tensor,
    weight_KN: Tensor,
    threshold_bits_S: Tensor,
    partials_W: Tensor,
    segments: list[int],
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
    config: str | None = None,
) -> Tensor:
    """Multiply by the weight rows whose input exceeds the threshold, and capture that input.

    Args:
        x_K: input, fp16 or bf16.
        weight_KN: weight, input-major and contiguous, dtype of `x_K`; the segments' columns side by side.
        threshold_bits_S: int32, bit pattern of each segment's threshold in the dtype of `x_K`, or in float32
            where `scale_SK` is given; kept if strictly above, a negative one counts as 0.
        partials_W: from `new_partials`, at least split x N words; launches that share them must be on one stream.
        segments: 1 to 3 widths that sum to N.
        scale_SK: float32 scale of |x| before the comparison, or None; the multiply takes x itself.
        values_RSK: ring that takes each segment's operand: x where kept, else +0.0; dtype of `x_K`; or None.
        mask_RSM: ring that takes the operand's bitmask, uint8, LSB first, trailing bits zero; or None.
        slot: [1] int64, the ring slot to write; outside [0, R) nothing is captured; None without a ring.
        config: from `GemvConfig.encode`, kernel `predicated` or `compacting`; None chooses one for 50 % sparsity.

    Returns:
        y_N: dtype of `x_K`; float32 accumulation, error within 2x that of dense torch, bitwise repeatable
        for one config. What is captured equals `sparse_gemv_ref` bit for bit.
    """
    op = "sparse_gemv"
    checks.require_half_vector(op, "x_K", x_K)
    (K,) = x_K.shape
    checks.require_weight(op, weight_KN, K, x_K.dtype, x_K.device)
    N = weight_KN.shape[1]
    checks.require_segments(op, segments, N)
    checks.require_thresholds(op, threshold_bits_S, scale_SK, len(segments), K, x_K.device)
    checks.require_ring(op, values_RSK, mask_RSM, slot, len(segments), K, x_K.dtype, x_K.device)
    chosen = config_for("single", K, N, x_K.dtype, config, x_K.device)
    if chosen.kernel == "list":
        raise ValueError(f"{op}: config must name kernel predicated or compacting, got {config!r}: use list_gemv")
    if chosen.kernel == "compacting" and triton.cdiv(K, chosen.split) > MAX_CHUNK_K:
        raise ValueError(f"{op}: config must cut K={K} into chunks of at most {MAX_CHUNK_K}, got split {chosen.split}")
    checks.require_partials(op, partials_W, count_splits(K, chosen), N, x_K.device)
    return launch_sparse_gemv(
        x_K, weight_KN, threshold_bits_S, partials_W, segments, scale_SK, values_RSK, mask_RSM, slot, chosen
    )


@sparse_gemv.register_fake
def _(
    x_K, weight_KN, threshold_bits_S, partials_W, segments,
    scale_SK, values_RSK, mask_RSM, slot, config=None,
):  # fmt: skip
    return x_K.new_empty(weight_KN.shape[1])
