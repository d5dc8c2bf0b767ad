"""TEAL's published histograms: `layer-N/{self_attn,mlp}/histograms.pt`, signed, of 10,000 bins, float32.

`h1` is what q, k, v (gate, up) read and `h2` what o (down) reads. Source: github.com/FasterDecoding/TEAL, commit
5baaec8: utils/utils.py `Distribution`.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.core.files import InputError

# Where each site's histogram lies: folder and key of `histograms.pt`.
PLACES = {
    "attn_in": ("self_attn", "h1"),
    "attn_out": ("self_attn", "h2"),
    "mlp_in": ("mlp", "h1"),
    "mlp_mid": ("mlp", "h2"),
}
# A histogram that lacks no more activations than this probably lost them to rounding, and is not another model's.
FEW = 8
# Counts of a bin: those of TEAL's files are below 2**31, and beyond 2**53 sums are no longer whole numbers.
MOST_COUNTED = 2.0**40


@dataclass(frozen=True, slots=True)
class SignedHistogram:
    """Counts of activations in bins of their signed value.

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


def read_histograms(folder: Path, layers: int) -> dict[tuple[int, str], SignedHistogram]:
    """All histograms of a model by layer and site; tensors are loaded, and no other object of a pickle.

    Raises:
        InputError: layers are missing or too many, or a file is unreadable.
    """
    refuse_other_layers(folder, layers, "histograms")
    found = {}
    for layer in range(layers):
        for site, (part, key) in PLACES.items():
            path = folder / f"layer-{layer}" / part / "histograms.pt"
            content = _load(path)
            centers, counts = content.get(f"{key}_centers"), content.get(key)
            if not (isinstance(centers, Tensor) and isinstance(counts, Tensor) and centers.shape == counts.shape):
                raise InputError(
                    f"import-teal: {path} must hold {key} and {key}_centers of one length, got {sorted(content)}"
                )
            for name, tensor in ((key, counts), (f"{key}_centers", centers)):
                # TEAL's arithmetic is that of float32: half precision overflows, and integers are rounded elsewhere
                if tensor.dtype != torch.float32 or tensor.dim() != 1 or tensor.layout != torch.strided:
                    shape = "x".join(map(str, tensor.shape))
                    raise InputError(
                        f"import-teal: {path}: {name} must be one row of float32, got {shape} of {tensor.dtype}"
                    )
            whole = bool(((counts >= 0) & (counts <= MOST_COUNTED) & (counts == counts.round())).all())
            if not whole or not bool(centers.isfinite().all()) or bool((centers.diff() < 0).any()):
                raise InputError(
                    f"import-teal: {path}: {key} must be counts over ascending bin centers, got other numbers"
                )
            found[layer, site] = SignedHistogram(centers, counts)
    return found


def refuse_other_model(
    histograms: dict[tuple[int, str], SignedHistogram], widths: dict[str, int], folder: Path, lost: int = 0
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


def refuse_other_layers(folder: Path, layers: int, what: str) -> None:
    """Refuse a folder whose `layer-N` are not those of the model.

    Args:
        folder: with a folder for each layer.
        layers: of the model.
        what: name of the folder's content, for the message.

    Raises:
        InputError: a layer is missing, or there are more.
    """
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
