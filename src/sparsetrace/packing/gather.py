"""Rows of one operand out of a dump's blocks, in the order of their tokens, with bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.formats.columns import Index
from sparsetrace.formats.dump import Block, array_prefix
from sparsetrace.formats.numbers import FORMATS, NumberFormat, mask_bytes
from sparsetrace.formats.ragged import offsets_of, runs, take
from sparsetrace.formats.row_statistics import RowStatistics, popcounts, row_norms
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import ROW_GROUP_ROWS, row_group_rows
from sparsetrace.packing.order import Order

# Bytes of the dump that one thread maps before it releases the blocks.
RELEASE_BYTES = 32 << 20
# Blocks that the rows of a piece may lie in. From more of them, only `PIECE_ROWS` rows are gathered at a time.
MAPPED_BLOCKS = 64
PIECE_ROWS = ROW_GROUP_ROWS[0]
# Memory that the system maps around the bytes of one row, which lie in two places: mask and values.
FAULT_BYTES = 2 << 16


def operand_prefix(matrix: dict[str, Any]) -> str:
    """First part of the names of the arrays of the operand that a matrix of the dump manifest reads."""
    return array_prefix(matrix["layer"], matrix["held_by"])


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand of the dump, and those of the matrices reading it that get files.

    Args:
        matrices: entries of the dump manifest's `matrices`.
        rows: number of rows.
        share: fraction of the dump's bytes that the operand takes, about.
    """

    matrices: tuple[dict[str, Any], ...]
    rows: int
    share: float

    @property
    def layer(self) -> int | None:
        """Layer number; None where the matrices belong to the model as a whole."""
        layer: int | None = self.matrices[0]["layer"]
        return layer

    @property
    def prefix(self) -> str:
        """First part of the names of its arrays."""
        return operand_prefix(self.matrices[0])

    @property
    def features(self) -> int:
        """Inputs of each matrix."""
        return int(self.matrices[0]["in_features"])

    @property
    def number(self) -> NumberFormat:
        """Number format of the values."""
        return FORMATS[self.matrices[0]["dtype"]]

    @property
    def row_bytes(self) -> int:
        """Bytes of a dense row."""
        return self.features * self.number.bits.itemsize

    @property
    def group_rows(self) -> int:
        """Rows of a full row group of its files."""
        return row_group_rows(self.features)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of an operand, at most a row group.

    Args:
        index: index columns.
        statistics: row statistics.
        rows: the operands, labelled with the first matrix; None at level `stats`.
        out_masks: uint8 [T, ceil(N / 8)] of each matrix, its outputs that the method leaves out; None where it computes
            all of them.
    """

    index: Index
    statistics: RowStatistics
    rows: Rows | None
    out_masks: list[np.ndarray | None]


def gather(operand: Operand, level: str, blocks: list[Block], order: Order) -> Iterator[Piece]:
    """Rows of an operand in order, in pieces that end where row groups do.

    Args:
        operand: which.
        level: capture level of the dump.
        blocks: all blocks of the dump.
        order: order of the rows.
    """
    start, mapped = 0, 0
    touched: set[int] = set()
    while start < len(order):
        records = order[start : start + operand.group_rows - start % operand.group_rows]
        used = np.unique(records["block"])
        if len(used) > MAPPED_BLOCKS:
            records = records[:PIECE_ROWS]
            used = np.unique(records["block"])
        start += len(records)
        yield _piece(operand, level, blocks, records)
        # rows that lie apart also map what is between them
        near = int(operand.share * sum(blocks[at].size for at in used))
        mapped += min(near, len(records) * (operand.row_bytes + FAULT_BYTES))
        touched.update(used.tolist())
        if mapped > RELEASE_BYTES or start == len(order):
            mapped = 0
            while touched:
                blocks[touched.pop()].release()


def _piece(operand: Operand, level: str, blocks: list[Block], records: np.ndarray) -> Piece:
    """The rows of some records of the order."""
    name, number, first = operand.prefix, operand.number, operand.matrices[0]
    places = _Places(blocks, records["block"], records["row"])
    index = Index(*(np.ascontiguousarray(records[column]) for column in ("token", "sequence", "position")))
    mask = None if level == "stats" else places.pick(f"{name}.mask")
    if mask is not None and mask.shape[1] != mask_bytes(operand.features):
        raise InputError(f"pack: {name} must have {operand.features} inputs, got {mask.shape[1]} mask bytes")
    rows, bits = None, None
    if level == "full":
        offsets, bits = places.ragged(f"{name}.offsets", f"{name}.values")
        bits = bits.astype(number.bits, copy=False)
        statistics = RowStatistics(np.diff(offsets), *row_norms(bits, offsets, number))
    else:
        absmax, l2 = (places.pick(f"{name}.{norm}") for norm in ("absmax", "l2"))
        nnz = places.pick(f"{name}.nnz") if mask is None else popcounts(mask)
        statistics = RowStatistics(nnz, absmax, l2)
    if mask is not None:
        kept = offsets_of(statistics.nnz)
        rows = Rows(operand.layer, first["matrix"], operand.features, number.name, index.token, mask, kept, bits)
    outputs = [f"{array_prefix(operand.layer, matrix['matrix'])}.out_mask" for matrix in operand.matrices]
    return Piece(index, statistics, rows, [places.pick(name) if places.has(name) else None for name in outputs])


class _Places:
    """Rows by block and place: read from each block at once, then put in order where that is not the blocks' own.

    Args:
        blocks: all blocks of the dump.
        block: [R], block of each row.
        row: [R], place of each row in its block.
    """

    def __init__(self, blocks: list[Block], block: np.ndarray, row: np.ndarray) -> None:
        self._back: np.ndarray | None = None
        if (np.diff(block) < 0).any():
            sorted_R = np.lexsort((row, block))
            block, row = block[sorted_R], row[sorted_R]
            self._back = np.empty_like(sorted_R)
            self._back[sorted_R] = np.arange(len(sorted_R))
        self._by_block = [(blocks[block[start]], row[start:stop]) for start, stop in runs(block)]

    def has(self, name: str) -> bool:
        """Whether there is an array of this name."""
        return name in self._by_block[0][0]

    def pick(self, name: str) -> np.ndarray:
        """Rows of an array whose first dimension is the row."""
        joined = _joined([block[name][rows] for block, rows in self._by_block])
        return joined if self._back is None else joined[self._back]

    def ragged(self, offsets: str, values: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a ragged array: int64 offsets [R + 1] and values."""
        taken = [take(block[values], block[offsets], rows) for block, rows in self._by_block]
        joined = _joined([piece for piece, _ in taken])
        joined_offsets = offsets_of(_joined([np.diff(piece_offsets) for _, piece_offsets in taken]))
        if self._back is not None:
            joined, joined_offsets = take(joined, joined_offsets, self._back)
        return joined_offsets, joined


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
