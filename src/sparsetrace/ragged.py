"""Rows of different length in one flat array, by offsets: the arithmetic that packing and reading share."""

from collections.abc import Iterator

import numpy as np


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Bounds of the stretches of equal values."""
    if len(values):
        edges = (np.flatnonzero(np.diff(values)) + 1).tolist()
        yield from zip([0, *edges], [*edges, len(values)], strict=True)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [R + 1]: where each of R rows begins, and where the last ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def take(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Select rows in any order.

    Args:
        offsets: [R + 1] of the flat array.
        rows: [n] row numbers.

    Returns:
        The n + 1 offsets of the selection, and for each of its elements the position in the flat array.
    """
    first = offsets[rows]
    lengths = offsets[rows + 1] - first
    selected = offsets_of(lengths)
    return selected, np.repeat(first - selected[:-1], lengths) + np.arange(selected[-1])
