"""The rows of a shard in the order of their token numbers, by an external sort.

Blocks hold rows in the order of execution. The token numbers are split into ranges of at most `ORDER_ROWS` rows, which
are sorted one at a time; the sorted order of a longer shard is kept in a file.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.formats.dump import Block

# Rows that are sorted at a time, and up to which an order is kept in memory.
ORDER_ROWS = 1 << 20
# Peak memory per row while it is sorted.
SORT_BYTES = 100
# Cells of the histogram of token numbers by which a range of too many rows is split.
ORDER_CELLS = 1 << 16
# Index columns of a row, its block, and its place among the operand's rows in that block.
ORDER = np.dtype([("token", "<i8"), ("sequence", "<i4"), ("position", "<i4"), ("block", "<i4"), ("row", "<i4")])


class Order:
    """Rows in the order of their tokens: records of `ORDER`, read by slices, also from several threads at once.

    Args:
        blocks: all blocks of the shard.
        folder: where the order of a longer shard is kept, in an unnamed file that no kill can leave behind.
        operand: prefix of an operand that has rows for some tokens only; None orders the rows of all captured tokens.

    Attributes:
        distinct: number of distinct tokens.
    """

    def __init__(self, blocks: list[Block], folder: Path, operand: str | None = None) -> None:
        tokens = _Tokens(blocks, operand)
        self.distinct = 0
        self._first, self._rows = 0, tokens.rows
        self._held = np.empty(0, ORDER)
        self._file: IO[bytes] | None = None
        if self._rows > ORDER_ROWS:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this object
        for low, high in tokens.ranges():
            rows = tokens.sorted(low, high)
            self.distinct += 1 + int(np.count_nonzero(np.diff(rows["token"]))) if len(rows) else 0
            if self._file is None:
                self._held = rows
            else:
                self._file.write(rows.data)
        if self._file is not None:
            self._file.flush()

    def within(self, chosen: slice) -> "Order":
        """The order of adjacent rows alone, over the same memory or file."""
        part = copy(self)
        start, stop, _ = chosen.indices(self._rows)
        part._first, part._rows = self._first + start, stop - start
        return part

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, chosen: slice) -> np.ndarray:
        start, stop, _ = chosen.indices(self._rows)
        start, stop = self._first + start, self._first + stop
        if self._file is None:
            return self._held[start:stop]
        size = ORDER.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), (stop - start) * size, start * size), ORDER)

    def token_range(self) -> tuple[int | None, int | None]:
        """First and last token; None where there are no rows."""
        if not self._rows:
            return None, None
        return int(self[0:1]["token"][0]), int(self[self._rows - 1 : self._rows]["token"][0])


class Orders:
    """The order of every operand of a shard.

    Operands that have rows for all captured tokens share one. Any other is sorted when it is first asked for, one at a
    time; only the latest of these is kept, since all files of one operand are written before those of the next.

    Attributes:
        all_tokens: the order of the rows of all captured tokens.
    """

    def __init__(self, blocks: list[Block], folder: Path) -> None:
        self._blocks = blocks
        self._folder = folder
        self.all_tokens = Order(blocks, folder)
        # tokens without a row, for each operand that may lack some
        self._missing: Counter[str] = Counter()
        for block in blocks:
            for operand, rows in block.partial.items():
                self._missing[operand] += block.rows - rows
        self._lock = Lock()
        self._latest: tuple[str, Order] | None = None

    def rows(self, operand: str) -> int:
        """Number of rows of an operand, by its prefix."""
        return len(self.all_tokens) - self._missing.get(operand, 0)

    def is_partial(self, operand: str) -> bool:
        """Whether an operand may have rows for some tokens only."""
        return operand in self._missing

    def of(self, operand: str) -> Order:
        """Order of the rows of an operand, by its prefix."""
        if not self.is_partial(operand):
            return self.all_tokens
        with self._lock:
            if self._latest is None or self._latest[0] != operand:
                self._latest = None
                self._latest = (operand, Order(self._blocks, self._folder, operand))
            return self._latest[1]


class _Tokens:
    """Token numbers of an operand's rows in a dump's blocks, read one range at a time."""

    def __init__(self, blocks: list[Block], operand: str | None) -> None:
        self.blocks = blocks
        self.operand = operand
        # number of rows, lowest and highest token of each block
        self.spans = np.zeros((len(blocks), 3), np.int64)
        for at, block in enumerate(blocks):
            if operand is not None:
                _check_rows(block, operand)
            if len(token := self._column(block, "token")):
                self.spans[at] = len(token), token.min(), token.max()
            block.release()

    @property
    def rows(self) -> int:
        return int(self.spans[:, 0].sum())

    def ranges(self) -> Iterable[tuple[int, int]]:
        """Ascending ranges of numbers, ends included, that cover all tokens with up to `ORDER_ROWS` rows each."""
        filled = self.spans[self.spans[:, 0] > 0]
        if len(filled):
            yield from self._ranges(int(filled[:, 1].min()), int(filled[:, 2].max()), int(filled[:, 0].sum()))

    def _ranges(self, low: int, high: int, rows: int) -> Iterable[tuple[int, int]]:
        if rows <= ORDER_ROWS or low == high:
            yield low, high
            return
        width = -(-(high - low + 1) // ORDER_CELLS)
        counts = np.zeros(ORDER_CELLS, np.int64)
        for _, block in self._within(low, high):
            token = self._column(block, "token")
            token = token[(token >= low) & (token <= high)]
            counts += np.bincount((token - low) // width, minlength=ORDER_CELLS)
            block.release()
        filled = np.flatnonzero(counts).tolist()
        first, held = filled[0], 0
        for cell, following in zip(filled, [*filled[1:], -1], strict=True):
            held += int(counts[cell])
            if following < 0 or held + counts[following] > ORDER_ROWS:
                yield from self._ranges(low + first * width, min(high, low + (cell + 1) * width - 1), held)
                first, held = following, 0

    def sorted(self, low: int, high: int) -> np.ndarray:
        """Records of `ORDER` of the tokens of a range, ascending."""
        pieces = [np.empty(0, ORDER)]
        for number, block in self._within(low, high):
            token = self._column(block, "token")
            chosen = np.flatnonzero((token >= low) & (token <= high))
            piece = np.empty(len(chosen), ORDER)
            for name in ("token", "sequence", "position"):
                piece[name] = self._column(block, name)[chosen]
            piece["block"], piece["row"] = number, chosen
            pieces.append(piece)
            block.release()
        rows = np.concatenate(pieces)
        return rows[np.argsort(rows["token"], kind="stable")]

    def _within(self, low: int, high: int) -> Iterable[tuple[int, Block]]:
        rows, first, last = self.spans.T
        for number in np.flatnonzero((rows > 0) & (first <= high) & (last >= low)).tolist():
            yield number, self.blocks[number]

    def _column(self, block: Block, name: str) -> np.ndarray:
        """An index column of the operand's rows in one block."""
        column = block[f"rows.{name}"]
        if self.operand is None or self.operand not in block.partial:
            return column
        return column[block[f"{self.operand}.rows"]]


def _check_rows(block: Block, operand: str) -> None:
    """Refuse a block that names rows it does not have, or one of them twice."""
    if not block.partial.get(operand):
        return
    rows = block[f"{operand}.rows"]
    if rows[0] < 0 or rows[-1] >= block.rows or (np.diff(rows) <= 0).any():
        raise InputError(
            f"pack: {operand}.rows of {block.path} must ascend below {block.rows}, got another order: generate it again"
        )
