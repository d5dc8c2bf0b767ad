"""Residual add and RMSNorm that also threshold, list and capture their output.

total = residual + delta;  normed = round(total * rsqrt(mean(total^2) + eps)) * weight, each rounded to the dtype before
the next step, as in Llama. The mask is made from `normed` as it is stored.
Oracles: `reference.add_rmsnorm_ref` for the sums, `reference.compact_ref` on the returned `normed_K` for the rest.
"""

# Shape suffixes: K = features, S = column segments (1 to 3), I = sections of a list, L = inputs of a section,
# R = ring slots, M = ceil(K / 8) bitmask bytes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.compact import check_producer, empty_lists, section_grid
from sparsetrace_kernels.primitives import (
    ListArguments,
    RingArguments,
    finish_section,
    load_slot,
    load_thresholds,
    pdl_options,
    wait_for_producer,
)

# each program sums the squares of the whole vector: 8 entries a thread at K = 4,096
NUM_WARPS = 16


@triton.jit
def load_total(residual_ptr, delta_ptr, o_k, m_k):
    """Load the sum of residual and delta, rounded as it is stored."""
    b_total = tl.load(residual_ptr + o_k, mask=m_k, other=0.0)
    if delta_ptr is not None:
        b_delta = tl.load(delta_ptr + o_k, mask=m_k, other=0.0)
        b_total = (b_total.to(tl.float32) + b_delta.to(tl.float32)).to(residual_ptr.dtype.element_ty)
    return b_total


@triton.jit
def normalize(b_total, b_rms, b_weight):
    """Multiply by the reciprocal root mean square, round, multiply by the weight, round."""
    dtype: tl.constexpr = b_total.dtype
    b_unit = (b_total.to(tl.float32) * b_rms).to(dtype)
    return (b_unit.to(tl.float32) * b_weight.to(tl.float32)).to(dtype)


@triton.jit
def _add_rmsnorm_kernel(
    residual_ptr,  # [K]
    delta_ptr,  # [K] or None
    weight_ptr,  # [K]
    eps,
    threshold_ptr,  # [S] int32
    scale_ptr,  # [S, K] float32 or None
    total_ptr,  # [K]; not residual_ptr, which every program reads whole
    normed_ptr,  # [K]
    lists_ptr,  # [S, I, L] int32
    counts_ptr,  # [S, I] int32
    values_ptr,  # [R, S, K] or None
    mask_ptr,  # [R, S, M] or None
    slot_ptr,  # [1] int64 or None
    num_slots,
    values_slot_stride,
    values_segment_stride,
    mask_slot_stride,
    mask_segment_stride,
    K,
    NUM_SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    i_section = tl.program_id(0)
    ring = RingArguments(
        values_ptr, mask_ptr, slot_ptr, num_slots, values_slot_stride, values_segment_stride, mask_slot_stride,
        mask_segment_stride,
    )  # fmt: skip
    lists = ListArguments(scale_ptr, lists_ptr, counts_ptr)
    o_k = i_section * LENGTH + tl.arange(0, LENGTH)
    m_k = o_k < K
    # the kernel before does not write these, so they are loaded while it still runs
    b_weight = tl.load(weight_ptr + o_k, mask=m_k, other=0.0)
    b_thresholds = load_thresholds(threshold_ptr, NUM_SEGMENTS)
    b_slot = load_slot(slot_ptr)
    wait_for_producer(PDL)
    o_all = tl.arange(0, BLOCK_K)
    b_all = load_total(residual_ptr, delta_ptr, o_all, o_all < K).to(tl.float32)
    b_mean = tl.sum(b_all * b_all, axis=0) / K
    b_total = load_total(residual_ptr, delta_ptr, o_k, m_k)
    b_x = normalize(b_total, tl.rsqrt(b_mean + eps), b_weight)
    tl.store(total_ptr + o_k, b_total, mask=m_k)
    tl.store(normed_ptr + o_k, b_x, mask=m_k)
    finish_section(
        b_x, o_k, m_k, b_thresholds, lists, ring, b_slot, i_section, tl.num_programs(0), K, NUM_SEGMENTS, LENGTH
    )


# no default for a written argument: torch 2.11 counts its version by position and fails if it was left out
@torch.library.custom_op("sparsetrace::add_rmsnorm", mutates_args=("values_RSK", "mask_RSM"))
def add_rmsnorm(
    residual_K: Tensor,
    delta_K: Tensor | None,
    norm_weight_K: Tensor,
    eps: float,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add to the residual stream, normalise, and list and capture what each segment keeps of the result.

    Args:
        residual_K: residual stream, fp16 or bf16, K at most 65,536.
        delta_K: what is added to it; None before the first layer.
        norm_weight_K: RMSNorm weight.
        eps: RMSNorm epsilon.
        threshold_bits_S: int32, as `sparse_gemv` takes them, 1 to 3.
        scale_SK: float32 scale of |x| before the comparison, or None.
        values_RSK: ring that takes each segment's operand, dtype of `residual_K`; or None.
        mask_RSM: ring that takes the operand's bitmask, uint8, LSB first; or None.
        slot: [1] int64, the ring slot to write; outside [0, R) nothing is captured; None without a ring.
        use_pdl: start while the kernel before still runs (Hopper and later); that kernel may write none of these
            tensors but the first two.

    Returns:
        total_K: the new residual stream.
        normed_K: the normalised vector before masking; error within 2x that of torch.
        list_SIL, counts_SI: as `compact` returns them for `normed_K`.
    """
    op = "add_rmsnorm"
    checks.require_half_vector(op, "residual_K", residual_K)
    (K,) = residual_K.shape
    device = residual_K.device
    if delta_K is not None:
        checks.require(op, "delta_K", delta_K, (K,), residual_K.dtype, device)
    checks.require(op, "norm_weight_K", norm_weight_K, (K,), residual_K.dtype, device)
    S = check_producer(op, residual_K, K, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot)
    total_K, normed_K = torch.empty_like(residual_K), torch.empty_like(residual_K)
    list_SIL, counts_SI = empty_lists(S, K, device)
    grid, meta = section_grid(list_SIL)
    meta |= {"BLOCK_K": triton.next_power_of_2(K), "num_warps": NUM_WARPS}
    _add_rmsnorm_kernel[grid](
        residual_K, delta_K, norm_weight_K, eps, threshold_bits_S, scale_SK, total_K, normed_K, list_SIL, counts_SI,
        *checks.ring_arguments(values_RSK, mask_RSM, slot), K,
        **meta, **pdl_options(use_pdl),
    )  # fmt: skip
    return total_K, normed_K, list_SIL, counts_SI


@add_rmsnorm.register_fake
def _(
    residual_K, delta_K, norm_weight_K, eps, threshold_bits_S,
    scale_SK, values_RSK, mask_RSM, slot, use_pdl=False,
):  # fmt: skip
    return (
        torch.empty_like(residual_K),
        torch.empty_like(residual_K),
        *empty_lists(threshold_bits_S.shape[0], residual_K.shape[0], residual_K.device),
    )
