"""Partial results handed over within a launch: every bit pattern arrives, and the words are zero again."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import WORDS

from sparsetrace_kernels.partials import block_of_partials, new_partials, receive, send

NUM_SENDERS = 7


@triton.jit
def _hand_over_kernel(x_ptr, y_ptr, words_ptr, N, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    i_n = tl.program_id(0)
    i_sender = tl.program_id(1)
    num_senders = tl.num_programs(1) - 1
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    if i_sender < num_senders:
        b_x = tl.load(x_ptr + i_sender * N + o_n, mask=m_n)
        send(words_ptr + i_sender * N + o_n, b_x, m_n)
    else:
        o_s = tl.arange(0, BLOCK_S)
        o_sn = o_s[:, None] * N + o_n[None, :]
        m_sn = (o_s < num_senders)[:, None] & m_n[None, :]
        tl.store(y_ptr + o_sn, receive(words_ptr + o_sn, m_sn, x_ptr.dtype.element_ty), mask=m_sn)


@pytest.mark.parametrize(("dtype", "word"), [(torch.float32, torch.int32), (torch.float64, torch.int64)], ids=str)
@pytest.mark.parametrize("num_warps", [1, 4])
def test_every_pattern_arrives(device, dtype, word, num_warps):
    limits = torch.iinfo(word)
    patterns = torch.randint(limits.min, limits.max, (NUM_SENDERS, 1000), dtype=word, device=device)
    # zeros of both signs, infinities, subnormals, and the one pattern that a word cannot hold
    special = torch.tensor([0, limits.min, limits.max, 1, -2, -1], dtype=word, device=device)
    patterns[:, : len(special)] = special
    words = new_partials(device, WORDS).view(word)
    for _ in range(3):
        y_SN = torch.full_like(patterns, 0x5A).view(dtype)
        _hand_over_kernel[(triton.cdiv(1000, 64), NUM_SENDERS + 1)](
            patterns.view(dtype), y_SN, words, 1000, BLOCK_N=64, BLOCK_S=8, num_warps=num_warps
        )
        assert not words.any()
        # all ones, a NaN, arrives as another NaN
        assert torch.equal(y_SN.view(word), torch.where(patterns == -1, -2, patterns))
    assert torch.tensor([-1, -2], dtype=word).view(dtype).isnan().all()


def test_partial_sums_fit_the_registers():
    for block_n in (16, 32, 64, 128, 256):
        for num_warps in (1, 2, 4, 8):
            block = block_of_partials(block_n, num_warps)
            assert block in (8, 16, 32) and (block == 8 or block * block_n <= 64 * 32 * num_warps)
