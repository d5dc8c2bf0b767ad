"""The order in which a workload's rows were, or could be, multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.files import InputError
from sparsetrace.ragged import runs
from sparsetrace.rows import Rows
from sparsetrace.schema import FORMATS, mask_bytes

if TYPE_CHECKING:
    from sparsetrace.reader import Workload

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
    _window: dict[tuple[int, str], Rows]
    _start: int

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
        rows, start = self._window[key], self._start
        stop = start + len(self.token)
        offsets = rows.offsets[start : stop + 1]
        bits = None if rows.bits is None else rows.bits[offsets[0] : offsets[-1]]
        out_mask = None if rows.out_mask is None else rows.out_mask[start:stop]
        return Rows(
            rows.layer,
            rows.matrix,
            rows.features,
            rows.dtype,
            self.token,
            rows.mask[start:stop],
            offsets - offsets[0],
            bits,
            out_mask,
        )


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
        window = {leaf: workload.matrix(*leaf, chosen, values=values) for leaf in workload.leaves}
        for at in range(first, last):
            start, stop = int(edges[at]), int(edges[at + 1])
            yield Step(int(group[start]), int(step[start]), token[start:stop], window, start - int(edges[first]))
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
