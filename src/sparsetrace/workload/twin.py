"""The i.i.d. twin: the same rows with masks drawn at random at equal density, as kernel studies commonly do.

Every input of every row is kept with probability p = density of its layer and matrix, independently; a kept input's
value is drawn from the kept values of the same row. A draw is a hash of (seed, layer, matrix, token, input), so that a
row's twin does not depend on how or with what else it is read.
"""

import numpy as np

from sparsetrace.formats.names import MATRICES
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.ragged import offsets_of
from sparsetrace.formats.row_statistics import popcounts
from sparsetrace.formats.rows import Rows, chunk_rows, join

# splitmix64: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014
_STEP = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX = (np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_MASKS, _VALUES = 0, 1


def twin(rows: Rows, density: float, seed: int) -> Rows:
    """Rows of the same tokens with random masks.

    Args:
        rows: real ones.
        density: probability that an input is kept; resolved to 2**-32.
        seed: of the draws.

    Returns:
        Masks of about `density * D` set bits each; values from the kept values of the same row (1.0 where the real
        row keeps none), and none where only masks were captured.
    """
    step = chunk_rows(rows.features)
    if len(rows) > step:
        starts = range(0, len(rows), step)
        pieces = [rows.take(np.arange(start, min(start + step, len(rows)))) for start in starts]
        return join([twin(piece, density, seed) for piece in pieces])
    assert rows.layer is not None
    key = _hash(np.array([seed], np.uint64), rows.layer * len(MATRICES) + MATRICES.index(rows.matrix))
    row_keys = _hash(key, rows.token.astype(np.uint64))
    width = 8 * rows.mask.shape[1]
    draws = _uniform32(_hash(row_keys, _MASKS), width)
    keep = draws < np.uint64(round(density * (1 << 32)))
    keep[:, rows.features :] = False
    mask = np.packbits(keep, axis=1, bitorder="little")
    offsets = offsets_of(popcounts(mask))
    bits = None
    if rows.bits is not None:
        draws = _uniform32(_hash(row_keys, _VALUES), width)[keep].astype(np.uint64)
        lengths = np.diff(offsets)
        place = np.repeat(rows.offsets[:-1], lengths) + (
            (draws * np.repeat(rows.nnz, lengths).astype(np.uint64)) >> np.uint64(32)
        ).astype(np.int64)
        one = FORMATS[rows.dtype].from_float(np.ones(1, np.float32))
        source = np.concatenate([rows.bits, one])
        bits = source[np.where(np.repeat(rows.nnz == 0, lengths), len(rows.bits), place)]
    return Rows(rows.layer, rows.matrix, rows.features, rows.dtype, rows.token, mask, offsets, bits, rows.out_mask)


def _hash(state: np.ndarray, word: int | np.ndarray) -> np.ndarray:
    """uint64 [R]: a word mixed into each state."""
    return _finish(state ^ (np.asarray(word, np.uint64) + _STEP))


def _uniform32(keys: np.ndarray, width: int) -> np.ndarray:
    """uint32 [R, width]: the stream of each key, two draws for each word of it."""
    counters = np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64) * _STEP
    return _finish(keys[:, None] + counters).view(np.uint32)[:, :width]


def _finish(z: np.ndarray) -> np.ndarray:
    z = z + _STEP
    z ^= z >> _SHIFTS[0]
    z *= _MIX[0]
    z ^= z >> _SHIFTS[1]
    z *= _MIX[1]
    z ^= z >> _SHIFTS[2]
    return z
