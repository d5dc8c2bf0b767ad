"""Running the groups of a shard, at a smaller batch where the GPU's memory does not hold the configured one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Capture
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.engine import Engine, GroupResult
from sparsetrace.generation.prompts import Sequence
from sparsetrace.generation.selection import Selection, refuse_head_without_logits, select


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """A group whose blocks are on disk.

    Args:
        sequences: of the group.
        result: what it produced.
        batch_size: at which it ran.
        blocks: file names.
        rows: of all blocks.
    """

    sequences: list[Sequence]
    result: GroupResult
    batch_size: int
    blocks: list[str]
    rows: int


class Runner:
    """Runs groups, each whole at the configured batch size or at a smaller one, and writes while the next one runs.

    Args:
        setup: of the engine, at the configured batch size.
        capture: what is kept of the operands; None captures nothing.

    Raises:
        InputError: the model has no such layer or matrix, or the backend cannot run it.
    """

    def __init__(self, setup: EngineSetup, capture: Capture | None) -> None:
        self._setup = setup
        self._selection: Selection | None = None
        if capture is not None:
            refuse_head_without_logits(capture, setup.decoding)
            self._selection = select(setup.model.sites, setup.model.config.dtype, setup.patch, capture)
        self._engine: Engine | None = None
        self._recorder: Recorder | None = None

    def run(
        self,
        group: list[Sequence],
        folder: Path,
        seal: Callable[[FinishedGroup], None],
        given: dict[int, list[int]] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Run a group from its start, at half its batch each time that the GPU's memory does not hold it.

        Args:
            group: sequences.
            folder: of the blocks.
            seal: called in the background once all of the group is written; see `wait`.
            given: with `tokens_from: dense`, the ids that follow each sequence's prompt.
            batch_size: to begin with; None takes the configured one.
        """
        batch_size = batch_size or self._setup.batching.batch_size
        while True:
            try:
                result = self._attempt(group, batch_size, folder, given)
                break
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    raise InputError(
                        f"generate: group {group[0].group} must fit the GPU's memory, got too little for a batch of 1: "
                        f"lower max_new_tokens or use a larger GPU ({str(error).splitlines()[0]})"
                    ) from None
            # not in the handler, whose traceback keeps the tensors
            if self._recorder is not None:
                self._recorder.abandon()
            self._dismantle()
            torch.cuda.empty_cache()
            batch_size = -(-batch_size // 2)

        def finish(blocks: list[str], rows: int) -> None:
            seal(FinishedGroup(group, result, batch_size, blocks, rows))

        if self._recorder is None:
            finish([], 0)
        else:
            self._recorder.close(finish)

    def wait(self) -> None:
        """Wait until every group that was run is sealed; raises what writing or sealing raised."""
        if self._recorder is not None:
            self._recorder.wait()

    def shutdown(self) -> None:
        """Leave; what has not begun to be written is not."""
        if self._recorder is not None:
            self._recorder.shutdown()

    def _dismantle(self) -> None:
        """Let the engine and the recorder go, once all that they made is sealed."""
        self.wait()
        self.shutdown()
        self._engine = self._recorder = None

    def _attempt(
        self, group: list[Sequence], batch_size: int, folder: Path, given: dict[int, list[int]] | None
    ) -> GroupResult:
        if self._engine is None or self._engine.setup.batching.batch_size != batch_size:
            # before the next takes as much again
            self._dismantle()
            batching = self._setup.batching.model_copy(update={"batch_size": batch_size})
            self._engine = engine = Engine(replace(self._setup, batching=batching))
            if self._selection is not None:
                self._recorder = Recorder(self._selection, engine.block_rows, engine.device)
        if self._recorder is not None:
            ends = {sequence.sequence: len(sequence.prompt_ids) - 1 for sequence in group}
            self._recorder.open(folder, group[0].group, logits_from=ends)
        parts = []
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            more = [given[sequence.sequence] for sequence in part] if given else None
            parts.append(self._engine.run(part, self._recorder, more))
        return _joined(parts)


def _joined(parts: list[GroupResult]) -> GroupResult:
    """Results of a group's parts as one; their steps count on, since only rows of one step were multiplied together."""
    fed, steps = [], 0
    for part in parts:
        step = pc.add(part.fed["step"], pa.scalar(steps, pa.int32()))
        fed.append(part.fed.set_column(part.fed.column_names.index("step"), "step", step))
        steps = 1 + pc.max(step).as_py()
    return GroupResult(
        [ids for part in parts for ids in part.output_ids],
        [stopped for part in parts for stopped in part.stopped],
        pa.concat_tables(fed),
    )
