"""Masks of one layer and matrix as 64-bit words, a chunk of consecutive rows at a time."""

# Shape suffixes: T tokens, W 64-bit words of a mask.

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.formats.numbers import mask_bytes
from sparsetrace.formats.row_statistics import popcounts
from sparsetrace.formats.sites import Leaf
from sparsetrace.formats.tables import PHASES
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.stats_tables import LAGS, SIZES

# Rows that are new in a chunk, and rows before them, which lags and windows look back on.
CHUNK_ROWS = 1024
CARRIED_ROWS = max(*LAGS, *SIZES)


class Chunk:
    """Consecutive rows of one layer and matrix.

    Args:
        mask: uint8 [C + T, bytes].
        token, sequence, position, phase: [C + T]; a phase is its place in `PHASES`.
        carried: C, rows at the beginning that an earlier chunk has counted.

    Attributes:
        words_TW: uint64 [C + T, W], the masks.
        nnz: int64 [C + T].
    """

    def __init__(
        self,
        mask: np.ndarray,
        token: np.ndarray,
        sequence: np.ndarray,
        position: np.ndarray,
        phase: np.ndarray,
        carried: int,
    ) -> None:
        self.mask = mask
        self.words_TW = words(mask)
        self.token = token
        self.sequence = sequence
        self.position = position
        self.phase = phase
        self.carried = carried
        self.nnz = popcounts(self.words_TW)

    def follow(self, lag: int) -> np.ndarray:
        """Places of new rows whose sequence also holds the row `lag` positions before."""
        at = np.arange(max(self.carried, lag), len(self.token))
        # tokens are unique and ascending, so `lag` rows back and `lag` numbers back leave no gap between
        near = (self.token[at] - self.token[at - lag] == lag) & (self.sequence[at] == self.sequence[at - lag])
        return at[near]


def chunks(workload: Workload, leaf: Leaf, fed: pa.Table) -> Iterator[Chunk]:
    """The rows of one layer and matrix, `CHUNK_ROWS` at a time.

    Args:
        workload: any selection.
        leaf: layer and matrix.
        fed: rows of `tokens.parquet` of the tokens that have a row there, ascending.
    """
    token = fed["token"].to_numpy()
    sequence, position = fed["sequence"].to_numpy(), fed["position"].to_numpy()
    phase = pc.index_in(fed["phase"].cast(pa.string()), pa.array(PHASES)).to_numpy()
    mask: np.ndarray | None = None
    for start, new in zip(range(0, len(token), CHUNK_ROWS), _masks(workload, leaf, token), strict=True):
        stop, first = start + len(new), max(0, start - CARRIED_ROWS)
        mask = new if mask is None else np.concatenate([mask[len(mask) - (start - first) :], new])
        near = slice(first, stop)
        yield Chunk(mask, token[near], sequence[near], position[near], phase[near], start - first)


def _masks(workload: Workload, leaf: Leaf, token: np.ndarray) -> Iterator[np.ndarray]:
    """Masks of the rows of some tokens, `CHUNK_ROWS` at a time; each row group is read once."""
    held = np.empty((0, mask_bytes(workload.features(*leaf))), np.uint8)
    for rows in workload.blocks(*leaf, values=False, tokens=token):
        held = np.concatenate([held, rows.mask])
        while len(held) >= CHUNK_ROWS:
            yield held[:CHUNK_ROWS]
            held = held[CHUNK_ROWS:]
    if len(held):
        yield held


def words(mask: np.ndarray) -> np.ndarray:
    """uint64 [T, W]: masks padded with zeros to whole words."""
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % 8))).view(np.uint64)


def block_counts(mask: np.ndarray, block: int) -> np.ndarray:
    """Kept inputs in each block of 4, 8, 16, ... neighbouring inputs; blocks beyond the last input are empty."""
    if block == 4:
        return np.bitwise_count(np.stack([mask & 15, mask >> 4], axis=2)).reshape(len(mask), -1)
    size = block // 8
    counts = np.bitwise_count(np.pad(mask, ((0, 0), (0, -mask.shape[1] % size))))
    return counts.reshape(len(mask), -1, size).sum(axis=2, dtype=np.int32)
