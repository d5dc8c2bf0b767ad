"""Mask whole rows for a dense matrix multiply, and capture them: producers for batches, prefill and teacher forcing.

An ordinary dense multiply follows; its operand is x where kept, else +0.0. Matrices that read the same input under the
same threshold and scale form one segment, with one operand and one row of the ring.
Oracles: `reference.mask_rows_ref`; `reference.add_rmsnorm_ref` and `silu_mul_ref` for the sums of a row.
"""

# Shape suffixes: T = rows (tokens), K = features, S = column segments (1 to 3), R = ring slots.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.add_rmsnorm import load_total, normalize
from sparsetrace_kernels.primitives import keep_entries, load_threshold
from sparsetrace_kernels.silu_mul import load_product
from sparsetrace_kernels.torch_ops import DENSE

# entries of a row that one program masks
CHUNK_K = 2048

# two loads of 16 bytes a thread for each input
ENTRIES_PER_WARP = 512

# one program normalises a whole row: at most 64 entries a thread
MAX_NORM_K = 1 << 15
MAX_WARPS = 16


class MaskArguments(NamedTuple):
    """Kernel arguments that say how rows are masked and where they are captured, as `_mask_arguments` lays them out."""

    threshold_ptr: Any  # [S] int32
    scale_ptr: Any  # [S, K] float32 or None
    operand_ptr: Any  # [S, T, K]
    dest_ptr: Any  # [T] int64
    values_ptr: Any  # [R, S, K] or None
    num_slots: Any
    slot_stride: Any
    segment_stride: Any
    operand_stride: Any


@triton.jit
def _store_rows(b_x, i_t, o_k, m_k, masking, K, NUM_SEGMENTS: tl.constexpr, DENSE: tl.constexpr):
    """Write a block of a row to every segment's operand and to the ring."""
    b_dest = tl.load(masking.dest_ptr + i_t)
    is_dense = b_dest == DENSE
    in_ring = (b_dest >= 0) & (b_dest < masking.num_slots)
    operand_ptr = masking.operand_ptr + i_t * K
    for i_segment in tl.static_range(NUM_SEGMENTS):
        b_t = load_threshold(masking.threshold_ptr, i_segment)
        b_keep = keep_entries(b_x, b_t, masking.scale_ptr, i_segment, o_k, m_k, K)
        b_operand = tl.where(b_keep | is_dense, b_x, 0.0)
        tl.store(operand_ptr + o_k, b_operand, mask=m_k)
        operand_ptr += masking.operand_stride
        if masking.values_ptr is not None:
            segment = tl.cast(i_segment, tl.int64) * masking.segment_stride
            row_ptr = masking.values_ptr + b_dest * masking.slot_stride + segment
            tl.store(row_ptr + o_k, b_operand, mask=m_k & in_ring)


@triton.jit
def _mask_rows_kernel(
    x_ptr,  # [T, K]
    x_stride,
    threshold_ptr,
    scale_ptr,
    operand_ptr,
    dest_ptr,
    values_ptr,
    num_slots,
    slot_stride,
    segment_stride,
    operand_stride,
    K,
    NUM_SEGMENTS: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_x = tl.load(x_ptr + i_t * x_stride + o_k, mask=m_k, other=0.0)
    masking = MaskArguments(
        threshold_ptr, scale_ptr, operand_ptr, dest_ptr, values_ptr, num_slots, slot_stride, segment_stride,
        operand_stride,
    )  # fmt: skip
    _store_rows(b_x, i_t, o_k, m_k, masking, K, NUM_SEGMENTS, DENSE)


@triton.jit
def _add_rmsnorm_rows_kernel(
    residual_ptr,  # [T, K]
    residual_stride,
    delta_ptr,  # [T, K] or None
    delta_stride,
    weight_ptr,  # [K]
    eps,
    total_ptr,  # [T, K]
    normed_ptr,  # [T, K]
    threshold_ptr,
    scale_ptr,
    operand_ptr,
    dest_ptr,
    values_ptr,
    num_slots,
    slot_stride,
    segment_stride,
    operand_stride,
    K,
    NUM_SEGMENTS: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    if delta_ptr is not None:
        delta_ptr += i_t * delta_stride
    b_total = load_total(residual_ptr + i_t * residual_stride, delta_ptr, o_k, m_k)
    tl.store(total_ptr + i_t * K + o_k, b_total, mask=m_k)
    b_mean = tl.sum(b_total.to(tl.float32) * b_total.to(tl.float32), axis=0) / K
    b_weight = tl.load(weight_ptr + o_k, mask=m_k, other=0.0)
    b_x = normalize(b_total, tl.rsqrt(b_mean + eps), b_weight)
    tl.store(normed_ptr + i_t * K + o_k, b_x, mask=m_k)
    masking = MaskArguments(
        threshold_ptr, scale_ptr, operand_ptr, dest_ptr, values_ptr, num_slots, slot_stride, segment_stride,
        operand_stride,
    )  # fmt: skip
    _store_rows(b_x, i_t, o_k, m_k, masking, K, NUM_SEGMENTS, DENSE)


@triton.jit
def _silu_mul_rows_kernel(
    gate_up_ptr,  # [T, 2 K]
    gate_up_stride,
    product_ptr,  # [T, K]
    threshold_ptr,
    scale_ptr,
    operand_ptr,
    dest_ptr,
    values_ptr,
    num_slots,
    slot_stride,
    segment_stride,
    operand_stride,
    K,
    NUM_SEGMENTS: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_x = load_product(gate_up_ptr + i_t * gate_up_stride, o_k, m_k, K)
    tl.store(product_ptr + i_t * K + o_k, b_x, mask=m_k)
    masking = MaskArguments(
        threshold_ptr, scale_ptr, operand_ptr, dest_ptr, values_ptr, num_slots, slot_stride, segment_stride,
        operand_stride,
    )  # fmt: skip
    _store_rows(b_x, i_t, o_k, m_k, masking, K, NUM_SEGMENTS, DENSE)


def _blocks(K: int) -> tuple[int, dict[str, int]]:
    """Divide rows of K entries into chunks: return their number, and the block size and warps of a program."""
    block = min(triton.next_power_of_2(K), CHUNK_K)
    return triton.cdiv(K, block), {"BLOCK_K": block, "num_warps": max(block // ENTRIES_PER_WARP, 1)}


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _mask_arguments(
    operand_STK: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> tuple[list[Tensor | int | None], dict[str, int]]:
    """Lay out what all three kernels take: the arguments from threshold_ptr to K, and the constants."""
    ring = (0, 0, 0) if values_RSK is None else (values_RSK.shape[0], values_RSK.stride(0), values_RSK.stride(1))
    S, T, K = operand_STK.shape
    arguments = [threshold_bits_S, scale_SK, operand_STK, dest_T, values_RSK, *ring, T * K, K]
    return arguments, {"NUM_SEGMENTS": S, "DENSE": DENSE}


def _check(
    op: str,
    x_TK: Tensor,
    K: int,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> None:
    """Refuse arguments, other than the input itself, that none of the ops takes."""
    S = checks.count_thresholds(op, "threshold_bits_S", threshold_bits_S)
    checks.require_thresholds(op, threshold_bits_S, scale_SK, S, K, x_TK.device)
    checks.require(op, "dest_T", dest_T, (x_TK.shape[0],), torch.int64, x_TK.device)
    if values_RSK is not None:
        checks.require_slots(op, "values_RSK", values_RSK, S, K, x_TK.dtype, x_TK.device)


def launch_mask_rows(
    x_TK: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> Tensor:
    """Launch `mask_rows` on arguments known to be right, without the overhead of torch's dispatcher."""
    T, K = x_TK.shape
    operand_STK = _empty((len(threshold_bits_S), T, K), x_TK)
    arguments, constants = _mask_arguments(operand_STK, threshold_bits_S, scale_SK, dest_T, values_RSK)
    num_chunks, meta = _blocks(K)
    _mask_rows_kernel[(T, num_chunks)](x_TK, x_TK.stride(0), *arguments, **constants, **meta)
    return operand_STK


# no default for a written argument: torch 2.11 counts its version by position and fails if it was left out
@torch.library.custom_op("sparsetrace::mask_rows", mutates_args=("values_RSK",))
def mask_rows(
    x_TK: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> Tensor:
    """Mask rows that are already in memory, such as the attention output, and capture them.

    Args:
        x_TK: inputs, fp16 or bf16; rows are contiguous, at any distance from each other.
        threshold_bits_S: int32, as `sparse_gemv` takes them, 1 to 3.
        scale_SK: float32 scale of |x| before the comparison, or None.
        dest_T: int64, what happens to each row: `DENSE` neither masks nor captures it; any other number masks it and
            captures it in the ring slot of this number, or in none outside [0, R).
        values_RSK: ring that takes each segment's operand, dtype of `x_TK`, any strides of slots and segments; or
            None. Captured rows must have different slots.

    Returns:
        operand_STK: dtype of `x_TK`, contiguous, without any -0.0 in masked rows; exactly equal to the oracle's.
    """
    checks.require_half_rows("mask_rows", "x_TK", x_TK)
    _check("mask_rows", x_TK, x_TK.shape[1], threshold_bits_S, scale_SK, dest_T, values_RSK)
    return launch_mask_rows(x_TK, threshold_bits_S, scale_SK, dest_T, values_RSK)


@mask_rows.register_fake
def _(x_TK, threshold_bits_S, scale_SK, dest_T, values_RSK):
    return x_TK.new_empty(len(threshold_bits_S), *x_TK.shape)


def launch_add_rmsnorm_rows(
    residual_TK: Tensor,
    delta_TK: Tensor | None,
    norm_weight_K: Tensor,
    eps: float,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `add_rmsnorm_rows` on arguments known to be right, without the overhead of torch's dispatcher."""
    T, K = residual_TK.shape
    total_TK, normed_TK = _empty((T, K), residual_TK), _empty((T, K), residual_TK)
    operand_STK = _empty((len(threshold_bits_S), T, K), residual_TK)
    arguments, constants = _mask_arguments(operand_STK, threshold_bits_S, scale_SK, dest_T, values_RSK)
    block = triton.next_power_of_2(K)
    _add_rmsnorm_rows_kernel[(T,)](
        residual_TK, residual_TK.stride(0), delta_TK, 0 if delta_TK is None else delta_TK.stride(0),
        norm_weight_K, eps, total_TK, normed_TK, *arguments, **constants,
        BLOCK_K=block, num_warps=min(max(block // ENTRIES_PER_WARP, 1), MAX_WARPS),
    )  # fmt: skip
    return total_TK, normed_TK, operand_STK


@torch.library.custom_op("sparsetrace::add_rmsnorm_rows", mutates_args=("values_RSK",))
def add_rmsnorm_rows(
    residual_TK: Tensor,
    delta_TK: Tensor | None,
    norm_weight_K: Tensor,
    eps: float,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to the residual stream, normalise, mask and capture, row by row; each value is rounded as `add_rmsnorm` does.

    Args:
        residual_TK: residual stream, fp16 or bf16, rows as in `mask_rows`, K at most 32,768.
        delta_TK: what is added to it, likewise; None before the first layer.
        norm_weight_K: RMSNorm weight.
        eps: RMSNorm epsilon.
        threshold_bits_S, scale_SK, dest_T, values_RSK: as `mask_rows` takes them.

    Returns:
        total_TK: the new residual stream.
        normed_TK: the normalised rows before masking; error within 2x that of torch.
        operand_STK: as `mask_rows` returns it for `normed_TK`.
    """
    op = "add_rmsnorm_rows"
    checks.require_half_rows(op, "residual_TK", residual_TK)
    K = residual_TK.shape[1]
    if K > MAX_NORM_K:
        raise ValueError(f"{op}: K must be at most {MAX_NORM_K}, got {K}: one program holds the whole row")
    if delta_TK is not None:
        checks.require_like_rows(op, "delta_TK", delta_TK, residual_TK)
    checks.require(op, "norm_weight_K", norm_weight_K, (K,), residual_TK.dtype, residual_TK.device)
    _check(op, residual_TK, K, threshold_bits_S, scale_SK, dest_T, values_RSK)
    return launch_add_rmsnorm_rows(
        residual_TK, delta_TK, norm_weight_K, eps, threshold_bits_S, scale_SK, dest_T, values_RSK
    )


@add_rmsnorm_rows.register_fake
def _(residual_TK, delta_TK, norm_weight_K, eps, threshold_bits_S, scale_SK, dest_T, values_RSK):
    shape = residual_TK.shape
    return (
        residual_TK.new_empty(shape),
        residual_TK.new_empty(shape),
        residual_TK.new_empty(len(threshold_bits_S), *shape),
    )


def launch_silu_mul_rows(
    gate_up_T2K: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch `silu_mul_rows` on arguments known to be right, without the overhead of torch's dispatcher."""
    T, K = gate_up_T2K.shape[0], gate_up_T2K.shape[1] // 2
    product_TK, operand_TK = _empty((T, K), gate_up_T2K), _empty((T, K), gate_up_T2K)
    arguments, constants = _mask_arguments(operand_TK[None], threshold_bits_S, scale_SK, dest_T, values_RSK)
    num_chunks, meta = _blocks(K)
    _silu_mul_rows_kernel[(T, num_chunks)](
        gate_up_T2K, gate_up_T2K.stride(0), product_TK, *arguments, **constants, **meta
    )
    return product_TK, operand_TK


@torch.library.custom_op("sparsetrace::silu_mul_rows", mutates_args=("values_RSK",))
def silu_mul_rows(
    gate_up_T2K: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gate the up projection, mask and capture, row by row; each value is rounded as `silu_mul` does.

    Args:
        gate_up_T2K: in each row the gate outputs, then the up outputs, fp16 or bf16, rows as in `mask_rows`.
        threshold_bits_S, scale_SK, dest_T, values_RSK: as `mask_rows` takes them, for the single segment `down`.

    Returns:
        product_TK: the product before masking; error within 2x that of torch.
        operand_TK: as `mask_rows` returns it for `product_TK`, without the dimension of segments.
    """
    op = "silu_mul_rows"
    checks.require_half_rows(op, "gate_up_T2K", gate_up_T2K)
    if gate_up_T2K.shape[1] % 2:
        raise ValueError(f"{op}: gate_up_T2K must hold two halves a row, got {gate_up_T2K.shape[1]} entries")
    S = len(threshold_bits_S)
    checks.require_one_threshold(op, S, "`down` reads the product")
    _check(op, gate_up_T2K, gate_up_T2K.shape[1] // 2, threshold_bits_S, scale_SK, dest_T, values_RSK)
    return launch_silu_mul_rows(gate_up_T2K, threshold_bits_S, scale_SK, dest_T, values_RSK)


@silu_mul_rows.register_fake
def _(gate_up_T2K, threshold_bits_S, scale_SK, dest_T, values_RSK):
    shape = (gate_up_T2K.shape[0], gate_up_T2K.shape[1] // 2)
    return gate_up_T2K.new_empty(shape), gate_up_T2K.new_empty(shape)
