"""Exact selection by rank, on any device; ties go to the lower index, whatever the device's sort does."""

from collections.abc import Callable

import torch
from torch import Tensor


def keep_largest(score_bits: Tensor, k: int) -> Tensor:
    """Which entries are the k largest of the last dim.

    Args:
        score_bits: [..., K] non-negative integers below 2**31, ordered as the scores are: `torch_ops.magnitude_bits`.
        k: 1 <= k <= K.

    Returns:
        [..., K] bool, exactly k set in each row.
    """
    K = score_bits.shape[-1]
    # no two keys of a row are equal: the score, then the index from the end
    from_end_K = torch.arange(K - 1, -1, -1, device=score_bits.device)
    key = (score_bits.long() << 32) | from_end_K
    least = key.kthvalue(K - k + 1, dim=-1, keepdim=True).values
    return key >= least


def keep_largest_sums(sums: Tensor, k: int) -> Tensor:
    """Which of finite float64 values [..., K] are the k largest of the last dim; slower, since it sorts."""
    order = sums.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., :k], True)


def keep_in_columns(keep: Callable[[Tensor], Tensor], weight_KN: Tensor, width: int) -> Tensor:
    """Mask a weight by `width` columns at a time, which bounds the memory: keep(weight [K, n]) gives bool [n, K]."""
    return torch.cat([keep(part).T for part in weight_KN.split(width, dim=1)], dim=1)


def keep_n_of_m(score_bits: Tensor, n: int, m: int) -> Tensor:
    """Which entries are the n largest of each m neighbours along the last dim, a multiple of m long."""
    return keep_largest(score_bits.unflatten(-1, (-1, m)), n).flatten(-2)
