"""Ragged arrays: rows of different length in one flat array, with the offset where each begins."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal values."""
    if len(values):
        edges = (np.flatnonzero(np.diff(values)) + 1).tolist()
        yield from zip([0, *edges], [*edges, len(values)], strict=True)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [R + 1]: where each of R rows begins, and where the last ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def take(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take rows of a ragged array, in any order.

    Args:
        values: flat array of all rows; it may be unaligned.
        offsets: [R + 1], where each row begins.
        rows: [n], row numbers.

    Returns:
        The values of those rows, and their n + 1 offsets.
    """
    if not len(rows):
        return values[:0], np.zeros(1, np.int64)
    first, last = int(rows.min()), int(rows.max()) + 1
    near = offsets[first : last + 1]
    values, near = values[near[0] : near[-1]], near - near[0]
    if len(rows) == last - first and (np.diff(rows) == 1).all():
        return values, near
    # Arrow copies whole rows of bytes, ten times as fast as numpy with an index for every value
    buffers = [None, pa.py_buffer(near * values.itemsize), pa.py_buffer(np.ascontiguousarray(values))]
    taken = pa.Array.from_buffers(pa.large_binary(), last - first, buffers).take(pa.array(rows - first))
    _, starts, data = taken.buffers()
    taken_offsets = np.frombuffer(starts, np.int64, len(rows) + 1) // values.itemsize
    return np.frombuffer(data or b"", values.dtype, int(taken_offsets[-1])), taken_offsets
