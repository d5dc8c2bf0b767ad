"""A workload with `lm_head`: in no layer, its operand whole, and of a prompt only the last position has a row.

It is added to a packed workload file by file, as docs/format.md says, so that reading is tested without packing.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from workload_testing import SHARDS, WIDTHS, build, round_to

from sparsetrace.core.files import sha256_file, sha256_json
from sparsetrace.formats.columns import Index, encode_rows
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.row_statistics import RowStatistics, popcounts, row_norms
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import column_encodings, data_schema
from sparsetrace.formats.tables import MATRIX_TABLE

HEAD = (None, "lm_head")
WIDTH = WIDTHS["attn_in"]
VOCABULARY = 51
# without `layer`, which is null
INDEXED = ["matrix", "token", "sequence", "position", "nnz", "absmax", "l2"]


def build_with_head(folder, dtype, level="full", encoding="split", rows_per_group=4, matrix="lm_head"):
    """A workload of `workload_testing.build` and `lm_head`: `head` are its bit patterns, `head_rows` the tokens fed."""
    built = build(folder, dtype, level=level, encoding=encoding)
    lengths = {}
    for row in built.fed:
        lengths[row["sequence"]] = lengths.get(row["sequence"], 0) + (row["phase"] == "prefill")
    captured = sorted((row for row in built.fed if row["captured"]), key=lambda row: row["token"])
    fed = [row for row in captured if row["position"] >= lengths[row["sequence"]] - 1]
    rng = np.random.default_rng(5)
    x = rng.standard_normal((len(fed), WIDTH))
    # an activation may be zero by itself
    x[2, 7], x[4] = 0, 0
    built.head = round_to(x, dtype)
    built.head_rows = fed
    entries = []
    for shard in range(len(SHARDS)):
        at = np.array([i for i, row in enumerate(fed) if row["shard"] == shard])
        path = f"data/model/{matrix}/part-{shard:05d}.parquet"
        table = _encode(built, matrix, [fed[i] for i in at], built.head[at], level, encoding)
        (built.workload / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table,
            built.workload / path,
            row_group_size=rows_per_group,
            compression="zstd",
            use_dictionary=["matrix"],
            column_encoding=column_encodings(table.schema),
            write_statistics=INDEXED,
            write_page_checksum=True,
        )
        numbers = table["token"].to_pylist()
        counted = {"rows": len(numbers), "nnz": sum(table["nnz"].to_pylist())}
        span = {"first_token": numbers[0], "last_token": numbers[-1]}
        entries.append({"path": path, "layer": None, "matrix": matrix, **counted, **span})
    _add(built.workload, matrix, dtype, entries)
    return built


def _encode(built, matrix, fed, patterns, level, encoding):
    number = FORMATS[built.dtype]
    keep = patterns != 0
    token, sequence, position = (np.array([row[name] for row in fed]) for name in ("token", "sequence", "position"))
    offsets = np.concatenate([[0], np.cumsum(keep.sum(1))])
    mask = np.packbits(keep, axis=1, bitorder="little")
    rows = Rows(None, matrix, WIDTH, built.dtype, token, mask, offsets, patterns[keep] if level == "full" else None)
    statistics = RowStatistics(popcounts(mask), *row_norms(patterns[keep], offsets, number))
    schema = data_schema(built.dtype, encoding, level, WIDTH, in_layer=False)
    index = Index(token, sequence, position)
    return encode_rows(schema, None, matrix, index, statistics, None if level == "stats" else rows)


def _add(workload, matrix, dtype, entries):
    """Name the files in `matrices.parquet` and the manifest, which is signed anew."""
    rows, nnz = (sum(entry[name] for entry in entries) for name in ("rows", "nnz"))
    table = pq.read_table(workload / "matrices.parquet").to_pylist()
    head = dict.fromkeys(MATRIX_TABLE.names) | {
        **{"matrix": matrix, "site": "head_in", "in_features": WIDTH, "out_features": VOCABULARY, "dtype": dtype},
        **{"method": "dense", "parameters": "{}", "rows": rows, "nnz": nnz},
        **{"achieved_sparsity": 1 - nnz / (rows * WIDTH)},
        **{"weight": matrix, "weight_column": 0, "weight_sha256": "", "source_weight": f"{matrix}.weight"},
    }
    pq.write_table(pa.Table.from_pylist([*table, head], schema=MATRIX_TABLE), workload / "matrices.parquet")
    path = workload / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    for name, more in (("rows", rows), ("nnz", nnz)):
        manifest[name] += more
    manifest["files"] += entries
    for file in manifest["files"]:
        if file["path"] == "matrices.parquet":
            file["rows"] += 1
        file |= {"bytes": (workload / file["path"]).stat().st_size, "sha256": sha256_file(workload / file["path"])}
    path.write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
