"""Thresholds of a method setting, from the histograms or the model: `sparsetrace.calibration.thresholds` says what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsetrace.calibration.allocation import allocate_targets
from sparsetrace.calibration.histogram import Histograms, Provenance
from sparsetrace.calibration.target import refuse_uncounted, threshold_row
from sparsetrace.calibration.thresholds import Thresholds, write_thresholds
from sparsetrace.core.files import InputError
from sparsetrace.formats.tables import THRESHOLDS
from sparsetrace.methods import Method
from sparsetrace.model.runtime import open_model

# What the table says of its calibration; the sites, and what the counts were added up from, stay in the histogram file.
CALIBRATION = ("model_hash", "text_hash", "dtype", "tokens", "layers")


def derive_thresholds(label: str, method: Method, source: Path, out: Path, tables: Sequence[Path] = ()) -> Thresholds:
    """Look a setting's targets up in the histograms and write the table.

    Args:
        label: of the setting.
        method: with its parameters.
        source: histograms of the model; or the model, its folder or config.json, for a method without thresholds.
        out: the table.
        tables: of the greedy search, one per layer; needed where the allocation is greedy.

    Raises:
        InputError: the histograms are unreadable or lack what the method needs, or the allocation does not fit.
    """
    if source.is_dir() or source.name == "config.json":
        thresholds = _without_calibration(label, method, source)
    else:
        histograms, provenance = Histograms.load(source)
        refuse_uncounted(method, histograms, source)
        targets, notes = allocate_targets(method, provenance, tables)
        rows = [threshold_row(histograms, method, *leaf, target) for leaf, target in targets.items()]
        calibration = {name: getattr(provenance, name) for name in CALIBRATION}
        thresholds = Thresholds(label, method, calibration, rows, notes)
    write_thresholds(thresholds, out)
    return thresholds


def _without_calibration(label: str, method: Method, model_path: Path) -> Thresholds:
    """The table of a method that has targets at most, for a model that was not calibrated."""
    if method.needs_thresholds:
        raise InputError(
            f"thresholds: histograms must be given for method {method.name}, got the model {model_path}: run "
            "`sparsetrace calibrate`"
        )
    model = open_model(model_path)
    layers = model.config.num_hidden_layers
    # nothing was counted on no text
    provenance = Provenance(model.model_hash, "", model.config.dtype, 0, layers, model.sites)
    targets, notes = allocate_targets(method, provenance, ())
    empty: dict[str, Any] = dict.fromkeys(THRESHOLDS.names)
    rows = [
        empty | {"layer": layer, "matrix": matrix, "target_sparsity": target.sparsity}
        for (layer, matrix), target in targets.items()
    ]
    return Thresholds(label, method, {"model_hash": model.model_hash, "dtype": model.config.dtype}, rows, notes)
