"""Operands of one layer and matrix: in memory, and as the Arrow columns of the workload format (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsetrace.core.files import InputError
from sparsetrace.formats.ragged import offsets_of, take
from sparsetrace.formats.schema import FORMATS, NumberFormat, index_type, mask_bytes

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from torch import Tensor

# Inputs expanded at once: a flag each and a place for each that is kept, which a processor's cache holds.
CHUNK_INPUTS = 1 << 18
# Values, about, whose figures are made at once: two thirds of the time of a whole row group's.
FIGURE_VALUES = 1 << 17


# not frozen, which makes one cost five times as much: a replay makes one for each matrix of each token
@dataclass(slots=True)
class Rows:
    """Operands of one layer and matrix, one per token.

    Args:
        layer, matrix: which.
        features: inputs D of the matrix.
        dtype: of the model.
        token: int64 [T].
        mask: uint8 [T, ceil(D / 8)], kept inputs, lowest bit first.
        offsets: int64 [T + 1], where each row's values begin.
        bits: uint16 or uint32 [nnz], bit patterns of the kept values; None where only masks were captured.
        out_mask: uint8 [T, ceil(N / 8)], outputs that the method says are not computed; None where it says nothing.
    """

    layer: int
    matrix: str
    features: int
    dtype: str
    token: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    bits: np.ndarray | None
    out_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token)

    def __repr__(self) -> str:
        kept = f"{self.offsets[-1]:,} kept" + ("" if self.bits is not None else ", masks only")
        return f"Rows(layer {self.layer}, {self.matrix}: {len(self):,} tokens x {self.features:,} {self.dtype}, {kept})"

    @property
    def nnz(self) -> np.ndarray:
        """int64 [T]: kept inputs of each row."""
        return np.diff(self.offsets)

    @property
    def patterns(self) -> np.ndarray:
        """[nnz] bit patterns of the kept values.

        Raises:
            InputError: the workload holds masks only.
        """
        if self.bits is None:
            raise InputError(
                "rows: values must have been captured, got capture level `masks`: use keep(), mask or indices()"
            )
        return self.bits

    @property
    def values(self) -> np.ndarray:
        """[nnz] kept values: float16 for a float16 model, else float32, which holds a bfloat16 exactly."""
        return FORMATS[self.dtype].to_float(self.patterns)

    def keep(self) -> np.ndarray:
        """bool [T, D]: which inputs were kept."""
        return np.unpackbits(self.mask, axis=1, count=self.features, bitorder="little").view(bool)

    def bitmask(self) -> np.ndarray:
        """uint8 [T, ceil(D / 8)]: `mask`; bit j of byte i is input 8 i + j, trailing bits zero."""
        return self.mask

    def dense(self) -> np.ndarray:
        """[T, D] the operands, dropped inputs +0.0; dtype as `values`."""
        return self._expand(FORMATS[self.dtype].float_type)

    def indices(self) -> np.ndarray:
        """int32 [nnz]: input number of each value."""
        indices = np.empty(self.offsets[-1], np.int32)
        width = 8 * self.mask.shape[1]
        for rows, held in self._chunks():
            first = np.repeat(np.arange(rows.stop - rows.start) * width, self.nnz[rows])
            indices[held] = _set_bits(self.mask[rows]) - first
        return indices

    def csr(self) -> csr_array:
        """scipy CSR [T, D]; float16 values are widened to float32, which scipy can multiply."""
        try:
            from scipy.sparse import csr_array
        except ImportError:
            raise InputError("csr: scipy must be installed, got none: pip install 'sparsetrace[scipy]'") from None
        values = self.values.astype(np.float32)
        return csr_array((values, self.indices(), self.offsets), shape=(len(self), self.features))

    def torch(self) -> Tensor:
        """torch tensor [T, D] in the model's own dtype, bit for bit."""
        return _as_torch(self._expand(self.patterns.dtype), self.dtype)

    def torch_csr(self) -> Tensor:
        """torch sparse CSR [T, D] in the model's own dtype, bit for bit; indices int64."""
        import torch

        return torch.sparse_csr_tensor(
            torch.from_numpy(self.offsets),
            torch.from_numpy(self.indices().astype(np.int64)),
            _as_torch(self.patterns, self.dtype),
            size=(len(self), self.features),
            # they hold by construction; torch warns where it is not told
            check_invariants=False,
        )

    def take(self, at: np.ndarray) -> Rows:
        """Rows by place, in any order."""
        if len(at) == len(self) and np.array_equal(at, np.arange(len(self))):
            return self
        if self.bits is None:
            bits, offsets = None, offsets_of(self.nnz[at])
        else:
            bits, offsets = take(self.bits, self.offsets, at)
        out_mask = None if self.out_mask is None else self.out_mask[at]
        return Rows(
            self.layer, self.matrix, self.features, self.dtype, self.token[at], self.mask[at], offsets, bits, out_mask
        )

    def _expand(self, dtype: np.dtype) -> np.ndarray:
        """[T, D] zeros of a type, with each pattern in the highest bytes of its place: a bfloat16's in a float32."""
        patterns = self.patterns
        width = 8 * self.mask.shape[1]
        dense = np.zeros((len(self), width), dtype)
        parts = dtype.itemsize // patterns.itemsize
        places = dense.reshape(-1).view(patterns.dtype)[parts - 1 :: parts]
        for rows, held in self._chunks():
            places[rows.start * width : rows.stop * width][_set_bits(self.mask[rows])] = patterns[held]
        return dense if width == self.features else np.ascontiguousarray(dense[:, : self.features])

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of rows, and of the values they hold."""
        step = chunk_rows(self.features)
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            yield slice(start, stop), slice(self.offsets[start], self.offsets[stop])


def _set_bits(mask: np.ndarray) -> np.ndarray:
    """int64: places of the set bits of [T, bytes], counted through all rows."""
    # as bool: numpy finds nonzero bools several times faster than nonzero bytes
    return np.flatnonzero(np.unpackbits(mask.reshape(-1), bitorder="little").view(bool))


def _as_torch(patterns: np.ndarray, dtype: str) -> Tensor:
    import torch

    signed = patterns.view(np.int16 if patterns.itemsize == 2 else np.int32)
    return torch.from_numpy(signed).view(getattr(torch, dtype))


def chunk_rows(features: int) -> int:
    """Rows to expand at once."""
    return max(1, CHUNK_INPUTS // features)


def popcounts(mask: np.ndarray) -> np.ndarray:
    """int64 [T]: set bits of each row of a mask [T, bytes]."""
    return np.bitwise_count(mask).sum(axis=1, dtype=np.int64)


def no_rows(layer: int, matrix: str, features: int, dtype: str, values: bool = True) -> Rows:
    """Rows of no token."""
    mask = np.empty((0, mask_bytes(features)), np.uint8)
    bits = np.empty(0, FORMATS[dtype].bits) if values else None
    return Rows(layer, matrix, features, dtype, np.empty(0, np.int64), mask, np.zeros(1, np.int64), bits)


def join(pieces: Sequence[Rows]) -> Rows:
    """Rows of one layer and matrix, one piece after another; at least one piece."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    bits = None if first.bits is None else np.concatenate([rows.patterns for rows in pieces])
    out_masks = [rows.out_mask for rows in pieces if rows.out_mask is not None]
    return Rows(
        first.layer,
        first.matrix,
        first.features,
        first.dtype,
        np.concatenate([rows.token for rows in pieces]),
        np.concatenate([rows.mask for rows in pieces]),
        offsets_of(np.concatenate([rows.nnz for rows in pieces])),
        bits,
        np.concatenate(out_masks) if out_masks else None,
    )


def row_figures(patterns: np.ndarray, offsets: np.ndarray, number: NumberFormat) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude and Euclidean norm of each row, float32 [T].

    The norm is summed in float64, and infinite where it lies beyond float32.

    Args:
        patterns: [nnz] bit patterns of the values.
        offsets: int64 [T + 1], where each row's values begin.
        number: format of the values.
    """
    absmax, l2 = np.zeros((2, len(offsets) - 1), np.float32)
    # reduceat needs the starts of rows that have values; empty ones add none between them
    filled = np.flatnonzero(np.diff(offsets))
    step = max(1, FIGURE_VALUES * len(filled) // max(1, len(patterns)))
    for rows in (filled[start : start + step] for start in range(0, len(filled), step)):
        first, last = offsets[rows[0]], offsets[rows[-1] + 1]
        magnitudes = patterns[first:last] & number.bits.type(number.sign - 1)
        starts = offsets[rows] - first
        absmax[rows] = number.magnitudes(np.maximum.reduceat(magnitudes, starts))
        squares = number.magnitudes(magnitudes).astype(np.float64)
        squares *= squares
        with np.errstate(over="ignore"):
            l2[rows] = np.sqrt(np.add.reduceat(squares, starts)).astype(np.float32)
    return absmax, l2


@dataclass(frozen=True, slots=True)
class Index:
    """Index columns of rows, [T] each."""

    token: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of rows, [T] each: kept inputs, largest magnitude, Euclidean norm."""

    nnz: np.ndarray
    absmax: np.ndarray
    l2: np.ndarray


def encode_rows(
    schema: pa.Schema,
    layer: int,
    matrix: str,
    index: Index,
    figures: Figures,
    rows: Rows | None,
) -> pa.Table:
    """Rows as the table that a data file holds.

    Args:
        schema: `schema.data_schema`; it says which columns there are.
        layer, matrix: which.
        index, figures: of the rows.
        rows: the operands; None where the schema has figures only.
    """
    T = len(index.token)
    columns: dict[str, Any] = {
        "layer": np.full(T, layer, np.int16),
        "matrix": _named(matrix, T),
        "token": index.token,
        "sequence": index.sequence.astype(np.int32),
        "position": index.position.astype(np.int32),
        "expert": pa.nulls(T, pa.int16()),
        "nnz": figures.nnz.astype(np.int32),
        "absmax": figures.absmax,
        "l2": figures.l2,
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
    """The rows of a data file as those of another matrix that reads the same operand.

    Args:
        table: from `encode_rows`.
        matrix: which.
        out_mask: uint8 [T, ceil(N / 8)] of its own, or None.
    """
    columns = {name: table[name] for name in table.column_names}
    columns["matrix"] = _named(matrix, len(table))
    if out_mask is not None:
        columns["out_mask"] = _fixed(out_mask)
    return pa.table(columns, schema=table.schema)


def operand_columns(names: list[str], values: bool = True) -> list[str]:
    """Of a data file's columns, those that hold the operands, in whatever encoding, with or without their values."""
    return [name for name in names if name in ("mask", "out_mask", "indices") or (values and name.startswith("values"))]


def decode_rows(table: pa.Table, layer: int, matrix: str, features: int, number: NumberFormat) -> Rows:
    """Rows of a table that holds `token` and either `mask` (with or without the value planes) or `indices`.

    The inverse of `encode_rows`; `values` of the open encoding may be left out too.
    """
    token = table["token"].to_numpy()
    out_mask = None
    if "out_mask" in table.column_names and not table["out_mask"].null_count:
        out_mask = _bytes(table["out_mask"])[0].reshape(len(token), -1)
    if "indices" in table.column_names:
        offsets, indices = _list_parts(table["indices"])
        values = _list_parts(table["values"])[1] if "values" in table.column_names else None
        keep = np.zeros((len(token), features), bool)
        keep[np.repeat(np.arange(len(token)), np.diff(offsets)), indices] = True
        mask = np.packbits(keep, axis=1, bitorder="little")
        bits = None if values is None else number.from_float(values)
        return Rows(layer, matrix, features, number.name, token, mask, offsets, bits, out_mask)
    mask = _bytes(table["mask"])[0].reshape(len(token), mask_bytes(features))
    if number.planes[0] not in table.column_names:
        return Rows(layer, matrix, features, number.name, token, mask, offsets_of(popcounts(mask)), None, out_mask)
    planes = [_bytes(table[name]) for name in number.planes]
    patterns = number.from_planes([plane for plane, _ in planes])
    return Rows(layer, matrix, features, number.name, token, mask, planes[0][1], patterns, out_mask)


def _named(matrix: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), [matrix])


def _binary(data: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """A binary column over one buffer, not copied."""
    buffers = [None, _offsets32(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers)


def _fixed(mask: np.ndarray) -> pa.Array:
    """A binary column of equally long rows."""
    return _binary(mask.reshape(-1), np.arange(len(mask) + 1) * mask.shape[1])


def _list(items: pa.Array, offsets: np.ndarray) -> pa.Array:
    """A list column over one array, not copied."""
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


def _bytes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """All bytes of a binary column and int64 offsets, without a copy where it is one chunk."""
    array = _one_chunk(column)
    _, offsets_buffer, data = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    data = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def _list_parts(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """int64 offsets and the flat values of a list column."""
    array = _one_chunk(column)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], array.flatten().to_numpy()
