"""TEAL's published calibration: `histograms.pt` of each layer and the search tables `results.csv`, as thresholds.

| column of the output | unit | what |
|---|---|---|
| `layer`, `matrix` | | the index |
| `sparsity` | fraction | target of the matrix |
| `threshold` | abs(x) | kept strictly above |
| `implied_sparsity` | fraction | what the threshold drops of the histogram itself |

The files are of Llama models, whose matrices and sites are named here. Source: github.com/FasterDecoding/TEAL, commit
5baaec8: teal/greedyopt.py.
"""

import csv
import io
from pathlib import Path
from typing import Literal

import pyarrow as pa

from sparsetrace.calibration.search_table import SearchTable, refuse_no_search
from sparsetrace.calibration.teal_histograms import read_histograms, refuse_other_layers, refuse_other_model
from sparsetrace.core.checked import write_checked_table
from sparsetrace.core.files import InputError, read_json, read_regular

ThresholdRule = Literal["teal", "magnitude"]

# The matrices in the order of the search tables' columns, and the site whose histogram each reads.
SITE_OF = {
    **dict.fromkeys(("q", "k", "v"), "attn_in"),
    "o": "attn_out",
    **dict.fromkeys(("gate", "up"), "mlp_in"),
    "down": "mlp_mid",
}
MATRICES = tuple(SITE_OF)
# The search tables' columns that belong to the layer.
LAYER_COLUMNS = ("Effective Sparsity", "Activation Error", "Baseline Error")

THRESHOLD_FILE = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("matrix", pa.string(), nullable=False),
        pa.field("sparsity", pa.float64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("implied_sparsity", pa.float64(), nullable=False),
    ]
)


def import_teal(
    histograms: Path,
    config: Path,
    sparsity: float,
    out: Path,
    rule: ThresholdRule = "teal",
    lookup: Path | None = None,
    lost: int = 0,
) -> pa.Table:
    """Thresholds from TEAL's published files.

    Args:
        histograms: folder with `layer-N/{self_attn,mlp}/histograms.pt`.
        config: the model's Hugging Face config.json.
        sparsity: target, 0 <= s < 1.
        out: Parquet file, usable as allocation `file`.
        rule: `teal` is TEAL's own, `magnitude` the quantile of |x| of the same histogram.
        lookup: folder with `layer-N/results.csv`, for greedy targets; None for uniform ones.
        lost: activations that a histogram may lack of a whole number of vectors. `torch.histogram`, which made them,
            can lose an extreme value to rounding: one of Mistral-7B's 128 published histograms lacks one.

    Returns:
        What was written: layer, matrix, sparsity, threshold, implied_sparsity.

    Raises:
        InputError: the files are unreadable, incomplete, or cannot be of this model.
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"import-teal: sparsity must be at least 0 and below 1, got {sparsity}")
    layers, widths = _shape(config)
    found = read_histograms(histograms, layers)
    refuse_other_model(found, widths, histograms, lost)
    tables = None if lookup is None else read_lookup(lookup, layers)
    rows = []
    for layer in range(layers):
        targets = dict.fromkeys(MATRICES, sparsity)
        if tables is not None:
            targets, _ = tables[layer].lookup(sparsity, f"import-teal: layer {layer} of {lookup}")
        for matrix in MATRICES:
            histogram, target = found[layer, SITE_OF[matrix]], targets[matrix]
            threshold = histogram.teal_threshold(target) if rule == "teal" else histogram.magnitude_threshold(target)
            implied = histogram.implied_sparsity(threshold)
            rows.append(
                {
                    "layer": layer,
                    "matrix": matrix,
                    "sparsity": target,
                    # the upper half of a distribution that lies below zero gives a negative quantile, which keeps all
                    "threshold": max(threshold, 0.0),
                    "implied_sparsity": implied,
                }
            )
    table = pa.Table.from_pylist(rows, schema=THRESHOLD_FILE)
    write_checked_table(table, out)
    return table


def read_lookup(folder: Path, layers: int) -> dict[int, SearchTable]:
    """TEAL's search tables by layer.

    Raises:
        InputError: layers are missing or too many, or a table is not TEAL's.
    """
    refuse_other_layers(folder, layers, "lookup tables")
    tables = {}
    for layer in range(layers):
        path = folder / f"layer-{layer}" / "results.csv"
        columns = _lookup_columns(path)
        effective, error, uniform_error = (columns[name] for name in LAYER_COLUMNS)
        if not effective:
            raise InputError(f"import-teal: {path} must list ascending finite effective sparsities, got no row")
        refuse_no_search(columns, (), effective, f"import-teal: {path}")
        steps = zip(*(columns[matrix] for matrix in MATRICES), strict=True)
        sparsities = [dict(zip(MATRICES, step, strict=True)) for step in steps]
        tables[layer] = SearchTable(MATRICES, effective, error, uniform_error, sparsities)
    return tables


def _lookup_columns(path: Path) -> dict[str, list[float]]:
    names = (*LAYER_COLUMNS, *MATRICES)
    try:
        # `strict`: a quote that is never closed is an error too
        rows = list(
            csv.DictReader(io.StringIO(read_regular(path, "import-teal").decode("utf-8"), newline=""), strict=True)
        )
        # what a row has beyond the header stands under None
        if uneven := [number for number, row in enumerate(rows, start=2) if None in row or None in row.values()]:
            raise ValueError(f"another number of cells in line {uneven[0]}")
        return {name: [float(row[name]) for row in rows] for name in names}
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"import-teal: {path} must have the columns {', '.join(names)} in numbers, got {error}"
        ) from None


def _shape(config: Path) -> tuple[int, dict[str, int]]:
    """Layers of a model, and the width of each site."""
    raw = read_json(config, "import-teal")

    def number(name: str) -> int:
        value = raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"import-teal: {config}: {name} must be a positive integer, got {value!r}")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim") if raw.get("head_dim") is not None else hidden // heads
    widths = {
        "attn_in": hidden,
        "attn_out": heads * head_dim,
        "mlp_in": hidden,
        "mlp_mid": number("intermediate_size"),
    }
    return number("num_hidden_layers"), widths
