"""Pack a [T, K] masked block on the device: bitmask, kept bit patterns, row offsets.

Two passes: count and bitmask by chunks of K, a running sum over the chunks, then every chunk stores its kept
patterns at its own offset.  Oracle: `reference.pack_ref`.
"""

# Shape suffixes: T = tokens, K = features, M = ceil(K / 8) bitmask bytes, Q = chunks of a row.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels.checks import require
from sparsetrace_kernels.primitives import mask_bytes

# fastest of 128 to 4096 entries by 1 to 8 warps on an H200
CHUNK_K = 1024
NUM_WARPS = 1

_PATTERNS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@triton.jit
def _load_patterns(bits_ptr, row_stride, i_t, o_k, K):
    b_bits = tl.load(bits_ptr + i_t.to(tl.int64) * row_stride + o_k, mask=o_k < K, other=0)
    # doubling drops the sign bit, so -0.0 counts as dropped
    b_keep = (b_bits << 1) != 0
    return b_bits, b_keep


@triton.jit
def _mask_kernel(
    bits_ptr,  # [T, K] int16 or int32
    mask_ptr,  # [T, M] uint8
    counts_ptr,  # [T, Q] int32
    row_stride,
    K,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_q = tl.program_id(1)
    _, b_keep = _load_patterns(bits_ptr, row_stride, i_t, i_q * BLOCK_K + tl.arange(0, BLOCK_K), K)
    num_bytes = tl.cdiv(K, 8)
    o_m = i_q * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    tl.store(mask_ptr + i_t.to(tl.int64) * num_bytes + o_m, mask_bytes(b_keep, BLOCK_K), mask=o_m < num_bytes)
    tl.store(counts_ptr + i_t.to(tl.int64) * tl.num_programs(1) + i_q, tl.sum(b_keep.to(tl.int32), axis=0))


@triton.jit
def _scatter_kernel(
    bits_ptr,  # [T, K] int16 or int32
    starts_ptr,  # [T * Q + 1] int64
    packed_ptr,  # [capacity] int16 or int32
    row_stride,
    K,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_q = tl.program_id(1)
    b_bits, b_keep = _load_patterns(bits_ptr, row_stride, i_t, i_q * BLOCK_K + tl.arange(0, BLOCK_K), K)
    b_start = tl.load(starts_ptr + i_t.to(tl.int64) * tl.num_programs(1) + i_q)
    b_one = b_keep.to(tl.int32)
    tl.store(packed_ptr + b_start + tl.cumsum(b_one, 0) - b_one, b_bits, mask=b_keep)


@torch.library.custom_op("sparsetrace::pack", mutates_args=("packed", "mask_TM", "offsets"))
def pack(x_TK: Tensor, packed: Tensor, mask_TM: Tensor, offsets: Tensor) -> None:
    """Pack a masked block: an entry is kept if it is not zero.

    Args:
        x_TK: masked block, fp16, bf16 or fp32, contiguous rows at any distance.
        packed: takes the kept bit patterns, row after row; int16 (int32 for fp32), at least T * K, since how
            many are kept is known on the device only. Entries from `offsets[T]` on are left as they were.
        mask_TM: takes the bitmask, uint8, M = ceil(K / 8), LSB first, trailing bits zero.
        offsets: [T + 1] int64, takes the start of every row in `packed`, and the end of the last.
    """
    op = "pack"
    if x_TK.ndim != 2 or x_TK.dtype not in _PATTERNS or x_TK.numel() == 0 or x_TK.stride(1) != 1:
        raise ValueError(
            f"{op}: x_TK must be a nonempty fp16, bf16 or fp32 matrix with contiguous rows, "
            f"got {x_TK.dtype} {tuple(x_TK.shape)} with strides {x_TK.stride()}"
        )
    T, K = x_TK.shape
    patterns = _PATTERNS[x_TK.dtype]
    require(op, "mask_TM", mask_TM, (T, triton.cdiv(K, 8)), torch.uint8, x_TK.device)
    require(op, "offsets", offsets, (T + 1,), torch.int64, x_TK.device)
    require(op, "packed", packed, (packed.numel(),), patterns, x_TK.device)
    if packed.numel() < T * K:
        raise ValueError(f"{op}: packed must hold at least T * K = {T * K} entries, got {packed.numel()}")
    bits_TK = x_TK.view(patterns)
    num_chunks = triton.cdiv(K, CHUNK_K)
    counts_TQ = torch.empty(T, num_chunks, dtype=torch.int32, device=x_TK.device)
    starts = torch.zeros(T * num_chunks + 1, dtype=torch.int64, device=x_TK.device)
    grid = (T, num_chunks)
    _mask_kernel[grid](bits_TK, mask_TM, counts_TQ, x_TK.stride(0), K, BLOCK_K=CHUNK_K, num_warps=NUM_WARPS)
    torch.cumsum(counts_TQ.view(-1), 0, dtype=torch.int64, out=starts[1:])
    offsets.copy_(starts[::num_chunks])
    _scatter_kernel[grid](bits_TK, starts, packed, x_TK.stride(0), K, BLOCK_K=CHUNK_K, num_warps=NUM_WARPS)


@pack.register_fake
def _(x_TK, packed, mask_TM, offsets):
    return None
