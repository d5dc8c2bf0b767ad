"""Count the bit patterns of a 16-bit tensor: the exact distribution of its values in 65,536 integers.

Integer atomics, so the counts are exact and the same in every order.  Oracle: `reference.histogram_ref`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels.checks import HALF_TYPES, require

NUM_PATTERNS = 1 << 16

# entries counted by one program
BLOCK = 1024


@triton.jit
def _histogram_kernel(
    bits_ptr,  # [num_entries] int16
    counts_ptr,  # [65536] int64
    num_entries,
    BLOCK: tl.constexpr,
):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < num_entries
    b_pattern = tl.load(bits_ptr + o_x, mask=m_x, other=0).to(tl.int32) & 0xFFFF
    tl.atomic_add(counts_ptr + b_pattern, tl.full([BLOCK], 1, tl.int64), mask=m_x, sem="relaxed")


@torch.library.custom_op("sparsetrace::add_histogram", mutates_args=("counts",))
def add_histogram(x: Tensor, counts: Tensor) -> None:
    """Add how often each bit pattern occurs in x to the counts.

    Args:
        x: fp16 or bf16, contiguous, any shape.
        counts: [65536] int64, indexed by the unsigned bit pattern, sign included.
    """
    if x.dtype not in HALF_TYPES or not x.is_contiguous():
        raise ValueError(f"add_histogram: x must be contiguous fp16 or bf16, got {x.dtype} with strides {x.stride()}")
    require("add_histogram", "counts", counts, (NUM_PATTERNS,), torch.int64, x.device)
    if x.numel() == 0:
        return
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _histogram_kernel[grid](x.view(torch.int16), counts, x.numel(), BLOCK=BLOCK)


@add_histogram.register_fake
def _(x, counts):
    return None
