"""Partial results sent within a launch: every bit pattern arrives, and the words are zero again."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import WORDS

from sparsetrace_kernels.configs import GemvConfig
from sparsetrace_kernels.partials import block_of_partials, new_partials, receive, send

NUM_SENDERS = 7


@triton.jit
def _send_kernel(x_ptr, y_ptr, words_ptr, N, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
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
        tl.store(y_ptr + o_sn, receive(words_ptr + o_sn, m_sn), mask=m_sn)


@pytest.mark.parametrize("num_warps", [1, 4])
def test_every_pattern_arrives(device, num_warps):
    limits = torch.iinfo(torch.int32)
    patterns = torch.randint(limits.min, limits.max, (NUM_SENDERS, 1000), dtype=torch.int32, device=device)
    # zeros of both signs, NaN, subnormals, and the only pattern that a word cannot hold
    special = torch.tensor([0, limits.min, limits.max, 1, -2, -1], dtype=torch.int32, device=device)
    patterns[:, : len(special)] = special
    words = new_partials(device, WORDS)
    for _ in range(3):
        y_SN = torch.full_like(patterns, 0x5A).view(torch.float32)
        _send_kernel[(triton.cdiv(1000, 64), NUM_SENDERS + 1)](
            patterns.view(torch.float32), y_SN, words, 1000, BLOCK_N=64, BLOCK_S=8, num_warps=num_warps
        )
        assert not words.any()
        # the pattern of all ones, a NaN, arrives as another NaN
        assert torch.equal(y_SN.view(torch.int32), torch.where(patterns == -1, -2, patterns))
    assert torch.tensor([-1, -2], dtype=torch.int32).view(torch.float32).isnan().all()


@pytest.mark.gpu
def test_no_warp_is_left_waiting(device):
    # every warp holds all words of so small a tile; thousands of launches, since one in a few hundred used to hang
    x_SN = torch.randn(NUM_SENDERS, 1, device=device)
    words = new_partials(device, WORDS)
    y_SN = torch.full_like(x_SN, float("nan"))
    for _ in range(5000):
        _send_kernel[(1, NUM_SENDERS + 1)](x_SN, y_SN, words, 1, BLOCK_N=1, BLOCK_S=8, num_warps=8)
    assert torch.equal(y_SN, x_SN)
    assert not words.any()


def test_partial_sums_fit_the_registers():
    for block_n in (16, 32, 64, 128, 256):
        for num_warps in (1, 2, 4, 8):
            if block_n < 4 * num_warps:
                with pytest.raises(ValueError, match="block_n must be at least 4 a warp, got 16 for 8 warps"):
                    GemvConfig("predicated", 1, 256, block_n, num_warps)
                continue
            block = block_of_partials(block_n, num_warps)
            # at least four words for each thread, so that no two warps hold the same words
            assert block in (8, 16, 32) and block * block_n >= 4 * 32 * num_warps
            assert block == 8 or block * block_n <= 16 * 32 * num_warps
