"""Step 4, once all shards are packed: their tables become one, and the manifest is written, last."""

import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace import __version__
from sparsetrace.core.files import (
    InputError,
    read_sealed_json,
    sha256_file,
    write_beside,
    write_sealed_json,
)
from sparsetrace.core.provenance import merged
from sparsetrace.formats.tables import teacher_forced_hash
from sparsetrace.formats.versions import WORKLOAD_REVISION, WORKLOAD_VERSION
from sparsetrace.packing.card import data_card
from sparsetrace.packing.parts import PACKED_KEYS, SHARD_TABLES, is_whole
from sparsetrace.packing.tables import matrix_table, merge_tables, table_entry
from sparsetrace.packing.views import duckdb_views

# Keys of a dump's manifest that name the shard, and those that may differ among the shards of one run.
OF_SHARD = ("key", "prompts", "groups", "rows")
VARYING = ("commit", "smaller_batches", "given")


def index(
    parts: list[Path], workload: Path, weight_masks: Path | None = None, study: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Merge the shards' tables and write the data set's manifest, last.

    Args:
        parts: manifests of all packed shards, `parts/<shard>.json`.
        workload: folder of the data set.
        weight_masks: table of the weights that were kept; None if the model is not pruned.
        study: the part of the study file from which the data set can be made again; None if it was made by hand.

    Returns:
        The manifest.

    Raises:
        InputError: shards of different runs, the same shard twice, or a file that is not there.
    """
    shards = _read_shards(parts, workload)
    first = shards[0]["manifest"]
    _remove_unexpected_files(workload, {file["path"] for shard in shards for file in shard["files"]})
    matrices = matrix_table(shards)
    tables = _write_tables(shards, workload, matrices, weight_masks)
    given = None
    if first.get("given") is not None:
        given = teacher_forced_hash(pq.read_table(workload / "sequences.parquet", partitioning=None))
    model = ("model_hash", "source", "source_hash", "dtype")
    settings = ("label", "method", "parameters", "calibration", "decoding", "batching")
    manifest = {
        "format": "sparsetrace-workload",
        "version": WORKLOAD_VERSION,
        "revision": WORKLOAD_REVISION,
        **{name: first[name] for name in (*model, *settings)},
        "capture": _capture(first),
        "encoding": shards[0]["encoding"],
        "share_inputs": bool(shards[0]["shared"]),
        "given": given,
        "engine": first.get("engine", "torch"),
        "device": first["device"],
        "threads": first["threads"],
        "versions": {**first["versions"], "pyarrow": pa.__version__, "sparsetrace": __version__},
        "packed_with": {"python": platform.python_version(), "numpy": np.__version__},
        "tuning": first.get("tuning"),
        **merged(shard["manifest"] for shard in shards),
        "study": study,
        "tokens": sum(shard["manifest"]["rows"] for shard in shards),
        "rows": sum(matrices["rows"].to_pylist()),
        "nnz": sum(matrices["nnz"].to_pylist()),
        "files": [file for shard in shards for file in shard["files"]] + tables,
    }
    with write_beside(workload / "README.md") as partial:
        partial.write_text(data_card(manifest, matrices), encoding="utf-8")
    write_sealed_json(workload / "manifest.json", manifest)
    return manifest


def _capture(dump: dict[str, Any]) -> dict[str, Any]:
    capture: dict[str, Any] = dump.get("capture", {"level": "full"})
    return capture


def _read_shards(parts: list[Path], workload: Path) -> list[dict[str, Any]]:
    """Manifests of the packed shards in order, with their own path under `at`; refused if they are not of one run."""
    read = (read_sealed_json(part, "index", PACKED_KEYS) | {"at": part} for part in parts)
    shards = sorted(read, key=lambda shard: shard["shard"])
    if [shard["shard"] for shard in shards] != list(range(len(shards))):
        raise InputError(f"index: shards must be 0 to {len(shards) - 1}, got {[shard['shard'] for shard in shards]}")
    first = shards[0]["manifest"]
    same = [name for name in first if name not in (*OF_SHARD, *VARYING)]
    for shard in shards:
        other = [name for name in same if shard["manifest"][name] != first[name]]
        other += [name for name in ("encoding", "shared") if shard[name] != shards[0][name]]
        if other:
            raise InputError(f"index: shards must be of one run, got {shard['at']} with another {', '.join(other)}")
        if not is_whole(shard, workload, shard["at"].parent):
            raise InputError(f"index: {shard['at']} must have all its files, got some missing: pack it again")
        for table, digest in shard.get("tables", {}).items():
            path = shard["at"].with_suffix(f".{table}.parquet")
            if sha256_file(path) != digest:
                raise InputError(
                    f"index: {path} must have sha256 {digest[:12]}, got damaged: generate and pack it again"
                )
    return shards


def _write_tables(
    shards: list[dict[str, Any]], workload: Path, matrices: pa.Table, weight_masks: Path | None
) -> list[dict[str, Any]]:
    """Write everything but the data files, the card and the manifest; returns the manifest's entries."""
    entries = []
    for table, schema in SHARD_TABLES.items():
        with write_beside(workload / f"{table}.parquet") as partial:
            rows = merge_tables(
                [shard["at"].with_suffix(f".{table}.parquet") for shard in shards], partial, schema, "index"
            )
        entries.append(table_entry(workload, f"{table}.parquet", rows))
    with write_beside(workload / "matrices.parquet") as partial:
        pq.write_table(matrices, partial, compression="zstd")
    entries.append(table_entry(workload, "matrices.parquet", len(matrices)))
    if weight_masks is not None:
        with write_beside(workload / "weight_masks.parquet") as partial:
            shutil.copyfile(weight_masks, partial)
        entries.append(table_entry(workload, "weight_masks.parquet", pq.read_metadata(weight_masks).num_rows))
    else:
        (workload / "weight_masks.parquet").unlink(missing_ok=True)
    first = shards[0]["manifest"]
    with write_beside(workload / "views.sql") as partial:
        views = duckdb_views(first["dtype"], shards[0]["encoding"], _capture(first)["level"], bool(shards[0]["shared"]))
        partial.write_text(views, encoding="utf-8")
    entries.append(table_entry(workload, "views.sql", 0))
    return entries


def _remove_unexpected_files(workload: Path, known: set[str]) -> None:
    """Remove data files that an earlier study with more shards left: a reader would take them for rows of this one."""
    data = workload / "data"
    for file in data.rglob("*.parquet"):
        if file.relative_to(workload).as_posix() not in known:
            file.unlink()
    for folder in data.iterdir():
        if not any(folder.rglob("*.parquet")):
            shutil.rmtree(folder)
