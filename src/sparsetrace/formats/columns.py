"""Operands as the Arrow columns of a data file, and back; docs/format.md specifies them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS, NumberFormat, mask_bytes
from sparsetrace.formats.ragged import offsets_of
from sparsetrace.formats.row_statistics import RowStatistics, popcounts
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import index_type


@dataclass(frozen=True, slots=True)
class Index:
    """Index columns of T rows, an array [T] each."""

    token: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


def encode_rows(
    schema: pa.Schema,
    layer: int | None,
    matrix: str,
    index: Index,
    statistics: RowStatistics,
    rows: Rows | None,
) -> pa.Table:
    """Encode rows as the table that a data file holds.

    Args:
        schema: from `schema.data_schema`; decides which columns there are.
        layer: layer number; None where the matrix belongs to the model as a whole.
        matrix: name of the matrix.
        index: index columns of the rows.
        statistics: statistics of the rows.
        rows: the operands; None where the schema has no columns for them (level `stats`).
    """
    T = len(index.token)
    columns: dict[str, Any] = {
        "layer": pa.nulls(T, pa.int16()) if layer is None else np.full(T, layer, np.int16),
        "matrix": _named(matrix, T),
        "token": index.token,
        "sequence": index.sequence.astype(np.int32),
        "position": index.position.astype(np.int32),
        "expert": pa.nulls(T, pa.int16()),
        "nnz": statistics.nnz.astype(np.int32),
        "absmax": statistics.absmax,
        "l2": statistics.l2,
    }
    if rows is not None:
        number = FORMATS[rows.dtype]
        columns["mask"] = _fixed(rows.mask)
        columns["out_mask"] = pa.nulls(T, pa.binary()) if rows.out_mask is None else _fixed(rows.out_mask)
        if "indices" in schema.names:
            indices = pa.array(rows.indices().astype(index_type(rows.features)))
            columns["indices"] = _list(indices, rows.offsets)
        if "values" in schema.names:
            columns["values"] = _list(pa.array(rows.values), rows.offsets)
        if number.planes[0] in schema.names:
            planes = number.to_planes(rows.patterns)
            columns |= {name: _binary(plane, rows.offsets) for name, plane in zip(number.planes, planes, strict=True)}
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def as_read_by(table: pa.Table, matrix: str, out_mask: np.ndarray | None) -> pa.Table:
    """The rows of one matrix as those of another that reads the same operand.

    Args:
        table: from `encode_rows`.
        matrix: name of the other matrix.
        out_mask: uint8 [T, ceil(N / 8)], its outputs that the method leaves out; None where it computes all of them.
    """
    columns = {name: table[name] for name in table.column_names}
    columns["matrix"] = _named(matrix, len(table))
    if out_mask is not None:
        columns["out_mask"] = _fixed(out_mask)
    return pa.table(columns, schema=table.schema)


def operand_columns(names: list[str], values: bool = True) -> list[str]:
    """Those columns of a data file that hold the operands, in either encoding, with or without their values."""
    return [name for name in names if name in ("mask", "out_mask", "indices") or (values and name.startswith("values"))]


def decode_rows(table: pa.Table, layer: int | None, matrix: str, features: int, number: NumberFormat) -> Rows:
    """Decode a table that holds `token` and either `mask` or `indices`, with or without the columns of the values.

    The inverse of `encode_rows`.
    """
    token = table["token"].to_numpy()
    out_mask = None
    if "out_mask" in table.column_names and len(token) and not table["out_mask"].null_count:
        out_mask = column_bytes(table["out_mask"])[0].reshape(len(token), -1)
    if "indices" in table.column_names:
        offsets, indices = _list_parts(table["indices"])
        values = _list_parts(table["values"])[1] if "values" in table.column_names else None
        keep = np.zeros((len(token), features), bool)
        keep[np.repeat(np.arange(len(token)), np.diff(offsets)), indices] = True
        mask = np.packbits(keep, axis=1, bitorder="little")
        bits = None if values is None else number.from_float(values)
        return Rows(layer, matrix, features, number.name, token, mask, offsets, bits, out_mask)
    mask = column_bytes(table["mask"])[0].reshape(len(token), mask_bytes(features))
    if number.planes[0] not in table.column_names:
        return Rows(layer, matrix, features, number.name, token, mask, offsets_of(popcounts(mask)), None, out_mask)
    planes = [column_bytes(table[name]) for name in number.planes]
    patterns = number.from_planes([plane for plane, _ in planes])
    return Rows(layer, matrix, features, number.name, token, mask, planes[0][1], patterns, out_mask)


def _named(matrix: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), [matrix])


def _binary(data: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """A binary column over a buffer that is not copied."""
    buffers = [None, _offsets32(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers)


def _fixed(mask: np.ndarray) -> pa.Array:
    """A binary column of rows of equal length."""
    return _binary(mask.reshape(-1), np.arange(len(mask) + 1) * mask.shape[1])


def _list(items: pa.Array, offsets: np.ndarray) -> pa.Array:
    """A list column over an array that is not copied."""
    field = pa.field("element", items.type, nullable=False)
    return pa.Array.from_buffers(pa.list_(field), len(offsets) - 1, [None, _offsets32(offsets)], children=[items])


def _offsets32(offsets: np.ndarray) -> pa.Buffer:
    if offsets[-1] > np.iinfo(np.int32).max:
        raise InputError(f"pack: a row group must hold less than 2 GiB in one column, got {offsets[-1]} bytes")
    return pa.py_buffer(offsets.astype(np.int32))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def column_bytes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a binary column and int64 offsets into them; not copied where the column is a single chunk."""
    array = _one_chunk(column)
    offsets, buffer = _offsets(array).astype(np.int64), array.buffers()[2]
    data = np.frombuffer(buffer, np.uint8) if buffer is not None else np.empty(0, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def row_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """int32: length of each row of a column of bytes or lists."""
    return np.diff(_offsets(_one_chunk(column)))


def _offsets(array: pa.Array) -> np.ndarray:
    """int32 offsets of the rows of an array of bytes or lists, as its buffer holds them."""
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]


def _list_parts(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """int64 offsets and the flat values of a list column."""
    array = _one_chunk(column)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], array.flatten().to_numpy()
