"""Rotary embedding of many rows, with their keys and values written to the cache.

It does in one launch all that lies between the q|k|v product and attention over a prompt. q and k are rotated as by
`model.rotate`, with each product rounded before they are added. Oracle: `reference.rotate_rows_ref`.
"""

# Shape suffixes: B = slots, T = positions of a slot, H = query heads, G = kv heads, D = head dim, S = cache positions,
# P = rows of the rotary tables, E = D / 2, N = (H + 2 G) D columns of q, k and v.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.rotary import load_rotation, rotate_head

# heads that a program processes, one after the other: 4 kB of q at D = 128
HEADS = 16


@triton.jit(do_not_specialize=["T"])
def _rotate_rows_kernel(
    qkv_ptr,  # [B T, N]
    cos_ptr,  # [P, E]
    sin_ptr,  # [P, E]
    positions_ptr,  # [B T] int64
    q_ptr,  # [B T, H D]
    keys_ptr,  # [B, S, G, D]
    values_ptr,  # [B, S, G, D]
    keys_slot_stride,
    keys_position_stride,
    keys_head_stride,
    values_slot_stride,
    values_position_stride,
    values_head_stride,
    T,
    H,
    G,
    S,
    P,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_position = tl.load(positions_ptr + i_row)
    in_cache = (b_position >= 0) & (b_position < S)
    b_cos, b_sin = load_rotation(cos_ptr, sin_ptr, b_position, P, o_d, m_d, D)
    row_ptr = qkv_ptr + i_row * (H + 2 * G) * D
    keys_ptr += (i_row // T) * keys_slot_stride + b_position * keys_position_stride
    values_ptr += (i_row // T) * values_slot_stride + b_position * values_position_stride
    first = tl.program_id(1) * HEADS
    for i_head in tl.range(first, tl.minimum(first + HEADS, H + 2 * G)):
        if i_head < H + G:
            b_x = rotate_head(row_ptr + i_head * D, b_cos, b_sin, o_d, m_d, D)
            tl.store(q_ptr + (i_row * H + i_head) * D + o_d, b_x, mask=m_d & (i_head < H))
            tl.store(keys_ptr + (i_head - H) * keys_head_stride + o_d, b_x, mask=m_d & (i_head >= H) & in_cache)
        else:
            b_x = tl.load(row_ptr + i_head * D + o_d, mask=m_d, other=0.0)
            tl.store(values_ptr + (i_head - H - G) * values_head_stride + o_d, b_x, mask=m_d & in_cache)


def launch_rotate_rows(
    qkv_nN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_n: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
) -> Tensor:
    """Launch `rotate_rows` on checked arguments."""
    B, S, G, D = keys_BSGD.shape
    n, N = qkv_nN.shape
    H = N // D - 2 * G
    q_nK = qkv_nN.new_empty(n, H * D)
    _rotate_rows_kernel[(n, triton.cdiv(H + 2 * G, HEADS))](
        qkv_nN, cos_PE, sin_PE, positions_n, q_nK, keys_BSGD, values_BSGD, *keys_BSGD.stride()[:3],
        *values_BSGD.stride()[:3], n // B, H, G, S, cos_PE.shape[0], D=D, BLOCK_D=triton.next_power_of_2(D),
        HEADS=HEADS, num_warps=1,
    )  # fmt: skip
    return q_nK


@torch.library.custom_op("sparsetrace::rotate_rows", mutates_args=("keys_BSGD", "values_BSGD"))
def rotate_rows(
    qkv_nN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_n: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
) -> Tensor:
    """Rotate queries and keys, and store keys and values at their positions.

    Args:
        qkv_nN: B T rows, slot by slot, fp16 or bf16: the query heads, then the key heads, then the value heads.
        cos_PE: cosines by position, dtype of `qkv_nN`.
        sin_PE: sines by position, likewise.
        positions_n: int64, position of each row, different for all rows of a slot. At a position outside [0, S)
            nothing is stored, and the rotation is that of the nearest row of the tables.
        keys_BSGD: rotated keys of one layer, any strides as long as each head is contiguous.
        values_BSGD: values, likewise.

    Returns:
        q_nK: [B T, H D], rotated queries; these and the stored keys equal those of `model.rotate` bit for bit.
    """
    op = "rotate_rows"
    checks.require_cache(op, keys_BSGD, values_BSGD)
    B, _, G, D = keys_BSGD.shape
    dtype, device = keys_BSGD.dtype, keys_BSGD.device
    checks.require_half_rows(op, "qkv_nN", qkv_nN)
    n, N = qkv_nN.shape
    H = N // D - 2 * G
    if N % D or H < 1 or H % G or n % B:
        raise ValueError(
            f"{op}: qkv_nN must hold equally many rows for each of {B} slots, and in each query heads, a multiple of "
            f"G={G}, and twice G others, each of D={D} columns, got {tuple(qkv_nN.shape)}"
        )
    checks.require(op, "qkv_nN", qkv_nN, (n, N), dtype, device)
    P = cos_PE.shape[0] if cos_PE.ndim else 0
    checks.require(op, "cos_PE", cos_PE, (P, D // 2), dtype, device)
    checks.require(op, "sin_PE", sin_PE, (P, D // 2), dtype, device)
    checks.require(op, "positions_n", positions_n, (n,), torch.int64, device)
    return launch_rotate_rows(qkv_nN, cos_PE, sin_PE, positions_n, keys_BSGD, values_BSGD)


@rotate_rows.register_fake
def _(qkv_nN, cos_PE, sin_PE, positions_n, keys_BSGD, values_BSGD):
    _, _, G, D = keys_BSGD.shape
    return qkv_nN.new_empty(qkv_nN.shape[0], qkv_nN.shape[1] - 2 * G * D)
