"""Time the sparse GEMVs against dense torch and, if a checkout is given, TEAL's own kernel in the same process.

Every call is timed in CUDA-graph replays over rotating weight copies larger than L2.  Appends rows to a CSV:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| k, n, dtype, sparsity | input and output features, type, fraction of the inputs dropped |
| impl | dense (torch, the faster of two weight layouts), teal, single (`sparse_gemv`), list (`list_gemv`) |
| capture | none, fused (values and bitmask, same launch), producer (made with the list, by the kernel before) |
| us_p20, us_p50, us_p80 | microseconds a call |
| roofline_share | bytes of the kept rows, x and y over pure-read bandwidth, as a share of us_p50 |
| max_error | max abs error against float64 over max abs output |
| bitwise_repeatable | six runs gave the same bits |

TEAL's function also zeroes its output, which its atomics add to; its configuration is the fastest of its own list
for every shape and sparsity.  It writes fp16 only, so it is timed in fp16 only.
"""

# Shape suffixes: K = input features, N = output features.

import argparse
import csv
import importlib.util
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import triton
from record import KERNELS, source_version
from shapes import FUSED_SHAPES, SHAPES

from sparsetrace_kernels.configs import active_table, choose_config
from sparsetrace_kernels.gemv_problem import Problem
from sparsetrace_kernels.timing import num_copies, read_floor, time_in_graph
from sparsetrace_kernels.torch_ops import keep_above, threshold_bits_for

RESULTS = Path(__file__).parent / "results" / "gemv.csv"
COLUMNS = [
    *("gpu", "torch", "triton", "commit", "k", "n", "dtype", "sparsity", "impl", "capture"),
    *("us_p20", "us_p50", "us_p80", "roofline_share", "max_error", "bitwise_repeatable"),
]

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65, 0.75, 0.9)
NUM_REPLAYS = 20
# large enough that the launch does not count
READ_BYTES = 1 << 31


def load_teal(checkout: Path) -> ModuleType:
    """Import the kernel file of a TEAL checkout, without its torch.compile wrapper and what that needs."""
    sys.modules["compile_wrapper"] = SimpleNamespace(BaseKernel=object)
    spec = importlib.util.spec_from_file_location("teal_sparse_gemv", checkout / "kernels" / "sparse_gemv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def teal_calls(teal: ModuleType, problem: Problem, threshold: float, sparsity: float, config) -> list:
    """Call TEAL's kernel under one of its own configurations, with the zeroing that its hook does."""
    kernel = teal.splitk_sparse_gemv_kernel.fn
    block_k, block_n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    grid = (triton.cdiv(problem.N, block_n), triton.cdiv(problem.K, block_k))
    y_N = torch.empty(problem.N, dtype=torch.float16, device=problem.x_K.device)

    def call(weight_KN):
        y_N.zero_()
        kernel[grid](
            y_N, weight_KN, problem.x_K, threshold, problem.N, problem.K, problem.N // 16, problem.K // 16,
            BATCHSIZE=1, SPARSITY_BIN=0, BLOCK_N=block_n, BLOCK_M=block_k, num_warps=config.num_warps,
        )  # fmt: skip
        return y_N

    return [lambda w=w: call(w) for w in problem.rotate(sparsity)]


class Recorder:
    """Times calls, checks them, and appends rows to the CSV."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.bytes_per_us = READ_BYTES / read_floor(READ_BYTES, device)
        commit = source_version(KERNELS)
        self.where = [torch.cuda.get_device_name(device), torch.__version__, triton.__version__, commit]
        self.us: dict[tuple, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")

    def record(self, problem: Problem, sparsity: float, impl: str, capture: str, calls: list, ref_N, num_kept) -> None:
        p20, p50, p80 = time_in_graph(calls, NUM_REPLAYS)
        outputs = [calls[0]().clone() for _ in range(6)]
        error = float((outputs[0].double() - ref_N).abs().max() / ref_N.abs().max())
        repeatable = all(torch.equal(outputs[0], y_N) for y_N in outputs)
        needed_bytes = problem.dtype.itemsize * (num_kept * problem.N + problem.K + problem.N)
        dtype = str(problem.dtype).removeprefix("torch.")
        row = [*self.where, problem.K, problem.N, dtype, sparsity, impl, capture, f"{p20:.3f}", f"{p50:.3f}",
               f"{p80:.3f}", f"{needed_bytes / self.bytes_per_us / p50:.3f}", f"{error:.2e}", repeatable]  # fmt: skip
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        self.us[dtype, problem.K, problem.N, sparsity, impl, capture] = p50


def measure(recorder: Recorder, problem: Problem, sparsities: tuple[float, ...], teal: ModuleType | None) -> None:
    """Record every implementation for one shape and dtype."""
    table = active_table(torch.cuda.get_device_name(problem.x_K.device))
    dense = min(problem.dense_calls(), key=lambda calls: time_in_graph(calls, 5)[1])
    exact_KN = problem.weights[0].double()
    recorder.record(problem, 0.0, "dense", "none", dense, problem.x_K.double() @ exact_KN, problem.K)
    for sparsity in sparsities:
        bits_S = threshold_bits_for(problem.x_K, sparsity)
        keep_K = keep_above(problem.x_K, bits_S)
        num_kept = int(keep_K.sum())
        ref_N = (problem.x_K.double() * keep_K) @ exact_KN
        if teal is not None and problem.dtype == torch.float16:
            threshold = float(bits_S.to(torch.int16).view(torch.float16))
            tried = [
                teal_calls(teal, problem, threshold, sparsity, config)
                for config in teal.splitk_sparse_gemv_kernel.configs
            ]
            best = min(tried, key=lambda calls: time_in_graph(calls, 3, min_calls=8)[1])
            recorder.record(problem, sparsity, "teal", "none", best, ref_N, num_kept)
        single = choose_config("single", problem.K, problem.N, problem.dtype, sparsity, table)
        for capture in ("none", "fused"):
            calls = problem.calls("single", sparsity, single, capture=capture == "fused")
            recorder.record(problem, sparsity, "single", capture, calls, ref_N, num_kept)
        config = choose_config("list", problem.K, problem.N, problem.dtype, sparsity, table)
        calls = problem.calls("list", sparsity, config)
        recorder.record(problem, sparsity, "list", "producer", calls, ref_N, num_kept)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summarize(us: dict[tuple, float]) -> None:
    """Print geometric means over the shapes of the bars: speed against TEAL and dense, and of bf16 against fp16."""
    ratios = defaultdict(list)
    for (dtype, k, n, sparsity, impl, capture), time in us.items():
        if (k, n) not in SHAPES or (impl, capture) not in (("single", "fused"), ("list", "producer")):
            continue
        teal = us.get((dtype, k, n, sparsity, "teal", "none"))
        if teal is not None:
            ratios[sparsity, impl, "vs teal"].append(teal / time)
        if dtype == "float16":
            ratios[sparsity, impl, "vs dense"].append(us[dtype, k, n, 0.0, "dense", "none"] / time)
        half = us.get(("float16", k, n, sparsity, impl, capture))
        if dtype == "bfloat16" and half is not None:
            ratios[sparsity, impl, "bf16 / fp16 time"].append(time / half)
    print(f"{'sparsity':>8} {'impl':>6} {'ratio':>16} {'geomean':>8} {'min':>6} {'max':>6}")
    for (sparsity, impl, name), values in sorted(ratios.items(), key=lambda item: item[0][::-1]):
        print(f"{sparsity:8} {impl:>6} {name:>16} {geometric_mean(values):8.3f} {min(values):6.3f} {max(values):6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teal", type=Path, help="checkout of FasterDecoding/TEAL to time beside ours")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to append to")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--no-fused", action="store_true", help="leave out the fused q|k|v and gate|up shapes")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    teal = load_teal(arguments.teal) if arguments.teal else None
    recorder = Recorder(arguments.out, device)
    print(f"pure read {recorder.bytes_per_us / 1e3:.0f} GB/s")
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        for K, N in SHAPES + ([] if arguments.no_fused else FUSED_SHAPES):
            copies = num_copies((1 - max(SPARSITIES)) * K * N * dtype.itemsize, device)
            measure(recorder, Problem(K, N, dtype, copies, device), SPARSITIES, teal)
    summarize(recorder.us)


if __name__ == "__main__":
    main()
