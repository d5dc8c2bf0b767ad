"""Count the bit patterns of a 16-bit tensor: the exact distribution of its values in 65,536 integers.

Integer atomics, so the counts are exact in whatever order they are added. Oracle: `reference.histogram_ref`.

There are two kernels. The one in CUDA C++ counts in shared memory and adds to the result once for each block: 250 G
entries/s on an H200, even if half of them are zero. Triton has no atomics on computed addresses in shared memory, so
its kernel adds to the result directly: 20 G entries/s, and 2.7 if every second entry is the same. It is used where the
CUDA kernel cannot be compiled (benchmarks/calibrate.py, results/calibrate.csv).
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels.checks import HALF_TYPES, require

NUM_PATTERNS = 1 << 16

# entries counted by one program
BLOCK = 1024

# entries counted by one block in shared memory, whose counters have 16 bits
SHARED_ENTRIES = (1 << 16) - 1
SHARED_BYTES = 2 * NUM_PATTERNS
SHARED_THREADS = 1024
# the kernel takes the number of entries as an int
MAX_LAUNCH_ENTRIES = 1 << 30

SHARED_SOURCE = r"""
extern "C" __global__ void shared_histogram(
    const unsigned short* bits, unsigned long long* counts, int num_entries, int entries_per_block
) {
    // a word holds the counters of a magnitude's two signs
    extern __shared__ unsigned int words[];
    for (int i = threadIdx.x; i < 32768; i += blockDim.x) words[i] = 0;
    __syncthreads();
    long long start = (long long)blockIdx.x * entries_per_block;
    long long stop = min(start + entries_per_block, (long long)num_entries);
    for (long long i = start + threadIdx.x; i < stop; i += blockDim.x) {
        unsigned int pattern = bits[i];
        atomicAdd(&words[pattern & 32767], 1u << ((pattern >> 15) * 16));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 32768; i += blockDim.x) {
        unsigned int positive = words[i] & 65535, negative = words[i] >> 16;
        if (positive) atomicAdd(&counts[i], (unsigned long long)positive);
        if (negative) atomicAdd(&counts[i + 32768], (unsigned long long)negative);
    }
}
"""


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


@functools.cache
def shared_kernel(device_index: int) -> Callable[..., None] | None:
    """Compile the CUDA C++ kernel for a device; None if this torch cannot, or the device has too little memory."""
    compile_kernel = getattr(torch.cuda, "_compile_kernel", None)
    properties = torch.cuda.get_device_properties(device_index)
    if compile_kernel is None or getattr(properties, "shared_memory_per_block_optin", 0) < SHARED_BYTES:
        return None
    with torch.cuda.device(device_index):
        kernel = compile_kernel(SHARED_SOURCE, "shared_histogram")
        kernel.set_shared_memory_config(SHARED_BYTES)
    launch: Callable[..., None] = kernel
    return launch


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
    bits = x.view(torch.int16).flatten()
    launch = shared_kernel(x.device.index or 0) if x.is_cuda else None
    if launch is None:
        grid = (triton.cdiv(bits.numel(), BLOCK),)
        _histogram_kernel[grid](bits, counts, bits.numel(), BLOCK=BLOCK)
        return
    for part in bits.split(MAX_LAUNCH_ENTRIES):
        launch(
            grid=(triton.cdiv(part.numel(), SHARED_ENTRIES), 1, 1),
            block=(SHARED_THREADS, 1, 1),
            args=[part, counts, part.numel(), SHARED_ENTRIES],
            shared_mem=SHARED_BYTES,
        )


@add_histogram.register_fake
def _(x, counts):
    return None
