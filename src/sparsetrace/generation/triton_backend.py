"""The fast backend: the decoder as Triton kernels, each step and each recurring pass one CUDA graph."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sparsetrace.generation.backend import Backend, Chunk, EngineSetup
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.decode_state import DecodeState
from sparsetrace.generation.fused import FusedDecoder
from sparsetrace.generation.graphs import GraphedPasses, captured_graph
from sparsetrace.generation.plan import GroupPlan, cache_length
from sparsetrace.model.decoder import KVCache
from sparsetrace_kernels.checks import new_arrivals
from sparsetrace_kernels.configs import active_table
from sparsetrace_kernels.draw_tokens import draw_tokens
from sparsetrace_kernels.torch_ops import DENSE

# Decoding steps between two polls, and polls that the device may be behind.
GPU_POLL_EVERY, GPU_POLLS_BEHIND = 8, 1


class TritonBackend(Backend):
    """Runs `FusedDecoder`; memory that CUDA graphs point to is laid out once for all groups.

    Attributes:
        decoder: the kernels.
        graphs: whether CUDA graphs are used; the interpreter on a CPU has none.
        passes: graphs of passes over known tokens, by their length and that of the cache.
    """

    def __init__(self, setup: EngineSetup, block_rows: int) -> None:
        super().__init__(setup, block_rows)
        self.graphs = setup.device.type == "cuda"
        self.passes = GraphedPasses(self.graphs)
        self._step_graph: torch.cuda.CUDAGraph | None = None
        table = active_table(torch.cuda.get_device_name(setup.device)) if self.graphs else None
        positions = cache_length(setup.positions)
        self.decoder = FusedDecoder(setup.model, setup.patch, positions, table)
        self._lay_out(positions)
        # the part of the cache that the present group uses
        self._used = self._cache
        temperature = setup.decoding.temperature
        divisor = torch.tensor([temperature], dtype=torch.float64, device=setup.device) if temperature else None
        self._draw_tokens = partial(draw_tokens, temperature=divisor, arrivals_C=new_arrivals(setup.device))

    def polling(self) -> tuple[int, int]:
        return (GPU_POLL_EVERY, GPU_POLLS_BEHIND) if self.graphs else (1, 0)

    def prepare(self, plan: GroupPlan, recorder: Recorder | None) -> None:
        if plan.cache_positions > self._positions:
            self.decoder.extend(plan.cache_positions)
            self._lay_out(plan.cache_positions)
        if recorder is not self._recorder:
            self.decoder.capture_into(recorder)
            self._recorder = recorder
            self._forget_graphs()
        if self._step_graph is None and self.graphs and plan.steps:
            self.state.rest()
            side = torch.cuda.Stream(self.setup.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # compiles, and takes all memory, outside the capture, where running out of it can be caught
                self._feed_next()
            torch.cuda.current_stream().wait_stream(side)
            self._step_graph, _ = captured_graph(self._feed_next)
        self._used = self._cache.first(plan.cache_positions)
        self._used.k_LBSGD.zero_()
        self._used.v_LBSGD.zero_()

    def forward(self, chunk: Chunk, rows_n: Tensor | None) -> Tensor:
        rows_n = self._nowhere(chunk.tokens.numel()) if rows_n is None else rows_n
        if chunk.sparsified is not True:
            rows_n = torch.where(chunk.sparsified.view(-1), rows_n, DENSE)
        cache = self._used

        def run(tokens_BT: Tensor, positions_BT: Tensor, rows_n: Tensor) -> Tensor:
            return self.decoder(tokens_BT, positions_BT, cache, rows_n, one=False)

        inputs = chunk.tokens, chunk.positions, rows_n
        # the memory of a graph is its own, so passes of more rows are launched one by one
        if not self.graphs or len(rows_n) > self.block_rows:
            return run(*inputs)
        return self.passes.run((chunk.tokens.shape[1], cache.k_LBSGD.shape[2]), run, *inputs)

    def step(self) -> None:
        if self.graphs:
            assert self._step_graph is not None
            self._step_graph.replay()
        else:
            self._feed_next()

    def _decode(self, tokens_B1: Tensor, positions_B1: Tensor, rows_B: Tensor | None) -> Tensor:
        batch = len(tokens_B1)
        rows_B = self._nowhere(batch) if rows_B is None else rows_B
        return self.decoder(tokens_B1, positions_B1, self._cache, rows_B, one=batch == 1)

    def _draw(self, hidden_BC: Tensor) -> tuple[Tensor, Tensor]:
        if self.setup.decoding.top_k:
            return super()._draw(hidden_BC)
        logits_BV = functional.linear(hidden_BC, self.setup.model.lm_head)
        return self._draw_tokens(logits_BV, self.state.uniform_BP, self.state.position_B)

    def _lay_out(self, positions: int) -> None:
        setup = self.setup
        batch = setup.batching.batch_size
        self._positions = positions
        self._cache: KVCache = KVCache(setup.model.config, batch, positions, setup.device)
        self.state = DecodeState(batch, positions, setup.ending, setup.device)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._step_graph = None
        self.passes.clear()

    def _nowhere(self, rows: int) -> Tensor:
        """Ring rows of what is masked and not captured."""
        return torch.full((rows,), -1, dtype=torch.int64, device=self.setup.device)
