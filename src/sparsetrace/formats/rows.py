"""Operands of one matrix in memory, as bitmask and packed values, and their dense, sparse, scipy and torch forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.ragged import offsets_of, take

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from torch import Tensor

# Inputs expanded at a time, so that their flags and the positions of the kept ones fit the processor's cache.
CHUNK_INPUTS = 1 << 18


# not frozen: that makes construction five times as slow, and a replay constructs one for each matrix of each token
@dataclass(slots=True)
class Rows:
    """Operands of one matrix, one per token.

    Args:
        layer: layer number; None where the matrix belongs to the model as a whole.
        matrix: name of the matrix.
        features: inputs D of the matrix.
        dtype: number format of the model.
        token: int64 [T], token numbers.
        mask: uint8 [T, ceil(D / 8)], kept inputs, lowest bit first.
        offsets: int64 [T + 1], where each row's values begin.
        bits: uint16 or uint32 [nnz], bit patterns of the kept values; None where only masks were captured.
        out_mask: uint8 [T, ceil(N / 8)], outputs that the method leaves out; None where it computes all of them.
    """

    layer: int | None
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
        name = self.matrix if self.layer is None else f"layer {self.layer}, {self.matrix}"
        return f"Rows({name}: {len(self):,} tokens x {self.features:,} {self.dtype}, {kept})"

    @property
    def nnz(self) -> np.ndarray:
        """int64 [T]: number of kept inputs of each row."""
        return np.diff(self.offsets)

    @property
    def patterns(self) -> np.ndarray:
        """[nnz]: bit patterns of the kept values.

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
        """[nnz]: kept values, as float16 for a float16 model and else as float32, which holds a bfloat16 exactly."""
        return FORMATS[self.dtype].to_float(self.patterns)

    def keep(self) -> np.ndarray:
        """bool [T, D]: which inputs were kept."""
        return np.unpackbits(self.mask, axis=1, count=self.features, bitorder="little").view(bool)

    def bitmask(self) -> np.ndarray:
        """uint8 [T, ceil(D / 8)]: `mask`; bit j of byte i is input 8 i + j, and trailing bits are zero."""
        return self.mask

    def dense(self) -> np.ndarray:
        """[T, D]: the operands with dropped inputs as +0.0, in the dtype of `values`."""
        return self._expand(FORMATS[self.dtype].float_type)

    def indices(self) -> np.ndarray:
        """int32 [nnz]: index of the input of each value."""
        indices = np.empty(self.offsets[-1], np.int32)
        width = 8 * self.mask.shape[1]
        for rows, held in self._chunks():
            first = np.repeat(np.arange(rows.stop - rows.start) * width, self.nnz[rows])
            indices[held] = _set_bits(self.mask[rows]) - first
        return indices

    def csr(self) -> csr_array:
        """scipy CSR [T, D]; float16 is widened to float32, since scipy cannot multiply it."""
        try:
            from scipy.sparse import csr_array
        except ImportError:
            raise InputError("csr: scipy must be installed, got none: pip install 'sparsetrace[scipy]'") from None
        values = self.values.astype(np.float32)
        return csr_array((values, self.indices(), self.offsets), shape=(len(self), self.features))

    def torch(self) -> Tensor:
        """torch tensor [T, D] in the model's dtype, bit for bit."""
        return _as_torch(self._expand(self.patterns.dtype), self.dtype)

    def torch_csr(self) -> Tensor:
        """torch sparse CSR [T, D] in the model's dtype, bit for bit, with int64 indices."""
        import torch

        return torch.sparse_csr_tensor(
            torch.from_numpy(self.offsets),
            torch.from_numpy(self.indices().astype(np.int64)),
            _as_torch(self.patterns, self.dtype),
            size=(len(self), self.features),
            # valid by construction; torch warns where this is left out
            check_invariants=False,
        )

    def take(self, at: np.ndarray) -> Rows:
        """Rows by their index in `token`, in any order."""
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
        """[T, D] of a type that may be wider: each pattern in the high bytes of its element, and zeros elsewhere."""
        patterns = self.patterns
        width = 8 * self.mask.shape[1]
        dense = np.zeros((len(self), width), dtype)
        parts = dtype.itemsize // patterns.itemsize
        high = dense.reshape(-1).view(patterns.dtype)[parts - 1 :: parts]
        for rows, held in self._chunks():
            high[rows.start * width : rows.stop * width][_set_bits(self.mask[rows])] = patterns[held]
        return dense if width == self.features else np.ascontiguousarray(dense[:, : self.features])

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of rows, and of their values."""
        step = chunk_rows(self.features)
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            yield slice(start, stop), slice(self.offsets[start], self.offsets[stop])


def _set_bits(mask: np.ndarray) -> np.ndarray:
    """int64: positions of the set bits of [T, bytes], counted through all rows."""
    # numpy finds nonzero bools several times faster than nonzero bytes
    return np.flatnonzero(np.unpackbits(mask.reshape(-1), bitorder="little").view(bool))


def _as_torch(patterns: np.ndarray, dtype: str) -> Tensor:
    import torch

    signed = patterns.view(np.int16 if patterns.itemsize == 2 else np.int32)
    return torch.from_numpy(signed).view(getattr(torch, dtype))


def chunk_rows(features: int) -> int:
    """Number of rows to expand at a time."""
    return max(1, CHUNK_INPUTS // features)


def no_rows(layer: int | None, matrix: str, features: int, dtype: str, values: bool = True) -> Rows:
    """Rows of zero tokens."""
    mask = np.empty((0, mask_bytes(features)), np.uint8)
    bits = np.empty(0, FORMATS[dtype].bits) if values else None
    return Rows(layer, matrix, features, dtype, np.empty(0, np.int64), mask, np.zeros(1, np.int64), bits)


def join(pieces: Sequence[Rows]) -> Rows:
    """Concatenate pieces of one matrix's rows; there must be at least one."""
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
