"""The rows of each layer and matrix over all its data files: which tokens they belong to, and their counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.schema import leaf
from sparsetrace.formats.sites import Leaf
from sparsetrace.methods import METHODS, Method
from sparsetrace.workload.verify_data import INDEX, DataFile, Rules
from sparsetrace.workload.verify_faults import Fault, file_faults, named, one_line


def data_faults(
    folder: Path,
    manifest: dict[str, Any],
    tables: dict[str, pa.Table],
    method: Method | None,
    report: Callable[[int, int], None] | None,
) -> Iterator[Fault]:
    """What is wrong with the data files, each by itself and all together.

    Args:
        folder: of the workload.
        manifest: of the workload.
        tables: the tables, all sound.
        method: of the manifest; None if this package does not have it.
        report: called with (data files done, in all).
    """
    files = [file for file in manifest["files"] if "matrix" in file]
    rows = {(row["layer"], row["matrix"]): row for row in tables["matrices.parquet"].to_pylist()}
    methods: dict[Leaf, Method | None] = {}
    for key, row in rows.items():
        methods[key], wrong = _method(row, manifest, method)
        yield from wrong
    found: dict[Leaf, list[DataFile]] = {key: [] for key in rows}
    for done, file in enumerate(files, start=1):
        key = (file["layer"], file["matrix"])
        if key not in rows:
            yield Fault("matrices.parquet", f"must have a row for {named(*key)}, got none")
            continue
        broken = list(file_faults(folder, file))
        yield from broken
        if (folder / file["path"]).is_file():
            one = DataFile(folder, file, Rules(manifest, rows[key], methods[key]))
            yield from one.faults(damaged=bool(broken))
            found[key].append(one)
        if report is not None:
            report(done, len(files))
    captured = _captured(tables)
    for (layer, matrix), row in rows.items():
        stored = (layer, row["shares_input_with"] or matrix)
        if stored not in found:
            what = f"{named(layer, matrix)} must share the input of a row, got {stored[1]}"
            yield Fault("matrices.parquet", what)
            continue
        if any(one.unreadable for one in found[stored]):
            continue
        index = {
            name: np.concatenate([np.empty(0, np.int64), *(file.index[name] for file in found[stored])])
            for name in INDEX
        }
        yield from _completeness(f"data/{leaf(layer, matrix)}", index, _expected(layer, matrix, captured))
        yield from _threshold_faults(row, methods[layer, matrix], manifest["dtype"])
        yield from _count_faults(row, len(index["token"]), sum(file.nnz for file in found[stored]))
    for name in ("rows", "nnz"):
        total = sum(row[name] for row in rows.values())
        if manifest[name] != total:
            yield Fault("manifest.json", f"{name} must be {total}, got {manifest[name]}")


def _method(
    row: dict[str, Any], manifest: dict[str, Any], of_manifest: Method | None
) -> tuple[Method | None, list[Fault]]:
    """The method that a layer and matrix follows by its row of `matrices.parquet`, and what is wrong with that."""
    faults = []
    expected = manifest["method"] if row["layer"] is not None else "dense"
    where = named(row["layer"], row["matrix"])
    if row["method"] != expected:
        faults.append(Fault("matrices.parquet", f"{where}: method must be {expected}, got {row['method']}"))
    if row["method"] == manifest["method"]:
        return of_manifest, faults
    if row["method"] not in METHODS:
        return None, faults
    try:
        return METHODS[row["method"]](**json.loads(row["parameters"])), faults
    except (ValueError, TypeError) as error:
        what = f"{where}: parameters must be those of method {row['method']}, got {one_line(error)}"
        return None, [*faults, Fault("matrices.parquet", what)]


@dataclass(frozen=True, slots=True)
class _Expected:
    """The rows that a layer and matrix must have.

    Args:
        index: token, sequence and position of each, ascending by token.
        whole: whether all of them must be there, and not only some.
        which: the tokens in the words of a fault.
    """

    index: dict[str, np.ndarray]
    whole: bool = True
    which: str = ""


def _captured(tables: dict[str, pa.Table]) -> dict[str, np.ndarray]:
    """Token, sequence, position and prompt length of the captured tokens, ascending."""
    tokens = tables["tokens.parquet"].filter(tables["tokens.parquet"]["captured"]).sort_by("token")
    sequences = tables["sequences.parquet"]
    lengths = pc.list_value_length(sequences["prompt_ids"]).to_pylist()
    length_of = dict(zip(sequences["sequence"].to_pylist(), lengths, strict=True))
    # a sequence that is missing has been named already
    prompt = [length_of.get(sequence, 0) for sequence in tokens["sequence"].to_pylist()]
    return {name: tokens[name].to_numpy() for name in INDEX} | {"prompt": np.array(prompt, np.int64)}


def _expected(layer: int | None, matrix: str, captured: dict[str, np.ndarray]) -> _Expected:
    """Within layers, all captured tokens; for `lm_head`, those whose logits were computed; else any of them."""
    index = {name: captured[name] for name in INDEX}
    if layer is not None:
        return _Expected(index)
    if matrix != "lm_head":
        return _Expected(index, whole=False)
    # of a prompt's positions only the last one predicts a token
    predicts = captured["position"] >= captured["prompt"] - 1
    which = " from the last position of its prompt on"
    return _Expected({name: column[predicts] for name, column in index.items()}, which=which)


def _completeness(where: str, index: dict[str, np.ndarray], expected: _Expected) -> Iterator[Fault]:
    """Whether the rows of a layer and matrix are of the tokens that they must be of."""
    order = np.argsort(index["token"], kind="stable")
    held = {name: column[order] for name, column in index.items()}
    token, wanted = held["token"], expected.index["token"]
    if twice := token[:-1][np.diff(token) == 0].tolist():
        yield Fault(where, f"tokens must differ, got {twice[0]} more than once")
    missing = np.setdiff1d(wanted, token) if expected.whole else np.empty(0, np.int64)
    if len(missing):
        which = f"every captured token{expected.which}"
        yield Fault(where, f"must hold {which}, got {len(missing)} missing, {missing[0]} the first")
    if len(unexpected := np.setdiff1d(token, wanted)):
        yield Fault(where, f"must hold captured tokens{expected.which} only, got {unexpected[0]}")
    if not (twice or len(missing) or len(unexpected)):
        at = np.searchsorted(wanted, token)
        for name in ("sequence", "position"):
            if len(wrong := token[held[name] != expected.index[name][at]]):
                yield Fault(where, f"{name} of token {wrong[0]} must be that of tokens.parquet, got another")


def _threshold_faults(row: dict[str, Any], method: Method | None, dtype: str) -> Iterator[Fault]:
    """Whether a layer and matrix has a threshold only where its method takes one, and the value that its bits have."""
    bits, where = row["threshold_bits"], named(row["layer"], row["matrix"])
    if bits is None or method is None:
        return
    if not method.needs_threshold(row["matrix"]):
        what = f"threshold must be null under method {method.name}, got {row['threshold']}"
        yield Fault("matrices.parquet", f"{where}: {what}")
    if method.score == "input":
        number = FORMATS[dtype]
        exact = float(number.to_float(np.array([bits], number.bits))[0])
        if row["threshold"] != exact:
            what = f"threshold must be {exact} by its bits, got {row['threshold']}"
            yield Fault("matrices.parquet", f"{where}: {what}")


def _count_faults(row: dict[str, Any], rows: int, nnz: int) -> Iterator[Fault]:
    """What `matrices.parquet` says was counted, against the rows that there are."""
    achieved = 1 - nnz / (rows * row["in_features"]) if rows else None
    for name, value in (("rows", rows), ("nnz", nnz), ("achieved_sparsity", achieved)):
        if row[name] != value:
            what = f"{named(row['layer'], row['matrix'])}: {name} must be {value}, got {row[name]}"
            yield Fault("matrices.parquet", what)
