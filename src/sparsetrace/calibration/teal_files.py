"""TEAL's published calibration: `histograms.pt` of each layer and the search tables `results.csv`, as thresholds.

| column of the output | unit | what |
|---|---|---|
| `layer`, `matrix` | | the index |
| `sparsity` | fraction | target of the matrix |
| `threshold` | abs(x) | kept strictly above |
| `implied_sparsity` | fraction | what the threshold drops of the histogram itself |

Source: github.com/FasterDecoding/TEAL, commit 5baaec8: utils/utils.py `Distribution`, teal/greedyopt.py. Its histograms
are signed, of 10,000 bins, float32, with `h1` what q, k, v (gate, up) read and `h2` what o (down) reads.
"""

import csv
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sparsetrace.calibration.allocation import Table
from sparsetrace.core.files import InputError, read_json, write_beside

Rule = Literal["teal", "magnitude"]

# The matrices of TEAL's files, in the order of their columns, and the site whose histogram each reads.
SITE_OF = {
    **dict.fromkeys(("q", "k", "v"), "attn_in"),
    "o": "attn_out",
    **dict.fromkeys(("gate", "up"), "mlp_in"),
    "down": "mlp_mid",
}
MATRICES = tuple(SITE_OF)

# Where each site's histogram lies: folder and key of `histograms.pt`.
PLACES = {
    "attn_in": ("self_attn", "h1"),
    "attn_out": ("self_attn", "h2"),
    "mlp_in": ("mlp", "h1"),
    "mlp_mid": ("mlp", "h2"),
}
# A histogram that lacks no more than this was probably spoilt by rounding, and is not another model's.
FEW = 8
THRESHOLD_FILE = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("matrix", pa.string(), nullable=False),
        pa.field("sparsity", pa.float64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("implied_sparsity", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Histogram:
    """One signed histogram.

    Args:
        centers: float32 [bins], ascending.
        counts: float32 [bins], whole numbers.
    """

    centers: Tensor
    counts: Tensor

    @property
    def mass(self) -> int:
        """Activations counted."""
        return int(self.counts.double().sum())

    def teal_threshold(self, sparsity: float) -> float:
        """TEAL's rule, in its arithmetic: the signed quantile at 0.5 + s/2, interpolated between bin centers.

        It is the magnitude that drops `sparsity` if the distribution is symmetric about zero. 0 for sparsity 0.
        """
        if sparsity == 0:
            return 0.0
        cumulative = self.counts.cumsum(0)
        wanted = (0.5 + sparsity / 2) * self.counts.sum()
        i = int(torch.searchsorted(cumulative, wanted))
        if i in (0, len(self.centers)):
            return float(self.centers[min(i, len(self.centers) - 1)])
        share = (wanted - cumulative[i - 1]) / (cumulative[i] - cumulative[i - 1])
        return float(self.centers[i - 1] + share * (self.centers[i] - self.centers[i - 1]))

    def magnitude_threshold(self, sparsity: float) -> float:
        """The magnitude t at which the histogram implies exactly `sparsity`; 0 for sparsity 0."""
        if sparsity == 0:
            return 0.0
        # what is implied is linear between two neighbouring center magnitudes
        edges = np.unique(np.concatenate([[0.0], np.abs(self.centers.double().numpy())]))
        implied = np.maximum.accumulate(self._implied(edges))
        i = int(np.clip(np.searchsorted(implied, sparsity), 1, len(edges) - 1))
        share = (sparsity - implied[i - 1]) / (implied[i] - implied[i - 1]) if implied[i] > implied[i - 1] else 1.0
        return float(edges[i - 1] + min(share, 1.0) * (edges[i] - edges[i - 1]))

    def implied_sparsity(self, threshold: float) -> float:
        """P(|x| <= t) by TEAL's own distribution function: cumulative counts at bin centers, linear in between."""
        return float(self._implied(np.array([threshold]))[0])

    def _implied(self, thresholds: np.ndarray) -> np.ndarray:
        shares = np.cumsum(self.counts.double().numpy()) / self.mass
        above, below = (
            np.interp(at, self.centers.double().numpy(), shares, left=0.0, right=1.0)
            for at in (thresholds, -thresholds)
        )
        return np.maximum(above - below, 0.0)


def import_teal(
    histograms: Path,
    config: Path,
    sparsity: float,
    out: Path,
    rule: Rule = "teal",
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
    with write_beside(out) as partial:
        pq.write_table(table, partial)
    return table


def read_histograms(folder: Path, layers: int) -> dict[tuple[int, str], Histogram]:
    """All histograms of a model by layer and site, loaded without running what a pickle may hold.

    Raises:
        InputError: layers are missing or too many, or a file is unreadable.
    """
    _refuse_other_layers(folder, layers, "histograms")
    found = {}
    for layer in range(layers):
        for site, (part, key) in PLACES.items():
            path = folder / f"layer-{layer}" / part / "histograms.pt"
            content = _load(path)
            pair = [content.get(name) for name in (f"{key}_centers", key)]
            centers, counts = pair
            if not (isinstance(centers, Tensor) and isinstance(counts, Tensor) and centers.shape == counts.shape):
                raise InputError(
                    f"import-teal: {path} must hold {key} and {key}_centers of one length, got {sorted(content)}"
                )
            whole = counts.dim() == 1 and bool((counts >= 0).all()) and bool((counts == counts.round()).all())
            if not whole or not bool(centers.isfinite().all()) or bool((centers.diff() < 0).any()):
                raise InputError(
                    f"import-teal: {path}: {key} must be counts over ascending bin centers, got other numbers"
                )
            found[layer, site] = Histogram(centers, counts)
    return found


def refuse_other_model(
    histograms: dict[tuple[int, str], Histogram], widths: dict[str, int], folder: Path, lost: int = 0
) -> None:
    """Refuse histograms that this model cannot have made: each token adds exactly `width` activations at a site.

    Args:
        histograms: by layer and site.
        widths: of the sites.
        folder: for messages.
        lost: activations that one may lack.

    Raises:
        InputError: says which site does not fit, and of what width it seems to be.
    """
    tokens: dict[tuple[int, str], int] = {}
    for (layer, site), histogram in histograms.items():
        mass, width = histogram.mass, widths[site]
        short = -mass % width
        if mass == 0 or short > lost:
            near = short <= FEW
            raise InputError(
                f"import-teal: counts of {folder} must be a multiple of the model's width at every site, got {mass:,} "
                f"in layer {layer} at {site}, which is "
                + (f"{short} short of {-(-mass // width):,}" if near else f"{mass / width:.2f}")
                + f" times {width}: "
                + (f"accept that with --lost {short}" if near else "the histograms are of another model")
            )
        tokens[layer, site] = -(-mass // width)
    if len(set(tokens.values())) > 1:
        usual = max(set(tokens.values()), key=list(tokens.values()).count)
        layer, site = next(place for place, count in tokens.items() if count != usual)
        raise InputError(
            f"import-teal: counts of {folder} must give the same number of tokens at every site, got "
            f"{tokens[layer, site]:,} in layer {layer} at {site} and {usual:,} elsewhere: "
            "the histograms are of another model, or of several"
        )


def read_lookup(folder: Path, layers: int) -> dict[int, Table]:
    """TEAL's search tables by layer.

    Raises:
        InputError: layers are missing or too many, or a table is not TEAL's.
    """
    _refuse_other_layers(folder, layers, "lookup tables")
    tables = {}
    for layer in range(layers):
        path = folder / f"layer-{layer}" / "results.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            columns = {name: [float(row[name]) for row in rows] for name in (*_COLUMNS, *MATRICES)}
        except FileNotFoundError:
            raise InputError(f"import-teal: {path} must be a file, got nothing there") from None
        except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(
                f"import-teal: {path} must have the columns {', '.join((*_COLUMNS, *MATRICES))} in numbers, got {error}"
            ) from None
        sparsities = [
            dict(zip(MATRICES, values, strict=True)) for values in zip(*(columns[m] for m in MATRICES), strict=True)
        ]
        numbers = [value for values in columns.values() for value in values]
        if not rows or not all(map(math.isfinite, numbers)) or columns[_COLUMNS[0]] != sorted(columns[_COLUMNS[0]]):
            raise InputError(f"import-teal: {path} must list ascending finite effective sparsities, got another table")
        effective, by_search, uniform = (columns[name] for name in _COLUMNS)
        tables[layer] = Table(MATRICES, effective, by_search, uniform, sparsities)
    return tables


_COLUMNS = ("Effective Sparsity", "Activation Error", "Baseline Error")


def _refuse_other_layers(folder: Path, layers: int, what: str) -> None:
    found = {int(name[1]) for path in folder.glob("layer-*") if (name := re.fullmatch(r"layer-(\d+)", path.name))}
    if missing := sorted(set(range(layers)) - found):
        shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        raise InputError(
            f"import-teal: {what} in {folder} must cover all {layers} layers of the model, got none of {shown}"
        )
    if more := sorted(found - set(range(layers))):
        raise InputError(
            f"import-teal: {what} in {folder} must be of the model's {layers} layers, got layer {more[0]} too: "
            "they are of another model"
        )


def _load(path: Path) -> dict[str, object]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"import-teal: {path} must be a file, got nothing there") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"import-teal: {path} must be tensors saved by torch, got {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"import-teal: {path} must hold named tensors, got {type(content).__name__}")
    return content


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
