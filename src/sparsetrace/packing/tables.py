"""The small tables of a data set: merging those of groups and shards, and the table of the matrices."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.core.checked import read_checked_table
from sparsetrace.core.files import sha256_file
from sparsetrace.core.folder import footer_sha256
from sparsetrace.formats.schema import leaf
from sparsetrace.formats.tables import MATRIX_TABLE

# Rows of a table that are collected before they are written.
MERGED_ROWS = 1 << 17


def merge_tables(files: list[Path], out: Path, schema: pa.Schema, where: str) -> int:
    """Concatenate tables into one file, in row groups of `MERGED_ROWS` or more; returns the number of rows.

    Raises:
        InputError: a table is damaged.
    """
    rows = 0
    with pq.ParquetWriter(out, schema, compression="zstd", write_page_checksum=True) as writer:
        waiting: list[pa.Table] = []
        for number, file in enumerate(files, start=1):
            waiting.append(read_checked_table(file, where, "a whole table of a dump", schema))
            if number == len(files) or sum(map(len, waiting)) >= MERGED_ROWS:
                rows += sum(map(len, waiting))
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
    return rows


def table_entry(workload: Path, name: str, rows: int) -> dict[str, Any]:
    """Manifest entry of a file that is not a data file."""
    path = workload / name
    entry = {"path": name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return entry | ({"footer_sha256": footer_sha256(path)} if path.suffix == ".parquet" else {})


def matrix_table(shards: list[dict[str, Any]]) -> pa.Table:
    """The table of the matrices, with their rows and nonzeros counted over all shards.

    Args:
        shards: manifests of the packed shards; the first one's order of the matrices, that of execution, is kept.
    """
    counted: dict[str, list[int]] = {}
    for file in (file for shard in shards for file in shard["files"]):
        count = counted.setdefault(leaf(file["layer"], file["matrix"]), [0, 0])
        count[0] += file["rows"]
        count[1] += file["nnz"]
    table = []
    for matrix in shards[0]["manifest"]["matrices"]:
        other = shards[0]["shared"].get(leaf(matrix["layer"], matrix["matrix"]))
        rows, nnz = counted[leaf(matrix["layer"], other or matrix["matrix"])]
        inputs = rows * matrix["in_features"]
        achieved = {"rows": rows, "nnz": nnz, "achieved_sparsity": 1 - nnz / inputs if inputs else None}
        table.append(matrix | achieved | {"shares_input_with": other})
    return pa.Table.from_pylist(table, schema=MATRIX_TABLE)
