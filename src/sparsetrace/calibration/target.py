"""The target of one matrix, and the threshold that the histograms give for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrace.calibration.histogram import Histograms
from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import by_leaf
from sparsetrace.formats.tables import THRESHOLDS
from sparsetrace.methods import Method


@dataclass(frozen=True, slots=True)
class Target:
    """What an allocation sets for one matrix.

    Args:
        sparsity: fraction of inputs dropped; None where none is set.
        threshold: of the method's score; None where the histograms give it for `sparsity`.
    """

    sparsity: float | None
    threshold: float | None = None


def refuse_uncounted(method: Method, histograms: Histograms, path: Path) -> None:
    """Refuse histograms without the distributions that a method needs.

    Raises:
        InputError: names them.
    """
    if missing := [key for key in method.needs(histograms.sites) if key not in histograms.row]:
        names = dict.fromkeys(name for _, name in missing)
        raise InputError(
            f"thresholds: {path} must hold the distributions that method {method.name} needs, got none of "
            f"{', '.join(names)}: calibrate with --score {method.name}"
        )


def threshold_row(histograms: Histograms, method: Method, layer: int, matrix: str, target: Target) -> dict[str, Any]:
    """One row of a threshold table.

    Args:
        histograms: of the model.
        method: says whether the matrix needs a threshold, and of which distribution.
        layer, matrix: which.
        target: of the matrix.

    Returns:
        A value, or None, for each column of `THRESHOLDS`.
    """
    row: dict[str, Any] = dict.fromkeys(THRESHOLDS.names) | {"layer": layer, "matrix": matrix}
    row["target_sparsity"] = target.sparsity
    if not method.needs_threshold(matrix):
        return row
    name = method.histogram(by_leaf(histograms.sites)[layer, matrix], matrix)
    number = histograms.format(layer, name)
    if target.threshold is None:
        assert target.sparsity is not None
        found = histograms.threshold(layer, name, target.sparsity)
    else:
        # rounded down to a number of the dtype, t is exceeded by the same numbers
        bits = number.floor_bits(target.threshold)
        counted = histograms.dropped(layer, name, bits)
        if counted is None:
            return row | {"threshold": target.threshold, "threshold_bits": bits}
        found = counted
    return row | {
        "calibrated_sparsity": found.dropped / found.counted,
        "dropped": found.dropped,
        "counted": found.counted,
        "threshold": float(number.to_float(np.array([found.bits], dtype=number.bits))[0]),
        "threshold_bits": found.bits,
    }
