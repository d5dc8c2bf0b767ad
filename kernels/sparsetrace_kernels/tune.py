"""Measure configurations of `list_gemv`, which the engine launches, and make a table of the fastest for `configs`.

Each shape is measured in two rounds: all candidates at a few sparsities, then the fastest of these at all sparsities,
with and without programmatic dependent launch. Worker processes compile the kernels into Triton's disk cache before.
"""

# Shape suffixes: K = input features, N = output features.

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace

import torch
import triton

from sparsetrace_kernels.compact import section_length
from sparsetrace_kernels.configs import GemvConfig
from sparsetrace_kernels.gemv_problem import Problem
from sparsetrace_kernels.timing import num_copies, time_in_graph

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65, 0.75, 0.9)
SCREENED = (0.25, 0.5, 0.75, 0.9)
NUM_FINALISTS = 4

# dtype name, K, configuration: what determines a kernel's compilation
Job = tuple[str, int, GemvConfig]

# programs of a launch: fewer leave most SMs idle, more only add partial sums
MIN_PROGRAMS, MAX_PROGRAMS = 96, 1 << 14

SPLITS = (1, 2, 3, 4, 6, 8, 16, 32)
BLOCKS_N = (32, 64, 128, 256)


def candidates(N: int) -> list[GemvConfig]:
    """List the configurations worth measuring for N output features, without dependent launch."""
    found: dict[str, GemvConfig] = {}
    # a narrow weight has too few columns for more
    least = min(MIN_PROGRAMS, triton.cdiv(N, min(BLOCKS_N)) * max(SPLITS))

    def add(config: GemvConfig) -> None:
        if least <= triton.cdiv(N, config.block_n) * config.split <= MAX_PROGRAMS:
            found[config.encode()] = config

    tiles = [
        (block_k, block_n, num_warps)
        for block_k in (32, 64)
        for block_n in BLOCKS_N
        for num_warps in (1, 2, 4, 8)
        if 32 <= block_k * block_n // (32 * num_warps) <= 128
    ]
    for split in SPLITS:
        for block_k, block_n, num_warps in tiles:
            # Triton spreads the stages over the two levels of an indirect load, so fewer leave none for the rows
            config = GemvConfig("list", split, block_k, block_n, num_warps, num_stages=5)
            add(config)
            if block_n >= 16 * num_warps:
                add(replace(config, use_dot=True))
    return list(found.values())


def format_table(document: dict) -> str:
    """Write a table document as JSON with one entry a line, so that two tables compare line by line."""
    entries = ",\n".join("    " + json.dumps(entry) for entry in document["entries"])
    head = "".join(f"  {json.dumps(name)}: {json.dumps(document[name])},\n" for name in document if name != "entries")
    return f'{{\n{head}  "entries": [\n{entries}\n  ]\n}}\n'


def _compile_worker(job: Job) -> None:
    """Compile into Triton's disk cache, by a launch over few columns that Triton specialises in the same way."""
    dtype_name, K, config = job
    device = torch.device("cuda", torch.cuda.current_device())
    Problem(K, 2 * config.block_n, getattr(torch, dtype_name), 1, device).calls("list", 0.5, config)[0]()
    torch.cuda.synchronize()


def _compile_key(job: Job) -> tuple:
    """Return what Triton compiles anew: of the split only whether there is one, of K only the number of sections."""
    dtype_name, K, config = job
    num_sections = triton.next_power_of_2(triton.cdiv(K, section_length(K)))
    return dtype_name, replace(config, split=min(config.split, 2)), num_sections


def distinct_kernels(jobs: Iterable[Job]) -> list[Job]:
    """Return one job for each kernel that Triton compiles."""
    return list({_compile_key(job): job for job in jobs}.values())


def compile_ahead(jobs: Iterable[Job], pool: Executor) -> Iterator[None]:
    """Compile the distinct kernels of jobs, and yield after each."""
    yield from pool.map(_compile_worker, distinct_kernels(jobs))


def _screen(problem: Problem) -> Iterator[GemvConfig]:
    """Yield the fastest candidates at any of the screened sparsities, each also with dependent launch."""
    kept: dict[str, GemvConfig] = {}
    tried = candidates(problem.N)
    for sparsity in SCREENED:
        times = {}
        for config in tried:
            _, times[config], _ = time_in_graph(problem.calls("list", sparsity, config), num_replays=3, min_calls=8)
        for config in sorted(times, key=times.__getitem__)[:NUM_FINALISTS]:
            kept[config.encode()] = config
    for config in kept.values():
        yield config
        yield replace(config, use_pdl=True)


def tune(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    sparsities: Sequence[float] = SPARSITIES,
    num_workers: int | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Measure configurations on the current GPU.

    Args:
        shapes: (K, N) pairs, N the width of all segments together.
        dtypes: fp16, bf16; one of them is enough, since `TuningTable.find` lets one stand in for the other.
        sparsities: fractions of the inputs dropped.
        num_workers: compiling processes; None starts one for each CPU.
        report: called with (steps done, steps in all, the last step); a step is a kernel compiled or an entry measured.

    Returns:
        a table document, which `format_table` writes as a table file.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    jobs = distinct_kernels((name, K, config) for name in names for K, N in shapes for config in candidates(N))
    num_steps = len(jobs) + len(names) * len(shapes) * len(sparsities)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done, num_steps, what)

    entries = []
    pool = ProcessPoolExecutor(num_workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    try:
        for _ in compile_ahead(jobs, pool):
            step("kernel compiled")
        for dtype, name in zip(dtypes, names, strict=True):
            for K, N in shapes:
                touched_bytes = (1 - max(sparsities)) * K * N * dtype.itemsize
                problem = Problem(K, N, dtype, num_copies(max(touched_bytes, 1.0), device), device)
                finalists = list(_screen(problem))
                # these differ from the candidates in dependent launch alone
                for _ in compile_ahead(((name, K, config) for config in finalists), pool):
                    pass
                for sparsity in sparsities:
                    times = {
                        config: time_in_graph(problem.calls("list", sparsity, config), num_replays=7)[1]
                        for config in finalists
                    }
                    best = min(times, key=times.__getitem__)
                    entry = {"op": "list", "dtype": name, "k": K, "n": N, "sparsity": sparsity}
                    entries.append(entry | {"config": best.encode(), "us": round(times[best], 3)})
                    step(f"{K}x{N} at {sparsity:.0%}: {times[best]:.1f} us")
    finally:
        # an interrupted run does not wait for the hundreds of kernels that are still to be compiled
        pool.shutdown(cancel_futures=True)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": entries,
    }
