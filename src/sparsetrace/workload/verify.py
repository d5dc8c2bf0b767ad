"""Checking a workload against its own manifest, format and method; every fault is named, none stops the search.

Of each file: its hash; that it can be read, page checksums included; its schema; the rows that it
should have; nnz = popcount of the mask = number of values; absmax and l2; no -0.0, Inf or NaN; the method's rule. Of
the whole: the manifest's own hash and keys, strangers in `data/`, tokens and sequences, and the counts in
`matrices.parquet`. Only a manifest that lacks a key, or holds another type there, ends the search at once.

What stored fields determine of a method's rule; the inputs that were dropped are not stored:

| method | checked |
|---|---|
| `teal` | every kept abs(x) is above the threshold |
| `topk`, `wina` with `select: topk` | no row keeps more than k; one with fewer had zeros among its k largest |
| `wina` with `select: threshold` | nothing: the scores need the norms of the weights, `--recompute` has them |
| `nm` | of each M neighbours at most N |
| `cats`, `griffin` | `out_mask` is where the method has one; `down` keeps no neuron that it says is not computed |
| `griffin` also | k neurons are computed, the same for `gate` and `up` and in every row of a sequence |
| `dense`, `exact_zeros` | there is no threshold and no `out_mask` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.core.files import read_json, sha256_file, sha256_json
from sparsetrace.formats.columns import decode_rows, operand_columns
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.row_statistics import popcounts, row_norms
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import ENCODINGS, LEVELS, data_schema, leaf, row_group_rows
from sparsetrace.formats.tables import MATRIX_TABLE, SEQUENCES, TOKENS, teacher_forced_hash
from sparsetrace.formats.versions import refuse_unknown_format
from sparsetrace.methods import METHODS, Method
from sparsetrace.workload.reader import Workload

# Types of the manifest's keys, and of each file's: docs/format.md says what they are.
MANIFEST: dict[str, type | UnionType] = {
    **dict.fromkeys(("model_hash", "source", "source_hash", "dtype", "label", "method", "encoding", "device"), str),
    **dict.fromkeys(("parameters", "decoding", "batching", "capture", "versions", "packed_with"), dict),
    **dict.fromkeys(("threads", "tokens", "rows", "nnz"), int),
    **dict.fromkeys(("given", "tuning"), str | None),
    **dict.fromkeys(("calibration", "study"), dict | None),
    **{"share_inputs": bool, "engine": str, "smaller_batches": dict, "commits": list, "files": list},
}
FILE: dict[str, type | UnionType] = {"path": str, "rows": int, "bytes": int, "sha256": str}
DATA_FILE = FILE | {"layer": int, "matrix": str, "nnz": int, "first_token": int | None, "last_token": int | None}
# The data card. People write into it, its licence to begin with, so that its hash would say nothing.
CARD = "README.md"

# Columns that must have statistics.
INDEXED = ("layer", "matrix", "token", "sequence", "position", "nnz", "absmax", "l2")

TABLES = {"tokens.parquet": TOKENS, "sequences.parquet": SEQUENCES, "matrices.parquet": MATRIX_TABLE}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong.

    Args:
        where: file, or `workload`.
        what: the rule and what was found.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(folder: Path, report: Callable[[int, int], None] | None = None) -> list[Fault]:
    """Find everything wrong with a workload on disk.

    Args:
        folder: of the workload.
        report: called with (data files done, in all).

    Raises:
        InputError: there is no workload, or its version is unknown.
    """
    manifest = read_json(folder / "manifest.json", "verify")
    refuse_unknown_format(manifest, f"verify: {folder}")
    faults = []
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if manifest.get("sha256") != sha256_json(content):
        faults.append(Fault("manifest.json", "its own sha256 must fit its content: it was edited or damaged"))
    if misshapen := list(_manifest_faults(manifest)):
        return faults + misshapen
    known = {file["path"] for file in manifest["files"]}
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            faults.append(Fault(path.relative_to(folder).as_posix(), "must be in the manifest, got a file it lacks"))
    if not (folder / CARD).is_file():
        faults.append(Fault(CARD, "must be there, got nothing"))
    tables = {}
    for name, schema in TABLES.items():
        entry = next((file for file in manifest["files"] if file["path"] == name), None)
        if entry is None:
            faults.append(Fault(name, "must be in the manifest, got no entry"))
            continue
        if broken := list(_file_faults(folder, entry)):
            # what a damaged table says is no measure of anything
            faults += broken
            continue
        table = _read(folder / name, faults, name)
        if table is None:
            continue
        if not table.schema.equals(schema):
            faults.append(Fault(name, "schema must be that of the format, got another"))
            continue
        tables[name] = table
    for file in manifest["files"]:
        if "matrix" not in file and file["path"] not in TABLES:
            faults += _file_faults(folder, file)
    if len(tables) < len(TABLES):
        for file in manifest["files"]:
            faults += _file_faults(folder, file) if "matrix" in file else []
        return faults
    faults += _table_faults(manifest, tables)
    method = _method(manifest, faults)
    faults += _data_faults(folder, manifest, tables, method, report)
    if not faults and method is not None and method.out_masks:
        # what follows compares files with each other, by the reader, which takes them for sound
        faults += _output_faults(Workload(folder), method)
    return faults


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[Fault]:
    """Keys that the manifest, or one of its files, lacks or that hold what they cannot."""
    parts = [("", manifest, MANIFEST)]
    if isinstance(manifest.get("files"), list):
        for file in manifest["files"]:
            if not isinstance(file, dict):
                yield Fault("manifest.json", f"files must be objects, got {file!r}")
                continue
            named = "layer" in file or str(file.get("path", "")).startswith("data/")
            parts.append((f" of {file.get('path', 'a file')}", file, DATA_FILE if named else FILE))
    for of, part, types in parts:
        for key, kind in types.items():
            if key not in part:
                yield Fault("manifest.json", f"{key}{of} must be there, got nothing")
            elif not isinstance(part[key], kind):
                name = getattr(kind, "__name__", str(kind))
                yield Fault("manifest.json", f"{key}{of} must be {name}, got {part[key]!r}")
    capture = manifest.get("capture")
    level = capture.get("level") if isinstance(capture, dict) else None
    for key, value, among in (
        ("dtype", manifest.get("dtype"), tuple(FORMATS)),
        ("encoding", manifest.get("encoding"), ENCODINGS),
        ("level", level, LEVELS),
    ):
        if value not in among:
            yield Fault("manifest.json", f"{key} must be one of {', '.join(among)}, got {value}")


def _method(manifest: dict[str, Any], faults: list[Fault]) -> Method | None:
    """The method, if it is one of ours; a data set of another is checked without its rule."""
    if manifest["method"] not in METHODS:
        return None
    try:
        return METHODS[manifest["method"]](**manifest["parameters"])
    except (ValueError, TypeError) as error:
        what = f"parameters must be those of method {manifest['method']}, got {_one_line(error)}"
        faults.append(Fault("manifest.json", what))
        return None


def _output_faults(workload: Workload, method: Method) -> Iterator[Fault]:
    """Outputs that are not computed: zero in what reads them, and of one sequence the same where a method says so."""
    if workload.level == "stats":
        return
    sequences = workload.fed()["sequence"].to_numpy()
    for layer in sorted({layer for layer, _ in workload.leaves}):
        stored = [matrix for matrix in method.out_masks if (layer, matrix) in workload.leaves]
        held: dict[int, np.ndarray] = {}
        for first in workload.blocks(layer, stored[0], values=False) if stored else ():
            others = [workload.matrix(layer, matrix, first.token, values=False) for matrix in stored[1:]]
            assert first.out_mask is not None
            for other in others:
                if other.out_mask is None or not np.array_equal(other.out_mask, first.out_mask):
                    yield Fault(f"data/{leaf(layer, other.matrix)}", f"out_mask must be that of {first.matrix}")
            if (layer, "down") in workload.leaves:
                down = workload.matrix(layer, "down", first.token, values=False)
                if (wrong := (down.mask & first.out_mask).any(axis=1)).any():
                    yield Fault(
                        f"data/{leaf(layer, 'down')}",
                        f"column mask: must keep no input that {first.matrix} did not compute, got one in token "
                        f"{first.token[wrong][0]}",
                    )
            if method.outputs_by_sequence:
                of = sequences[np.searchsorted(workload.tokens, first.token)]
                for sequence in np.unique(of).tolist():
                    masks = first.out_mask[of == sequence]
                    if (masks != held.setdefault(sequence, masks[0])).any():
                        what = f"column out_mask: must be one for all of sequence {sequence}, got several"
                        yield Fault(f"data/{leaf(layer, first.matrix)}", what)


def _file_faults(folder: Path, entry: dict[str, Any]) -> Iterator[Fault]:
    path = folder / entry["path"]
    if not path.is_file():
        yield Fault(entry["path"], "must be there, got nothing")
    elif path.stat().st_size != entry["bytes"]:
        yield Fault(entry["path"], f"must have {entry['bytes']} bytes, got {path.stat().st_size}")
    elif (digest := sha256_file(path)) != entry["sha256"]:
        yield Fault(entry["path"], f"must have sha256 {entry['sha256'][:12]}, got {digest[:12]}")


def _read(path: Path, faults: list[Fault], name: str) -> pa.Table | None:
    try:
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowInvalid, pa.ArrowException) as error:
        faults.append(Fault(name, f"must be readable, got {_one_line(error)}"))
        return None


def _table_faults(manifest: dict[str, Any], tables: dict[str, pa.Table]) -> Iterator[Fault]:
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
    """What was fed of each sequence: its prompt, then what stands behind it but for the last."""
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


def _data_faults(
    folder: Path,
    manifest: dict[str, Any],
    tables: dict[str, pa.Table],
    method: Method | None,
    report: Callable[[int, int], None] | None,
) -> Iterator[Fault]:
    tokens = tables["tokens.parquet"].filter(tables["tokens.parquet"]["captured"]).sort_by("token")
    wanted = {name: tokens[name].to_numpy() for name in ("token", "sequence", "position")}
    files = [file for file in manifest["files"] if "matrix" in file]
    rows_of_leaf = {(row["layer"], row["matrix"]): row for row in tables["matrices.parquet"].to_pylist()}
    found: dict[tuple[int, str], list[_Leaf]] = {key: [] for key in rows_of_leaf}
    for done, file in enumerate(files, start=1):
        key = (file["layer"], file["matrix"])
        if key not in rows_of_leaf:
            yield Fault("matrices.parquet", f"must have a row for layer {key[0]} {key[1]}, got none")
            continue
        broken = list(_file_faults(folder, file))
        yield from broken
        if (folder / file["path"]).is_file():
            one = _Leaf(folder, file, rows_of_leaf[key], manifest, method)
            yield from one.faults(damaged=bool(broken))
            found[key].append(one)
        if report is not None:
            report(done, len(files))
    for (layer, matrix), row in rows_of_leaf.items():
        where = f"data/{leaf(layer, matrix)}"
        stored = row["shares_input_with"] or matrix
        if (layer, stored) not in found:
            yield Fault("matrices.parquet", f"layer {layer} {matrix} must share the input of a row, got {stored}")
            continue
        leaves = found[layer, stored]
        if any(one.unreadable for one in leaves):
            continue
        held = {name: np.concatenate([np.empty(0, np.int64), *(one.index[name] for one in leaves)]) for name in wanted}
        order = np.argsort(held["token"], kind="stable")
        yield from _completeness(where, {name: column[order] for name, column in held.items()}, wanted)
        bits = row["threshold_bits"]
        if bits is not None and method is not None and not method.needs_threshold(matrix):
            what = f"threshold must be null under method {method.name}, got {row['threshold']}"
            yield Fault("matrices.parquet", f"layer {layer} {matrix}: {what}")
        if bits is not None and method is not None and method.score == "input":
            number = FORMATS[manifest["dtype"]]
            exact = float(number.to_float(np.array([bits], number.bits))[0])
            if row["threshold"] != exact:
                yield Fault(
                    "matrices.parquet",
                    f"layer {layer} {matrix}: threshold must be {exact} by its bits, got {row['threshold']}",
                )
        count, nnz = len(order), sum(one.nnz for one in leaves)
        achieved = 1 - nnz / (count * row["in_features"]) if count else None
        for name, value in (("rows", count), ("nnz", nnz), ("achieved_sparsity", achieved)):
            if row[name] != value:
                yield Fault("matrices.parquet", f"layer {layer} {matrix}: {name} must be {value}, got {row[name]}")
    for name in ("rows", "nnz"):
        expected = sum(row[name] for row in rows_of_leaf.values())
        if manifest[name] != expected:
            yield Fault("manifest.json", f"{name} must be {expected}, got {manifest[name]}")


def _completeness(where: str, held: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> Iterator[Fault]:
    token = held["token"]
    if twice := token[:-1][np.diff(token) == 0].tolist():
        yield Fault(where, f"tokens must differ, got {twice[0]} more than once")
    if len(missing := np.setdiff1d(wanted["token"], token)):
        yield Fault(where, f"must hold every captured token, got {len(missing)} missing, {missing[0]} the first")
    if len(strange := np.setdiff1d(token, wanted["token"])):
        yield Fault(where, f"must hold captured tokens only, got {strange[0]}")
    if np.array_equal(token, wanted["token"]):
        for name in ("sequence", "position"):
            if len(wrong := token[held[name] != wanted[name]]):
                yield Fault(where, f"{name} of token {wrong[0]} must be that of tokens.parquet, got another")


class _Leaf:
    """One data file.

    Attributes:
        index: token, sequence and position of its rows.
        nnz: kept inputs, counted.
        unreadable: whether some of it could not be read.
    """

    def __init__(
        self,
        folder: Path,
        file: dict[str, Any],
        matrix: dict[str, Any],
        manifest: dict[str, Any],
        method: Method | None,
    ) -> None:
        self.folder = folder
        self.file = file
        self.matrix = matrix
        self.dtype = manifest["dtype"]
        self.level = manifest["capture"]["level"]
        self.encoding = manifest["encoding"]
        self.method = method
        self.bound = matrix["threshold_bits"] if method is not None and method.score == "input" else None
        self.index: dict[str, np.ndarray] = {}
        self.nnz = 0
        self.unreadable = False

    def faults(self, damaged: bool) -> Iterator[Fault]:
        """What is wrong; of a damaged file only which columns cannot be read, for the rest means nothing."""
        self.unreadable = damaged
        where = self.file["path"]
        pieces: list[pa.Table] = []
        try:
            file = pq.ParquetFile(self.folder / where, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid, pa.ArrowException) as error:
            self.unreadable = True
            yield Fault(where, f"must be readable, got {_one_line(error)}")
            return
        schema = data_schema(self.dtype, self.encoding, self.level, self.matrix["in_features"])
        if not file.schema_arrow.equals(schema, check_metadata=True):
            self.unreadable = True
            yield Fault(where, "schema must be that of the format, got another")
            return
        yield from self._statistics_faults(file.metadata)
        for group in range(file.num_row_groups):
            columns = {}
            for name in schema.names:
                try:
                    columns[name] = file.read_row_group(group, columns=[name], use_threads=False)[name]
                except (OSError, pa.ArrowInvalid, pa.ArrowException) as error:
                    self.unreadable = True
                    yield Fault(where, f"column {name} of row group {group} must be readable, got {_one_line(error)}")
            rows = file.metadata.row_group(group).num_rows
            for name in [name for name, column in columns.items() if len(column) != rows]:
                self.unreadable = True
                yield Fault(
                    where, f"column {name} of row group {group} must have {rows} rows, got {len(columns.pop(name))}"
                )
            if not self.unreadable:
                table = pa.table(columns, schema=schema)
                pieces.append(table.select(["token", "sequence", "position"]))
                for column, what in self._row_faults(table):
                    yield Fault(where, f"column {column} of row group {group}: {what}")
        if self.unreadable:
            return
        table = pa.concat_tables(pieces) if pieces else schema.empty_table()
        self.index = {name: table[name].to_numpy() for name in ("token", "sequence", "position")}
        token = self.index["token"]
        rows = len(token)
        span = (int(token[0]), int(token[-1])) if rows else (None, None)
        counted = {"rows": rows, "nnz": self.nnz, "first_token": span[0], "last_token": span[1]}
        for name, value in counted.items():
            if self.file[name] != value:
                yield Fault("manifest.json", f"{name} of {where} must be {value}, got {self.file[name]}")
        if not (np.diff(token) > 0).all():
            yield Fault(where, "column token: must ascend, got a number that does not")

    def _statistics_faults(self, metadata: pq.FileMetaData) -> Iterator[Fault]:
        """Columns by which a query, the reader's own too, skips row groups."""
        for group in range(metadata.num_row_groups):
            chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
            for chunk in chunks:
                if chunk.path_in_schema in INDEXED and not (chunk.statistics and chunk.statistics.has_min_max):
                    what = f"column {chunk.path_in_schema} of row group {group} must have statistics, got none"
                    yield Fault(self.file["path"], what)

    def _row_faults(self, table: pa.Table) -> Iterator[tuple[str, str]]:
        """(column, what) of one row group."""
        number, features = FORMATS[self.dtype], self.matrix["in_features"]
        if len(table) > row_group_rows(features):
            yield "token", f"must hold at most {row_group_rows(features)} rows, got {len(table)}"
        for name in ("layer", "matrix"):
            if set(table[name].unique().to_pylist()) != {self.file[name]}:
                yield name, f"must be {self.file[name]} in every row, got another"
        if table["expert"].null_count != len(table):
            yield "expert", "must be null for a dense model, got a number"
        nnz = table["nnz"].to_numpy()
        self.nnz += int(nnz.sum())
        if self.method is not None:
            most = self.method.most_kept(self.file["matrix"], features)
            if most is not None and (many := nnz > most).any():
                yield "nnz", f"must be at most {most} under {self.method.label}, got {nnz[many][0]}" + _of(table, many)
        if self.level == "stats":
            return
        yield from self._out_mask_faults(table)
        if self.encoding == "split":
            width = -(-features // 8)
            if set(_lengths(table["mask"])) - {width}:
                yield "mask", f"must have {width} bytes in every row, got others"
                return
            for name in operand_columns(table.column_names):
                if name.startswith("values") and not np.array_equal(_lengths(table[name]), nnz):
                    yield name, "must have nnz bytes in every row, got others"
                    return
        else:
            for name in ("indices", "values"):
                if name in table.column_names and not np.array_equal(_lengths(table[name]), nnz):
                    yield name, "must have nnz items in every row, got others"
                    return
            indices = table["indices"].combine_chunks().flatten().to_numpy().astype(np.int64)
            row = np.repeat(np.arange(len(nnz)), nnz)
            ordered = (np.diff(indices) > 0) | (np.diff(row) > 0)
            if len(indices) and (indices.max() >= features or not ordered.all()):
                yield "indices", f"must ascend below {features} in every row, got others"
                return
        rows = decode_rows(table, self.file["layer"], self.file["matrix"], features, number)
        yield from self._operand_faults(rows, table, nnz)

    def _out_mask_faults(self, table: pa.Table) -> Iterator[tuple[str, str]]:
        """Whether there are masks of outputs where the method has them, and of how many."""
        if self.method is None:
            return
        stated = self.file["matrix"] in self.method.out_masks
        if table["out_mask"].null_count != (0 if stated else len(table)):
            rule = "be there in every row" if stated else "be null"
            yield "out_mask", f"must {rule} under method {self.method.name}, got the contrary"
        elif stated:
            outputs = self.matrix["out_features"]
            if set(_lengths(table["out_mask"])) - {mask_bytes(outputs)}:
                yield "out_mask", f"must have {mask_bytes(outputs)} bytes in every row, got others"
                return
            masks = np.array([list(mask) for mask in table["out_mask"].to_pylist()], np.uint8)
            if outputs % 8 and (masks[:, -1] >> (outputs % 8)).any():
                yield "out_mask", "bits beyond the last output must be zero, got ones"
            dropped = self.method.dropped_outputs(outputs)
            if dropped is not None and (other := popcounts(masks) != dropped).any():
                what = f"must name {dropped} of {outputs} outputs under {self.method.label}, got another number"
                yield "out_mask", what + _of(table, other)

    def _operand_faults(self, rows: Rows, table: pa.Table, nnz: np.ndarray) -> Iterator[tuple[str, str]]:
        number, features = FORMATS[self.dtype], rows.features
        counts = popcounts(rows.mask)
        if not np.array_equal(counts, nnz):
            token = int(rows.token[np.flatnonzero(counts != nnz)[0]])
            yield "mask", f"must have nnz set bits in every row, got another number in token {token}"
        if features % 8 and (rows.mask[:, -1] >> (features % 8)).any():
            yield "mask", "bits beyond the last input must be zero, got ones"
        neighbours = None if self.method is None else self.method.most_of_neighbours()
        if neighbours is not None and features % neighbours[1] == 0:
            n, m = neighbours
            many = rows.keep().reshape(len(rows), -1, m).sum(axis=2).max(axis=1, initial=0) > n
            if many.any():
                yield "mask", f"must keep at most {n} of each {m} neighbours, got more" + _of(table, many)
        if rows.bits is None:
            return
        magnitudes = rows.bits & number.bits.type(number.sign - 1)
        of = np.repeat(rows.token, nnz)
        for bad, what in (
            (magnitudes == 0, "kept values must not be zero, got 0.0 or -0.0"),
            (magnitudes >= number.infinity, "values must be finite, got Inf or NaN"),
        ):
            if bad.any():
                yield "values", f"{what} in token {of[bad][0]}"
        if self.bound is not None and (low := magnitudes <= self.bound).any():
            yield (
                "values",
                (
                    f"kept |x| must be above the threshold {self.matrix['threshold']} of matrices.parquet, "
                    f"got {number.to_float(magnitudes[low][:1])[0]} in token {of[low][0]}"
                ),
            )
        if (magnitudes < number.infinity).all():
            for name, value in zip(("absmax", "l2"), row_norms(rows.bits, rows.offsets, number), strict=True):
                stored = table[name].to_numpy()
                # a norm may be summed in another order
                near = stored == value if name == "absmax" else np.isclose(stored, value, rtol=1e-6, atol=0)
                if not near.all():
                    yield name, f"must be that of the values, got another in token {rows.token[~near][0]}"


def _of(table: pa.Table, wrong: np.ndarray) -> str:
    return f" in token {table['token'].to_numpy()[wrong][0]}"


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    return np.diff(offsets)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
