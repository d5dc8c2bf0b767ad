"""The tables of a workload beside its data files: tokens, sequences and matrices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.formats.tables import MATRIX_TABLE, SEQUENCES, TOKENS, teacher_forced_hash
from sparsetrace.workload.verify_faults import Fault, file_faults, one_line

TABLES = {"tokens.parquet": TOKENS, "sequences.parquet": SEQUENCES, "matrices.parquet": MATRIX_TABLE}


def read_tables(folder: Path, manifest: dict[str, Any], faults: list[Fault]) -> dict[str, pa.Table]:
    """The tables that are sound as files.

    Args:
        folder: of the workload.
        manifest: of the workload.
        faults: receives those of the other tables.
    """
    tables = {}
    for name, schema in TABLES.items():
        entry = next((file for file in manifest["files"] if file["path"] == name), None)
        if entry is None:
            faults.append(Fault(name, "must be in the manifest, got no entry"))
            continue
        if broken := list(file_faults(folder, entry)):
            # what a damaged table says is no measure of anything
            faults += broken
            continue
        try:
            table = pq.read_table(folder / name, partitioning=None)
        except (OSError, pa.ArrowInvalid, pa.ArrowException) as error:
            faults.append(Fault(name, f"must be readable, got {one_line(error)}"))
            continue
        if not table.schema.equals(_of_version(schema, manifest["version"])):
            faults.append(Fault(name, "schema must be that of the format, got another"))
            continue
        tables[name] = table
    return tables


def _of_version(schema: pa.Schema, version: int) -> pa.Schema:
    """A table's schema in a version of the format; version 1 gave every matrix a layer, and no `weight_columns`."""
    if schema is not MATRIX_TABLE or version > 1:
        return schema
    first = schema.set(0, schema.field("layer").with_nullable(False))
    return first.remove(first.get_field_index("weight_columns"))


def table_faults(manifest: dict[str, Any], tables: dict[str, pa.Table]) -> Iterator[Fault]:
    """Whether tokens, sequences and manifest agree."""
    tokens = tables["tokens.parquet"]
    numbers = tokens["token"].to_numpy()
    if len(np.unique(numbers)) != len(numbers):
        values, counts = np.unique(numbers, return_counts=True)
        yield Fault("tokens.parquet", f"tokens must differ, got {values[counts > 1][0]} more than once")
    bases = dict(zip(*(tables["sequences.parquet"][name].to_pylist() for name in ("sequence", "base")), strict=True))
    sequence, position = tokens["sequence"].to_pylist(), tokens["position"].to_pylist()
    for token, of, at in zip(numbers.tolist(), sequence, position, strict=True):
        if of not in bases or token != bases[of] + at:
            yield Fault("tokens.parquet", f"token {token} must be base + position of its sequence {of}, got {at}")
            break
    yield from _fed_faults(tokens, tables["sequences.parquet"])
    captured = int(np.count_nonzero(tokens["captured"].to_numpy(zero_copy_only=False)))
    if captured != manifest["tokens"]:
        yield Fault("tokens.parquet", f"must name {manifest['tokens']} captured tokens, got {captured}")
    given = manifest.get("given")
    if given is not None and (held := teacher_forced_hash(tables["sequences.parquet"])) != given:
        yield Fault("sequences.parquet", f"must hold the tokens given, of hash {given[:12]}, got {held[:12]}")


def _fed_faults(tokens: pa.Table, sequences: pa.Table) -> Iterator[Fault]:
    """Whether what was fed of each sequence is its prompt and then its output without the last token."""
    fed = tokens.sort_by([("sequence", "ascending"), ("position", "ascending")])
    numbers, ids = fed["sequence"].to_numpy(), fed["token_id"].to_numpy()
    for row in sequences.select(["sequence", "prompt_ids", "output_ids"]).to_pylist():
        start, stop = np.searchsorted(numbers, [row["sequence"], row["sequence"] + 1])
        if ids[start:stop].tolist() != row["prompt_ids"] + row["output_ids"][:-1]:
            yield Fault(
                "tokens.parquet",
                f"token ids of sequence {row['sequence']} must be its prompt and its output without the last, got "
                "others",
            )
            return
