"""Rotary embedding of one head, shared by attention kernels; the result equals `model.rotate`'s bit for bit."""

# Shape suffixes: D = head dim, P = rows of the rotary tables, E = D / 2.

import triton
import triton.language as tl


@triton.jit
def load_rotation(
    cos_ptr,  # [P, E]
    sin_ptr,  # [P, E]
    b_position,
    P,
    o_d,
    m_d,
    D: tl.constexpr,
):
    """Load the cosines and sines of a position, or of the nearest that the tables have."""
    b_row = tl.minimum(tl.maximum(b_position, 0), P - 1)
    o_table = b_row * (D // 2) + tl.where(o_d < D // 2, o_d, o_d - D // 2)
    b_cos = tl.load(cos_ptr + o_table, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + o_table, mask=m_d, other=0.0).to(tl.float32)
    return b_cos, b_sin


@triton.jit
def rotate_head(x_ptr, b_cos, b_sin, o_d, m_d, D: tl.constexpr):
    """Load and rotate one head; as in `model.rotate`, each product is rounded before they are added."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m_low = o_d < D // 2
    b_x = tl.load(x_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_pair = tl.load(x_ptr + tl.where(m_low, o_d + D // 2, o_d - D // 2), mask=m_d, other=0.0).to(tl.float32)
    b_along = (b_x * b_cos).to(dtype).to(tl.float32)
    b_across = (b_pair * b_sin).to(dtype).to(tl.float32)
    # a difference, since Triton's unary minus turns +0 into +0
    return tl.where(m_low, b_along - b_across, b_along + b_across).to(dtype)
