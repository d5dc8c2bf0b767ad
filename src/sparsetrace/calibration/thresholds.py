"""A method setting with what calibration settled for each layer and matrix: `thresholds.parquet`.

| column | unit | what |
|---|---|---|
| `layer`, `matrix` | | the index |
| `target_sparsity` | fraction | asked for |
| `calibrated_sparsity`, `dropped`, `counted` | fraction, counts | what the threshold drops of the counted activations |
| `threshold`, `threshold_bits` | score, bit pattern | kept strictly above; null where the method needs none |

How a target is spread over the matrices is `sparsetrace.calibration.allocation`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.calibration.allocation import Choice, greedy_targets, read_threshold_file
from sparsetrace.calibration.histogram import Histograms, Provenance
from sparsetrace.core.files import InputError, write_beside
from sparsetrace.formats.sites import by_leaf, layer_sites
from sparsetrace.formats.tables import THRESHOLDS
from sparsetrace.methods import METHODS, FromFile, MatrixRule, Method, PerLayer, ThresholdMethod

if TYPE_CHECKING:
    from sparsetrace.model.runtime import RuntimeModel


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A method setting with what calibration settled for each layer and matrix.

    Args:
        label: of the setting.
        method: with its parameters.
        calibration: hashes of the model and text, and the tokens counted.
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


def derive_thresholds(
    label: str, method: Method, histograms_path: Path, out: Path, tables: list[Path] | None = None
) -> Thresholds:
    """Look a setting's targets up in the histograms and write the table.

    Args:
        label: of the setting.
        method: with its parameters.
        histograms_path: of the model.
        out: the table.
        tables: of the greedy allocation, one per layer; needed where the method asks for it.

    Raises:
        InputError: the histograms are unreadable or lack what the method needs, or the allocation does not fit.
    """
    histograms, provenance = Histograms.load(histograms_path)
    refuse_uncounted(method, histograms, histograms_path)
    choices, notes = _choices(method, provenance, tables or [])
    rows = [threshold_row(histograms, method, *place, choice) for place, choice in choices.items()]
    # what a person asks for; which shards it was added up from is in the histograms
    calibration = {
        name: value for name, value in asdict(provenance).items() if name not in ("sites", "scores", "parts")
    }
    content = {
        "label": label,
        "method": method.name,
        "parameters": method.model_dump(mode="json"),
        "calibration": calibration,
    }
    table = pa.Table.from_pylist(rows, schema=THRESHOLDS.with_metadata({"sparsetrace": json.dumps(content)}))
    with write_beside(out) as partial:
        pq.write_table(table, partial)
    return Thresholds(label, method, calibration, rows, notes)


def refuse_uncounted(method: Method, histograms: Histograms, path: Path) -> None:
    """Refuse histograms without the distributions that a method needs.

    Raises:
        InputError: names them.
    """
    if missing := [key for key in method.needs(histograms.sites) if key not in histograms.counts]:
        names = dict.fromkeys(name for _, name in missing)
        raise InputError(
            f"thresholds: {path} must hold the distributions that method {method.name} needs, got none of "
            f"{', '.join(names)}: calibrate with --score {method.name}"
        )


def threshold_row(histograms: Histograms, method: Method, layer: int, matrix: str, choice: Choice) -> dict[str, Any]:
    """One row of the table.

    Args:
        histograms: of the model.
        method: decides which distribution is looked at.
        layer, matrix: which.
        choice: target or threshold of the matrix.
    """
    row: dict[str, Any] = dict.fromkeys(THRESHOLDS.names) | {"layer": layer, "matrix": matrix}
    row["target_sparsity"] = choice.sparsity
    if not method.needs_threshold(matrix):
        return row
    name = method.histogram(by_leaf(histograms.sites)[layer, matrix], matrix)
    number = histograms.format(layer, name)
    if choice.threshold is None:
        assert choice.sparsity is not None
        found = histograms.threshold(layer, name, choice.sparsity)
        bits = found.bits
    else:
        # |x| > t holds for the same numbers of the dtype if t is rounded down to one of them
        bits = number.floor_bits(choice.threshold)
        counted = histograms.dropped(layer, name, bits)
        row |= {"threshold": choice.threshold, "threshold_bits": bits}
        if counted is None:
            return row
        found = counted
    return row | {
        "calibrated_sparsity": found.dropped / found.counted,
        "dropped": found.dropped,
        "counted": found.counted,
        "threshold": float(number.to_float(np.array([bits], dtype=number.bits))[0]),
        "threshold_bits": bits,
    }


def _choices(
    method: Method, provenance: Provenance, tables: list[Path]
) -> tuple[dict[tuple[int, str], Choice], tuple[str, ...]]:
    """What is chosen for each layer and matrix, and what a person should know of it."""
    sites = by_leaf(layer_sites(provenance.sites))
    allocation = method.allocation if isinstance(method, ThresholdMethod) else "uniform"
    if isinstance(allocation, FromFile):
        return read_threshold_file(Path(allocation.file), provenance.sites), ()
    if isinstance(allocation, PerLayer) and len(allocation.per_layer) != provenance.layers:
        raise InputError(
            f"thresholds: per_layer must have a target for each of the model's {provenance.layers} layers, "
            f"got {len(allocation.per_layer)}"
        )
    if allocation == "greedy":
        assert isinstance(method, ThresholdMethod) and method.sparsity is not None
        return greedy_targets(tables, method, provenance)
    return {(layer, matrix): Choice(method.target(layer, matrix)) for layer, matrix in sites if layer is not None}, ()


def read_thresholds(path: Path, model: RuntimeModel) -> Thresholds:
    """Read a threshold table and check that it was made for this model.

    Raises:
        InputError: it belongs to another model or dtype.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"thresholds: {path} must be a whole Parquet file, got {error}") from None
    content = json.loads((table.schema.metadata or {}).get(b"sparsetrace", b"{}"))
    if not content:
        raise InputError(f"thresholds: {path} must be a threshold table of sparsetrace, got another Parquet file")
    calibration = content["calibration"]
    if calibration["model_hash"] != model.model_hash:
        raise InputError(
            f"thresholds: {path} must be calibrated on this model ({model.model_hash[:12]}, {model.config.dtype}), "
            f"got {calibration['model_hash'][:12]}, {calibration['dtype']}: calibrate again"
        )
    method = METHODS[content["method"]](**content["parameters"])
    return Thresholds(content["label"], method, calibration, table.to_pylist())


def dense_thresholds(model: RuntimeModel) -> Thresholds:
    """The setting that drops nothing, which needs no calibration."""
    leaves = by_leaf(layer_sites(model.sites))
    empty: dict[str, Any] = dict.fromkeys(THRESHOLDS.names)
    return Thresholds("dense", METHODS["dense"](), {}, [empty | {"layer": la, "matrix": m} for la, m in leaves])
