"""Attention of one decode token per slot in one launch: rotary embedding, cache write and attention over the cache.

y = sum_s softmax_s(q . k_s / sqrt(D)) v_s over the slot's cached positions and its current token, with an online
softmax. No program reads the cache entries that another one writes: each program computes the current key and value
itself, and one program of each kv head stores them. For a single slot the output can be listed and captured for the
multiply that reads it, with one section for each head.
Source: FlashDecoding (https://pytorch.org/blog/flash-decoding/) for the split over positions.
Oracles: `reference.decode_attention_ref` for the sums, `reference.compact_ref` on the returned `y_BN` for the rest.
No floating-point atomics: the splits' sums are added in one fixed order (`partials`).
"""

# Shape suffixes: B = slots, H = query heads, G = kv heads, D = head dim, S = cache positions, P = rows of the rotary
# tables, E = D / 2, N = (H + 2 G) D columns of q, k and v (H D of the output), W = words of `new_partials`.  Of the
# list: K = H D inputs, one segment (S), I = H sections of L = D inputs, R = ring slots.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.compact import check_producer, empty_lists
from sparsetrace_kernels.list_gemv import MAX_SECTIONS
from sparsetrace_kernels.partials import receive, send
from sparsetrace_kernels.primitives import (
    ListArguments,
    RingArguments,
    finish_section,
    load_slot,
    load_thresholds,
    pdl_options,
    wait_for_producer,
)
from sparsetrace_kernels.rotary import load_rotation, rotate_head

# the last program of a head holds the sums of all splits at once: 16 registers a thread at D = 128
MAX_SPLITS = 32

# about two programs on each of an H100's or H200's 132 SMs, and a power of two
TARGET_PROGRAMS = 256

# Positions in a tile. In a decoding step of the Llama-2-7B shape on an H100, 16 is faster than 32 and 64 by 2 and 4 %
# at batch 1, and by 2 and 12 % at batch 64, since more programs share an SM.
BLOCK_S = 16

# 32 entries a thread: four 16-byte copies of keys, as many of values, and 32 float32 sums
ENTRIES_PER_WARP = 1024

# Tiles are loaded by cp.async, two of each in flight. With loads to registers, ptxas (sm_90) moved the loads of the
# values behind the first use of the keys.
NUM_STAGES = 3

# below every finite score but finite, so that the difference of two maxima over nothing is zero and not NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def attend_tile(b_k, b_v, m_s, b_q, scale, b_max, b_sum, b_acc):
    """Add a tile of positions to the online softmax that each row of the tile keeps."""
    b_score = tl.sum(b_k.to(tl.float32) * b_q[None, :], axis=1) * scale
    b_score = tl.where(m_s, b_score, float("-inf"))
    b_top = tl.maximum(b_max, b_score)
    b_decay = tl.exp(b_max - b_top)
    b_p = tl.exp(b_score - b_top)
    b_sum = b_sum * b_decay + b_p
    b_acc = b_acc * b_decay[:, None] + b_v.to(tl.float32) * b_p[:, None]
    return b_top, b_sum, b_acc


@triton.jit
def load_tile(cache_ptr, start, hi, position_stride, o_d, m_d, BLOCK_S: tl.constexpr):
    """Load cached positions [start, start + BLOCK_S) below `hi`."""
    o_s = start + tl.arange(0, BLOCK_S)
    m_tile = (o_s < hi)[:, None] & m_d[None, :]
    return tl.load(cache_ptr + o_s.to(tl.int64)[:, None] * position_stride + o_d[None, :], mask=m_tile, other=0.0)


# S, P and window differ between caches and models, and kernels gain nothing from their alignment
@triton.jit(do_not_specialize_on_alignment=["S", "P", "window"])
def _decode_attention_kernel(
    qkv_ptr,  # [B, N]
    cos_ptr,  # [P, E]
    sin_ptr,  # [P, E]
    positions_ptr,  # [B] int64
    keys_ptr,  # [B, S, G, D]
    values_ptr,  # [B, S, G, D]
    keys_slot_stride,
    keys_position_stride,
    keys_head_stride,
    values_slot_stride,
    values_position_stride,
    values_head_stride,
    y_ptr,  # [B, H, D]
    partials_ptr,  # [W] int32; of [B, H, NUM_SPLITS, D + 2]: weighted sum of values, maximum, sum of weights
    threshold_ptr,  # [1] int32, or None
    scale_ptr,  # [1, K] float32 or None
    lists_ptr,  # [1, H, D] int32
    counts_ptr,  # [1, H] int32
    ring_ptr,  # [R, 1, K] or None
    slot_ptr,  # [1] int64 or None
    num_slots,
    ring_stride,
    H,
    G,
    S,
    P,
    window,
    scale,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    i_b = i_head // H
    i_h = i_head % H
    i_g = i_h // (H // G)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D

    # the kernel before writes the current token's vectors only, so all else is loaded while it still runs
    b_thresholds = None
    if threshold_ptr is not None:
        b_thresholds = load_thresholds(threshold_ptr, 1)
    b_slot = load_slot(slot_ptr)
    b_position = tl.load(positions_ptr + i_b)
    in_cache = (b_position >= 0) & (b_position < S)
    b_cos, b_sin = load_rotation(cos_ptr, sin_ptr, b_position, P, o_d, m_d, D)
    keys_ptr += i_b * keys_slot_stride + i_g * keys_head_stride
    values_ptr += i_b * values_slot_stride + i_g * values_head_stride
    b_last = tl.maximum(b_position, 0)
    b_first = tl.where(window > 0, tl.minimum(tl.maximum(b_last - window + 1, 0), S), 0)
    lo = b_first.to(tl.int32) + i_split * BLOCK_S
    hi = tl.minimum(b_last, S).to(tl.int32)
    step: tl.constexpr = NUM_SPLITS * BLOCK_S
    if NUM_SPLITS > 1:
        m_s = lo + tl.arange(0, BLOCK_S) < hi
        b_k = load_tile(keys_ptr, lo, hi, keys_position_stride, o_d, m_d, BLOCK_S)
        b_v = load_tile(values_ptr, lo, hi, values_position_stride, o_d, m_d, BLOCK_S)

    wait_for_producer(PDL)
    row_ptr = qkv_ptr + i_b * (H + 2 * G) * D
    b_q = rotate_head(row_ptr + i_h * D, b_cos, b_sin, o_d, m_d, D).to(tl.float32)
    b_key = rotate_head(row_ptr + (H + i_g) * D, b_cos, b_sin, o_d, m_d, D)
    b_value = tl.load(row_ptr + (H + G + i_g) * D + o_d, mask=m_d, other=0.0)

    # each row of the tile keeps a softmax of its own, so the loop needs no reduction over rows
    b_max = tl.full([BLOCK_S], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_S], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    if NUM_SPLITS > 1:
        b_max, b_sum, b_acc = attend_tile(b_k, b_v, m_s, b_q, scale, b_max, b_sum, b_acc)
        lo += step
    for start in tl.range(lo, hi, step, num_stages=NUM_STAGES):
        m_s = start + tl.arange(0, BLOCK_S) < hi
        b_k = load_tile(keys_ptr, start, hi, keys_position_stride, o_d, m_d, BLOCK_S)
        b_v = load_tile(values_ptr, start, hi, values_position_stride, o_d, m_d, BLOCK_S)
        b_max, b_sum, b_acc = attend_tile(b_k, b_v, m_s, b_q, scale, b_max, b_sum, b_acc)

    # the last split has the fewest positions, so it takes the current token
    has_current = i_split == NUM_SPLITS - 1
    # stored after the loop, so that the first tiles do not wait for the rotation
    m_write = m_d & has_current & in_cache & (i_h % (H // G) == 0)
    tl.store(keys_ptr + b_position * keys_position_stride + o_d, b_key, mask=m_write)
    tl.store(values_ptr + b_position * values_position_stride + o_d, b_value, mask=m_write)
    b_score = tl.where(has_current, tl.sum(b_key.to(tl.float32) * b_q, axis=0) * scale, float("-inf"))
    b_top = tl.maximum(tl.max(b_max, axis=0), b_score)
    b_decay = tl.exp(b_max - b_top)
    b_p = tl.exp(b_score - b_top)
    b_total = tl.sum(b_sum * b_decay, axis=0) + b_p
    # conditional, since an infinite value times a weight of zero would be NaN
    b_y = tl.sum(b_acc * b_decay[:, None], axis=0) + tl.where(has_current, b_value.to(tl.float32) * b_p, 0.0)

    if NUM_SPLITS > 1:
        partials_ptr += i_head * NUM_SPLITS * (D + 2)
        own_ptr = partials_ptr + i_split * (D + 2)
        send(own_ptr + o_d, b_y, m_d)
        send(own_ptr + D, b_top)
        send(own_ptr + D + 1, b_total)
    if i_split == NUM_SPLITS - 1:
        if NUM_SPLITS > 1:
            o_p = tl.arange(0, BLOCK_P)
            m_p = o_p < NUM_SPLITS
            split_ptr = partials_ptr + o_p * (D + 2)
            b_sums = receive(split_ptr[:, None] + o_d[None, :], m_p[:, None] & m_d[None, :])
            b_tops = tl.where(m_p, receive(split_ptr + D, m_p), LOWEST)
            b_totals = receive(split_ptr + D + 1, m_p)
            b_weight = tl.exp(b_tops - tl.max(b_tops, axis=0))
            b_y = tl.sum(b_sums * b_weight[:, None], axis=0)
            b_total = tl.sum(b_totals * b_weight, axis=0)
        b_x = (b_y / b_total).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + i_head * D + o_d, b_x, mask=m_d)
        if b_thresholds is not None:
            i_section = i_head.to(tl.int32)
            lists = ListArguments(scale_ptr, lists_ptr, counts_ptr)
            ring = RingArguments(ring_ptr, None, slot_ptr, num_slots, ring_stride, 0, 0, 0)
            finish_section(b_x, i_section * D + o_d, m_d, b_thresholds, lists, ring, b_slot, i_section, H, H * D, 1, D)


def choose_splits(B: int, H: int) -> int:
    """Choose how many programs share a head's positions: a power of two, and fewer if there are more heads."""
    num_splits = 1
    while num_splits < MAX_SPLITS and 2 * num_splits * B * H <= TARGET_PROGRAMS:
        num_splits *= 2
    return num_splits


def launch_decode_attention(
    qkv_BN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_B: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
    partials_W: Tensor,
    window: int,
    num_splits: int,
    use_pdl: bool,
    listing: tuple[Tensor | None, ...] = (None,) * 6,
) -> Tensor:
    """Launch `decode_attention` or `decode_attention_list` on checked arguments.

    Args:
        listing: thresholds, scale, list, counts, ring and slot of `decode_attention_list`.
    """
    B, S, G, D = keys_BSGD.shape
    ring_RSK = listing[4]
    ring = (0, 0) if ring_RSK is None else (ring_RSK.shape[0], ring_RSK.stride(0))
    H = qkv_BN.shape[1] // D - 2 * G
    block_d = triton.next_power_of_2(D)
    y_BN = torch.empty(B, H * D, dtype=qkv_BN.dtype, device=qkv_BN.device)
    _decode_attention_kernel[(B * H, num_splits)](
        qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, *keys_BSGD.stride()[:3], *values_BSGD.stride()[:3],
        y_BN, partials_W, *listing, *ring, H, G, S, cos_PE.shape[0], window, D**-0.5,
        D=D, NUM_SPLITS=num_splits, BLOCK_D=block_d, BLOCK_S=BLOCK_S, BLOCK_P=triton.next_power_of_2(num_splits),
        NUM_STAGES=NUM_STAGES, num_warps=max(1, min(8, BLOCK_S * block_d // ENTRIES_PER_WARP)),
        **pdl_options(use_pdl),
    )  # fmt: skip
    return y_BN


def _check(
    op: str,
    qkv_BN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_B: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
    partials_W: Tensor,
    window: int,
    num_splits: int,
) -> None:
    """Refuse arguments that do not fit each other."""
    checks.require_cache(op, keys_BSGD, values_BSGD)
    B, S, G, D = keys_BSGD.shape
    dtype, device = keys_BSGD.dtype, keys_BSGD.device
    N = qkv_BN.shape[-1] if qkv_BN.ndim else 0
    H = N // D - 2 * G
    if N % D or H < 1 or H % G:
        raise ValueError(
            f"{op}: qkv_BN must hold query heads, a multiple of G={G}, and twice G others, each of D={D} columns, "
            f"got {tuple(qkv_BN.shape)}"
        )
    checks.require(op, "qkv_BN", qkv_BN, (B, N), dtype, device)
    P = cos_PE.shape[0] if cos_PE.ndim else 0
    if P < S:
        raise ValueError(f"{op}: cos_PE must have at least S={S} rows, got {tuple(cos_PE.shape)}")
    checks.require(op, "cos_PE", cos_PE, (P, D // 2), dtype, device)
    checks.require(op, "sin_PE", sin_PE, (P, D // 2), dtype, device)
    checks.require(op, "positions_B", positions_B, (B,), torch.int64, device)
    if window < 0:
        raise ValueError(f"{op}: window must be at least 0, got {window}: 0 attends to all positions")
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"{op}: num_splits must be in [1, {MAX_SPLITS}], got {num_splits}: take it from choose_splits")
    # a single split sends nothing
    checks.require_partials(op, partials_W, num_splits if num_splits > 1 else 0, B * H * (D + 2), device)


@torch.library.custom_op("sparsetrace::decode_attention", mutates_args=("keys_BSGD", "values_BSGD", "partials_W"))
def decode_attention(
    qkv_BN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_B: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
    partials_W: Tensor,
    window: int,
    num_splits: int,
    use_pdl: bool = False,
) -> Tensor:
    """Rotate the tokens' queries and keys, store keys and values at their positions, and attend.

    Args:
        qkv_BN: one token of each slot, fp16 or bf16: the query heads, then the key heads, then the value heads.
        cos_PE: cosines by position, dtype of `qkv_BN`, at least S rows.
        sin_PE: sines by position, likewise.
        positions_B: int64, position of each token, which attends to the cached positions before it and to itself.
            At a position outside [0, S) nothing is stored, the token still attends to the cached positions before
            it, and its rotation is that of the nearest row of the tables.
        keys_BSGD: rotated keys of one layer, any strides as long as each head is contiguous.
        values_BSGD: values, likewise.
        partials_W: from `new_partials`, at least B H num_splits (D + 2) words if there are several splits; launches
            that share them must be on one stream.
        window: attend only to positions less than this far back; 0 attends to all.
        num_splits: programs that share a head's positions, from `choose_splits`.
        use_pdl: start while the kernel before still runs (Hopper and later); that kernel may write none of these
            tensors but the first.

    Returns:
        y_BN: [B, H D], dtype of `qkv_BN`; float32 accumulation, error within 2x that of torch's attention. Bitwise
        repeatable, and for one `num_splits` independent of S, B and the other slots. The stored keys equal those of
        `model.rotate` bit for bit.
    """
    _check(
        "decode_attention", qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits
    )
    return launch_decode_attention(
        qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits, use_pdl
    )


@decode_attention.register_fake
def _(
    qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W,
    window, num_splits, use_pdl=False,
):  # fmt: skip
    _, _, G, D = keys_BSGD.shape
    return qkv_BN.new_empty(keys_BSGD.shape[0], qkv_BN.shape[1] - 2 * G * D)


# no default for a written argument: torch 2.11 counts its version by position and fails if it was left out
@torch.library.custom_op(
    "sparsetrace::decode_attention_list", mutates_args=("keys_BSGD", "values_BSGD", "partials_W", "values_RSK")
)
def decode_attention_list(
    qkv_BN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_B: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
    partials_W: Tensor,
    window: int,
    num_splits: int,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    slot: Tensor | None,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend as `decode_attention` does, for a single slot, and list and capture what the output projection keeps.

    Args:
        qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits, use_pdl: as
            `decode_attention` takes them, with B = 1 and at most 128 query heads.
        threshold_bits_S: int32, as `sparse_gemv` takes it, one.
        scale_SK: float32 scale of |y| before the comparison, or None.
        values_RSK: ring that takes the operand, dtype of `qkv_BN`; or None.
        slot: [1] int64, the ring slot to write; outside [0, R) nothing is captured; None without a ring.

    Returns:
        y_BN: the output before masking, bit for bit that of `decode_attention`.
        list_SIL, counts_SI: as `compact` returns them for y_BN, except that each head is a section: I = H, L = D.
    """
    op = "decode_attention_list"
    _check(op, qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits)
    B, _, G, D = keys_BSGD.shape
    H = qkv_BN.shape[1] // D - 2 * G
    if B != 1 or H > MAX_SECTIONS:
        raise ValueError(f"{op}: qkv_BN must be of one slot and at most {MAX_SECTIONS} heads, got {B} and {H}")
    S = check_producer(op, qkv_BN, H * D, threshold_bits_S, scale_SK, values_RSK, None, slot)
    checks.require_one_threshold(op, S, "`o` reads the output")
    lists = empty_lists(1, H * D, qkv_BN.device, D)
    y_BN = launch_decode_attention(
        qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits, use_pdl,
        (threshold_bits_S, scale_SK, *lists, values_RSK, slot),
    )  # fmt: skip
    return y_BN, *lists


@decode_attention_list.register_fake
def _(
    qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W,
    window, num_splits, threshold_bits_S, scale_SK, values_RSK, slot, use_pdl=False,
):  # fmt: skip
    _, _, G, D = keys_BSGD.shape
    K = qkv_BN.shape[1] - 2 * G * D
    return qkv_BN.new_empty(1, K), *empty_lists(1, K, qkv_BN.device, D)
