"""The reference backend: the model itself, in eager mode, on any device."""

from torch import Tensor

from sparsetrace.generation.backend import Backend, Chunk
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.decode_state import DecodeState
from sparsetrace.generation.plan import GroupPlan
from sparsetrace.model.decoder import KVCache


class TorchBackend(Backend):
    """Runs the patched model; a group has a cache and a state of its own."""

    def prepare(self, plan: GroupPlan, recorder: Recorder | None) -> None:
        setup = self.setup
        self._recorder = recorder
        self._cache = KVCache(setup.model.config, plan.batch_size, plan.cache_positions, setup.device)
        self.state = DecodeState(plan.batch_size, plan.cache_positions, setup.ending, setup.device)

    def forward(self, chunk: Chunk, rows_n: Tensor | None) -> Tensor:
        return self._run(chunk.tokens, chunk.positions, chunk.sparsified, chunk.dense, rows_n is not None)

    def step(self) -> None:
        self._feed_next()

    def _decode(self, tokens_B1: Tensor, positions_B1: Tensor, rows_B: Tensor | None) -> Tensor:
        return self._run(tokens_B1, positions_B1, True, None, rows_B is not None)

    def _run(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        sparsified: Tensor | bool,
        dense_BT: Tensor | None,
        records: bool,
    ) -> Tensor:
        """One pass, [B, T, C]; the recorder takes the rows that it placed last if `records`."""
        patch = self.setup.patch
        # a method need not be asked about rows that are not there
        patch.sparsified_BT = sparsified if not isinstance(sparsified, Tensor) or bool(sparsified.any()) else False
        patch.dense_BT = dense_BT if dense_BT is not None and bool(dense_BT.any()) else None
        recorder = self._recorder if records else None
        patch.record = recorder.record if recorder is not None else None
        patch.record_outputs = recorder.record_outputs if recorder is not None else None
        hidden: Tensor = self.setup.model(tokens_BT, positions_BT, self._cache)
        return hidden


def reference_of(backend: Backend, plan: GroupPlan) -> TorchBackend:
    """The model itself, prepared for a group that another backend has run, recording nothing."""
    reference = TorchBackend(backend.setup, backend.block_rows)
    reference.prepare(plan, None)
    return reference
