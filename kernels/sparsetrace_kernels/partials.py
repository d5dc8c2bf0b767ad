"""Partial results that the programs of one launch hand to the last of them, without a fence or an atomic.

A word is 0 until it holds a value, so a value says by itself that it has arrived: one trip to the L2 cache instead of
the three of a counter (values, then the counter, then the values again).  The reader waits for programs of lower number
only, which a GPU has started before it, so they end whatever it does; it leaves zeros, so that the next launch finds
the words as it needs them.
"""

# Shape suffixes: W = words of 32 bits.

import torch
import triton
import triton.language as tl
from torch import Tensor

# for list_gemv with 32 programs along K, 262,144 outputs
DEFAULT_WORDS = 1 << 23


def new_partials(device: torch.device | str, words: int = DEFAULT_WORDS) -> Tensor:
    """Make the words in which the programs of a launch meet: int32 [W], zero, and left zero by every launch.

    Kernels may share them if they run on one stream.
    """
    return torch.zeros(words, dtype=torch.int32, device=device)


@triton.jit
def send(words_ptr, b_value, mask=None):
    """Hand float32 values to the program that calls `receive` for the same words."""
    b_word = ~b_value.to(tl.int32, bitcast=True)
    # complements, so that the one pattern that would read as `not there` is a NaN, for which another NaN does
    tl.store(words_ptr, tl.where(b_word == 0, 1, b_word), mask=mask)


@triton.jit
def receive(words_ptr, mask):
    """Wait for float32 values that programs of lower number, or this one, send; leaves zeros; 0.0 where not mask.

    A tile must lie in one warp or be spread over all of them: where a few of many warps held a copy, a warp might leave
    the loop by what another one saw.
    """
    b_word = tl.load(words_ptr, mask=mask, other=-1, volatile=True)
    while tl.min((b_word != 0).to(tl.int32)) == 0:
        b_word = tl.load(words_ptr, mask=mask, other=-1, volatile=True)
    # warps that hold copies of the same words read each for itself: one must not clear what another waits for
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
    """Store the sum over the split programs along K of one column block, added in one fixed order by the last."""
    if split == 1:
        tl.store(y_ptr + o_n, b_y.to(y_ptr.dtype.element_ty), mask=m_n)
    else:
        # The last program sends too: where it used its own sum below, Triton 3.6 brought the whole product into the
        # layout of these loads, which took three times the registers.
        send(partials_ptr + i_k.to(tl.int64) * N + o_n, b_y, m_n)
        if i_k == split - 1:
            b_total = tl.zeros_like(b_y)
            for start in tl.range(0, split, BLOCK_S):
                o_s = start + tl.arange(0, BLOCK_S)
                m_s = (o_s < split)[:, None] & m_n[None, :]
                b_part = receive(partials_ptr + o_s[:, None].to(tl.int64) * N + o_n[None, :], m_s)
                b_total += tl.sum(b_part, axis=0)
            tl.store(y_ptr + o_n, b_total.to(y_ptr.dtype.element_ty), mask=m_n)


def block_of_partials(block_n: int, num_warps: int) -> int:
    """Choose how many partial sums the last program adds at a time: 16 a thread, since more registers cost speed.

    At least 4 a thread under the rule of `GemvConfig`: loads of 16 bytes by all threads, spread as `receive` needs it.
    """
    return max(8, min(32, 16 * 32 * num_warps // block_n))
