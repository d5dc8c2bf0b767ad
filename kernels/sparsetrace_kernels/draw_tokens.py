"""Choose each slot's next token from its logits in one launch: the likeliest, or a draw by the inverse distribution.

next = the first token at which the running sum of exp((l - max l) / temperature), in float64, exceeds u times the total
sum; at temperature 0, the first token with the largest logit. In torch, a draw takes a dozen launches over the
vocabulary. Here each program takes a chunk of the vocabulary and stores its largest logit and its sum relative to that;
the last program of a slot to arrive finds the chunk in which the draw falls, and the token within the chunk.
Oracle: `torch_ops.sample`; equal unless a draw lies within rounding of the boundary between two tokens.
"""

# Shape suffixes: B = slots, V = vocabulary, P = positions of a sequence, C = chunks, F = fields of a chunk's entry;
# in `arrivals_C`, C = arrival counters.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks

# logits of a program: 16 programs a slot for 32,000 tokens, 63 for 128,256
CHUNK_V = 2048
NUM_WARPS = 8

# of a chunk: its largest logit, the sum relative to it, the first token with that logit, whether all logits are finite
NUM_FIELDS = tl.constexpr(4)


@triton.jit
def load_logits(logits_ptr, o_v, V):
    """Load logits of a slot, with minus infinity beyond the vocabulary."""
    return tl.load(logits_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float64)


@triton.jit
def _draw_tokens_kernel(
    logits_ptr,  # [B, V]
    uniform_ptr,  # [B, P] float64
    positions_ptr,  # [B] int64
    temperature_ptr,  # [1] float64; None takes the likeliest token
    partials_ptr,  # [B, C, F] float64
    arrivals_ptr,  # [C] int32, zero before and after
    next_ptr,  # [B] int64
    finite_ptr,  # [B] bool
    V,
    P,
    CHUNK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    logits_ptr += i_b * V
    partials_ptr += i_b * num_chunks * NUM_FIELDS
    o_v = i_c * CHUNK_V + tl.arange(0, CHUNK_V)
    b_l = load_logits(logits_ptr, o_v, V)
    b_top = tl.max(b_l, axis=0)
    # also false for NaN
    b_finite = (tl.abs(b_l) < float("inf")) | (o_v >= V)
    field_ptr = partials_ptr + i_c * NUM_FIELDS
    tl.store(field_ptr, b_top)
    if temperature_ptr is not None:
        b_temperature = tl.load(temperature_ptr)
        tl.store(field_ptr + 1, tl.sum(tl.exp((b_l - b_top) / b_temperature), axis=0))
    else:
        tl.store(field_ptr + 2, tl.min(tl.where(b_l == b_top, o_v, V), axis=0).to(tl.float64))
    tl.store(field_ptr + 3, tl.min(b_finite.to(tl.int32), axis=0).to(tl.float64))
    # all threads have stored their fields before the atomic publishes them
    tl.debug_barrier()
    num_arrived = tl.atomic_add(arrivals_ptr + i_b, 1, sem="acq_rel", scope="gpu")
    if num_arrived == num_chunks - 1:
        o_c = tl.arange(0, BLOCK_C)
        m_c = o_c < num_chunks
        fields_ptr = partials_ptr + o_c * NUM_FIELDS
        # .cg bypasses L1, since other SMs wrote these
        b_tops = tl.load(fields_ptr, mask=m_c, other=float("-inf"), cache_modifier=".cg")
        b_all_finite = tl.load(fields_ptr + 3, mask=m_c, other=1.0, cache_modifier=".cg")
        b_best = tl.max(b_tops, axis=0)
        if temperature_ptr is None:
            b_firsts = tl.load(fields_ptr + 2, mask=m_c, other=0.0, cache_modifier=".cg")
            b_next = tl.min(tl.where(b_tops == b_best, b_firsts, V), axis=0).to(tl.int64)
        else:
            b_sums = tl.load(fields_ptr + 1, mask=m_c, other=0.0, cache_modifier=".cg")
            b_weights = b_sums * tl.exp((b_tops - b_best) / b_temperature)
            b_target = tl.load(uniform_ptr + i_b * P + tl.load(positions_ptr + i_b)) * tl.sum(b_weights, axis=0)
            b_passed = (tl.cumsum(b_weights, 0) <= b_target) & m_c
            # clamped, here and within the chunk, since rounding may let the draw pass all of them
            i_chunk = tl.minimum(tl.sum(b_passed.to(tl.int32), axis=0), num_chunks - 1)
            b_before = tl.sum(tl.where(o_c < i_chunk, b_weights, 0.0), axis=0)
            o_again = i_chunk * CHUNK_V + tl.arange(0, CHUNK_V)
            b_again = load_logits(logits_ptr, o_again, V)
            b_running = b_before + tl.cumsum(tl.exp((b_again - b_best) / b_temperature), 0)
            b_skipped = tl.sum((b_running <= b_target).to(tl.int32), axis=0)
            b_next = tl.minimum(i_chunk * CHUNK_V + tl.minimum(b_skipped, CHUNK_V - 1), V - 1).to(tl.int64)
        tl.store(next_ptr + i_b, b_next)
        tl.store(finite_ptr + i_b, tl.min(b_all_finite, axis=0) != 0)
        tl.store(arrivals_ptr + i_b, 0)


@torch.library.custom_op("sparsetrace::draw_tokens", mutates_args=("arrivals_C",))
def draw_tokens(
    logits_BV: Tensor,
    uniform_BP: Tensor,
    positions_B: Tensor,
    temperature: Tensor | None,
    arrivals_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose the token at each slot's position.

    Args:
        logits_BV: fp16, bf16 or fp32.
        uniform_BP: float64 in [0, 1), the draw for each slot and position.
        positions_B: int64, in [0, P).
        temperature: [1] float64, above 0; None takes the likeliest token.
        arrivals_C: at least B counters from `new_arrivals`; launches that share them must be on one stream.

    Returns:
        next_B: int64, in [0, V).
        finite_B: bool, whether all logits of the slot are finite; otherwise the token is meaningless.
    """
    op = "draw_tokens"
    if logits_BV.ndim != 2 or logits_BV.numel() == 0 or not logits_BV.is_floating_point():
        raise ValueError(
            f"{op}: logits_BV must be a nonempty floating-point matrix, got {logits_BV.dtype} {tuple(logits_BV.shape)}"
        )
    B, V = logits_BV.shape
    device = logits_BV.device
    checks.require(op, "logits_BV", logits_BV, (B, V), logits_BV.dtype, device)
    P = uniform_BP.shape[-1] if uniform_BP.ndim else 0
    checks.require(op, "uniform_BP", uniform_BP, (B, P), torch.float64, device)
    checks.require(op, "positions_B", positions_B, (B,), torch.int64, device)
    if temperature is not None:
        checks.require(op, "temperature", temperature, (1,), torch.float64, device)
    checks.require_arrivals(op, arrivals_C, B, device)
    num_chunks = triton.cdiv(V, CHUNK_V)
    partials_BCF = torch.empty(B, num_chunks, NUM_FIELDS.value, dtype=torch.float64, device=device)
    next_B = torch.empty(B, dtype=torch.int64, device=device)
    finite_B = torch.empty(B, dtype=torch.bool, device=device)
    _draw_tokens_kernel[(B, num_chunks)](
        logits_BV, uniform_BP, positions_B, temperature, partials_BCF, arrivals_C, next_B, finite_B, V, P,
        CHUNK_V=CHUNK_V, BLOCK_C=triton.next_power_of_2(num_chunks), num_warps=NUM_WARPS,
    )  # fmt: skip
    return next_B, finite_B


@draw_tokens.register_fake
def _(logits_BV, uniform_BP, positions_B, temperature, arrivals_C):
    B = logits_BV.shape[0]
    return positions_B.new_empty(B), positions_B.new_empty(B, dtype=torch.bool)
