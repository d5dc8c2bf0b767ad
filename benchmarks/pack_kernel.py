"""Times of the kernels other than the GEMVs: packing, histogram, and producers of lists and rows. Appends to a CSV:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| kernel | pack, pack_regions (both passes), histogram; producers of lists and of `_rows`, with capture |
| rows, k, dtype, sparsity | shape of the input (k summed over the regions of a ring), type, fraction dropped |
| us_p20, us_p50, us_p80 | microseconds a call, in CUDA-graph replays |
| gb_per_s | bytes of the input over us_p50 |
"""

# Shape suffixes: T = tokens, K = features.

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from gemv import source_version

from sparsetrace_kernels.add_rmsnorm import add_rmsnorm
from sparsetrace_kernels.compact import compact
from sparsetrace_kernels.histogram import NUM_PATTERNS, add_histogram
from sparsetrace_kernels.masked_rows import add_rmsnorm_rows, mask_rows, silu_mul_rows
from sparsetrace_kernels.pack import chunk_table, pack, pack_regions
from sparsetrace_kernels.reference import pack_ref, pack_regions_ref
from sparsetrace_kernels.silu_mul import silu_mul
from sparsetrace_kernels.timing import time_in_graph
from sparsetrace_kernels.torch_ops import threshold_bits_for

RESULTS = Path(__file__).parent / "results" / "pack_kernel.csv"
COLUMNS = [
    *("gpu", "torch", "triton", "commit", "kernel", "rows", "k", "dtype", "sparsity"),
    *("us_p20", "us_p50", "us_p80", "gb_per_s"),
]
NUM_TOKENS = 65536
NUM_REPLAYS = 5

# a capture ring of 1 GiB over the matrices of Llama-2-7B, layer by layer
RING_WIDTHS = ([4096] * 6 + [11008]) * 32
RING_ROWS = 448
# a prefill that captures the last position of each of 64 prompts
PREFILL_ROWS = 8192
NUM_PROMPTS = 64


def block_calls(K: int, dtype: torch.dtype, sparsity: float, device: torch.device) -> dict:
    """Calls of the kernels that take a [T, K] block; packing is checked first."""
    x_TK = torch.randn(NUM_TOKENS, K, device=device, dtype=dtype)
    x_TK.masked_fill_(torch.rand_like(x_TK) < sparsity, 0)
    packed = torch.empty(x_TK.numel(), dtype=torch.int16, device=device)
    mask_TM = torch.empty(NUM_TOKENS, K // 8, dtype=torch.uint8, device=device)
    offsets = torch.empty(NUM_TOKENS + 1, dtype=torch.int64, device=device)
    counts = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
    pack(x_TK, packed, mask_TM, offsets)
    for ours, ref in zip((mask_TM, packed, offsets), pack_ref(x_TK), strict=True):
        assert torch.equal(ours[: ref.shape[0]], ref)
    return {
        "pack": [lambda: pack(x_TK, packed, mask_TM, offsets)],
        "histogram": [lambda: add_histogram(x_TK, counts)],
    }


def producer_calls(K: int, dtype: torch.dtype, sparsity: float, device: torch.device) -> dict:
    """Calls of the producers, each with capture."""
    x_K, delta_K, weight_K = (torch.randn(K, device=device, dtype=dtype) for _ in range(3))
    gate_up_K2 = torch.randn(2 * K, device=device, dtype=dtype)
    values_RSK = torch.zeros(4, 1, K, dtype=dtype, device=device)
    bits_S = threshold_bits_for(x_K, sparsity)
    ring = (None, values_RSK, None, torch.ones(1, dtype=torch.int64, device=device))
    return {
        "add_rmsnorm": [lambda: add_rmsnorm(x_K, delta_K, weight_K, 1e-5, bits_S, *ring)],
        "silu_mul": [lambda: silu_mul(gate_up_K2, bits_S, *ring)],
        "compact": [lambda: compact(x_K, bits_S, *ring)],
    }


def ring_calls(K: int, dtype: torch.dtype, sparsity: float, device: torch.device) -> dict:
    """A call that packs a whole ring; it is checked on the first regions first."""
    assert sum(RING_WIDTHS) == K
    infinity = 0x7F80
    x = torch.randn(RING_ROWS * K, device=device, dtype=dtype)
    x.masked_fill_(torch.rand_like(x) < sparsity, 0)
    bits = x.view(torch.int16)
    packed = torch.empty_like(bits)
    masks = torch.empty(RING_ROWS * K // 8, dtype=torch.uint8, device=device)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
    num_rows = torch.tensor([RING_ROWS], device=device)

    def call(widths: list[int]) -> Callable[[], tuple[torch.Tensor, ...]]:
        table = chunk_table(widths, RING_ROWS, device)
        starts = torch.empty(len(widths) * RING_ROWS + 1, dtype=torch.int64, device=device)
        outputs = (packed, masks, starts, nonfinite)

        def run() -> tuple[torch.Tensor, ...]:
            pack_regions(bits, table, widths, RING_ROWS, RING_ROWS, num_rows, *outputs, infinity)
            return outputs[:3]

        return run

    refs = pack_regions_ref(bits, RING_WIDTHS[:7], RING_ROWS, RING_ROWS, RING_ROWS, infinity)
    for ours, ref in zip(call(RING_WIDTHS[:7])(), refs[:3], strict=True):
        assert torch.equal(ours[: ref.shape[0]], ref)
    return {"pack_regions": [call(RING_WIDTHS)]}


def row_calls(K: int, dtype: torch.dtype, sparsity: float, device: torch.device) -> dict:
    """Calls of the producers of rows, for an operand that q, k and v share."""
    x_TK, delta_TK = (torch.randn(PREFILL_ROWS, K, device=device, dtype=dtype) for _ in range(2))
    gate_up_T2K = torch.randn(PREFILL_ROWS, 2 * K, device=device, dtype=dtype)
    values_RSK = torch.zeros(NUM_PROMPTS, 1, K, dtype=dtype, device=device)
    dest_T = torch.full((PREFILL_ROWS,), -1, device=device)
    dest_T[PREFILL_ROWS // NUM_PROMPTS - 1 :: PREFILL_ROWS // NUM_PROMPTS] = torch.arange(NUM_PROMPTS, device=device)
    rest = (threshold_bits_for(x_TK[0], sparsity), None, dest_T, values_RSK)
    return {
        "mask_rows": [lambda: mask_rows(x_TK, *rest)],
        "add_rmsnorm_rows": [lambda: add_rmsnorm_rows(x_TK, delta_TK, x_TK[0], 1e-5, *rest)],
        "silu_mul_rows": [lambda: silu_mul_rows(gate_up_T2K, *rest)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to append to")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    where = [torch.cuda.get_device_name(device), torch.__version__, triton.__version__, source_version()]
    if not arguments.out.exists():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(",".join(COLUMNS) + "\n")
    with arguments.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for rows, make, sizes in (
            (NUM_TOKENS, block_calls, (4096,)),
            (RING_ROWS, ring_calls, (sum(RING_WIDTHS),)),
            (PREFILL_ROWS, row_calls, (4096, 11008)),
            (1, producer_calls, (4096, 8192, 14336)),
        ):
            for K in sizes:
                for kernel, calls in make(K, torch.bfloat16, 0.5, device).items():
                    times = time_in_graph(calls, NUM_REPLAYS)
                    num_bytes = rows * K * (4 if kernel.startswith(("add_rmsnorm", "silu_mul")) else 2)
                    cells = [*(f"{t:.3f}" for t in times), f"{num_bytes / times[1] / 1e3:.1f}"]
                    writer.writerow([*where, kernel, rows, K, "bfloat16", 0.5, *cells])
                    print(f"{kernel:>16} {rows:6} x {K:6} {times[1]:10.2f} us {cells[-1]:>8} GB/s")


if __name__ == "__main__":
    main()
