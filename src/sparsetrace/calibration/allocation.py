"""How a target sparsity is spread over the matrices of a model.

| allocation | what |
|---|---|
| `uniform` | the target, for every matrix |
| `per_layer` | targets given in config |
| `greedy` | looked up in tables that `sparsetrace.calibration.greedy` makes, one per layer |
| `file` | thresholds of the user's own, or those that `sparsetrace import-teal` writes |
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import Site, by_leaf, layer_sites
from sparsetrace.methods import ThresholdMethod

if TYPE_CHECKING:
    from sparsetrace.calibration.histogram import Provenance

# Columns of a greedy table that are no matrix's. `uniform_error`: of all matrices at `effective_sparsity`.
GREEDY_COLUMNS = ("effective_sparsity", "error", "uniform_error")


def greedy_schema(matrices: Sequence[str]) -> pa.Schema:
    """Schema of a search table: one row per step, with a column for each matrix of the layer."""
    return pa.schema([pa.field(name, pa.float64(), nullable=False) for name in (*GREEDY_COLUMNS, *matrices)])


@dataclass(frozen=True, slots=True)
class Choice:
    """What an allocation chose for a matrix.

    Args:
        sparsity: target, None where there is none.
        threshold: of the score; None where the target is to be looked up.
    """

    sparsity: float | None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Search table of one layer, by step.

    Args:
        matrices: of the layer.
        effective: sparsity of the whole layer, weighted by parameters.
        error, uniform_error: of the layer's output, by the search and with all matrices at `effective`.
        sparsities: for each step, that of each matrix.
    """

    matrices: Sequence[str]
    effective: Sequence[float]
    error: Sequence[float]
    uniform_error: Sequence[float]
    sparsities: Sequence[dict[str, float]]

    def losses(self) -> list[int]:
        """Steps at which the search did worse than uniform."""
        return [step for step in range(len(self.error)) if self.error[step] > self.uniform_error[step]]

    def lookup(self, target: float, where: str) -> tuple[dict[str, float], bool]:
        """Sparsities for a target: those of the step nearest to it, as TEAL's code looks them up.

        Args:
            target: of the layer, 0 <= target < 1.
            where: for messages.

        Returns:
            Sparsity of each matrix, and whether they are uniform because the search lost to that.

        Raises:
            InputError: the table ends before the target.
        """
        if target == 0:
            return dict.fromkeys(self.matrices, 0.0), False
        if not self.effective or target > self.effective[-1]:
            reach = self.effective[-1] if self.effective else 0.0
            raise InputError(f"{where}: sparsity must be at most {reach:.4f}, where its table ends, got {target}")
        step = min(range(len(self.effective)), key=lambda i: abs(self.effective[i] - target))
        if self.error[step] > self.uniform_error[step]:
            return dict.fromkeys(self.matrices, target), True
        return dict(self.sparsities[step]), False


def greedy_targets(
    paths: Sequence[Path], method: ThresholdMethod, provenance: Provenance
) -> tuple[dict[tuple[int, str], Choice], tuple[str, ...]]:
    """Targets of a method from the search tables.

    Args:
        paths: one table per layer, in any order.
        method: with the target.
        provenance: of the histograms that thresholds will be looked up in.

    Returns:
        What is chosen for each layer and matrix, and notes on where the search lost to uniform.

    Raises:
        InputError: a layer has no table, or a table is of another model or method.
    """
    assert method.sparsity is not None
    tables: dict[int, Table] = {}
    for path in paths:
        metadata, table = read_greedy(path)
        wanted = {"model_hash": provenance.model_hash, "method": method.name}
        if other := [name for name, value in wanted.items() if metadata[name] != value]:
            raise InputError(f"thresholds: {path} must be of this model and method, got another {', '.join(other)}")
        tables[metadata["layer"]] = table
    tables = dict(sorted(tables.items()))
    matrices: dict[int, list[str]] = {}
    for layer, matrix in by_leaf(layer_sites(provenance.sites)):
        assert layer is not None
        matrices.setdefault(layer, []).append(matrix)
    if missing := [layer for layer in matrices if layer not in tables]:
        raise InputError(
            f"thresholds: greedy must have a table for every layer, got none for {', '.join(map(str, missing))}: "
            "run `sparsetrace allocate`"
        )
    choices: dict[tuple[int, str], Choice] = {}
    lost = {layer: len(table.losses()) for layer, table in sorted(tables.items()) if table.losses()}
    uniform = []
    for layer in tables:
        sparsities, is_uniform = tables[layer].lookup(method.sparsity, f"thresholds: layer {layer}")
        uniform += [layer] if is_uniform else []
        choices |= {(layer, matrix): Choice(sparsities[matrix]) for matrix in matrices[layer]}
    rows = sum(len(table.error) for table in tables.values())
    notes = [
        f"greedy loses to uniform in {sum(lost.values())} of {rows} rows" + (f", layers {_list(lost)}" if lost else "")
    ]
    if uniform:
        notes.append(f"looked up as uniform: layers {_list(uniform)}")
    return choices, tuple(notes)


def _list(items: Any) -> str:
    return ", ".join(map(str, items))


def read_greedy(path: Path) -> tuple[dict[str, Any], Table]:
    """A search table with what it says of itself."""
    if not path.is_file():
        raise InputError(f"allocate: {path} must be a greedy table, got nothing there: run `sparsetrace allocate`")
    table = pq.read_table(path)
    metadata = (table.schema.metadata or {}).get(b"sparsetrace_greedy")
    if metadata is None:
        raise InputError(f"allocate: {path} must be a greedy table of sparsetrace, got another Parquet file")
    matrices = [name for name in table.column_names if name not in GREEDY_COLUMNS]
    columns = table.to_pydict()
    return json.loads(metadata), Table(
        matrices,
        columns["effective_sparsity"],
        columns["error"],
        columns["uniform_error"],
        [dict(zip(matrices, row, strict=True)) for row in zip(*(columns[m] for m in matrices), strict=True)],
    )


def read_threshold_file(path: Path, sites: Sequence[Site]) -> dict[tuple[int, str], Choice]:
    """Thresholds of the user's own.

    Args:
        path: Parquet or CSV with the columns `layer`, `matrix`, `threshold`, and `sparsity` if the targets are known.
        sites: of the model.

    Raises:
        InputError: a column or row is missing, twice there, of no layer or matrix of the model, or no threshold.
    """
    where = f"thresholds: {path}"
    try:
        table = pa_csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{where} must be a file, got nothing there") from None
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{where} must be Parquet, or CSV with the suffix .csv, got {str(error).splitlines()[0]}"
        ) from None
    if missing := [name for name in ("layer", "matrix", "threshold") if name not in table.column_names]:
        raise InputError(f"{where} must have the columns layer, matrix, threshold, got no {', '.join(missing)}")
    wanted = [(layer, matrix) for layer, matrix in by_leaf(layer_sites(sites)) if layer is not None]
    choices: dict[tuple[int, str], Choice] = {}
    for row in table.to_pylist():
        place, threshold, sparsity = (row["layer"], row["matrix"]), row["threshold"], row.get("sparsity")
        at = f"{where}: layer {place[0]} {place[1]}"
        if place not in wanted:
            layers = len(dict.fromkeys(layer for layer, _ in wanted))
            raise InputError(f"{at} must be a matrix of a model of {layers} layers, got another")
        if place in choices:
            raise InputError(f"{at} must have one row, got two")
        if not isinstance(threshold, int | float) or not math.isfinite(threshold) or threshold < 0:
            raise InputError(f"{at}: threshold must be a number of at least 0, got {threshold!r}")
        choices[place] = Choice(None if sparsity is None else float(sparsity), float(threshold))
    if absent := [f"layer {layer} {matrix}" for layer, matrix in wanted if (layer, matrix) not in choices]:
        more = f" and {len(absent) - 7} more" if len(absent) > 7 else ""
        raise InputError(f"{where} must have a row for every matrix, got none for {', '.join(absent[:7])}{more}")
    return {place: choices[place] for place in wanted}
