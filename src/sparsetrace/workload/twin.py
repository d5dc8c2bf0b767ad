"""The i.i.d. twin: the same rows with masks drawn at random at equal density, as kernel studies commonly do.

Every input of every row is kept with probability p = density of its layer and matrix, independently; a kept input's
value is drawn from the kept values of the same row. A draw is a hash of (seed, layer, matrix, token, input), so that a
row's twin does not depend on how or with what else it is read.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.ragged import offsets_of
from sparsetrace.formats.row_statistics import popcounts
from sparsetrace.formats.rows import Rows, chunk_rows, join
from sparsetrace.formats.schema import leaf
from sparsetrace.formats.sites import Leaf

# splitmix64: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014
_STEP = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX = (np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_MASKS, _VALUES = 0, 1
# Numbers that the draws of these matrices are keyed by: published twins depend on them, so they never change.
_NUMBERS = {"q": 0, "k": 1, "v": 2, "o": 3, "gate": 4, "up": 5, "down": 6}


class Twin:
    """The i.i.d. twin of a selection.

    Args:
        seed: of the draws.
        density: gives the density of one layer and matrix of the selection; called once for each that is read.
    """

    def __init__(self, seed: int, density: Callable[[int | None, str], float]) -> None:
        self.seed = seed
        self._density = density
        self._densities: dict[Leaf, float] = {}

    def density(self, layer: int | None, matrix: str) -> float:
        """Probability with which an input of one layer and matrix is kept."""
        if (layer, matrix) not in self._densities:
            self._densities[layer, matrix] = self._density(layer, matrix)
        return self._densities[layer, matrix]

    def of(self, rows: Rows) -> Rows:
        """The twins of real rows."""
        return twin(rows, self.density(rows.layer, rows.matrix), self.seed)


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
    key = _hash(np.array([seed], np.uint64), np.array([leaf_key(rows.layer, rows.matrix)], np.uint64))
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


def leaf_key(layer: int | None, matrix: str) -> int:
    """64 bits that stand for a layer and matrix in the draws.

    `7 * layer + number` for `q k v o gate up down`; for any other, the first eight bytes of the SHA-256 of its folder
    (`model/lm_head`), lowest byte first, with the highest bit set, which no numbered one has.
    """
    if layer is not None and matrix in _NUMBERS:
        return len(_NUMBERS) * layer + _NUMBERS[matrix]
    return int.from_bytes(hashlib.sha256(leaf(layer, matrix).encode()).digest()[:8], "little") | 1 << 63


def _hash(state: np.ndarray, word: int | np.ndarray) -> np.ndarray:
    """uint64 [R]: a word mixed into each state."""
    return _finish(state ^ (np.asarray(word, np.uint64) + _STEP))


def _uniform32(keys: np.ndarray, width: int) -> np.ndarray:
    """uint32 [R, width]: the random stream of each key; a 64-bit hash gives two draws."""
    counters = np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64) * _STEP
    return _finish(keys[:, None] + counters).view(np.uint32)[:, :width]


def _finish(z: np.ndarray) -> np.ndarray:
    """uint64: the finaliser of splitmix64, which spreads every bit of the input over all of the output."""
    z = z + _STEP
    z ^= z >> _SHIFTS[0]
    z *= _MIX[0]
    z ^= z >> _SHIFTS[1]
    z *= _MIX[1]
    z ^= z >> _SHIFTS[2]
    return z
