"""Split-K reduction within one launch, without fences or atomics: programs send partial results to the last of them.

A word is 0 until a value is stored in it, so a nonzero word tells by itself that the value has arrived. That takes one
trip to the L2 cache; a counter takes three (values, counter, values again). The reader waits only for programs of lower
number, which the GPU has started before it, so they finish whatever the reader does. The reader writes zeros back, so
that the next launch starts from zeros.
"""

# Shape suffixes: W = words of 32 bits.

import torch
import triton
import triton.language as tl
from torch import Tensor

# for list_gemv with 32 programs along K, 262,144 outputs
DEFAULT_WORDS = 1 << 23


def new_partials(device: torch.device | str, words: int = DEFAULT_WORDS) -> Tensor:
    """Allocate words for partial results: int32 [W], zero before and after every launch.

    Kernels on one stream may share them.
    """
    return torch.zeros(words, dtype=torch.int32, device=device)


@triton.jit
def send(words_ptr, b_value, mask=None):
    """Send float32 values to the program that calls `receive` for the same words."""
    b_word = ~b_value.to(tl.int32, bitcast=True)
    # complemented, so that the only pattern that would become 0 is a NaN, which another NaN replaces
    tl.store(words_ptr, tl.where(b_word == 0, 1, b_word), mask=mask)


@triton.jit
def receive(words_ptr, mask):
    """Wait for float32 values from programs of lower number or from this one; write zeros back; 0.0 where not mask.

    A tile must lie in one warp or be spread over all warps: if only some warps held copies of it, a warp could leave
    the loop because of what another one had read.
    """
    b_word = tl.load(words_ptr, mask=mask, other=-1, volatile=True)
    while tl.min((b_word != 0).to(tl.int32)) == 0:
        b_word = tl.load(words_ptr, mask=mask, other=-1, volatile=True)
    # each warp reads for itself, so none may clear a word that another one still waits for
    tl.debug_barrier()
    tl.store(words_ptr, tl.zeros_like(b_word), mask=mask)
    return (~b_word).to(tl.float32, bitcast=True)


@triton.jit
def store_sum(
    b_y,
    y_ptr,  # [N]
    partials_ptr,  # [W] int32
    i_k,
    o_n,
    m_n,
    N,
    split,
    BLOCK_S: tl.constexpr,
):
    """Store a column block's sum over the programs along K; the last program adds the partial sums in a fixed order."""
    if split == 1:
        tl.store(y_ptr + o_n, b_y.to(y_ptr.dtype.element_ty), mask=m_n)
    else:
        # The last program sends its sum too. When it used the sum directly, Triton 3.6 converted the whole product to
        # the layout of the loads below, which took three times the registers.
        send(partials_ptr + i_k.to(tl.int64) * N + o_n, b_y, m_n)
        if i_k == split - 1:
            b_total = tl.zeros_like(b_y)
            for start in tl.range(0, split, BLOCK_S):
                o_s = start + tl.arange(0, BLOCK_S)
                m_s = (o_s < split)[:, None] & m_n[None, :]
                b_sums = receive(partials_ptr + o_s[:, None].to(tl.int64) * N + o_n[None, :], m_s)
                b_total += tl.sum(b_sums, axis=0)
            tl.store(y_ptr + o_n, b_total.to(y_ptr.dtype.element_ty), mask=m_n)


def block_of_partials(block_n: int, num_warps: int) -> int:
    """Choose how many partial sums the last program adds at a time: 16 a thread, since more registers cost speed.

    The rule of `GemvConfig` makes it at least 4 a thread, so that loads of 16 bytes occupy all threads, as `receive`
    requires.
    """
    return max(8, min(32, 16 * 32 * num_warps // block_n))
