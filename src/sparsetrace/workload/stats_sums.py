"""What is summed over the rows of one layer and matrix, chunk by chunk, and the tables that follow from the sums."""

# Shape suffixes: T tokens, D inputs, W 64-bit words of a mask.

from collections.abc import Callable
from typing import Any

import numpy as np

from sparsetrace.formats.row_statistics import popcounts
from sparsetrace.formats.tables import PHASES
from sparsetrace.workload.stats_chunks import Chunk, block_counts
from sparsetrace.workload.stats_tables import BLOCKS, LAGS, PATTERNS, SIZES, TOP_COLUMNS, TOP_INPUTS

TableRows = list[dict[str, Any]]


class LeafSums:
    """Sums over the rows of one layer and matrix.

    Args:
        features: inputs D.
        tiles: widths over which the load is compared.

    Attributes:
        rows: number of rows.
        hits: int64 [D], rows that keep each input.
        phases, positions: int64 [n, 2], rows and kept inputs of each phase and position.
        lags: for each lag, pairs of rows and the sum of their Jaccard overlaps.
        windows, batches: for each size, unions of masks and the inputs kept in all of them; `batches` is set from
            outside, since its rows are read in another order.
        runs: for each kind, int64 [D + 1], runs of each length.
        occupied: for each block size, blocks with a kept input.
        satisfied: for each N:M pattern, rows and groups that satisfy it.
        tiles: for each tile width, rows, the sum of their load ratios, and the largest one.
        top: the inputs kept most often, ties by lower number.
        together: int64 [n, n], rows that keep both of two top inputs; set from outside, in a second pass.
    """

    def __init__(self, features: int, tiles: tuple[int, ...]) -> None:
        self.features = features
        self.rows = 0
        self.hits = np.zeros(features, np.int64)
        self.phases = np.zeros((len(PHASES), 2), np.int64)
        self.positions = np.zeros((0, 2), np.int64)
        self.lags = {lag: [0, 0.0] for lag in LAGS}
        self.windows = {size: [0, 0] for size in SIZES}
        self.batches = {size: [0, 0] for size in SIZES}
        self.runs = {kind: np.zeros(features + 1, np.int64) for kind in ("kept", "dropped")}
        self.occupied = dict.fromkeys(BLOCKS, 0)
        self.satisfied = {pattern: [0, 0] for pattern in PATTERNS}
        self.tiles = {tile: [0, 0.0, 0.0] for tile in tiles}
        self.together = np.zeros((0, 0), np.int64)

    @property
    def top(self) -> np.ndarray:
        """int64 [up to `TOP_INPUTS`]."""
        return np.argsort(-self.hits, kind="stable")[:TOP_INPUTS]

    def add(self, chunk: Chunk) -> None:
        """Count the new rows of a chunk."""
        mask, nnz = chunk.mask[chunk.carried :], chunk.nnz[chunk.carried :]
        self.rows += len(mask)
        self._add_marginals(chunk, nnz)
        for lag in LAGS:
            at = chunk.follow(lag)
            both = popcounts(chunk.words_TW[at] & chunk.words_TW[at - lag])
            either = chunk.nnz[at] + chunk.nnz[at - lag] - both
            some = either > 0
            self.lags[lag][0] += int(some.sum())
            self.lags[lag][1] += float((both[some] / either[some]).sum())
        union_TW, reach = chunk.words_TW, 1
        for size in SIZES:
            # row i: the union of rows i - size + 1 to i
            shifted_TW = np.zeros_like(union_TW)
            shifted_TW[reach:] = union_TW[:-reach]
            union_TW, reach = union_TW | shifted_TW, size
            last = chunk.follow(size - 1)
            last = last[(chunk.position[last] + 1) % size == 0]
            self.windows[size][0] += len(last)
            self.windows[size][1] += int(popcounts(union_TW[last]).sum())
        self._add_shapes(mask)

    def _add_marginals(self, chunk: Chunk, nnz: np.ndarray) -> None:
        phase, position = chunk.phase[chunk.carried :], chunk.position[chunk.carried :]
        self.phases += np.stack([np.bincount(phase, w, len(PHASES)) for w in (None, nnz)], axis=1).astype(np.int64)
        length = max(len(self.positions), int(position.max()) + 1)
        grown = np.zeros((length, 2), np.int64)
        grown[: len(self.positions)] = self.positions
        self.positions = grown + np.stack([np.bincount(position, w, length) for w in (None, nnz)], 1).astype(np.int64)

    def _add_shapes(self, mask: np.ndarray) -> None:
        keep_TD = np.unpackbits(mask, axis=1, count=self.features, bitorder="little")
        self.hits += keep_TD.sum(axis=0, dtype=np.int64)
        for kind, value in (("kept", 1), ("dropped", 0)):
            # a column of the other kind on both sides, so that no run passes the end of a row
            edged = np.full((len(keep_TD), self.features + 2), 1 - value, np.int8)
            edged[:, 1:-1] = keep_TD
            change = np.diff(edged.reshape(-1))
            starts, stops = (np.flatnonzero(change == sign * (2 * value - 1)) for sign in (1, -1))
            self.runs[kind] += np.bincount(stops - starts, minlength=self.features + 1)
        for block in BLOCKS:
            self.occupied[block] += int((block_counts(mask, block) > 0).sum())
        for n, m in PATTERNS:
            fits = block_counts(mask, m)[:, : -(-self.features // m)] <= n
            self.satisfied[n, m][0] += int(fits.all(axis=1).sum())
            self.satisfied[n, m][1] += int(fits.sum())
        for tile, sums in self.tiles.items():
            load = np.add.reduceat(keep_TD, np.arange(0, self.features, tile), axis=1, dtype=np.int32)
            some = load.sum(axis=1) > 0
            ratio = load[some].max(axis=1) / load[some].mean(axis=1)
            sums[0] += int(some.sum())
            sums[1] += float(ratio.sum())
            sums[2] = max(sums[2], float(ratio.max(initial=0)))


def table_rows(sums: LeafSums) -> dict[str, TableRows]:
    """Rows of every table but `layers`, without layer, matrix and masks; none where there was no row to count."""
    return {name: rows(sums) for name, rows in _ROWS.items()} if sums.rows else {}


def _sparsity(sums: LeafSums, rows: int, nnz: int) -> dict[str, Any]:
    return {"rows": rows, "nnz": nnz, "sparsity": 1 - nnz / (rows * sums.features)}


def _by_phase(sums: LeafSums) -> TableRows:
    counts = zip(PHASES, sums.phases.tolist(), strict=True)
    return [{"phase": phase} | _sparsity(sums, rows, nnz) for phase, (rows, nnz) in counts if rows]


def _by_position(sums: LeafSums) -> TableRows:
    counts = enumerate(sums.positions.tolist())
    return [{"position": at} | _sparsity(sums, rows, nnz) for at, (rows, nnz) in counts if rows]


def _neurons(sums: LeafSums) -> TableRows:
    counts = enumerate(sums.hits.tolist())
    return [{"input": i, "hits": hits, "frequency": hits / sums.rows} for i, hits in counts]


def _concentration(sums: LeafSums) -> TableRows:
    D = sums.features
    ordered = np.sort(sums.hits)[::-1]
    total = int(sums.hits.sum())
    # Gini of the hits: mean absolute difference over twice the mean
    gini = float((ordered * (D + 1 - 2 * np.arange(1, D + 1))).sum() / (D * total)) if total else None
    frequency = sums.hits[sums.hits > 0] / max(total, 1)
    shares = {
        name: float(ordered[: -(-round(share * 100) * D // 100)].sum() / total) if total else None
        for name, share in TOP_COLUMNS.items()
    }
    row = {
        "inputs": D,
        "never_kept": int((sums.hits == 0).sum()),
        "always_kept": int((sums.hits == sums.rows).sum()),
        "gini": gini,
        "effective_inputs": float(2 ** -(frequency * np.log2(frequency)).sum()) if total else 0.0,
    }
    return [row | shares]


def _overlap(sums: LeafSums) -> TableRows:
    return [
        {"lag": lag, "pairs": pairs, "jaccard": total / pairs} for lag, (pairs, total) in sums.lags.items() if pairs
    ]


def _unions(sums: LeafSums) -> TableRows:
    return [
        {"over": over, "size": size, "unions": unions, "density": kept / (unions * sums.features)}
        for over, by_size in (("window", sums.windows), ("batch", sums.batches))
        for size, (unions, kept) in by_size.items()
        if unions
    ]


def _runs(sums: LeafSums) -> TableRows:
    return [
        {"kind": kind, "length": int(length), "runs": int(counts[length])}
        for kind, counts in sums.runs.items()
        for length in np.flatnonzero(counts)
    ]


def _blocks(sums: LeafSums) -> TableRows:
    found, total = [], int(sums.hits.sum())
    for block, occupied in sums.occupied.items():
        blocks = sums.rows * -(-sums.features // block)
        kept = total / occupied if occupied else None
        row = {"block": block, "occupied": occupied, "blocks": blocks, "occupancy": occupied / blocks}
        found.append({**row, "kept_in_occupied": kept})
    return found


def _structured(sums: LeafSums) -> TableRows:
    return [
        {
            "pattern": f"{n}:{m}",
            "rows": sums.rows,
            "rows_satisfied": rows,
            "groups_satisfied": groups / (sums.rows * -(-sums.features // m)),
        }
        for (n, m), (rows, groups) in sums.satisfied.items()
    ]


def _imbalance(sums: LeafSums) -> TableRows:
    return [
        {"tile": tile, "rows": rows, "mean": total / rows, "max": worst}
        for tile, (rows, total, worst) in sums.tiles.items()
        if rows
    ]


def _coactivation(sums: LeafSums) -> TableRows:
    top, hits = sums.top.tolist(), sums.hits
    return [
        {
            "input_a": a,
            "input_b": b,
            "both": int(sums.together[i, j]),
            "lift": float(sums.together[i, j] * sums.rows / (hits[a] * hits[b])),
        }
        for i, a in enumerate(top)
        for j, b in enumerate(top)
        if i < j and hits[a] and hits[b]
    ]


_ROWS: dict[str, Callable[[LeafSums], TableRows]] = {
    "sparsity": _by_phase,
    "positions": _by_position,
    "neurons": _neurons,
    "concentration": _concentration,
    "overlap": _overlap,
    "unions": _unions,
    "runs": _runs,
    "blocks": _blocks,
    "structured": _structured,
    "imbalance": _imbalance,
    "coactivation": _coactivation,
}
