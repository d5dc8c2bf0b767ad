"""Bookkeeping between decoding steps, one small launch each: where rows are captured, and what each slot is fed next.

In torch (`torch_ops`) these take about twenty launches a step, each hardly longer than the gap after it. Each kernel
runs one program, on integers only, so the results equal the oracles exactly.
Oracles: `reference.place_rows_ref`, `reference.advance_ref`.
"""

# Shape suffixes: n = rows of a pass, R = rows of the capture ring and one more for rows that are not captured,
# B = slots, P = positions, V = end tokens.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks

BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def _place_rows_kernel(
    chosen_ptr,  # [n] bool
    positions_ptr,  # [n] int64
    bases_ptr,  # [n] int64
    numbers_ptr,  # [n] int64
    labels_ptr,  # [R, 3] int64
    filled_ptr,  # [1] int64
    rows_ptr,  # [n] int64
    n,
    every,
    nowhere,
    BLOCK: tl.constexpr,
):
    b_filled = tl.load(filled_ptr)
    for start in tl.range(0, n, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < n
        b_position = tl.load(positions_ptr + o_n, mask=m_n, other=0)
        b_captured = (tl.load(chosen_ptr + o_n, mask=m_n, other=0) != 0) & (b_position % every == 0) & m_n
        b_one = b_captured.to(tl.int64)
        b_row = b_filled + tl.cumsum(b_one, 0) - b_one
        tl.store(rows_ptr + o_n, tl.where(b_captured, b_row, nowhere), mask=m_n)
        # a full ring takes no more rows
        m_label = b_captured & (b_row < nowhere)
        b_base = tl.load(bases_ptr + o_n, mask=m_n, other=0)
        tl.store(labels_ptr + 3 * b_row, b_base + b_position, mask=m_label)
        tl.store(labels_ptr + 3 * b_row + 1, tl.load(numbers_ptr + o_n, mask=m_n, other=0), mask=m_label)
        tl.store(labels_ptr + 3 * b_row + 2, b_position, mask=m_label)
        b_filled += tl.sum(b_one, 0)
    tl.store(filled_ptr, b_filled)


@torch.library.custom_op("sparsetrace::place_rows", mutates_args=("labels_R3", "filled"))
def place_rows(
    chosen_n: Tensor,
    positions_n: Tensor,
    bases_n: Tensor,
    numbers_n: Tensor,
    every: int,
    labels_R3: Tensor,
    filled: Tensor,
) -> Tensor:
    """Assign the next free row of the ring to each row that is captured, and label it.

    Args:
        chosen_n: bool, rows that may be captured.
        positions_n: int64, not negative; a chosen row is captured if its position is a multiple of `every`.
        bases_n: int64, token number of each row's sequence at position 0.
        numbers_n: int64, number of each row's sequence.
        every: at least 1.
        labels_R3: int64, takes (token, sequence, position) of each captured row; R - 1 rows can be captured.
        filled: [1] int64, filled rows of the ring; increases by the number of rows captured.

    Returns:
        rows_n: int64, the ring's row for each row, R - 1 for rows that are not captured.
    """
    op = "place_rows"
    device = chosen_n.device
    (n,) = chosen_n.shape
    checks.require(op, "chosen_n", chosen_n, (n,), torch.bool, device)
    for name, values_n in (("positions_n", positions_n), ("bases_n", bases_n), ("numbers_n", numbers_n)):
        checks.require(op, name, values_n, (n,), torch.int64, device)
    R = labels_R3.shape[0]
    checks.require(op, "labels_R3", labels_R3, (R, 3), torch.int64, device)
    checks.require(op, "filled", filled, (1,), torch.int64, device)
    if every < 1:
        raise ValueError(f"{op}: every must be at least 1, got {every}")
    rows_n = torch.empty(n, dtype=torch.int64, device=device)
    block = min(BLOCK, triton.next_power_of_2(n))
    _place_rows_kernel[(1,)](
        chosen_n, positions_n, bases_n, numbers_n, labels_R3, filled, rows_n, n, every, R - 1, BLOCK=block,
        num_warps=4 if block > 128 else 1,
    )  # fmt: skip
    return rows_n


@place_rows.register_fake
def _(chosen_n, positions_n, bases_n, numbers_n, every, labels_R3, filled):
    return positions_n.new_empty(positions_n.shape)


@triton.jit
def _advance_kernel(
    next_ptr,  # [B] int64
    finite_ptr,  # [B] bool
    eos_ptr,  # [V] int64
    limits_ptr,  # [B] int64
    chosen_ptr,  # [P, B] int64
    count_ptr,  # [1] int64
    tokens_ptr,  # [B] int64
    running_ptr,  # [B] bool
    all_finite_ptr,  # [B] bool
    B,
    num_eos,
    P,
    BLOCK_B: tl.constexpr,
):
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < B
    b_count = tl.load(count_ptr)
    b_next = tl.load(next_ptr + o_b, mask=m_b, other=0)
    b_running = tl.load(running_ptr + o_b, mask=m_b, other=0) != 0
    b_finite = tl.load(finite_ptr + o_b, mask=m_b, other=1) != 0
    b_all_finite = tl.load(all_finite_ptr + o_b, mask=m_b, other=1) != 0
    b_more = b_running & (b_count + 1 < tl.load(limits_ptr + o_b, mask=m_b, other=0))
    for i_eos in tl.range(0, num_eos):
        b_more = b_more & (b_next != tl.load(eos_ptr + i_eos))
    tl.store(chosen_ptr + b_count * B + o_b, b_next, mask=m_b & (b_count < P))
    tl.store(tokens_ptr + o_b, b_next, mask=m_b)
    tl.store(all_finite_ptr + o_b, b_all_finite & (b_finite | (b_running == 0)), mask=m_b)
    tl.store(running_ptr + o_b, b_more, mask=m_b)
    tl.store(count_ptr, b_count + 1)


@torch.library.custom_op(
    "sparsetrace::advance", mutates_args=("chosen_PB", "count", "tokens_B", "running_B", "all_finite_B")
)
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
    """Record the tokens chosen, and decide which slots continue.

    Args:
        next_B: int64, token chosen for each slot.
        finite_B: bool, whether all logits of the slot are finite.
        eos_V: int64, tokens that end a slot; may be empty.
        limits_B: int64, maximum number of tokens to choose for each slot.
        chosen_PB: int64, takes `next_B` in row `count`, which must be below P.
        count: [1] int64, tokens chosen so far for each slot; increases by one.
        tokens_B: int64, becomes `next_B`.
        running_B: bool, cleared where the slot ends, so that it is not fed the chosen token.
        all_finite_B: bool, cleared where a running slot's logits are not finite.
    """
    op = "advance"
    device = next_B.device
    (B,) = next_B.shape
    for name, tensor, shape, dtype in (
        ("next_B", next_B, (B,), torch.int64),
        ("finite_B", finite_B, (B,), torch.bool),
        ("eos_V", eos_V, (eos_V.numel(),), torch.int64),
        ("limits_B", limits_B, (B,), torch.int64),
        ("chosen_PB", chosen_PB, (chosen_PB.shape[0], B), torch.int64),
        ("count", count, (1,), torch.int64),
        ("tokens_B", tokens_B, (B,), torch.int64),
        ("running_B", running_B, (B,), torch.bool),
        ("all_finite_B", all_finite_B, (B,), torch.bool),
    ):
        checks.require(op, name, tensor, shape, dtype, device)
    _advance_kernel[(1,)](
        next_B, finite_B, eos_V, limits_B, chosen_PB, count, tokens_B, running_B, all_finite_B,
        B, eos_V.numel(), chosen_PB.shape[0], BLOCK_B=triton.next_power_of_2(B), num_warps=1 if B <= 128 else 4,
    )  # fmt: skip


@advance.register_fake
def _(next_B, finite_B, eos_V, limits_B, chosen_PB, count, tokens_B, running_B, all_finite_B):
    return None
