"""A method setting with what calibration settled for each layer and matrix: `thresholds.parquet`.

| column | unit | what |
|---|---|---|
| `layer`, `matrix` | | the index |
| `target_sparsity` | fraction | asked for |
| `calibrated_sparsity`, `dropped`, `counted` | fraction, counts | what the threshold drops of the counted activations |
| `threshold`, `threshold_bits` | magnitude, bit pattern | kept strictly above; null where the method needs none |
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.files import InputError, write_beside
from sparsetrace.histogram import Histograms
from sparsetrace.methods import METHODS, MatrixRule, Method
from sparsetrace.runtime import RuntimeModel
from sparsetrace.schema import FORMATS, MATRICES, SITE_OF, THRESHOLDS


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A method setting with what calibration settled for each layer and matrix.

    Args:
        label: of the setting.
        method: with its parameters.
        calibration: hashes of the model and text, and the tokens counted.
        rows: `schema.THRESHOLDS` as a list of rows.
    """

    label: str
    method: Method
    calibration: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def rules(self) -> list[MatrixRule]:
        """The rows as the methods read them."""
        return [MatrixRule(row["layer"], row["matrix"], row["threshold_bits"]) for row in self.rows]

    def overall(self) -> tuple[float | None, float | None]:
        """Target and calibrated sparsity over all matrices, weighted by their inputs; None without a target."""
        counted = [row for row in self.rows if row["counted"]]
        if not counted:
            return None, None
        total = sum(row["counted"] for row in counted)
        target = sum(row["target_sparsity"] * row["counted"] for row in counted) / total
        return target, sum(row["dropped"] for row in counted) / total


def derive_thresholds(label: str, method: Method, histograms_path: Path, out: Path) -> Thresholds:
    """Look a setting's targets up in the histograms and write the table.

    Raises:
        InputError: the histograms are unreadable.
    """
    histograms, provenance = Histograms.load(histograms_path)
    number = FORMATS[provenance.dtype]
    rows: list[dict[str, Any]] = []
    for layer in range(provenance.layers):
        for matrix in MATRICES:
            row: dict[str, Any] = dict.fromkeys(THRESHOLDS.names) | {"layer": layer, "matrix": matrix}
            target = method.targets(matrix)
            if target is not None:
                found = histograms.threshold(layer, SITE_OF[matrix], target)
                row |= {
                    "target_sparsity": target,
                    "calibrated_sparsity": found.dropped / found.counted,
                    "dropped": found.dropped,
                    "counted": found.counted,
                    "threshold": float(number.to_float(np.array([found.bits], dtype=number.bits))[0]),
                    "threshold_bits": found.bits,
                }
            rows.append(row)
    calibration = asdict(provenance)
    content = {
        "label": label,
        "method": method.name,
        "parameters": method.model_dump(),
        "calibration": calibration,
    }
    table = pa.Table.from_pylist(rows, schema=THRESHOLDS.with_metadata({"sparsetrace": json.dumps(content)}))
    with write_beside(out) as partial:
        pq.write_table(table, partial)
    return Thresholds(label, method, calibration, rows)


def read_thresholds(path: Path, model: RuntimeModel) -> Thresholds:
    """Read a threshold table and check that it was made for this model.

    Raises:
        InputError: it belongs to another model or dtype.
    """
    table = pq.read_table(path)
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
