"""A method setting with what calibration settled for each layer and matrix: `thresholds.parquet`.

| column | unit | what |
|---|---|---|
| `layer`, `matrix` | | the index |
| `target_sparsity` | fraction | asked for |
| `calibrated_sparsity`, `dropped`, `counted` | fraction, counts | what the threshold drops of the counted activations |
| `threshold`, `threshold_bits` | score, bit pattern | kept strictly above; null where the method needs none |

`sparsetrace.calibration.derive` makes it; generation and quality read it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import ValidationError

from sparsetrace.core.checked import read_checked_table, write_checked_table
from sparsetrace.core.files import InputError, parse_json
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import layer_leaves
from sparsetrace.formats.tables import THRESHOLDS
from sparsetrace.methods import METHODS, MatrixRule, Method

if TYPE_CHECKING:
    from sparsetrace.model.runtime import RuntimeModel


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A method setting with what calibration settled for each layer and matrix.

    Args:
        label: of the setting.
        method: with its parameters.
        calibration: hashes of the model and text, and the tokens counted; of the model alone if nothing was counted.
        rows: `tables.THRESHOLDS` as a list of rows.
        notes: what a person should know of the allocation, a sentence each.
    """

    label: str
    method: Method
    calibration: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def rules(self) -> list[MatrixRule]:
        """The rows as the methods read them."""
        return [
            MatrixRule(row["layer"], row["matrix"], row["threshold_bits"], expected=row["target_sparsity"])
            for row in self.rows
        ]

    def overall(self) -> tuple[float | None, float | None]:
        """Target and calibrated sparsity over the matrices that have one, weighted by their inputs.

        Returns:
            None for what is not known: without a target both, without thresholds the second.
        """
        counted = [row for row in self.rows if row["counted"] and row["target_sparsity"] is not None]
        if not counted:
            targets = {row["target_sparsity"] for row in self.rows} - {None}
            return (targets.pop() if len(targets) == 1 else None), None
        total = sum(row["counted"] for row in counted)
        target = sum(row["target_sparsity"] * row["counted"] for row in counted) / total
        return target, sum(row["dropped"] for row in counted) / total


def write_thresholds(thresholds: Thresholds, path: Path) -> None:
    """Write a table; its notes are not in it."""
    content = {
        "label": thresholds.label,
        "method": thresholds.method.name,
        "parameters": thresholds.method.model_dump(mode="json"),
        "calibration": thresholds.calibration,
    }
    schema = THRESHOLDS.with_metadata({"sparsetrace": json.dumps(content)})
    write_checked_table(pa.Table.from_pylist(thresholds.rows, schema=schema), path)


def read_thresholds(path: Path, model: RuntimeModel) -> Thresholds:
    """Read a threshold table and check that it was made for this model.

    Raises:
        InputError: it belongs to another model or dtype.
    """
    table = read_checked_table(path, "thresholds", "a whole Parquet file")
    metadata = (table.schema.metadata or {}).get(b"sparsetrace", b"{}")
    content = parse_json(metadata, f"thresholds: the metadata of {path}")
    if not content:
        raise InputError(f"thresholds: {path} must be a threshold table of sparsetrace, got another Parquet file")
    if not table.schema.equals(THRESHOLDS):
        raise InputError(f"thresholds: {path} must have the columns of thresholds, got {', '.join(table.column_names)}")
    try:
        label, calibration = content["label"], content["calibration"]
        counted_on, dtype = calibration["model_hash"], calibration["dtype"]
        method = METHODS[content["method"]](**content["parameters"])
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(f"thresholds: {path} must name its method and calibration, got {error!r}") from None
    if counted_on != model.model_hash:
        raise InputError(
            f"thresholds: {path} must be calibrated on this model ({model.model_hash[:12]}, {model.config.dtype}), "
            f"got {str(counted_on)[:12]}, {dtype}: calibrate again"
        )
    thresholds = Thresholds(label, method, calibration, table.to_pylist())
    _refuse_impossible(thresholds, model, path)
    return thresholds


def _refuse_impossible(thresholds: Thresholds, model: RuntimeModel, path: Path) -> None:
    """Refuse a table whose rows are not those of the model's matrices, or hold what no threshold is."""
    wanted = layer_leaves(model.sites)
    if (found := [(row["layer"], row["matrix"]) for row in thresholds.rows]) != wanted:
        other = [f"layer {layer} {matrix}" for layer, matrix in set(found).symmetric_difference(wanted)]
        raise InputError(
            f"thresholds: {path} must have one row for each matrix of the model, in order, got others: "
            f"{', '.join(sorted(other)) or 'another order'}"
        )
    infinity = FORMATS["float32" if thresholds.method.score == "scaled" else model.config.dtype].infinity
    for row in thresholds.rows:
        at = f"thresholds: {path}: layer {row['layer']} {row['matrix']}"
        bits, target = row["threshold_bits"], row["target_sparsity"]
        if bits is not None and not 0 <= bits < infinity:
            raise InputError(f"{at}: threshold_bits must be the pattern of a finite number, got {bits}")
        if target is not None and not 0 <= target < 1:
            raise InputError(f"{at}: target_sparsity must be at least 0 and below 1, got {target}")


def dense_thresholds(model: RuntimeModel) -> Thresholds:
    """The setting that drops nothing, which needs no calibration."""
    leaves = layer_leaves(model.sites)
    empty: dict[str, Any] = dict.fromkeys(THRESHOLDS.names)
    return Thresholds("dense", METHODS["dense"](), {}, [empty | {"layer": la, "matrix": m} for la, m in leaves])
