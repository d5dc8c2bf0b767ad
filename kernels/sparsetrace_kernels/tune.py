"""Measure GEMV configurations on this GPU and make a table of the fastest, in the format of `configs`.

Two rounds for every shape: all candidates at a few sparsities, then the fastest of each at all sparsities, also with
programmatic dependent launch.  Kernels are compiled ahead by worker processes through Triton's disk cache.
"""

# Shape suffixes: K = input features, N = output features, S = column segments, R = ring slots.

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace

import torch
import triton
from torch import Tensor

from sparsetrace_kernels.compact import compact
from sparsetrace_kernels.configs import MAX_CHUNK_K, GemvConfig
from sparsetrace_kernels.list_gemv import launch_list_gemv
from sparsetrace_kernels.partials import new_partials
from sparsetrace_kernels.sparse_gemv import chunk_inputs, launch_sparse_gemv
from sparsetrace_kernels.timing import num_copies, time_in_graph
from sparsetrace_kernels.torch_ops import threshold_bits_for

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65, 0.75, 0.9)
SCREENED = (0.25, 0.5, 0.75, 0.9)
NUM_FINALISTS = 4

# op, dtype name, K, configuration: what one compilation needs to know
Job = tuple[str, str, int, GemvConfig]

# programs of a launch: fewer leave most SMs idle, more only add partial sums
MIN_PROGRAMS, MAX_PROGRAMS = 96, 1 << 14


def candidates(op: str, K: int, N: int) -> list[GemvConfig]:
    """List the configurations worth measuring for a shape, without dependent launch."""
    found: dict[str, GemvConfig] = {}

    def add(config: GemvConfig) -> None:
        if MIN_PROGRAMS <= triton.cdiv(N, config.block_n) * config.split <= MAX_PROGRAMS:
            found[config.encode()] = config

    if op == "single":
        for block_k in (64, 128, 256, 512):
            for block_n in (16, 32, 64, 128):
                for num_warps in (1, 2, 4):
                    if 64 <= block_k * block_n // (32 * num_warps) <= 512:
                        add(GemvConfig("predicated", triton.cdiv(K, block_k), block_k, block_n, num_warps))
    tiles = [
        (block_k, block_n, num_warps)
        for block_k in (32, 64)
        for block_n in (32, 64, 128, 256)
        for num_warps in (1, 2, 4, 8)
    ]
    for split in (2, 3, 4, 8, 11, 16, 22) if op == "single" else (1, 2, 3, 4, 6, 8, 16, 32):
        chunk_k = chunk_inputs(K, split)
        if op == "single" and not 256 <= chunk_k <= MAX_CHUNK_K:
            continue
        for block_k, block_n, num_warps in tiles:
            if op == "single" and triton.next_power_of_2(chunk_k) > 4096 * num_warps:
                continue
            kernel = "compacting" if op == "single" else "list"
            if not 32 <= block_k * block_n // (32 * num_warps) <= 128:
                continue
            plain = GemvConfig(kernel, split, block_k, block_n, num_warps)
            # Triton spreads the stages over the two levels of an indirect load, so fewer leave none for the rows
            pipelined = replace(plain, num_stages=5)
            add(plain if op == "single" else pipelined)
            if block_n >= 16 * num_warps:
                add(replace(pipelined, use_dot=True))
    return list(found.values())


def format_table(document: dict) -> str:
    """Write a table document as JSON with one entry a line, so that two tables compare line by line."""
    entries = ",\n".join("    " + json.dumps(entry) for entry in document["entries"])
    head = "".join(f"  {json.dumps(name)}: {json.dumps(document[name])},\n" for name in document if name != "entries")
    return f'{{\n{head}  "entries": [\n{entries}\n  ]\n}}\n'


class Problem:
    """One shape and dtype on one GPU: rotating weights, an input, a ring."""

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
        """Choose as many weight copies as a graph needs at a sparsity."""
        touched_bytes = (1 - sparsity) * self.K * self.N * self.dtype.itemsize
        return self.weights[: num_copies(max(touched_bytes, 1.0), self.x_K.device)]

    def dense_calls(self) -> list[list[Callable[[], Tensor]]]:
        """Make dense multiplies of each rotating weight, in either layout."""
        weights = self.rotate(0.0)
        transposed = [w.T.contiguous() for w in weights]
        return [
            [lambda w=w: torch.mv(w.T, self.x_K) for w in weights],
            [lambda w=w: torch.mv(w, self.x_K) for w in transposed],
        ]

    def calls(self, op: str, sparsity: float, config: GemvConfig, capture: bool = True) -> list[Callable[[], Tensor]]:
        """Make one call of an op for each rotating weight."""
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


def _compile_worker(job: Job) -> None:
    """Compile into Triton's disk cache, by a launch on a small shape that Triton specialises in the same way."""
    op, dtype_name, K, config = job
    device = torch.device("cuda", torch.cuda.current_device())
    small_k, small = K, config
    if config.kernel == "predicated":
        small_k = config.block_k * min(config.split, 2)
    elif config.kernel == "compacting":
        small_k = chunk_inputs(K, config.split) * min(config.split, 2)
        small = replace(config, split=min(config.split, 2))
    Problem(small_k, 2 * config.block_n, getattr(torch, dtype_name), 1, device).calls(op, 0.5, small)[0]()
    torch.cuda.synchronize()


def _compile_key(op: str, K: int, config: GemvConfig) -> tuple:
    """What Triton compiles anew: all but the split, of which only `one or several` and the chunk's size count."""
    chunk = triton.next_power_of_2(chunk_inputs(K, config.split)) if config.kernel == "compacting" else 0
    return op, replace(config, split=min(config.split, 2)), chunk


def distinct_kernels(jobs: Iterable[Job]) -> list[Job]:
    """Of some jobs, one for each kernel that Triton compiles."""
    return list(
        {(dtype, _compile_key(op, K, config)): (op, dtype, K, config) for op, dtype, K, config in jobs}.values()
    )


def compile_ahead(jobs: Iterable[Job], pool: Executor) -> Iterator[str]:
    """Compile the distinct kernels of jobs, yielding the name of each that is done."""
    distinct = distinct_kernels(jobs)
    for (op, *_), _ in zip(distinct, pool.map(_compile_worker, distinct), strict=True):
        yield f"{op} kernel compiled"


def _screen(problem: Problem, op: str) -> Iterator[GemvConfig]:
    """Yield the fastest candidates at any of the screened sparsities, each also with dependent launch."""
    kept: dict[str, GemvConfig] = {}
    tried = candidates(op, problem.K, problem.N)
    for sparsity in SCREENED:
        times = {}
        for config in tried:
            _, times[config], _ = time_in_graph(problem.calls(op, sparsity, config), num_replays=3, min_calls=8)
        for config in sorted(times, key=times.__getitem__)[:NUM_FINALISTS]:
            kept[config.encode()] = config
    for config in kept.values():
        yield config
        yield replace(config, use_pdl=True)


def tune(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    ops: Sequence[str] = ("single", "list"),
    sparsities: Sequence[float] = SPARSITIES,
    num_workers: int | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Measure configurations on the current GPU.

    Args:
        shapes: (K, N) pairs, N the width of all segments together.
        dtypes: fp16, bf16; one of them will do, since `TuningTable.find` lets one stand in for the other.
        ops: `single`, `list`.
        sparsities: fractions dropped to measure at.
        num_workers: compiling processes, by default one for each CPU.
        report: called with (steps done, steps in all, what was done last), a step being a kernel compiled or an entry
            measured.

    Returns:
        a table document; `format_table` makes a table file of it.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    jobs = distinct_kernels(
        (op, name, K, config) for name in names for op in ops for K, N in shapes for config in candidates(op, K, N)
    )
    num_steps = len(jobs) + len(names) * len(shapes) * len(ops) * len(sparsities)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done, num_steps, what)

    entries = []
    pool = ProcessPoolExecutor(num_workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    try:
        for what in compile_ahead(jobs, pool):
            step(what)
        for dtype, name in zip(dtypes, names, strict=True):
            for K, N in shapes:
                touched_bytes = (1 - max(sparsities)) * K * N * dtype.itemsize
                problem = Problem(K, N, dtype, num_copies(max(touched_bytes, 1.0), device), device)
                for op in ops:
                    finalists = list(_screen(problem, op))
                    # these differ from the candidates in dependent launch alone
                    for _ in compile_ahead(((op, name, K, config) for config in finalists), pool):
                        pass
                    for sparsity in sparsities:
                        times = {
                            config: time_in_graph(problem.calls(op, sparsity, config), num_replays=7)[1]
                            for config in finalists
                        }
                        best = min(times, key=times.__getitem__)
                        entry = {"op": op, "dtype": name, "k": K, "n": N, "sparsity": sparsity}
                        entries.append(entry | {"config": best.encode(), "us": round(times[best], 3)})
                        step(f"{op} {K}x{N} at {sparsity:.0%}: {times[best]:.1f} us")
    finally:
        # an interrupted run does not wait for the hundreds of kernels that are still to be compiled
        pool.shutdown(cancel_futures=True)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": entries,
    }
