"""One layer and matrix of a workload in the formats of other tools, a slice of tokens at a time.

| format | file | what |
|---|---|---|
| `mtx` | `.mtx` | MatrixMarket coordinate, real, general: tokens x inputs |
| `smtx` | `.smtx` | DLMC: pattern only, zero-based row offsets and column indices |
| `npz` | `.npz` | scipy CSR, as `scipy.sparse.load_npz` reads |
| `safetensors` | `.safetensors` | CSR: `crow_indices`, `col_indices`, `values` in the model's dtype, `shape`, `token` |
| `npy` | `.npy` | dense, float16 or float32 |
| `bitmask` | `.bitmask.npy` | uint8 tokens x inputs, 0 or 1, as STONNE's bitmap controllers take |
| `density` | `.density.csv` | tile_density, tiles, probability: a histogram, for Sparseloop's density model |
| `ramulator` | `.ramulator.trace` | `LD addr` for each line of the weight rows that kept inputs touch |
| `dramsim3` | `.dramsim3.trace` | `addr READ cycle` for the same |
| `libcachesim` | `.libcachesim.csv` | time, object id, size for the same rows or bundles of rows |

Everything is defined in docs/export.md. Memory is one row group, but for `npz` and `safetensors`, whose layout
needs the whole slice at once.
"""

# Shape suffixes: T tokens, D inputs.

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsetrace.core.files import InputError, write_beside
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.rows import Rows, join, no_rows
from sparsetrace.workload.reader import Workload

SAFETENSORS_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Addresses of a trace lie below: they are reckoned in int64.
ADDRESSES = 1 << 63
# Lines of a memory trace formatted at once.
TRACE_LINES = 1 << 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How the weight lies in the memory that is traced: input i at `base + i * stride`.

    Args:
        base: address of the row of input 0, bytes.
        stride: distance between two rows, bytes; None for rows without a gap, outputs x bytes a value.
        line: bytes of one access.
        bundle: rows fetched together; inputs i with equal i // bundle.
        cycles: between two accesses, for traces that carry a time.
    """

    base: int = 0
    stride: int | None = None
    line: int = 64
    bundle: int = 1
    cycles: int = 1

    def __post_init__(self) -> None:
        for name, least in (("base", 0), ("line", 1), ("bundle", 1), ("cycles", 0)):
            if getattr(self, name) < least:
                raise InputError(f"export: {name} must be at least {least}, got {getattr(self, name)}")
        if self.stride is not None and self.stride < 1:
            raise InputError(f"export: stride must be at least 1, got {self.stride}")


@dataclass(frozen=True, slots=True)
class _Job:
    """What an exporter needs.

    Args:
        workload: the slice.
        layer, matrix: which.
        row_bytes: of one weight row.
        layout: of the weight.
        tile: inputs of a tile.
    """

    workload: Workload
    layer: int
    matrix: str
    row_bytes: int
    layout: Layout
    tile: int

    def blocks(self, values: bool) -> Iterator[Rows]:
        return self.workload.blocks(self.layer, self.matrix, values=values)

    def rows(self, values: bool) -> Rows:
        """The whole slice."""
        features, dtype = self.features, self.workload.manifest["dtype"]
        empty = no_rows(self.layer, self.matrix, features, dtype, values)
        return join([*self.blocks(values)] or [empty])

    @property
    def features(self) -> int:
        return self.workload.features(self.layer, self.matrix)

    @property
    def tokens(self) -> int:
        return len(self.workload.tokens)


def export(
    workload: Workload,
    layer: int,
    matrix: str,
    form: str,
    out: Path,
    layout: Layout | None = None,
    tile: int = 64,
) -> None:
    """Write the operands of one layer and matrix.

    Args:
        workload: any selection, or its twin.
        layer, matrix: which.
        form: one of `FORMS`.
        out: the file.
        layout: of the weight, for the memory traces.
        tile: inputs of a tile, for `density`.

    Raises:
        InputError: an unknown format, an empty selection, or values that were not captured.
    """
    if form not in FORMS:
        raise InputError(f"export: format must be one of {', '.join(FORMS)}, got {form}")
    if tile < 1:
        raise InputError(f"export: tile must be at least 1, got {tile}")
    if not len(workload.tokens):
        raise InputError("export: the selection must hold at least one token, got none")
    if workload.level == "stats":
        raise InputError("export: masks must have been captured, got capture level `stats`")
    if FORMS[form].values and workload.level != "full":
        masks = ", ".join(name for name, other in FORMS.items() if not other.values)
        raise InputError(f"export: values must have been captured for {form}, got capture level `masks`: use {masks}")
    layout = layout or Layout()
    features = workload.features(layer, matrix)
    by_leaf = {(row["layer"], row["matrix"]): row for row in workload.matrix_table.to_pylist()}
    row_bytes = by_leaf[layer, matrix]["out_features"] * FORMATS[workload.manifest["dtype"]].bits.itemsize
    if layout.stride is not None and layout.stride < row_bytes:
        raise InputError(f"export: stride must be at least the {row_bytes} bytes of a row, got {layout.stride}")
    if layout.base + features * (layout.stride or row_bytes) + layout.line > ADDRESSES:
        raise InputError(f"export: base must leave the weight below address {ADDRESSES:#x}, got {layout.base:#x}")
    job = _Job(workload, layer, matrix, row_bytes, layout, tile)
    with write_beside(out) as partial:
        FORMS[form].write(job, partial)


def _write_mtx(job: _Job, path: Path) -> None:
    nnz = sum(int(rows.offsets[-1]) for rows in job.blocks(values=False))
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write("%%MatrixMarket matrix coordinate real general\n")
        file.write(f"% sparsetrace layer {job.layer} matrix {job.matrix}: rows are tokens, columns inputs\n")
        file.write(f"{job.tokens} {job.features} {nnz}\n")
        first = 1
        for rows in job.blocks(values=True):
            number = np.repeat(np.arange(first, first + len(rows)), rows.nnz)
            # the fewest digits that a reader's float64 needs to be exactly the value
            values = rows.values.astype(np.float64)
            columns = zip(number.tolist(), (rows.indices() + 1).tolist(), values.tolist(), strict=True)
            file.write("".join(f"{row} {column} {value!r}\n" for row, column, value in columns))
            first += len(rows)


def _write_smtx(job: _Job, path: Path) -> None:
    nnz = np.concatenate([rows.nnz for rows in job.blocks(values=False)])
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(f"{job.tokens}, {job.features}, {nnz.sum()}\n")
        file.write(" ".join(map(str, [0, *np.cumsum(nnz).tolist()])) + "\n")
        gap = ""
        for rows in job.blocks(values=False):
            if rows.offsets[-1]:
                file.write(gap + " ".join(map(str, rows.indices().tolist())))
                gap = " "
        file.write("\n")


def _write_npz(job: _Job, path: Path) -> None:
    rows = job.rows(values=True)
    arrays = {"data": rows.values.astype(np.float32), "indices": rows.indices(), "indptr": rows.offsets}
    with path.open("wb") as file:
        np.savez_compressed(
            file, allow_pickle=False, format=np.array(b"csr"), shape=np.array([job.tokens, job.features]), **arrays
        )


def _write_safetensors(job: _Job, path: Path) -> None:
    rows = job.rows(values=True)
    arrays = {
        "crow_indices": ("I64", rows.offsets),
        "col_indices": ("I64", rows.indices().astype(np.int64)),
        "token": ("I64", rows.token),
        "shape": ("I64", np.array([job.tokens, job.features], np.int64)),
        "values": (SAFETENSORS_CODES[rows.dtype], rows.patterns),
    }
    header: dict[str, object] = {
        "__metadata__": {"format": "sparse_csr", "layer": str(job.layer), "matrix": job.matrix}
    }
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


def _write_npy(job: _Job, path: Path) -> None:
    dtype = FORMATS[job.workload.manifest["dtype"]].float_type
    _write_array(job, path, dtype, (rows.dense() for rows in job.blocks(values=True)))


def _write_bitmask(job: _Job, path: Path) -> None:
    blocks = (rows.keep().view(np.uint8) for rows in job.blocks(values=False))
    _write_array(job, path, np.dtype(np.uint8), blocks)


def _write_array(job: _Job, path: Path, dtype: np.dtype, blocks: Iterator[np.ndarray]) -> None:
    """One array [T, D] as `.npy`, block by block."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (job.tokens, job.features)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def _write_density(job: _Job, path: Path) -> None:
    starts = np.arange(0, job.features, job.tile)
    widths = np.diff(np.append(starts, job.features))
    counts = np.zeros((len(starts), job.tile + 1), np.int64)
    for rows in job.blocks(values=False):
        kept = np.add.reduceat(rows.keep().view(np.uint8), starts, axis=1, dtype=np.int64)
        for place in range(len(starts)):
            counts[place] += np.bincount(kept[:, place], minlength=job.tile + 1)
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


def _bundles(job: _Job) -> Iterator[np.ndarray]:
    """int64: bundles of weight rows that each block's tokens touch, token by token, each once a token."""
    for rows in job.blocks(values=False):
        bundle = rows.indices().astype(np.int64) // job.layout.bundle
        token = np.repeat(np.arange(len(rows)), rows.nnz)
        # inputs ascend within a token, so equal bundles are neighbours
        new = np.ones(len(bundle), bool)
        new[1:] = (np.diff(bundle) != 0) | (np.diff(token) != 0)
        yield bundle[new]


def _span(job: _Job, bundle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte of each bundle and its length; the last one may hold fewer rows."""
    stride = job.row_bytes if job.layout.stride is None else job.layout.stride
    first = bundle * job.layout.bundle
    last = np.minimum(first + job.layout.bundle, job.features) - 1
    return job.layout.base + first * stride, (last - first) * stride + job.row_bytes


def _lines(job: _Job) -> Iterator[np.ndarray]:
    """int64: addresses of the lines that are read, in order, aligned to the line."""
    line = job.layout.line
    for bundle in _bundles(job):
        address, length = _span(job, bundle)
        first, last = address // line, (address + length - 1) // line
        counts = last - first + 1
        ends = np.cumsum(counts)
        for start, stop in _pieces(ends):
            some = counts[start:stop]
            within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
            yield (np.repeat(first[start:stop], some) + within) * line


def _pieces(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of bundles of about `TRACE_LINES` lines."""
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + TRACE_LINES, side="right")))
        yield start, stop
        start = stop


def _write_ramulator(job: _Job, path: Path) -> None:
    with path.open("w", encoding="ascii", newline="\n") as file:
        for addresses in _lines(job):
            file.write("".join(f"LD 0x{address:x}\n" for address in addresses.tolist()))


def _write_dramsim3(job: _Job, path: Path) -> None:
    cycle = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        for addresses in _lines(job):
            times = range(cycle, cycle + len(addresses) * job.layout.cycles, job.layout.cycles or 1)
            stamped = times if job.layout.cycles else [0] * len(addresses)
            file.write("".join(f"0x{a:x} READ {t}\n" for a, t in zip(addresses.tolist(), stamped, strict=True)))
            cycle += len(addresses) * job.layout.cycles


def _write_libcachesim(job: _Job, path: Path) -> None:
    time = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write("time,object,size\n")
        for rows in _bundles(job):
            _, size = _span(job, rows)
            lines = zip(range(time, time + len(rows)), rows.tolist(), size.tolist(), strict=True)
            file.write("".join(f"{at},{name},{length}\n" for at, name, length in lines))
            time += len(rows)


@dataclass(frozen=True, slots=True)
class Form:
    """One format.

    Args:
        suffix: of the file; no two formats share one, so that they may lie in one folder.
        write: what writes it.
        values: whether it holds values, and not only which inputs were kept.
    """

    suffix: str
    write: Callable[[_Job, Path], None]
    values: bool


FORMS = {
    "mtx": Form(".mtx", _write_mtx, values=True),
    "smtx": Form(".smtx", _write_smtx, values=False),
    "npz": Form(".npz", _write_npz, values=True),
    "safetensors": Form(".safetensors", _write_safetensors, values=True),
    "npy": Form(".npy", _write_npy, values=True),
    "bitmask": Form(".bitmask.npy", _write_bitmask, values=False),
    "density": Form(".density.csv", _write_density, values=False),
    "ramulator": Form(".ramulator.trace", _write_ramulator, values=False),
    "dramsim3": Form(".dramsim3.trace", _write_dramsim3, values=False),
    "libcachesim": Form(".libcachesim.csv", _write_libcachesim, values=False),
}
