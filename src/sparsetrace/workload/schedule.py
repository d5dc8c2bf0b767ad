"""The order in which a workload's rows were, or could be, multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.ragged import runs
from sparsetrace.formats.rows import Rows

if TYPE_CHECKING:
    from sparsetrace.workload.reader import Workload

# Bytes of operands that a replay holds.
WINDOW_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model: rows that were multiplied together.

    Args:
        group, step: which.
        token: int64 [T], in the order of the slots.
    """

    group: int
    step: int
    token: np.ndarray
    _window: dict[tuple[int, str], _Held]
    _start: int
    _number: int

    def __repr__(self) -> str:
        tokens, operands = f"{len(self.token):,} tokens", f"{len(self._window)} operands each"
        return f"Step(group={self.group}, step={self.step}, {tokens}, {operands})"

    def __iter__(self) -> Iterator[Rows]:
        """The operands of each layer and matrix, in the order of execution."""
        for key in self._window:
            yield self[key]

    def __getitem__(self, key: tuple[int, str]) -> Rows:
        """Operands of one layer and matrix, T rows.

        Raises:
            InputError: no such layer or matrix in the selection that is replayed.
        """
        if key not in self._window:
            raise InputError(f"replay: layer and matrix must be among those of the selection, got {key}")
        held, start = self._window[key], self._start
        rows, stop = held.rows, start + len(self.token)
        bits = None if rows.bits is None else rows.bits[rows.offsets[start] : rows.offsets[stop]]
        out_mask = None if rows.out_mask is None else rows.out_mask[start:stop]
        return Rows(
            rows.layer,
            rows.matrix,
            rows.features,
            rows.dtype,
            self.token,
            rows.mask[start:stop],
            held.offsets[start + self._number : stop + self._number + 1],
            bits,
            out_mask,
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """Operands of one layer and matrix in a window.

    Args:
        rows: of all steps, one after another.
        offsets: int64, of the rows of each step from 0 on, one after another: one more than rows for each step.
    """

    rows: Rows
    offsets: np.ndarray


def replay(workload: Workload, values: bool, window_bytes: int = WINDOW_BYTES) -> Iterator[Step]:
    """Walk a workload in the order of execution.

    Args:
        workload: any selection.
        values: read the values too; otherwise masks only.
        window_bytes: of operands held at a time; it changes speed and memory, nothing else.
    """
    table = workload.fed().sort_by([("group", "ascending"), ("step", "ascending"), ("slot", "ascending")])
    token, group, step = (table[name].to_numpy() for name in ("token", "group", "step"))
    edges = np.array([start for start, _ in runs(group.astype(np.int64) << 32 | step)] + [len(token)])
    held = 0
    for leaf in workload.leaves:
        features = workload.features(*leaf)
        held += mask_bytes(features) + 8
        if values:
            held += features * FORMATS[workload.manifest["dtype"]].bits.itemsize
    # arranging a leaf's rows takes a second copy of that leaf, which is small beside the window
    room = max(1, window_bytes // max(held, 1))
    first = 0
    while first < len(edges) - 1:
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + room, side="right")) - 1)
        chosen = token[edges[first] : edges[last]]
        starts = edges[first : last + 1] - edges[first]
        # the ends of steps are the starts of those behind them
        ends = np.sort(np.concatenate([np.arange(starts[-1] + 1), starts[1:-1]]))
        begins = np.repeat(starts[:-1], np.diff(starts) + 1)
        window = {}
        for leaf in workload.leaves:
            rows = workload.matrix(*leaf, chosen, values=values)
            window[leaf] = _Held(rows, rows.offsets[ends] - rows.offsets[begins])
        for number, start in enumerate(starts[:-1].tolist()):
            at = edges[first] + start
            tokens = token[at : edges[first + number + 1]]
            yield Step(int(group[at]), int(step[at]), tokens, window, start, number)
        first = last


def batches(workload: Workload, size: int | None) -> Iterator[np.ndarray]:
    """Token numbers of rows to be multiplied together, int64 [up to `size`] each.

    Args:
        workload: any selection.
        size: None gives the batches that were run: equal (group, step). A number regroups: the sequences are taken
            `size` at a time, in order, and the n-th decode tokens of those that have one form a batch; a prompt's
            tokens, and those of a replayed text, form batches of `size` consecutive ones.
    """
    table = workload.fed()
    if size is None:
        table = table.sort_by([("group", "ascending"), ("step", "ascending"), ("slot", "ascending")])
        token = table["token"].to_numpy()
        key = table["group"].to_numpy().astype(np.int64) << 32 | table["step"].to_numpy()
        for start, stop in runs(key):
            yield token[start:stop]
        return
    table = table.sort_by("token")
    token, sequence = table["token"].to_numpy(), table["sequence"].to_numpy()
    decode = pc.equal(table["phase"].cast(pa.string()), "decode").to_numpy()
    whole, one = np.flatnonzero(~decode), np.flatnonzero(decode)
    for start, stop in runs(sequence[whole]):
        for at in range(start, stop, size):
            yield token[whole[at : min(at + size, stop)]]
    bounds = list(runs(sequence[one]))
    for at in range(0, len(bounds), size):
        bundle = bounds[at : at + size]
        nth = np.concatenate([np.arange(stop - start) for start, stop in bundle])
        numbers = token[one[bundle[0][0] : bundle[-1][1]]]
        order = np.argsort(nth, kind="stable")
        for start, stop in runs(nth[order]):
            yield numbers[order[start:stop]]
