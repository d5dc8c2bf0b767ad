"""Thresholds of a method setting, from the histograms: `sparsetrace.calibration.thresholds` describes the table."""

from collections.abc import Sequence
from pathlib import Path

from sparsetrace.calibration.allocation import allocate_targets
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.target import refuse_uncounted, threshold_row
from sparsetrace.calibration.thresholds import Thresholds, write_thresholds
from sparsetrace.methods import Method

# What the table says of its calibration; the sites, and what the counts were added up from, stay in the histogram file.
CALIBRATION = ("model_hash", "text_hash", "dtype", "tokens", "layers")


def derive_thresholds(
    label: str, method: Method, histograms_path: Path, out: Path, tables: Sequence[Path] = ()
) -> Thresholds:
    """Look a setting's targets up in the histograms and write the table.

    Args:
        label: of the setting.
        method: with its parameters.
        histograms_path: of the model.
        out: the table.
        tables: of the greedy search, one per layer; needed where the allocation is greedy.

    Raises:
        InputError: the histograms are unreadable or lack what the method needs, or the allocation does not fit.
    """
    histograms, provenance = Histograms.load(histograms_path)
    refuse_uncounted(method, histograms, histograms_path)
    targets, notes = allocate_targets(method, provenance, tables)
    rows = [threshold_row(histograms, method, *leaf, target) for leaf, target in targets.items()]
    calibration = {name: getattr(provenance, name) for name in CALIBRATION}
    thresholds = Thresholds(label, method, calibration, rows, notes)
    write_thresholds(thresholds, out)
    return thresholds
