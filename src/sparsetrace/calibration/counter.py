"""Counting of activations while a model runs, on its device; exact, see `sparsetrace.calibration.histogram`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.calibration.histogram import NUM_MAGNITUDES, NUM_PATTERNS, Histograms
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Site

# Shape suffixes: H histograms, P bit patterns, K input features.


class ActivationCounter:
    """Counts the bit patterns of a model's activations.

    Args:
        sites: of the model; those within layers are counted.
        dtype: of the activations.
        device: where they are counted.
        scores: names of the methods whose scores are counted besides what enters the sites.

    Attributes:
        scores: as given.
        add: called with a contiguous 16-bit tensor and the int64 [65536] counts that its patterns are added to.
    """

    def __init__(
        self, sites: Sequence[Site], dtype: str, device: torch.device | str = "cpu", scores: Sequence[str] = ()
    ) -> None:
        self._host = Histograms(sites, dtype, scores)
        self.scores = self._host.scores
        # one tensor, so that one copy to the host answers for every histogram
        self._counts_HP = torch.zeros(self._host.counts_HP.shape, dtype=torch.int64, device=device)
        self._float32_zeros_H = torch.zeros(len(self._counts_HP), dtype=torch.int64, device=device)
        self.add = _adder(self._counts_HP.device)

    def count(self, layer: int, name: str, x: Tensor) -> None:
        """Add every element of x [..., K]."""
        x = x.contiguous()
        row = self._host.row[layer, name]
        if shift := self._host.format(layer, name).count_shift:
            self._float32_zeros_H[row] += (x == 0).sum()
            x = (x.view(torch.int32) >> shift).to(torch.int16).view(torch.float16)
        self.add(x, self._counts_HP[row])

    def not_finite(self) -> tuple[int, str] | None:
        """The first layer and site, in the order of execution, that has counted an Inf or NaN."""
        number = FORMATS[self._host.dtype]
        first = number.infinity >> number.count_shift
        positive, negative = self._counts_HP[:, first:NUM_MAGNITUDES], self._counts_HP[:, NUM_MAGNITUDES + first :]
        if not bool(positive.any() | negative.any()):
            return None
        found = self.histograms()
        for site in found.sites:
            assert site.layer is not None
            if found.magnitudes(site.layer, site.name)[first:].any():
                return site.layer, site.name
        return None

    def histograms(self) -> Histograms:
        """What has been counted so far; the same object at each call, brought up to date."""
        host = self._host
        host.counts_HP[:] = self._counts_HP.cpu().numpy()
        both_signs_H = host.counts_HP[:, 0] + host.counts_HP[:, NUM_MAGNITUDES]
        separate_H = [host.format(*key).count_shift > 0 for key in host.row]
        host.zeros_H[:] = np.where(separate_H, self._float32_zeros_H.cpu().numpy(), both_signs_H)
        return host

    def resume(self, path: Path, key: str) -> int:
        """Go on from the counts of an interrupted calibration, and return how much of it was done (0: nothing)."""
        if done := self._host.resume(path, key):
            self._counts_HP.copy_(torch.from_numpy(self._host.counts_HP))
            self._float32_zeros_H.copy_(torch.from_numpy(self._host.zeros_H))
        return done


def _adder(device: torch.device) -> Callable[[Tensor, Tensor], object]:
    """The function that adds the patterns of a contiguous 16-bit tensor to int64 counts."""
    if device.type == "cuda":
        from sparsetrace_kernels.histogram import add_histogram

        return add_histogram

    def add(x: Tensor, counts_P: Tensor) -> None:
        patterns = x.view(torch.int16).flatten().int() & (NUM_PATTERNS - 1)
        counts_P += torch.bincount(patterns, minlength=NUM_PATTERNS)

    return add
