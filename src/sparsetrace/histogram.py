"""Exact distributions of activations: counts of bit patterns, one histogram per layer and site.

A 16-bit float has 65,536 patterns, so counting them loses nothing, needs fixed memory and merges by addition. A float32
is counted by its top 16 bits; a threshold is then the upper edge of a bucket, and zeros are counted apart, so that
what a threshold drops is still known as an integer. Source: DESIGN contract "Calibration".

File: safetensors, `LNN.site` int64 [65536] by pattern, `zeros` int64 [layers, 4] in the order of `schema.SITES`, and
the metadata of `Provenance`.
"""

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from sparsetrace.files import InputError, write_beside
from sparsetrace.schema import FORMATS, SITES

NUM_PATTERNS = 1 << 16
NUM_MAGNITUDES = NUM_PATTERNS // 2


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a set of histograms was counted on."""

    model_hash: str
    text_hash: str
    dtype: str
    tokens: int
    layers: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """A magnitude and what it drops of the counted activations, as integers.

    Args:
        bits: bit pattern of the magnitude; kept strictly above.
        dropped: activations at or below it.
        counted: all.
    """

    bits: int
    dropped: int
    counted: int


class Histograms:
    """Counts of one model, on its device.

    Args:
        layers: number of layers.
        dtype: of the activations.
        device: where they are counted.
    """

    def __init__(self, layers: int, dtype: str, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self.layers = layers
        self.counts = {
            (layer, site): torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
            for layer in range(layers)
            for site in SITES
        }
        self.zeros = {key: torch.zeros((), dtype=torch.int64, device=device) for key in self.counts}

    def count(self, layer: int, site: str, x: Tensor) -> None:
        """Add every element of x [..., K]."""
        number = FORMATS[self.dtype]
        integers = x.contiguous().view(torch.int16 if number.bits.itemsize == 2 else torch.int32)
        patterns = (integers >> number.count_shift).flatten().int() & (NUM_PATTERNS - 1)
        self.counts[layer, site] += torch.bincount(patterns, minlength=NUM_PATTERNS)
        self.zeros[layer, site] += (x == 0).sum()

    def not_finite(self) -> tuple[int, str] | None:
        """The first layer and site, in the order of execution, that has counted an Inf or NaN."""
        first = FORMATS[self.dtype].infinity >> FORMATS[self.dtype].count_shift
        return next((key for key in self.counts if self.magnitudes(*key)[first:].any()), None)

    def magnitudes(self, layer: int, site: str) -> np.ndarray:
        """int64 [32768]: counts by magnitude, both signs folded."""
        counts: np.ndarray = self.counts[layer, site].cpu().numpy()
        return counts[:NUM_MAGNITUDES] + counts[NUM_MAGNITUDES:]

    def threshold(self, layer: int, site: str, sparsity: float) -> Threshold:
        """The magnitude t with P(|x| < t) < sparsity <= P(|x| <= t); t = 0 for sparsity 0."""
        counted = int(self.magnitudes(layer, site).sum())
        if sparsity == 0:
            return Threshold(0, int(self.zeros[layer, site]), counted)
        cumulative = np.cumsum(self.magnitudes(layer, site))
        # repr: the sparsity that the user wrote, not its nearest binary fraction
        wanted = -(-Fraction(repr(sparsity)) * counted // 1)
        bucket = int(np.searchsorted(cumulative, int(wanted)))
        shift = FORMATS[self.dtype].count_shift
        return Threshold(((bucket + 1) << shift) - 1, int(cumulative[bucket]), counted)

    def save(self, path: Path, provenance: Provenance) -> None:
        """Write the file described above."""
        arrays = {f"L{layer:02d}.{site}": c.cpu().numpy() for (layer, site), c in self.counts.items()}
        arrays["zeros"] = np.array([int(z) for z in self.zeros.values()], dtype=np.int64).reshape(
            self.layers, len(SITES)
        )
        with write_beside(path) as partial:
            save_file(arrays, partial, metadata={"sparsetrace_histograms": json.dumps(asdict(provenance))})

    @staticmethod
    def load(path: Path) -> tuple["Histograms", Provenance]:
        """Read the file described above."""
        try:
            with safe_open(path, framework="np") as file:
                metadata = (file.metadata() or {}).get("sparsetrace_histograms")
                if metadata is None:
                    raise InputError(f"histograms: {path} must be a histogram file of sparsetrace, got another")
                provenance = Provenance(**json.loads(metadata))
                histograms = Histograms(provenance.layers, provenance.dtype)
                zeros = file.get_tensor("zeros").reshape(-1)
                for i, (layer, site) in enumerate(histograms.counts):
                    counts = torch.from_numpy(file.get_tensor(f"L{layer:02d}.{site}"))
                    histograms.counts[layer, site] = counts
                    histograms.zeros[layer, site] = torch.tensor(int(zeros[i]))
        except (SafetensorError, OSError) as error:
            raise InputError(f"histograms: {path} must be a readable histogram file, got {error}") from None
        return histograms, provenance
