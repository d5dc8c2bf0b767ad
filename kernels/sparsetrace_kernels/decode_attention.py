"""Attention of one decode token per slot, one launch: rotary embedding, cache write and attention over the cache.

y = sum_s softmax_s(q . k_s / sqrt(D)) v_s over the slot's cached positions and its current token, with an online
softmax.  No program reads what another one writes: the current key and value, which one program of each kv head
stores, are made anew by every program that needs them.  For one slot the output can be listed and captured for the
product that reads it, each head a section.
Source: FlashDecoding (https://pytorch.org/blog/flash-decoding/) for the split over positions.
Oracles: `reference.decode_attention_ref` for the sums, `reference.compact_ref` on the returned `y_K` for the rest.
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
from sparsetrace_kernels.primitives import finish_section, load_slot, load_thresholds, wait_for_producer

# the last program of a head holds all its splits' sums at once: 16 registers a thread at D = 128
MAX_SPLITS = 32

# about two programs on each of an H100's or H200's 132 SMs, and a power of two
TARGET_PROGRAMS = 256

# Positions of a tile: 16 is faster than 32 and 64 in a decoding step of the Llama-2-7B shape on an H100, by 2 and 4 %
# at batch 1 and by 2 and 12 % at batch 64, since more programs share an SM.
BLOCK_S = 16

# 32 entries a thread: four 16-byte copies of keys, four of values, 32 float32 sums
ENTRIES_PER_WARP = 1024

# Tiles go through cp.async, two of each in flight.  Loaded to registers, ptxas (sm_90) moved the values' loads behind
# the first use of the keys.
NUM_STAGES = 3

# below every finite score, and finite: the difference of two empty maxima is zero and not NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def rotate_head(x_ptr, b_cos, b_sin, o_d, m_d, D: tl.constexpr):
    """Rotate one head as `model.rotate` does, each product rounded before the sum is."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m_low = o_d < D // 2
    b_x = tl.load(x_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_pair = tl.load(x_ptr + tl.where(m_low, o_d + D // 2, o_d - D // 2), mask=m_d, other=0.0).to(tl.float32)
    b_along = (b_x * b_cos).to(dtype).to(tl.float32)
    b_across = (b_pair * b_sin).to(dtype).to(tl.float32)
    # a difference, as Triton's unary minus turns +0 into +0
    return tl.where(m_low, b_along - b_across, b_along + b_across).to(dtype)


@triton.jit
def attend_tile(b_k, b_v, m_s, b_q, scale, b_max, b_sum, b_acc):
    """Add a tile of positions to the online softmax of every row of it."""
    b_score = tl.sum(b_k.to(tl.float32) * b_q[None, :], axis=1) * scale
    b_score = tl.where(m_s, b_score, float("-inf"))
    b_top = tl.maximum(b_max, b_score)
    b_decay = tl.exp(b_max - b_top)
    b_p = tl.exp(b_score - b_top)
    b_sum = b_sum * b_decay + b_p
    b_acc = b_acc * b_decay[:, None] + b_v.to(tl.float32) * b_p[:, None]
    return b_top, b_sum, b_acc


@triton.jit
def load_tile(cache_ptr, o_s, m_tile, position_stride, o_d):
    return tl.load(cache_ptr + o_s.to(tl.int64)[:, None] * position_stride + o_d[None, :], mask=m_tile, other=0.0)


@triton.jit
def finish_head(
    b_y,
    y_ptr,
    i_head,
    o_d,
    m_d,
    b_thresholds,
    scale_ptr,
    lists_ptr,
    counts_ptr,
    ring_ptr,
    b_slot,
    num_slots,
    ring_stride,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store a head's output, and list and capture it where there are thresholds."""
    b_x = b_y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + i_head * D + o_d, b_x, mask=m_d)
    if b_thresholds is not None:
        i_section = i_head.to(tl.int32)
        finish_section(
            b_x,
            i_section * D + o_d,
            m_d,
            b_thresholds,
            scale_ptr,
            lists_ptr,
            counts_ptr,
            ring_ptr,
            None,
            b_slot,
            num_slots,
            ring_stride,
            0,
            0,
            0,
            i_section,
            H,
            H * D,
            1,
            D,
            BLOCK_D,
        )


# S and window differ between caches and models, and an alignment of theirs gains nothing
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

    # the kernel before makes the current token's vectors alone, so all else is fetched while it still runs
    b_thresholds = None
    if threshold_ptr is not None:
        b_thresholds = load_thresholds(threshold_ptr, 1)
    b_slot = load_slot(slot_ptr)
    b_position = tl.load(positions_ptr + i_b)
    in_cache = (b_position >= 0) & (b_position < S)
    # clamped: an odd position must not read outside the tables
    b_row = tl.minimum(tl.maximum(b_position, 0), P - 1)
    o_table = b_row * (D // 2) + tl.where(o_d < D // 2, o_d, o_d - D // 2)
    b_cos = tl.load(cos_ptr + o_table, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + o_table, mask=m_d, other=0.0).to(tl.float32)
    keys_ptr += i_b * keys_slot_stride + i_g * keys_head_stride
    values_ptr += i_b * values_slot_stride + i_g * values_head_stride
    b_last = tl.maximum(b_position, 0)
    b_first = tl.where(window > 0, tl.minimum(tl.maximum(b_last - window + 1, 0), S), 0)
    lo = b_first.to(tl.int32) + i_split * BLOCK_S
    hi = tl.minimum(b_last, S).to(tl.int32)
    step: tl.constexpr = NUM_SPLITS * BLOCK_S
    if NUM_SPLITS > 1:
        o_s = lo + tl.arange(0, BLOCK_S)
        m_s = o_s < hi
        m_tile = m_s[:, None] & m_d[None, :]
        b_k = load_tile(keys_ptr, o_s, m_tile, keys_position_stride, o_d)
        b_v = load_tile(values_ptr, o_s, m_tile, values_position_stride, o_d)

    wait_for_producer(PDL)
    row_ptr = qkv_ptr + i_b * (H + 2 * G) * D
    b_q = rotate_head(row_ptr + i_h * D, b_cos, b_sin, o_d, m_d, D).to(tl.float32)
    b_key = rotate_head(row_ptr + (H + i_g) * D, b_cos, b_sin, o_d, m_d, D)
    b_value = tl.load(row_ptr + (H + G + i_g) * D + o_d, mask=m_d, other=0.0)

    # every row of the tile keeps a softmax of its own, so that the loop needs no sum over rows
    b_max = tl.full([BLOCK_S], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_S], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    if NUM_SPLITS > 1:
        b_max, b_sum, b_acc = attend_tile(b_k, b_v, m_s, b_q, scale, b_max, b_sum, b_acc)
        lo += step
    for start in tl.range(lo, hi, step, num_stages=NUM_STAGES):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < hi
        m_tile = m_s[:, None] & m_d[None, :]
        b_k = load_tile(keys_ptr, o_s, m_tile, keys_position_stride, o_d)
        b_v = load_tile(values_ptr, o_s, m_tile, values_position_stride, o_d)
        b_max, b_sum, b_acc = attend_tile(b_k, b_v, m_s, b_q, scale, b_max, b_sum, b_acc)

    # the last split has the fewest positions, so it takes the current token
    has_current = i_split == NUM_SPLITS - 1
    # stored behind the loop, so that the first tiles need not wait for the rotation
    m_write = m_d & has_current & in_cache & (i_h % (H // G) == 0)
    tl.store(keys_ptr + b_position * keys_position_stride + o_d, b_key, mask=m_write)
    tl.store(values_ptr + b_position * values_position_stride + o_d, b_value, mask=m_write)
    b_score = tl.where(has_current, tl.sum(b_key.to(tl.float32) * b_q, axis=0) * scale, float("-inf"))
    b_top = tl.maximum(tl.max(b_max, axis=0), b_score)
    b_decay = tl.exp(b_max - b_top)
    b_p = tl.exp(b_score - b_top)
    b_total = tl.sum(b_sum * b_decay, axis=0) + b_p
    # the condition again: an infinite value times a weight of zero would be NaN
    b_y = tl.sum(b_acc * b_decay[:, None], axis=0) + tl.where(has_current, b_value.to(tl.float32) * b_p, 0.0)

    if NUM_SPLITS > 1:
        partials_ptr += i_head * NUM_SPLITS * (D + 2)
        part_ptr = partials_ptr + i_split * (D + 2)
        send(part_ptr + o_d, b_y, m_d)
        send(part_ptr + D, b_top)
        send(part_ptr + D + 1, b_total)
    if i_split == NUM_SPLITS - 1:
        if NUM_SPLITS > 1:
            o_p = tl.arange(0, BLOCK_P)
            m_p = o_p < NUM_SPLITS
            parts_ptr = partials_ptr + o_p * (D + 2)
            b_parts = receive(parts_ptr[:, None] + o_d[None, :], m_p[:, None] & m_d[None, :])
            b_tops = tl.where(m_p, receive(parts_ptr + D, m_p), LOWEST)
            b_totals = receive(parts_ptr + D + 1, m_p)
            b_weight = tl.exp(b_tops - tl.max(b_tops, axis=0))
            b_y = tl.sum(b_parts * b_weight[:, None], axis=0)
            b_total = tl.sum(b_totals * b_weight, axis=0)
        finish_head(
            b_y / b_total,
            y_ptr,
            i_head,
            o_d,
            m_d,
            b_thresholds,
            scale_ptr,
            lists_ptr,
            counts_ptr,
            ring_ptr,
            b_slot,
            num_slots,
            ring_stride,
            H,
            D,
            BLOCK_D,
        )


def choose_splits(B: int, H: int) -> int:
    """Choose among how many programs a head's positions are divided: a power of two, fewer the more heads there are."""
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
        listing: thresholds, scale, list, counts, ring and slot of the latter.
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
        NUM_STAGES=NUM_STAGES, PDL=use_pdl, num_warps=max(1, min(8, BLOCK_S * block_d // ENTRIES_PER_WARP)),
        **({"launch_pdl": True} if use_pdl else {}),
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
    """Refuse what does not fit."""
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
    # a single split hands over nothing
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
        qkv_BN: one token of each slot, fp16 or bf16: the query heads, the key heads, then the value heads.
        cos_PE: cosines by position, in the dtype of `qkv_BN`; at least S rows.
        sin_PE: sines likewise.
        positions_B: int64, each token's position: it attends to the cached positions before, and to itself.  Outside
            [0, S) nothing is stored, cached positions before it still count, and the nearest row of the tables is
            taken.
        keys_BSGD: rotated keys of one layer; any strides, but heads are contiguous.
        values_BSGD: values likewise.
        partials_W: from `new_partials`, at least B H num_splits (D + 2) words if there are several splits; launches
            that share them must be on one stream.
        window: attend to positions less than this far back only; 0 attends to all.
        num_splits: programs that share a head's positions, as `choose_splits` says.
        use_pdl: launch while the kernel before still drains (Hopper and later); of the tensors here that one may make
            the first only.

    Returns:
        y_BN: [B, H D], dtype of `qkv_BN`; float32 accumulation, error within 2x that of torch's attention.  Bitwise
        repeatable, and for one `num_splits` the same whatever S, B and the other slots are.  The stored keys are bit
        for bit those of `model.rotate`.
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
    """Attend as `decode_attention` for a single slot, and list and capture what the output projection keeps.

    Args:
        qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits, use_pdl: as
            `decode_attention` takes them, B = 1; at most 128 heads.
        threshold_bits_S: int32, as `sparse_gemv` takes it, one.
        scale_SK: float32 scale of |y| before the comparison, or None.
        values_RSK: ring that takes the operand, dtype of `qkv_BN`; or None.
        slot: [1] int64, the ring slot to write; outside [0, R) nothing is captured; None without a ring.

    Returns:
        y_BN: the output as thresholded, before masking; the same bits as of `decode_attention`.
        list_SIL, counts_SI: as `compact` returns them for it, but that a section is a head: I = H, L = D.
    """
    op = "decode_attention_list"
    _check(op, qkv_BN, cos_PE, sin_PE, positions_B, keys_BSGD, values_BSGD, partials_W, window, num_splits)
    B, _, G, D = keys_BSGD.shape
    H = qkv_BN.shape[1] // D - 2 * G
    if B != 1 or H > MAX_SECTIONS:
        raise ValueError(f"{op}: qkv_BN must be of one slot and at most {MAX_SECTIONS} heads, got {B} and {H}")
    S = check_producer(op, qkv_BN, H * D, threshold_bits_S, scale_SK, values_RSK, None, slot)
    if S != 1:
        raise ValueError(f"{op}: threshold_bits_S must hold one threshold, got {S}: only `o` reads the output")
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
