"""Operations of the torch engine that define what a mask, an operand and a decoding step are.

The Triton kernels make the same masks and operands bit for bit. This module imports torch only, so it runs on any
device, also where Triton is not installed.
"""

# Shape suffixes: K = input features, n = rows of a pass, R = rows of the capture ring and one more for rows that are
# not captured, B = slots, P = positions, V = vocabulary (in `eos_V`, end tokens).

import torch
from torch import Tensor

# destination of a row that is neither masked nor captured, see `masked_rows.mask_rows`
DENSE = -2

_SIGN_CLEARED = {
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFFFFFF),
}


def magnitude_bits(x: Tensor) -> Tensor:
    """Bit pattern of |x|, which orders as |x| does, with Inf and NaN above every finite value.

    Args:
        x: any shape, fp16, bf16 or fp32.

    Returns:
        same shape, int16 for the 16-bit types and int32 for fp32, never negative.
    """
    if x.dtype not in _SIGN_CLEARED:
        raise ValueError(
            f"magnitude_bits: x must be fp16, bf16 or fp32, got {x.dtype}: masks are defined on stored bit patterns"
        )
    int_dtype, mask = _SIGN_CLEARED[x.dtype]
    return x.view(int_dtype) & mask


def keep_above(x: Tensor, threshold_bits: int | Tensor) -> Tensor:
    """Return which entries lie strictly above a threshold; magnitudes are compared as bit patterns.

    Args:
        x: any shape, fp16, bf16 or fp32.
        threshold_bits: `magnitude_bits` of the threshold in the dtype of `x`; a tensor is broadcast.

    Returns:
        bool, shape of `x`; NaN and Inf are kept by every finite threshold.
    """
    return magnitude_bits(x) > threshold_bits


def threshold_bits_for(x_K: Tensor, sparsity: float) -> Tensor:
    """Return the [1] int32 threshold pattern that drops the fraction `sparsity` of x_K; 0 drops zeros only."""
    bits_K = magnitude_bits(x_K).int().sort().values
    index = round(sparsity * bits_K.shape[0])
    return bits_K[index - 1 : index].clone() if index else bits_K.new_zeros(1)


def mask_operand(x: Tensor, keep: Tensor) -> Tensor:
    """Build the operand that the multiply consumes: x where kept, else +0.0.

    A kept -0.0 becomes +0.0 too, so an entry of the result has nonzero bits exactly if it is kept and nonzero.

    Args:
        x: any shape, floating point.
        keep: bool, broadcast to `x`.

    Returns:
        shape and dtype of `x`, without any -0.0.
    """
    return torch.where(keep & (x != 0), x, torch.zeros((), dtype=x.dtype, device=x.device))


def pack_bits(keep: Tensor) -> Tensor:
    """Pack booleans along the last dim into bytes, LSB first.

    Args:
        keep: [..., K] bool.

    Returns:
        [..., ceil(K / 8)] uint8; the trailing bits of the last byte are zero.
    """
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def place_rows(
    chosen_n: Tensor,
    positions_n: Tensor,
    bases_n: Tensor,
    numbers_n: Tensor,
    every: int,
    labels_R3: Tensor,
    filled: Tensor,
) -> Tensor:
    """Same contract as `decode_state.place_rows`, but the last row of the labels is overwritten."""
    captured_n = chosen_n & (positions_n % every == 0)
    rows_n = torch.where(captured_n, captured_n.cumsum(0) - 1 + filled, labels_R3.shape[0] - 1)
    labels_R3.index_copy_(0, rows_n, torch.stack([bases_n + positions_n, numbers_n, positions_n], dim=1))
    filled += captured_n.sum()
    return rows_n


def advance(
    next_B: Tensor,
    finite_B: Tensor,
    eos_V: Tensor,
    limits_B: Tensor,
    chosen_PB: Tensor,
    count: Tensor,
    tokens_B: Tensor,
    running_B: Tensor,
    all_finite_B: Tensor,
) -> None:
    """Same contract as `decode_state.advance`."""
    all_finite_B &= finite_B | ~running_B
    chosen_PB.index_copy_(0, count, next_B[None])
    count += 1
    tokens_B.copy_(next_B)
    running_B &= (count < limits_B) & (next_B[:, None] != eos_V).all(-1)


def sample(logits_BV: Tensor, uniform_B1: Tensor, temperature: float, top_k: int) -> Tensor:
    """Choose each slot's next token: the likeliest, or the inverse of the cumulative distribution at a uniform draw.

    Args:
        logits_BV: float32, finite.
        uniform_B1: float64 in [0, 1).
        temperature: 0 takes the likeliest token, and the first of several.
        top_k: draw among this many likeliest tokens; 0 draws among all.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV.double() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = scaled_BV.topk(top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    cumulative_BV = scaled_BV.softmax(-1).cumsum(-1)
    # scaled by the last sum, which may round to less than 1, so that no draw falls beyond the vocabulary
    return (cumulative_BV <= uniform_B1 * cumulative_BV[:, -1:]).sum(-1)
