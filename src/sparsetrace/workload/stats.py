"""Statistics of a workload's masks, each beside the same figure of its i.i.d. twin; streaming, a chunk at a time.

| table | one row for each |
|---|---|
| `sparsity` | layer, matrix, phase |
| `positions` | layer, matrix, position |
| `neurons` | layer, matrix, input: how often it is kept |
| `concentration` | layer, matrix: how unevenly that is spread |
| `overlap` | layer, matrix, lag between two tokens of one sequence |
| `unions` | layer, matrix, window of one sequence or batch of several, size |
| `runs` | layer, matrix, kept or dropped, length |
| `blocks` | layer, matrix, block size |
| `structured` | layer, matrix, N:M pattern |
| `imbalance` | layer, matrix, tile width |
| `coactivation` | layer, matrix, pair of the most active inputs |
| `layers` | matrix, pair of neighbouring layers |

Every table has the column `masks`, `real` or `twin`. The formulas are in docs/statistics.md.
"""

# Shape suffixes: T tokens, D inputs, W 64-bit words of a mask, P pairs.

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError, write_beside
from sparsetrace.formats.names import MATRICES
from sparsetrace.formats.ragged import runs
from sparsetrace.formats.tables import PHASES
from sparsetrace.workload.reader import Workload

LAGS = range(1, 17)
SIZES = (2, 4, 8, 16, 32, 64)
BLOCKS = (4, 8, 16, 32, 64, 128, 256)
PATTERNS = ((2, 4), (4, 8), (8, 16))
TILES = (32, 128, 512)
TOP_INPUTS = 32
TOP_SHARES = (0.01, 0.1, 0.2, 0.5)
# Rows held at once, with those before that lags and windows look back on.
CHUNK_ROWS = 1024
CARRIED_ROWS = max(*LAGS, *SIZES)
# Steps of a bundle of sequences read at once for the unions over batches.
BATCH_STEPS = 32


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema({"layer": pa.int16(), "matrix": pa.string(), "masks": pa.string(), **columns})


_COUNT, _SHARE, _NAME = pa.int64(), pa.float64(), pa.string()
TOP_COLUMNS = {f"share_of_top_{round(100 * share)}_percent": share for share in TOP_SHARES}
# Schemas of the tables. All are written, those without a row too, so that none of an earlier selection is left.
TABLES = {
    "sparsity": _schema(phase=_NAME, rows=_COUNT, nnz=_COUNT, sparsity=_SHARE),
    "positions": _schema(position=_COUNT, rows=_COUNT, nnz=_COUNT, sparsity=_SHARE),
    "neurons": _schema(input=_COUNT, hits=_COUNT, frequency=_SHARE),
    "concentration": _schema(
        inputs=_COUNT,
        never_kept=_COUNT,
        always_kept=_COUNT,
        gini=_SHARE,
        effective_inputs=_SHARE,
        **dict.fromkeys(TOP_COLUMNS, _SHARE),
    ),
    "overlap": _schema(lag=_COUNT, pairs=_COUNT, jaccard=_SHARE),
    "unions": _schema(over=_NAME, size=_COUNT, unions=_COUNT, density=_SHARE),
    "runs": _schema(kind=_NAME, length=_COUNT, runs=_COUNT),
    "blocks": _schema(block=_COUNT, occupied=_COUNT, blocks=_COUNT, occupancy=_SHARE, kept_in_occupied=_SHARE),
    "structured": _schema(pattern=_NAME, rows=_COUNT, rows_satisfied=_COUNT, groups_satisfied=_SHARE),
    "imbalance": _schema(tile=_COUNT, rows=_COUNT, mean=_SHARE, max=_SHARE),
    "coactivation": _schema(input_a=_COUNT, input_b=_COUNT, both=_COUNT, lift=_SHARE),
    "layers": _schema(next_layer=pa.int16(), pairs=_COUNT, jaccard=_SHARE),
}


def statistics(
    workload: Workload,
    out: Path | None = None,
    seed: int = 0,
    tiles: tuple[int, ...] = TILES,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, pa.Table]:
    """Compute every table, for the workload and for its twin.

    Args:
        workload: any selection.
        out: folder that the tables are written to, `<name>.parquet`; None writes nothing.
        seed: of the twin.
        tiles: widths over which the load is compared.
        report: called with (layers and matrices done, in all), both kinds of masks counted.

    Raises:
        InputError: masks were not captured, or nothing is selected.
    """
    if workload.level == "stats":
        raise InputError("stats: masks must have been captured, got capture level `stats`: use ds.figures()")
    if not len(workload.tokens) or not workload.leaves:
        raise InputError("stats: the selection must hold at least one row, got none")
    if bad := [tile for tile in tiles if tile < 1]:
        raise InputError(f"stats: tiles must be at least 1 wide, got {bad[0]}")
    fed = workload.fed()
    # what each layer and matrix adds to each table; all of a large model's as Python objects would take gigabytes
    pieces: dict[str, list[pa.Table]] = {name: [schema.empty_table()] for name, schema in TABLES.items()}

    def add(name: str, rows: list[dict[str, Any]], **same: Any) -> None:
        pieces[name].append(pa.Table.from_pylist([same | row for row in rows], TABLES[name]))

    kinds = {"real": workload, "twin": workload.twin(seed)}
    done = 0
    for masks, kind in kinds.items():
        for layer, matrix in workload.leaves:
            leaf = _Leaf(workload.features(layer, matrix), tiles)
            for chunk in _chunks(kind, layer, matrix, fed):
                leaf.add(chunk)
            top = leaf.top_inputs()
            together = np.zeros((len(top), len(top)), np.int64)
            for block in kind.blocks(layer, matrix, values=False):
                # float32 sums of ones are exact up to 2**24 rows of a block
                active = block.keep()[:, top].astype(np.float32)
                together += (active.T @ active).astype(np.int64)
            unions = _batch_unions(kind, layer, matrix, fed)
            for name, table in leaf.tables(top, together, unions).items():
                add(name, table, layer=layer, matrix=matrix, masks=masks)
            done += 1
            if report is not None:
                report(done, 2 * len(workload.leaves))
        add("layers", list(_across_layers(kind)), masks=masks)
    # tells a table of another selection, twin or state of the workload from one of this
    metadata = {
        "sparsetrace_workload": str(workload.manifest.get("sha256")),
        "sparsetrace_tokens": str(len(workload.tokens)),
        "sparsetrace_seed": str(seed),
    }
    tables = {name: pa.concat_tables(parts).replace_schema_metadata(metadata) for name, parts in pieces.items()}
    if out is not None:
        with ExitStack() as written:
            for name, table in tables.items():
                # all are written before the first takes its name
                partial = written.enter_context(write_beside(out / f"{name}.parquet"))
                pq.write_table(table, partial, compression="zstd")
    return tables


def summary(tables: dict[str, pa.Table]) -> list[tuple[str, float, float]]:
    """The figures that differ most from random masks: name, real, twin; means over layers and matrices."""
    wanted: list[tuple[str, str, str, dict[str, object]]] = [
        ("sparsity", "sparsity", "sparsity", {}),
        ("Jaccard of neighbouring tokens", "overlap", "jaccard", {"lag": 1}),
        ("inputs kept by 8 neighbouring tokens", "unions", "density", {"over": "window", "size": 8}),
        ("inputs kept by 8 sequences", "unions", "density", {"over": "batch", "size": 8}),
        ("Gini of the hits", "concentration", "gini", {}),
        ("occupied blocks of 32", "blocks", "occupancy", {"block": 32}),
        ("groups that satisfy 2:4", "structured", "groups_satisfied", {"pattern": "2:4"}),
        ("load imbalance over tiles", "imbalance", "mean", {}),
    ]
    found = []
    for name, table, column, where in wanted:
        rows = [row for row in tables[table].to_pylist() if all(row[key] == value for key, value in where.items())]
        means = []
        for masks in ("real", "twin"):
            own = [row for row in rows if row["masks"] == masks and row[column] is not None]
            # phases count by their rows; layers and matrices have equally many
            weights = [row["rows"] if table == "sparsity" else 1 for row in own]
            total = sum(weight * row[column] for weight, row in zip(weights, own, strict=True))
            means.append(total / sum(weights) if own else float("nan"))
        if not np.isnan(means[0]):
            found.append((name, means[0], means[1]))
    return found


class _Chunk:
    """Consecutive rows of one layer and matrix, with up to `CARRIED_ROWS` rows before them.

    Args:
        mask: uint8 [C + T, bytes].
        token, sequence, position, phase: [C + T].
        carried: C, rows that an earlier chunk has counted.
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
        self.words_TW = _words(mask)
        self.token = token
        self.sequence = sequence
        self.position = position
        self.phase = phase
        self.carried = carried
        self.nnz = _popcount(self.words_TW)

    def follow(self, lag: int) -> np.ndarray:
        """Places of new rows whose sequence also holds the row `lag` positions before."""
        at = np.arange(max(self.carried, lag), len(self.token))
        # tokens are unique and ascending, so `lag` rows back and `lag` numbers back leave no gap between
        near = (self.token[at] - self.token[at - lag] == lag) & (self.sequence[at] == self.sequence[at - lag])
        return at[near]


def _chunks(workload: Workload, layer: int, matrix: str, fed: pa.Table) -> Iterator[_Chunk]:
    token = fed["token"].to_numpy()
    sequence, position = fed["sequence"].to_numpy(), fed["position"].to_numpy()
    phase = pc.index_in(fed["phase"].cast(pa.string()), pa.array(PHASES)).to_numpy()
    mask: np.ndarray | None = None
    for start in range(0, len(token), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(token))
        first = max(0, start - CARRIED_ROWS)
        new = workload.matrix(layer, matrix, token[start:stop], values=False).mask
        mask = new if mask is None else np.concatenate([mask[len(mask) - (start - first) :], new])
        near = slice(first, stop)
        yield _Chunk(mask, token[near], sequence[near], position[near], phase[near], start - first)


class _Leaf:
    """Sums over the rows of one layer and matrix.

    Args:
        features: inputs D.
        tiles: widths over which the load is compared.
    """

    def __init__(self, features: int, tiles: tuple[int, ...]) -> None:
        self.features = features
        self.rows = 0
        self.hits = np.zeros(features, np.int64)
        self.phases = np.zeros((len(PHASES), 2), np.int64)
        self.positions = np.zeros((0, 2), np.int64)
        self.lags = {lag: [0, 0.0] for lag in LAGS}
        self.windows = {size: [0, 0] for size in SIZES}
        self.runs = {kind: np.zeros(features + 1, np.int64) for kind in ("kept", "dropped")}
        self.occupied = dict.fromkeys(BLOCKS, 0)
        self.satisfied = {pattern: [0, 0] for pattern in PATTERNS}
        self.tiles = {tile: [0, 0.0, 0.0] for tile in tiles}

    def add(self, chunk: _Chunk) -> None:
        new = slice(chunk.carried, None)
        mask, nnz = chunk.mask[new], chunk.nnz[new]
        self.rows += len(mask)
        self._add_marginals(chunk, nnz)
        for lag in LAGS:
            at = chunk.follow(lag)
            both = _popcount(chunk.words_TW[at] & chunk.words_TW[at - lag])
            either = chunk.nnz[at] + chunk.nnz[at - lag] - both
            some = either > 0
            self.lags[lag][0] += int(some.sum())
            self.lags[lag][1] += float((both[some] / either[some]).sum())
        union_TW, reach = chunk.words_TW, 1
        for size in SIZES:
            # row i: the union of rows i - size + 1 to i
            shifted_TW = np.zeros_like(union_TW)
            shifted_TW[reach:] = union_TW[:-reach] if reach else union_TW
            union_TW, reach = union_TW | shifted_TW, size
            last = chunk.follow(size - 1)
            last = last[(chunk.position[last] + 1) % size == 0]
            self.windows[size][0] += len(last)
            self.windows[size][1] += int(_popcount(union_TW[last]).sum())
        self._add_shapes(mask)

    def _add_marginals(self, chunk: _Chunk, nnz: np.ndarray) -> None:
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
            self.occupied[block] += int((_counts(mask, block) > 0).sum())
        for n, m in PATTERNS:
            fits = _counts(mask, m)[:, : -(-self.features // m)] <= n
            self.satisfied[n, m][0] += int(fits.all(axis=1).sum())
            self.satisfied[n, m][1] += int(fits.sum())
        for tile, sums in self.tiles.items():
            load = np.add.reduceat(keep_TD, np.arange(0, self.features, tile), axis=1, dtype=np.int32)
            some = load.sum(axis=1) > 0
            ratio = load[some].max(axis=1) / load[some].mean(axis=1)
            sums[0] += int(some.sum())
            sums[1] += float(ratio.sum())
            sums[2] = max(sums[2], float(ratio.max(initial=0)))

    def top_inputs(self) -> np.ndarray:
        """The inputs kept most often, ties by lower number."""
        return np.argsort(-self.hits, kind="stable")[:TOP_INPUTS]

    def tables(
        self, top: np.ndarray, together: np.ndarray, batch_unions: dict[int, list[int]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Rows of every table, without layer, matrix and masks."""
        D, rows = self.features, self.rows
        ordered = np.sort(self.hits)[::-1]
        total = int(self.hits.sum())

        def sparsity(count: int, nnz: int) -> dict[str, Any]:
            return {"rows": count, "nnz": nnz, "sparsity": 1 - nnz / (count * D)}

        shares = {
            name: float(ordered[: -(-round(share * 100) * D // 100)].sum() / total) if total else None
            for name, share in TOP_COLUMNS.items()
        }
        # Gini of the hits: mean absolute difference over twice the mean
        gini = float((ordered * (D + 1 - 2 * np.arange(1, D + 1))).sum() / (D * total)) if total else None
        frequency = self.hits[self.hits > 0] / max(total, 1)
        used = float(2 ** -(frequency * np.log2(frequency)).sum()) if total else 0.0
        kept_all = {"never_kept": int((self.hits == 0).sum()), "always_kept": int((self.hits == rows).sum())}
        pairs = [(i, j) for i in range(len(top)) for j in range(i + 1, len(top))]
        sums = [("window", self.windows), ("batch", batch_unions)]
        unions = [(over, size, sizes[size][0], sizes[size][1]) for over, sizes in sums for size in SIZES]
        return {
            "sparsity": [
                {"phase": phase} | sparsity(int(count), int(nnz))
                for phase, (count, nnz) in zip(PHASES, self.phases, strict=True)
                if count
            ],
            "positions": [
                {"position": at} | sparsity(int(count), int(nnz))
                for at, (count, nnz) in enumerate(self.positions)
                if count
            ],
            "neurons": [{"input": i, "hits": int(hits), "frequency": hits / rows} for i, hits in enumerate(self.hits)],
            "concentration": [{"inputs": D, **kept_all, "gini": gini, "effective_inputs": used} | shares],
            "overlap": [
                {"lag": lag, "pairs": count, "jaccard": total_share / count}
                for lag, (count, total_share) in self.lags.items()
                if count
            ],
            "unions": [
                {"over": over, "size": size, "unions": count, "density": kept / (count * D)}
                for over, size, count, kept in unions
                if count
            ],
            "runs": [
                {"kind": kind, "length": int(length), "runs": int(counts[length])}
                for kind, counts in self.runs.items()
                for length in np.flatnonzero(counts)
            ],
            "blocks": [
                {
                    "block": block,
                    "occupied": occupied,
                    "blocks": rows * -(-D // block),
                    "occupancy": occupied / (rows * -(-D // block)),
                    "kept_in_occupied": total / occupied if occupied else None,
                }
                for block, occupied in self.occupied.items()
            ],
            "structured": [
                {
                    "pattern": f"{n}:{m}",
                    "rows": rows,
                    "rows_satisfied": whole,
                    "groups_satisfied": fits / (rows * -(-D // m)),
                }
                for (n, m), (whole, fits) in self.satisfied.items()
            ],
            "imbalance": [
                {"tile": tile, "rows": count, "mean": total_ratio / count, "max": worst}
                for tile, (count, total_ratio, worst) in self.tiles.items()
                if count
            ],
            "coactivation": [
                {
                    "input_a": int(top[i]),
                    "input_b": int(top[j]),
                    "both": int(together[i, j]),
                    "lift": float(together[i, j] * rows / (self.hits[top[i]] * self.hits[top[j]])),
                }
                for i, j in pairs
                if self.hits[top[i]] and self.hits[top[j]]
            ],
        }


def _batch_unions(workload: Workload, layer: int, matrix: str, fed: pa.Table) -> dict[int, list[int]]:
    """For each size: unions of the n-th decode tokens of as many sequences, and the inputs kept in all of them.

    The decoding sequences are taken in order, `size` at a time; a union counts where each of them has an n-th token.
    """
    decode = np.flatnonzero(pc.equal(fed["phase"].cast(pa.string()), "decode").to_numpy())
    token, sequence = fed["token"].to_numpy()[decode], fed["sequence"].to_numpy()[decode]
    bounds = list(runs(sequence))
    found = {size: [0, 0] for size in SIZES}
    most = max(SIZES)
    width = -(-workload.features(layer, matrix) // 64)
    for at in range(0, len(bounds), most):
        bundle = bounds[at : at + most]
        longest = max(stop - start for start, stop in bundle)
        for first in range(0, longest, BATCH_STEPS):
            words = np.zeros((BATCH_STEPS, most, width), np.uint64)
            there = np.zeros((BATCH_STEPS, most), bool)
            near = [
                (slot, start + first, min(start + first + BATCH_STEPS, stop))
                for slot, (start, stop) in enumerate(bundle)
            ]
            near = [(slot, start, stop) for slot, start, stop in near if start < stop]
            slots = np.concatenate([np.full(stop - start, slot) for slot, start, stop in near])
            steps = np.concatenate([np.arange(stop - start) for _, start, stop in near])
            chosen = np.concatenate([token[start:stop] for _, start, stop in near])
            words[steps, slots] = _words(workload.matrix(layer, matrix, chosen, values=False).mask)
            there[steps, slots] = True
            for size in SIZES:
                whole = there.reshape(BATCH_STEPS, -1, size).all(axis=2)
                union = np.bitwise_or.reduce(words.reshape(BATCH_STEPS, -1, size, width), axis=2)
                found[size][0] += int(whole.sum())
                found[size][1] += int(_popcount(union[whole]).sum())
    return found


def _across_layers(workload: Workload) -> Iterator[dict[str, Any]]:
    """Overlap of one token's masks in neighbouring layers of equal width."""
    leaves = set(workload.leaves)
    for matrix in MATRICES:
        for layer, other in ((layer, layer + 1) for layer, name in workload.leaves if name == matrix):
            if (other, matrix) not in leaves or workload.features(layer, matrix) != workload.features(other, matrix):
                continue
            pairs, total = 0, 0.0
            for start in range(0, len(workload.tokens), CHUNK_ROWS):
                chosen = workload.tokens[start : start + CHUNK_ROWS]
                a, b = (_words(workload.matrix(at, matrix, chosen, values=False).mask) for at in (layer, other))
                both, either = _popcount(a & b), _popcount(a | b)
                pairs += int((either > 0).sum())
                total += float((both[either > 0] / either[either > 0]).sum())
            if pairs:
                row = {"matrix": matrix, "layer": layer, "next_layer": other}
                yield row | {"pairs": pairs, "jaccard": total / pairs}


def _words(mask: np.ndarray) -> np.ndarray:
    """uint64 [T, W]: masks padded with zeros to whole words."""
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % 8))).view(np.uint64)


def _popcount(words_TW: np.ndarray) -> np.ndarray:
    """int64 [T]."""
    return np.bitwise_count(words_TW).sum(axis=-1, dtype=np.int64)


def _counts(mask: np.ndarray, block: int) -> np.ndarray:
    """Kept inputs of each block of 4, 8, 16, ... neighbours; blocks beyond the last input are empty."""
    if block == 4:
        return np.bitwise_count(np.stack([mask & 15, mask >> 4], axis=2)).reshape(len(mask), -1)
    size = block // 8
    counts = np.bitwise_count(np.pad(mask, ((0, 0), (0, -mask.shape[1] % size))))
    return counts.reshape(len(mask), -1, size).sum(axis=2, dtype=np.int32)
