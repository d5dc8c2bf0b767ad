"""One GEMV to time on a GPU, for `tune`, `sparsetrace bench` and the benchmarks."""

# Shape suffixes: K = input features, N = output features, S = column segments (1), R = ring slots,
# M = ceil(K / 8) bitmask bytes, W = words of `new_partials`.

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from sparsetrace_kernels.compact import compact
from sparsetrace_kernels.configs import GemvConfig
from sparsetrace_kernels.list_gemv import launch_list_gemv
from sparsetrace_kernels.partials import new_partials
from sparsetrace_kernels.sparse_gemv import launch_sparse_gemv
from sparsetrace_kernels.timing import num_copies
from sparsetrace_kernels.torch_ops import threshold_bits_for


class Problem:
    """A shape and dtype: an input, a capture ring, and copies of a weight that calls take in turn.

    Args:
        K: input features.
        N: output features.
        dtype: fp16 or bf16.
        copies: of the weight; with enough of them no call finds its weight in the L2 cache, see `num_copies`.
        device: a GPU.
    """

    def __init__(self, K: int, N: int, dtype: torch.dtype, copies: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.K, self.N, self.dtype = K, N, dtype
        self.x_K = torch.randn(K, generator=generator, device=device).to(dtype)
        self.weights = [
            torch.randn(K, N, generator=generator, device=device, dtype=dtype).mul_(K**-0.5) for _ in range(copies)
        ]
        self.partials_W = new_partials(device)
        self.values_RSK = torch.zeros(4, 1, K, dtype=dtype, device=device)
        self.mask_RSM = torch.zeros(4, 1, triton.cdiv(K, 8), dtype=torch.uint8, device=device)
        self.slot = torch.ones(1, dtype=torch.int64, device=device)

    def rotate(self, sparsity: float) -> list[Tensor]:
        """Return as many weight copies as a graph needs at a sparsity."""
        touched_bytes = (1 - sparsity) * self.K * self.N * self.dtype.itemsize
        return self.weights[: num_copies(max(touched_bytes, 1.0), self.x_K.device)]

    def dense_calls(self) -> list[list[Callable[[], Tensor]]]:
        """Make calls of torch's dense multiply, one for each weight copy: input-major, then output-major weights."""
        weights = self.rotate(0.0)
        transposed = [w.T.contiguous() for w in weights]
        return [
            [lambda w=w: torch.mv(w.T, self.x_K) for w in weights],
            [lambda w=w: torch.mv(w, self.x_K) for w in transposed],
        ]

    def calls(self, op: str, sparsity: float, config: GemvConfig, capture: bool = True) -> list[Callable[[], Tensor]]:
        """Make calls of a kernel, one for each weight copy.

        Args:
            op: `single` (`sparse_gemv`) or `list` (`list_gemv`, without the producer that makes the list).
            sparsity: fraction of the inputs dropped.
            config: of the kernel.
            capture: whether `single` captures its operand.
        """
        bits_S = threshold_bits_for(self.x_K, sparsity)
        weights = self.rotate(sparsity)
        if op == "list":
            lists = compact(self.x_K, bits_S, None, None, None, None)
            return [lambda w=w: launch_list_gemv(*lists, w, self.partials_W, [self.N], config) for w in weights]
        ring = (self.values_RSK, self.mask_RSM, self.slot) if capture else (None, None, None)
        return [
            lambda w=w: launch_sparse_gemv(self.x_K, w, bits_S, self.partials_W, [self.N], None, *ring, config)
            for w in weights
        ]
