"""Statistics of each row of an operand: number of kept inputs, largest magnitude and Euclidean norm."""

from dataclasses import dataclass

import numpy as np

from sparsetrace.formats.numbers import NumberFormat

# Values per chunk, about. Chunks stay in cache, which takes a third off the time of a whole row group at once.
CHUNK_VALUES = 1 << 17


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Statistics of T rows, an array [T] each.

    Args:
        nnz: number of kept inputs.
        absmax: largest magnitude; 0 where nothing is kept.
        l2: Euclidean norm.
    """

    nnz: np.ndarray
    absmax: np.ndarray
    l2: np.ndarray


def popcounts(mask: np.ndarray) -> np.ndarray:
    """int64 [T]: number of set bits in each row of a mask [T, bytes or words]."""
    return np.bitwise_count(mask).sum(axis=1, dtype=np.int64)


def row_norms(patterns: np.ndarray, offsets: np.ndarray, number: NumberFormat) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude and Euclidean norm of each row, both float32 [T].

    The Euclidean norm is summed in float64; it is infinite where it exceeds float32.

    Args:
        patterns: [nnz] bit patterns of the values.
        offsets: int64 [T + 1], where each row's values begin.
        number: format of the values.
    """
    absmax, l2 = np.zeros((2, len(offsets) - 1), np.float32)
    # reduceat takes the starts of non-empty rows alone: an empty row lies between two of them without a value
    filled = np.flatnonzero(np.diff(offsets))
    step = max(1, CHUNK_VALUES * len(filled) // max(1, len(patterns)))
    for rows in (filled[start : start + step] for start in range(0, len(filled), step)):
        first, last = offsets[rows[0]], offsets[rows[-1] + 1]
        magnitudes = patterns[first:last] & number.bits.type(number.sign - 1)
        starts = offsets[rows] - first
        absmax[rows] = number.magnitudes(np.maximum.reduceat(magnitudes, starts))
        squares = number.magnitudes(magnitudes).astype(np.float64)
        squares *= squares
        with np.errstate(over="ignore"):
            l2[rows] = np.sqrt(np.add.reduceat(squares, starts)).astype(np.float32)
    return absmax, l2
