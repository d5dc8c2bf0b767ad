"""Thresholds of the user's own: the file that `allocation: {file: PATH}` names."""

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from sparsetrace.calibration.target import Target
from sparsetrace.core.checked import read_checked_table
from sparsetrace.core.files import InputError, read_regular
from sparsetrace.formats.sites import Site, layer_leaves

# At most so many matrices are named in a message.
NAMED = 7


def read_threshold_file(path: Path, sites: Sequence[Site]) -> dict[tuple[int, str], Target]:
    """The threshold of each layer and matrix, in the order of execution.

    Args:
        path: Parquet or CSV with the columns `layer`, `matrix`, `threshold`, and `sparsity` if the targets are known.
        sites: of the model.

    Raises:
        InputError: a column or row is missing, a row is there twice or of no layer or matrix of the model, or a
            threshold is no number.
    """
    where = f"thresholds: {path}"
    table = _read(path, where)
    if missing := [name for name in ("layer", "matrix", "threshold") if name not in table.column_names]:
        raise InputError(f"{where} must have the columns layer, matrix, threshold, got no {', '.join(missing)}")
    wanted = layer_leaves(sites)
    found: dict[tuple[int, str], Target] = {}
    for row in table.to_pylist():
        leaf, threshold, sparsity = (row["layer"], row["matrix"]), row["threshold"], row.get("sparsity")
        at = f"{where}: layer {leaf[0]} {leaf[1]}"
        if leaf not in wanted:
            layers = len({layer for layer, _ in wanted})
            raise InputError(f"{at} must be a matrix of a model of {layers} layers, got another")
        if leaf in found:
            raise InputError(f"{at} must have one row, got two")
        if (
            not isinstance(threshold, int | float)
            or isinstance(threshold, bool)
            or not math.isfinite(threshold)
            or threshold < 0
        ):
            raise InputError(f"{at}: threshold must be a number of at least 0, got {threshold!r}")
        if sparsity is not None and not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
            raise InputError(f"{at}: sparsity must be at least 0 and below 1, got {sparsity!r}")
        found[leaf] = Target(None if sparsity is None else float(sparsity), float(threshold))
    if absent := [f"layer {layer} {matrix}" for layer, matrix in wanted if (layer, matrix) not in found]:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        raise InputError(f"{where} must have a row for every matrix, got none for {', '.join(absent[:NAMED])}{more}")
    return {leaf: found[leaf] for leaf in wanted}


def _read(path: Path, where: str) -> pa.Table:
    if path.suffix != ".csv":
        return read_checked_table(path, "thresholds", "Parquet, or CSV with the suffix .csv")
    try:
        return pa_csv.read_csv(pa.BufferReader(read_regular(path, "thresholds")))
    except (pa.ArrowException, ValueError) as error:
        raise InputError(
            f"{where} must be Parquet, or CSV with the suffix .csv, got {str(error).splitlines()[0]}"
        ) from None
