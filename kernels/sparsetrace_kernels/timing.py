"""Timing of short GPU calls by replays of a CUDA graph over rotating inputs, without launch gaps or L2 hits."""

# Shape suffixes: K = input features, N = output features.

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

# bytes that a graph touches, as a multiple of the L2 cache, so that nothing that a replay leaves there serves the next
L2_MULTIPLE = 2.5

# calls in one graph; with fewer, the gap between two replays adds to the time of a call
MIN_CALLS = 40


def num_copies(touched_bytes: float, device: torch.device) -> int:
    """Return how many rotating copies of a weight a graph needs if each call reads `touched_bytes` of its copy."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, int(L2_MULTIPLE * l2_bytes / touched_bytes) + 1))


def time_in_graph(
    calls: Sequence[Callable[[], object]], num_replays: int, min_calls: int = MIN_CALLS
) -> tuple[float, float, float]:
    """Time calls on the current GPU by replays of one graph that holds them all.

    Args:
        calls: one for each copy of the inputs, taken in turn; the first also runs once before.
        num_replays: replays measured, after one that is not.
        min_calls: minimum number of calls in the graph.

    Returns:
        20th, 50th and 80th percentile over the replays, microseconds per call.
    """
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    num_rounds = -(-min_calls // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(num_rounds):
            for call in calls:
                call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [1e3 * a.elapsed_time(b) / (num_rounds * len(calls)) for a, b in itertools.pairwise(events)]
    if num_replays < 5:
        return min(times), statistics.median(times), max(times)
    p20, *_, p80 = statistics.quantiles(times, n=5)
    return p20, statistics.median(times), p80


@triton.jit
def _read_kernel(x_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], dtype=tl.int32)
    for i_row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=4):
        b_sum += tl.load(x_ptr + tl.cast(i_row, tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(b_sum, axis=0))


def read_floor(num_bytes: int, device: torch.device) -> float:
    """Measure the time of one launch that only reads `num_bytes`: the least over launch shapes, in microseconds."""
    block = 4096
    num_rows = max(1, round(num_bytes / (4 * block)))
    copies = num_copies(num_rows * 4 * block, device)
    buffers = [torch.randint(0, 100, (num_rows * block,), dtype=torch.int32, device=device) for _ in range(copies)]
    best = math.inf
    for programs_per_sm in (2, 4, 8, 16):
        num_programs = programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count
        out = torch.empty(num_programs, dtype=torch.int32, device=device)
        for num_warps in (4, 8):
            calls = [
                lambda x=x, out=out, grid=(num_programs,), num_warps=num_warps: _read_kernel[grid](
                    x, out, num_rows, BLOCK=block, num_warps=num_warps
                )
                for x in buffers
            ]
            best = min(best, time_in_graph(calls, 5)[1])
    return best
