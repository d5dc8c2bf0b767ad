"""Statistics of a workload's masks, each beside that of its i.i.d. twin; streaming, a chunk at a time.

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

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError, write_beside
from sparsetrace.formats.sites import Leaf
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.stats_chunks import chunks
from sparsetrace.workload.stats_sums import LeafSums, table_rows
from sparsetrace.workload.stats_tables import TABLES, TILES
from sparsetrace.workload.stats_unions import across_layers, batch_unions


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
    if not any(len(workload.tokens_of(*leaf)) for leaf in workload.leaves):
        raise InputError("stats: the selection must hold at least one row, got none")
    if bad := [tile for tile in tiles if tile < 1]:
        raise InputError(f"stats: tiles must be at least 1 wide, got {bad[0]}")
    fed = workload.fed()
    # Arrow tables of each layer and matrix; all of a large model's as Python objects would take gigabytes
    pieces: dict[str, list[pa.Table]] = {name: [schema.empty_table()] for name, schema in TABLES.items()}

    def add(name: str, rows: list[dict[str, Any]], **same: Any) -> None:
        pieces[name].append(pa.Table.from_pylist([same | row for row in rows], TABLES[name]))

    done = 0
    for masks, kind in {"real": workload, "twin": workload.twin(seed)}.items():
        for layer, matrix in workload.leaves:
            for name, rows in table_rows(_sums(kind, (layer, matrix), fed, tiles)).items():
                add(name, rows, layer=layer, matrix=matrix, masks=masks)
            done += 1
            if report is not None:
                report(done, 2 * len(workload.leaves))
        add("layers", list(across_layers(kind)), masks=masks)
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


def _sums(workload: Workload, leaf: Leaf, fed: pa.Table, tiles: tuple[int, ...]) -> LeafSums:
    """Everything that is counted of one layer and matrix.

    Args:
        workload: any selection, or its twin.
        leaf: layer and matrix.
        fed: rows of `tokens.parquet` of all tokens of the selection, ascending.
        tiles: widths over which the load is compared.
    """
    tokens = workload.tokens_of(*leaf)
    own = fed if len(tokens) == len(fed) else fed.filter(np.isin(fed["token"].to_numpy(), tokens, assume_unique=True))
    sums = LeafSums(workload.features(*leaf), tiles)
    for chunk in chunks(workload, leaf, own):
        sums.add(chunk)
    top = sums.top
    sums.together = np.zeros((len(top), len(top)), np.int64)
    for block in workload.blocks(*leaf, values=False):
        # float32 sums of ones are exact up to 2**24 rows of a block
        active = block.keep()[:, top].astype(np.float32)
        sums.together += (active.T @ active).astype(np.int64)
    sums.batches = batch_unions(workload, leaf, own)
    return sums


def summary(tables: dict[str, pa.Table]) -> list[tuple[str, float, float]]:
    """The statistics that differ most from random masks.

    Args:
        tables: from `statistics`.

    Returns:
        Name, real, twin; means over layers and their matrices. Matrices outside layers, whose inputs no method drops,
        count only where nothing else was selected.
    """
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
    outside_alone = tables["neurons"]["layer"].null_count == len(tables["neurons"])
    found = []
    for name, table, column, where in wanted:
        rows = [row for row in tables[table].to_pylist() if all(row[key] == value for key, value in where.items())]
        rows = [row for row in rows if outside_alone or row["layer"] is not None]
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
