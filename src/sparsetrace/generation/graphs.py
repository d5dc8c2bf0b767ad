"""CUDA graphs of what the model launches: one for the decoding step, and one for each recurring shape of a pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Returned = TypeVar("Returned")

# Graphs of passes that are kept: those of the shapes seen last.
KEPT_PASSES = 8


def captured_graph(run: Callable[[], Returned], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Returned]:
    """A CUDA graph of what `run` launches, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    # a writing thread may be at work meanwhile
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        returned = run()
    return graph, returned


class GraphedPass:
    """A pass of one shape: launch by launch the first time, which compiles, and as a CUDA graph from the second on."""

    def __init__(self, run: Callable[..., Tensor], pool: Any) -> None:
        self._run, self._pool = run, pool
        self._ran = False
        self._inputs: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Hidden states, which hold until the next pass."""
        if not self._ran:
            self._ran = True
            return self._run(*inputs)
        if self.graph is None:
            self._inputs = [given.clone(memory_format=torch.contiguous_format) for given in inputs]
            self.graph, self._hidden = captured_graph(lambda: self._run(*self._inputs), self._pool)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return self._hidden


class GraphedPasses:
    """The passes of the shapes seen last; their graphs take turns in one pool of memory.

    Args:
        cuda: whether there is a GPU; without one nothing can be run.

    Attributes:
        passes: by shape, in the order of their last use.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self.clear()

    def clear(self) -> None:
        """Forget every graph, and the memory that they share."""
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self.passes: dict[tuple[int, int], GraphedPass] = {}

    def run(self, shape: tuple[int, int], run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run a pass.

        Args:
            shape: what tells it from others.
            run: launches it, on the inputs.
            inputs: of shapes that follow from `shape`.
        """
        taken = self.passes.pop(shape) if shape in self.passes else GraphedPass(run, self._pool)
        self.passes[shape] = taken
        if len(self.passes) > KEPT_PASSES:
            del self.passes[next(iter(self.passes))]
        return taken(*inputs)
