"""The record of what was fed: a row for each position, in the order of execution."""

# Shape suffixes: B slots, T positions of one pass.

import numpy as np
import pyarrow as pa

from sparsetrace.generation.plan import GroupPlan, KnownTokens, sampled


class FedTokens:
    """Columns of `tables.TOKENS`, token and text aside, of one group.

    Args:
        plan: of the group.
        every: positions that are a multiple of this are captured, of those that are sparsified; None captures none.
    """

    def __init__(self, plan: GroupPlan, every: int | None) -> None:
        self._plan = plan
        self._every = every
        self._columns: list[dict[str, np.ndarray]] = []
        self._step = 0

    def add_pass(self, known: KnownTokens, start: int, stop: int) -> None:
        """Note a pass over known ids, positions [start, stop) of every slot."""
        span = np.s_[:, start:stop]
        slots, columns = np.nonzero(known.real[span])
        parts = (known.positions, known.tokens, known.phase, known.captured, known.sparsified)
        self._add(slots, np.full(len(slots), self._step), *(part_BP[span][slots, columns] for part_BP in parts))
        self._step += 1

    def add_steps(self, chosen: list[list[int]]) -> None:
        """Note what the steps fed, in the order of (step, slot): all tokens that were chosen but the last."""
        counts = np.array([len(ids) - 1 for ids in chosen])
        fed_TB = np.arange(max(int(counts.max()), 0))[:, None] < counts
        steps, slots = np.nonzero(fed_TB)
        position = np.array([feed.known for feed in self._plan.feeds])[slots] + steps
        token_id = np.array([chosen[slot][step] for step, slot in zip(steps, slots, strict=True)])
        captured = np.zeros(len(position), dtype=bool) if self._every is None else sampled(position, self._every)
        phase, sparsified = np.full(len(steps), "decode"), np.ones(len(position), dtype=bool)
        self._add(slots, self._step + steps, position, token_id, phase, captured, sparsified)
        self._step += len(fed_TB)

    def table(self) -> pa.Table:
        """The columns, in the order in which they were noted."""
        names = self._columns[0]
        return pa.table({name: np.concatenate([part[name] for part in self._columns]) for name in names})

    def _add(
        self,
        slots: np.ndarray,
        step: np.ndarray,
        position: np.ndarray,
        token_id: np.ndarray,
        phase: np.ndarray,
        captured: np.ndarray,
        sparsified: np.ndarray,
    ) -> None:
        """Add one entry of each array for each position fed."""
        group = self._plan.group
        self._columns.append(
            {
                "sequence": np.array([sequence.sequence for sequence in group], dtype=np.int32)[slots],
                "position": position.astype(np.int32),
                "token_id": token_id.astype(np.int32),
                "phase": phase,
                "captured": captured,
                "sparsified": sparsified,
                "group": np.full(len(slots), group[0].group, dtype=np.int32),
                "step": step.astype(np.int32),
                "slot": slots.astype(np.int32),
            }
        )
