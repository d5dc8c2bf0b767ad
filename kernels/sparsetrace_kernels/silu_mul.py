"""SiLU(gate) * up that also thresholds, lists and captures its output.

product = round(SiLU(gate)) * up, rounded to the dtype after each step, as in Llama. The mask is made from the product
as it is stored.
Oracles: `reference.silu_mul_ref` for the product, `reference.compact_ref` on the returned `product_K` for the rest.
"""

# Shape suffixes: K = features, S = column segments (1), I = sections of a list, L = inputs of a section,
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


@triton.jit
def load_product(gate_up_ptr, o_k, m_k, K):
    """Load gate and up, which lie K apart, and return their product, rounded after each step."""
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    b_gate = tl.load(gate_up_ptr + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_up = tl.load(gate_up_ptr + K + o_k, mask=m_k, other=0.0)
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(dtype)
    return (b_silu.to(tl.float32) * b_up.to(tl.float32)).to(dtype)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,  # [2 K]
    threshold_ptr,  # [1] int32
    scale_ptr,  # [1, K] float32 or None
    product_ptr,  # [K]
    lists_ptr,  # [1, I, L] int32
    counts_ptr,  # [1, I] int32
    values_ptr,  # [R, 1, K] or None
    mask_ptr,  # [R, 1, M] or None
    slot_ptr,  # [1] int64 or None
    num_slots,
    values_slot_stride,
    values_segment_stride,
    mask_slot_stride,
    mask_segment_stride,
    K,
    NUM_SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
    PDL: tl.constexpr,
):
    i_section = tl.program_id(0)
    ring = RingArguments(
        values_ptr, mask_ptr, slot_ptr, num_slots, values_slot_stride, values_segment_stride, mask_slot_stride,
        mask_segment_stride,
    )  # fmt: skip
    lists = ListArguments(scale_ptr, lists_ptr, counts_ptr)
    b_thresholds = load_thresholds(threshold_ptr, NUM_SEGMENTS)
    b_slot = load_slot(slot_ptr)
    wait_for_producer(PDL)
    o_k = i_section * LENGTH + tl.arange(0, LENGTH)
    m_k = o_k < K
    b_x = load_product(gate_up_ptr, o_k, m_k, K)
    tl.store(product_ptr + o_k, b_x, mask=m_k)
    finish_section(
        b_x, o_k, m_k, b_thresholds, lists, ring, b_slot, i_section, tl.num_programs(0), K, NUM_SEGMENTS, LENGTH
    )


# no default for a written argument: torch 2.11 counts its version by position and fails if it was left out
@torch.library.custom_op("sparsetrace::silu_mul", mutates_args=("values_RSK", "mask_RSM"))
def silu_mul(
    gate_up_K2: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
    use_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate the up projection, and list and capture what the down projection keeps of the result.

    Args:
        gate_up_K2: the gate outputs, then the up outputs, 2 K entries, fp16 or bf16, K at most 65,536.
        threshold_bits_S: int32, as `sparse_gemv` takes it, one.
        scale_SK: float32 scale of |x| before the comparison, or None.
        values_RSK: ring that takes the operand, dtype of `gate_up_K2`; or None.
        mask_RSM: ring that takes the operand's bitmask, uint8, LSB first; or None.
        slot: [1] int64, the ring slot to write; outside [0, R) nothing is captured; None without a ring.
        use_pdl: start while the kernel before still runs (Hopper and later); that kernel may write none of these
            tensors but the first.

    Returns:
        product_K: the product before masking; error within 2x that of torch.
        list_SIL, counts_SI: as `compact` returns them for `product_K`.
    """
    op = "silu_mul"
    checks.require_half_vector(op, "gate_up_K2", gate_up_K2)
    if gate_up_K2.shape[0] % 2:
        raise ValueError(f"{op}: gate_up_K2 must hold two halves, got {gate_up_K2.shape[0]} entries")
    K = gate_up_K2.shape[0] // 2
    S = check_producer(op, gate_up_K2, K, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot)
    checks.require_one_threshold(op, S, "`down` reads the product")
    product_K = gate_up_K2.new_empty(K)
    list_SIL, counts_SI = empty_lists(S, K, gate_up_K2.device)
    grid, meta = section_grid(list_SIL)
    _silu_mul_kernel[grid](
        gate_up_K2, threshold_bits_S, scale_SK, product_K, list_SIL, counts_SI,
        *checks.ring_arguments(values_RSK, mask_RSM, slot), K,
        **meta, **pdl_options(use_pdl),
    )  # fmt: skip
    return product_K, list_SIL, counts_SI


@silu_mul.register_fake
def _(gate_up_K2, threshold_bits_S, scale_SK, values_RSK, mask_RSM, slot, use_pdl=False):
    K = gate_up_K2.shape[0] // 2
    return gate_up_K2.new_empty(K), *empty_lists(1, K, gate_up_K2.device)
