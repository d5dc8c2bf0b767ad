"""Exports the operands of one layer and matrix in the formats of other tools.

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

docs/export.md defines them. An export holds one row group in memory, except `npz` and `safetensors`, whose layout needs
all rows at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsetrace.core.files import InputError, write_beside
from sparsetrace.formats.schema import leaf
from sparsetrace.workload import export_matrices, export_traces
from sparsetrace.workload.export_operands import Layout, Operands
from sparsetrace.workload.reader import Workload


@dataclass(frozen=True, slots=True)
class Form:
    """One format.

    Args:
        suffix: of the file; unique, so that several formats can share a folder.
        write: writes the file.
        values: whether the file holds values, and not only which inputs were kept.
    """

    suffix: str
    write: Callable[[Operands, Path], None]
    values: bool


FORMS = {
    "mtx": Form(".mtx", export_matrices.write_mtx, values=True),
    "smtx": Form(".smtx", export_matrices.write_smtx, values=False),
    "npz": Form(".npz", export_matrices.write_npz, values=True),
    "safetensors": Form(".safetensors", export_matrices.write_safetensors, values=True),
    "npy": Form(".npy", export_matrices.write_npy, values=True),
    "bitmask": Form(".bitmask.npy", export_matrices.write_bitmask, values=False),
    "density": Form(".density.csv", export_matrices.write_density, values=False),
    "ramulator": Form(".ramulator.trace", export_traces.write_ramulator, values=False),
    "dramsim3": Form(".dramsim3.trace", export_traces.write_dramsim3, values=False),
    "libcachesim": Form(".libcachesim.csv", export_traces.write_libcachesim, values=False),
}


def file_name(layer: int | None, matrix: str, form: str) -> str:
    """File name for one layer and matrix in one of `FORMS`, such as `L07.q.mtx` or `model.lm_head.mtx`."""
    return leaf(layer, matrix).replace("/", ".") + FORMS[form].suffix


def export(
    workload: Workload,
    layer: int | None,
    matrix: str,
    form: str,
    out: Path,
    layout: Layout | None = None,
    tile: int = 64,
) -> None:
    """Write the operands of one layer and matrix.

    Args:
        workload: any selection, or its twin.
        layer, matrix: whose operands.
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
    operands = Operands(workload, layer, matrix, layout or Layout(), tile)
    if not operands.tokens:
        raise InputError(f"export: the selection must hold at least one row of {matrix}, got none")
    export_traces.refuse_layout(operands)
    with write_beside(out) as partial:
        FORMS[form].write(operands, partial)
