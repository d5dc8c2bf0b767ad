"""The order in which a workload's rows were, or could be, multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.ragged import runs
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.sites import Leaf

# Bytes of operands that a replay holds at a time.
WINDOW_BYTES = 256 << 20


class Selection(Protocol):
    """What can be walked: a workload or a part of one, see `reader.Workload`."""

    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def leaves(self) -> list[Leaf]: ...
    @property
    def tokens(self) -> np.ndarray: ...
    def fed(self) -> pa.Table: ...
    def features(self, layer: int | None, matrix: str) -> int: ...
    def tokens_of(self, layer: int | None, matrix: str) -> np.ndarray: ...
    def matrix(self, layer: int | None, matrix: str, tokens: np.ndarray, values: bool) -> Rows: ...


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
    _window: dict[Leaf, _Held]
    _number: int

    def __repr__(self) -> str:
        most = "" if all(held.every_token for held in self._window.values()) else "up to "
        operands = f"{most}{len(self._window)} operands each"
        return f"Step(group={self.group}, step={self.step}, {len(self.token):,} tokens, {operands})"

    def __iter__(self) -> Iterator[Rows]:
        """The operands of each layer and matrix, in the order of execution.

        Matrices in which none of the step's tokens has a row are skipped: nothing was multiplied with them.
        """
        for leaf, held in self._window.items():
            if held.edges[self._number] < held.edges[self._number + 1]:
                yield self[leaf]

    def __getitem__(self, key: Leaf) -> Rows:
        """Operands of one layer and matrix: a row for each token of the step that has one.

        Raises:
            InputError: no such layer or matrix in the selection that is replayed.
        """
        if key not in self._window:
            raise InputError(f"replay: layer and matrix must be among those of the selection, got {key}")
        held = self._window[key]
        rows, start, stop = held.rows, held.edges[self._number], held.edges[self._number + 1]
        bits = None if rows.bits is None else rows.bits[rows.offsets[start] : rows.offsets[stop]]
        out_mask = None if rows.out_mask is None else rows.out_mask[start:stop]
        return Rows(
            rows.layer,
            rows.matrix,
            rows.features,
            rows.dtype,
            self.token if held.every_token else rows.token[start:stop],
            rows.mask[start:stop],
            held.offsets[start + self._number : stop + self._number + 1],
            bits,
            out_mask,
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """Operands of one layer and matrix in a window of steps.

    Args:
        rows: of all steps, one after another.
        edges: where the rows of each step begin, and where those of the last end.
        offsets: int64, where each row's values begin: for each step, counted from 0, one more than it has rows.
        every_token: whether every token of a step has a row.
    """

    rows: Rows
    edges: list[int]
    offsets: np.ndarray
    every_token: bool


def replay(selection: Selection, values: bool, window_bytes: int = WINDOW_BYTES) -> Iterator[Step]:
    """Walk a workload in the order of execution.

    Args:
        selection: what to walk.
        values: False reads the masks alone.
        window_bytes: bytes of operands held at a time; affects speed and memory alone.
    """
    table, steps = _executed(selection)
    token, group, step = (table[name].to_numpy() for name in ("token", "group", "step"))
    edges = np.array([start for start, _ in steps] + [len(token)])
    token_bytes = 0
    for leaf in selection.leaves:
        features = selection.features(*leaf)
        token_bytes += mask_bytes(features) + 8
        if values:
            token_bytes += features * FORMATS[selection.manifest["dtype"]].bits.itemsize
    # the copy that `matrix` makes to arrange one leaf's rows is not counted: it is small beside the window
    room = max(1, window_bytes // max(token_bytes, 1))
    own = {leaf: selection.tokens_of(*leaf) for leaf in selection.leaves}
    first = 0
    while first < len(edges) - 1:
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + room, side="right")) - 1)
        chosen = token[edges[first] : edges[last]]
        starts = edges[first : last + 1] - edges[first]
        whole = _layout(starts)
        window = {}
        for leaf, tokens in own.items():
            every_token = len(tokens) == len(token)
            layout, numbers = whole, chosen
            if not every_token:
                there = np.isin(chosen, tokens, assume_unique=True)
                layout, numbers = _layout(np.concatenate([[0], np.cumsum(there)])[starts]), chosen[there]
            rows = selection.matrix(*leaf, numbers, values=values)
            offsets = rows.offsets[layout.ends] - rows.offsets[layout.begins]
            window[leaf] = _Held(rows, layout.edges, offsets, every_token)
        for number, start in enumerate(starts[:-1].tolist()):
            at = edges[first] + start
            tokens = token[at : edges[first + number + 1]]
            yield Step(int(group[at]), int(step[at]), tokens, window, number)
        first = last


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the rows of each step of a window lie, and how their offsets follow from those of the whole window.

    Args:
        edges: where the rows of each step begin, and where those of the last end.
        ends, begins: int64; the offsets of all steps are `offsets[ends] - offsets[begins]` of the window's rows.
    """

    edges: list[int]
    ends: np.ndarray
    begins: np.ndarray


def _layout(edges: np.ndarray) -> _Layout:
    # a step ends where the next one begins
    ends = np.sort(np.concatenate([np.arange(edges[-1] + 1), edges[1:-1]]))
    return _Layout(edges.tolist(), ends, np.repeat(edges[:-1], np.diff(edges) + 1))


def batches(selection: Selection, size: int | None) -> Iterator[np.ndarray]:
    """Token numbers of rows to be multiplied together, int64 [up to `size`] each.

    Args:
        selection: whose tokens.
        size: None gives the batches that were run: equal (group, step). A number regroups: the sequences are taken
            `size` at a time, in order, and the n-th decode tokens of those that have one form a batch; a prompt's
            tokens, and those of a text that was given, form batches of `size` consecutive ones.
    """
    if size is None:
        table, steps = _executed(selection)
        token = table["token"].to_numpy()
        for start, stop in steps:
            yield token[start:stop]
        return
    table = selection.fed()
    token, sequence = table["token"].to_numpy(), table["sequence"].to_numpy()
    decode = pc.equal(table["phase"].cast(pa.string()), "decode").to_numpy()
    together, one_by_one = np.flatnonzero(~decode), np.flatnonzero(decode)
    for start, stop in runs(sequence[together]):
        for at in range(start, stop, size):
            yield token[together[at : min(at + size, stop)]]
    bounds = list(runs(sequence[one_by_one]))
    for at in range(0, len(bounds), size):
        bundle = bounds[at : at + size]
        nth = np.concatenate([np.arange(stop - start) for start, stop in bundle])
        numbers = token[one_by_one[bundle[0][0] : bundle[-1][1]]]
        order = np.argsort(nth, kind="stable")
        for start, stop in runs(nth[order]):
            yield numbers[order[start:stop]]


def _executed(selection: Selection) -> tuple[pa.Table, list[tuple[int, int]]]:
    """What was fed, in the order of execution, and (start, stop) of the rows of each step."""
    table = selection.fed().sort_by([("group", "ascending"), ("step", "ascending"), ("slot", "ascending")])
    key = table["group"].to_numpy().astype(np.int64) << 32 | table["step"].to_numpy()
    return table, list(runs(key))
