"""One data file of a workload: its schema, statistics and pages, and the rule of every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.formats.columns import column_bytes, decode_rows, operand_columns, row_lengths
from sparsetrace.formats.numbers import FORMATS, NumberFormat, mask_bytes
from sparsetrace.formats.row_statistics import popcounts, row_norms
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import INDEXED, data_schema, row_group_rows
from sparsetrace.methods import Method
from sparsetrace.workload.verify_faults import Fault, one_line

INDEX = ("token", "sequence", "position")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a data file is checked against.

    Args:
        manifest: of the workload.
        matrix: its layer and matrix's row of `matrices.parquet`.
        method: that of this row; None if this package does not have it.
    """

    manifest: dict[str, Any]
    matrix: dict[str, Any]
    method: Method | None

    @property
    def features(self) -> int:
        """Inputs of the matrix."""
        return int(self.matrix["in_features"])

    @property
    def number(self) -> NumberFormat:
        """Format of the operands."""
        return FORMATS[self.manifest["dtype"]]

    @property
    def level(self) -> str:
        """What was captured."""
        return str(self.manifest["capture"]["level"])

    @property
    def bound(self) -> int | None:
        """Bit pattern that the magnitude of each kept value must exceed; None if values say nothing about the rule."""
        by_input = self.method is not None and self.method.score == "input"
        return self.matrix["threshold_bits"] if by_input else None

    @property
    def schema(self) -> pa.Schema:
        """Of the file."""
        encoding, in_layer = self.manifest["encoding"], self.matrix["layer"] is not None
        return data_schema(self.number.name, encoding, self.level, self.features, in_layer)


class DataFile:
    """One data file.

    Args:
        folder: of the workload.
        entry: of the file, in the manifest.
        rules: what it is checked against.

    Attributes:
        index: token, sequence and position of its rows.
        nnz: kept inputs, counted.
        unreadable: whether some of it could not be read.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], rules: Rules) -> None:
        self.folder = folder
        self.entry = entry
        self.rules = rules
        self.index: dict[str, np.ndarray] = {}
        self.nnz = 0
        self.unreadable = False

    def faults(self, damaged: bool) -> Iterator[Fault]:
        """What is wrong with the file; of a damaged one, whose rows mean nothing, only which columns cannot be read."""
        self.unreadable = damaged
        where = self.entry["path"]
        pieces: list[pa.Table] = []
        try:
            file = pq.ParquetFile(self.folder / where, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid, pa.ArrowException) as error:
            self.unreadable = True
            yield Fault(where, f"must be readable, got {one_line(error)}")
            return
        schema = self.rules.schema
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
                    yield Fault(where, f"column {name} of row group {group} must be readable, got {one_line(error)}")
            rows = file.metadata.row_group(group).num_rows
            for name in [name for name, column in columns.items() if len(column) != rows]:
                self.unreadable = True
                yield Fault(
                    where, f"column {name} of row group {group} must have {rows} rows, got {len(columns.pop(name))}"
                )
            if not self.unreadable:
                table = pa.table(columns, schema=schema)
                pieces.append(table.select(INDEX))
                self.nnz += int(table["nnz"].to_numpy().sum())
                for column, what in row_faults(table, self.entry, self.rules):
                    yield Fault(where, f"column {column} of row group {group}: {what}")
        if not self.unreadable:
            table = pa.concat_tables(pieces) if pieces else schema.empty_table()
            self.index = {name: table[name].to_numpy() for name in INDEX}
            yield from self._entry_faults()

    def _statistics_faults(self, metadata: pq.FileMetaData) -> Iterator[Fault]:
        """Columns by which a query, the reader's own too, skips row groups."""
        # `layer` has none where it is null
        indexed = [name for name in INDEXED if name != "layer" or self.entry["layer"] is not None]
        for group in range(metadata.num_row_groups):
            chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
            for chunk in chunks:
                if chunk.path_in_schema in indexed and not (chunk.statistics and chunk.statistics.has_min_max):
                    what = f"column {chunk.path_in_schema} of row group {group} must have statistics, got none"
                    yield Fault(self.entry["path"], what)

    def _entry_faults(self) -> Iterator[Fault]:
        """What the manifest says of the file's rows."""
        where, token = self.entry["path"], self.index["token"]
        rows = len(token)
        span = (int(token[0]), int(token[-1])) if rows else (None, None)
        counted = {"rows": rows, "nnz": self.nnz, "first_token": span[0], "last_token": span[1]}
        for name, value in counted.items():
            if self.entry[name] != value:
                yield Fault("manifest.json", f"{name} of {where} must be {value}, got {self.entry[name]}")
        if not (np.diff(token) > 0).all():
            yield Fault(where, "column token: must ascend, got a number that does not")


def row_faults(table: pa.Table, entry: dict[str, Any], rules: Rules) -> Iterator[tuple[str, str]]:
    """What is wrong with the rows of one row group, each as (column, what)."""
    features, method = rules.features, rules.method
    if len(table) > row_group_rows(features):
        yield "token", f"must hold at most {row_group_rows(features)} rows, got {len(table)}"
    for name in ("layer", "matrix"):
        if set(table[name].unique().to_pylist()) != {entry[name]}:
            yield name, f"must be {'null' if entry[name] is None else entry[name]} in every row, got another"
    if table["expert"].null_count != len(table):
        yield "expert", "must be null for a dense model, got a number"
    nnz = table["nnz"].to_numpy()
    if method is not None:
        most = method.most_kept(entry["matrix"], features)
        if most is not None and (many := nnz > most).any():
            yield "nnz", f"must be at most {most} under {method.label}, got {nnz[many][0]}" + _of(table, many)
    if rules.level == "stats":
        return
    yield from _out_mask_faults(table, entry["matrix"], rules)
    if wrong := _shape_fault(table, features):
        yield wrong
        return
    rows = decode_rows(table, entry["layer"], entry["matrix"], features, rules.number)
    yield from _mask_faults(rows, table, method)
    if rows.bits is not None:
        yield from _value_faults(rows, rows.bits, table, rules)


def _out_mask_faults(table: pa.Table, matrix: str, rules: Rules) -> Iterator[tuple[str, str]]:
    """Whether there are masks of outputs where the method has them, and whether each drops as many as it must."""
    method, outputs = rules.method, rules.matrix["out_features"]
    if method is None:
        return
    stated = matrix in method.out_masks
    if table["out_mask"].null_count != (0 if stated else len(table)):
        rule = "be there in every row" if stated else "be null"
        yield "out_mask", f"must {rule} under method {method.name}, got the contrary"
    elif stated:
        if set(row_lengths(table["out_mask"])) - {mask_bytes(outputs)}:
            yield "out_mask", f"must have {mask_bytes(outputs)} bytes in every row, got others"
            return
        masks = column_bytes(table["out_mask"])[0].reshape(len(table), mask_bytes(outputs))
        if outputs % 8 and (masks[:, -1] >> (outputs % 8)).any():
            yield "out_mask", "bits beyond the last output must be zero, got ones"
        dropped = method.dropped_outputs(outputs)
        if dropped is not None and (other := popcounts(masks) != dropped).any():
            what = f"must name {dropped} of {outputs} outputs under {method.label}, got another number"
            yield "out_mask", what + _of(table, other)


def _shape_fault(table: pa.Table, features: int) -> tuple[str, str] | None:
    """The first column in which rows are not as long as they must be, so that they cannot be decoded."""
    nnz = table["nnz"].to_numpy()
    if "mask" in table.column_names:
        if set(row_lengths(table["mask"])) - {mask_bytes(features)}:
            return "mask", f"must have {mask_bytes(features)} bytes in every row, got others"
        for name in operand_columns(table.column_names):
            if name.startswith("values") and not np.array_equal(row_lengths(table[name]), nnz):
                return name, "must have nnz bytes in every row, got others"
        return None
    for name in ("indices", "values"):
        if name in table.column_names and not np.array_equal(row_lengths(table[name]), nnz):
            return name, "must have nnz items in every row, got others"
    indices = table["indices"].combine_chunks().flatten().to_numpy().astype(np.int64)
    row = np.repeat(np.arange(len(nnz)), nnz)
    ordered = (np.diff(indices) > 0) | (np.diff(row) > 0)
    if len(indices) and (indices.max() >= features or not ordered.all()):
        return "indices", f"must ascend below {features} in every row, got others"
    return None


def _mask_faults(rows: Rows, table: pa.Table, method: Method | None) -> Iterator[tuple[str, str]]:
    features, counts, nnz = rows.features, popcounts(rows.mask), table["nnz"].to_numpy()
    if not np.array_equal(counts, nnz):
        token = int(rows.token[np.flatnonzero(counts != nnz)[0]])
        yield "mask", f"must have nnz set bits in every row, got another number in token {token}"
    if features % 8 and (rows.mask[:, -1] >> (features % 8)).any():
        yield "mask", "bits beyond the last input must be zero, got ones"
    neighbours = None if method is None else method.most_of_neighbours()
    if neighbours is not None and features % neighbours[1] == 0:
        n, m = neighbours
        many = rows.keep().reshape(len(rows), -1, m).sum(axis=2).max(axis=1, initial=0) > n
        if many.any():
            yield "mask", f"must keep at most {n} of each {m} neighbours, got more" + _of(table, many)


def _value_faults(rows: Rows, bits: np.ndarray, table: pa.Table, rules: Rules) -> Iterator[tuple[str, str]]:
    number, bound = rules.number, rules.bound
    magnitudes = bits & number.bits.type(number.sign - 1)
    of = np.repeat(rows.token, table["nnz"].to_numpy())
    for bad, what in (
        (magnitudes == 0, "kept values must not be zero, got 0.0 or -0.0"),
        (magnitudes >= number.infinity, "values must be finite, got Inf or NaN"),
    ):
        if bad.any():
            yield "values", f"{what} in token {of[bad][0]}"
    if bound is not None and (low := magnitudes <= bound).any():
        threshold, value = rules.matrix["threshold"], number.to_float(magnitudes[low][:1])[0]
        what = f"kept |x| must be above the threshold {threshold} of matrices.parquet"
        yield "values", f"{what}, got {value} in token {of[low][0]}"
    if (magnitudes < number.infinity).all():
        for name, value in zip(("absmax", "l2"), row_norms(bits, rows.offsets, number), strict=True):
            stored = table[name].to_numpy()
            # a norm may be summed in another order
            near = stored == value if name == "absmax" else np.isclose(stored, value, rtol=1e-6, atol=0)
            if not near.all():
                yield name, f"must be that of the values, got another in token {rows.token[~near][0]}"


def _of(table: pa.Table, wrong: np.ndarray) -> str:
    """The first token of some rows, at the end of a fault."""
    return f" in token {table['token'].to_numpy()[wrong][0]}"
