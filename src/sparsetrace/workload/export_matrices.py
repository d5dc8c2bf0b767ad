"""Export as sparse or dense matrices, tokens x inputs, and as a histogram of tile densities."""

# Shape suffixes: T tokens, D inputs.

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsetrace.formats.dtypes import STORED_CODES
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.workload.export_operands import Operands


def write_mtx(operands: Operands, path: Path) -> None:
    """MatrixMarket coordinate, one-based."""
    nnz = sum(int(rows.offsets[-1]) for rows in operands.blocks(values=False))
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write("%%MatrixMarket matrix coordinate real general\n")
        layer = "" if operands.layer is None else f"layer {operands.layer} "
        file.write(f"% sparsetrace {layer}matrix {operands.matrix}: rows are tokens, columns inputs\n")
        file.write(f"{operands.tokens} {operands.features} {nnz}\n")
        first = 1
        for rows in operands.blocks(values=True):
            number = np.repeat(np.arange(first, first + len(rows)), rows.nnz)
            # the fewest digits that a reader's float64 needs to be exactly the value
            values = rows.values.astype(np.float64)
            columns = zip(number.tolist(), (rows.indices() + 1).tolist(), values.tolist(), strict=True)
            file.write("".join(f"{row} {column} {value!r}\n" for row, column, value in columns))
            first += len(rows)


def write_smtx(operands: Operands, path: Path) -> None:
    """The Deep Learning Matrix Collection's form: row offsets and column indices, without values."""
    nnz = np.concatenate([rows.nnz for rows in operands.blocks(values=False)])
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(f"{operands.tokens}, {operands.features}, {nnz.sum()}\n")
        file.write(" ".join(map(str, [0, *np.cumsum(nnz).tolist()])) + "\n")
        gap = ""
        for rows in operands.blocks(values=False):
            if rows.offsets[-1]:
                file.write(gap + " ".join(map(str, rows.indices().tolist())))
                gap = " "
        file.write("\n")


def write_npz(operands: Operands, path: Path) -> None:
    """CSR as scipy saves it, with float32 values."""
    rows = operands.rows(values=True)
    arrays = {"data": rows.values.astype(np.float32), "indices": rows.indices(), "indptr": rows.offsets}
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            allow_pickle=False,
            format=np.array(b"csr"),
            shape=np.array([operands.tokens, operands.features]),
            **arrays,
        )


def write_safetensors(operands: Operands, path: Path) -> None:
    """CSR in the model's own dtype, bit for bit."""
    rows = operands.rows(values=True)
    arrays = {
        "crow_indices": ("I64", rows.offsets),
        "col_indices": ("I64", rows.indices().astype(np.int64)),
        "token": ("I64", rows.token),
        "shape": ("I64", np.array([operands.tokens, operands.features], np.int64)),
        "values": (STORED_CODES[rows.dtype], rows.patterns),
    }
    layer = {} if operands.layer is None else {"layer": str(operands.layer)}
    header: dict[str, object] = {"__metadata__": {"format": "sparse_csr", **layer, "matrix": operands.matrix}}
    offset = 0
    for name, (code, array) in arrays.items():
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


def write_npy(operands: Operands, path: Path) -> None:
    """Dense, block by block."""
    dtype = FORMATS[operands.dtype].float_type
    _write_array(operands, path, dtype, (rows.dense() for rows in operands.blocks(values=True)))


def write_bitmask(operands: Operands, path: Path) -> None:
    """0 or 1 for each input, block by block."""
    blocks = (rows.keep().view(np.uint8) for rows in operands.blocks(values=False))
    _write_array(operands, path, np.dtype(np.uint8), blocks)


def _write_array(operands: Operands, path: Path, dtype: np.dtype, blocks: Iterator[np.ndarray]) -> None:
    """One array [T, D] as `.npy`, block by block."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (operands.tokens, operands.features),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def write_density(operands: Operands, path: Path) -> None:
    """How many tiles have each share of kept inputs."""
    starts = np.arange(0, operands.features, operands.tile)
    widths = np.diff(np.append(starts, operands.features))
    counts = np.zeros((len(starts), operands.tile + 1), np.int64)
    for rows in operands.blocks(values=False):
        kept = np.add.reduceat(rows.keep().view(np.uint8), starts, axis=1, dtype=np.int64)
        for place in range(len(starts)):
            counts[place] += np.bincount(kept[:, place], minlength=operands.tile + 1)
    found: dict[float, int] = {}
    for width, count in zip(widths.tolist(), counts, strict=True):
        for kept_inputs in np.flatnonzero(count).tolist():
            # the last tile may be narrower
            found[kept_inputs / width] = found.get(kept_inputs / width, 0) + int(count[kept_inputs])
    with path.open("w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tile_density", "tiles", "probability"])
        for density in sorted(found):
            writer.writerow([f"{density:.9g}", found[density], f"{found[density] / sum(found.values()):.9g}"])
