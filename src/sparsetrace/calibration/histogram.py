"""Exact distributions of activations: counts of bit patterns, one histogram per layer and name.

A 16-bit float has 65,536 patterns, so counting them loses nothing, needs fixed memory and merges by addition. A float32
is counted by its top 16 bits; a threshold is then the upper edge of a bucket, and zeros are counted apart, so that
what a threshold drops is still known as an integer. Source: DESIGN contract "Calibration".

| name | of what | dtype |
|---|---|---|
| `attn_in`, `attn_out`, `mlp_in`, `mlp_mid` | x at the site | the model's |
| `cats`: a method whose score is `gate` | activation function of `gate` | the model's |
| `wina.q`, ...: a method whose score is `scaled` | abs(x) times the method's scale, per matrix | float32 |

File: safetensors, `LNN.name` int64 [65536] by pattern, `zeros` int64 [histograms], and the metadata of `Provenance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparsetrace.core.files import InputError, sha256_json, write_beside
from sparsetrace.formats.numbers import FORMATS, NumberFormat
from sparsetrace.formats.sites import Site, layer_sites, sites_from_json
from sparsetrace.methods import METHODS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUM_PATTERNS = 1 << 16
NUM_MAGNITUDES = NUM_PATTERNS // 2


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a set of histograms was counted on.

    Args:
        model_hash: of the model.
        text_hash: of the text and of how it was cut.
        dtype: of the model.
        tokens: counted; no padding among them.
        layers: of the model.
        sites: of the model.
        scores: names of the methods whose scores were counted besides what enters the sites.
        parts: (text hash, shard, shards) of everything that was added up; empty stands for the one whole text.
    """

    model_hash: str
    text_hash: str
    dtype: str
    tokens: int
    layers: int
    sites: tuple[Site, ...]
    scores: tuple[str, ...] = ()
    parts: tuple[tuple[str, int, int], ...] = ()


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


def distributions(sites: Sequence[Site], scores: Sequence[str]) -> dict[tuple[int, str], bool]:
    """Every histogram of a model, by layer and name.

    Args:
        sites: within layers.
        scores: names of the methods whose scores are counted besides what enters the sites.

    Returns:
        Whether each counts float32 scores rather than activations of the model's dtype.
    """
    names: dict[int, dict[str, bool]] = {}
    for site in sites:
        assert site.layer is not None
        names.setdefault(site.layer, {})[site.name] = False
    for method in scores:
        for layer, own in names.items():
            matrices = [matrix for site in sites if site.layer == layer for matrix in site.matrices]
            match METHODS[method].score:
                case "gate" if "gate" in matrices:
                    own[method] = False
                case "scaled":
                    own |= {f"{method}.{matrix}": True for matrix in matrices}
    return {(layer, name): scaled for layer, own in names.items() for name, scaled in own.items()}


class Histograms:
    """Counts of one model, as they lie in its file: all zero at first.

    Args:
        sites: of the model; those within layers are counted.
        dtype: of the activations.
        scores: names of the methods whose scores are counted besides what enters the sites.
    """

    def __init__(self, sites: Sequence[Site], dtype: str, scores: Sequence[str] = ()) -> None:
        self.dtype = dtype
        self.sites = layer_sites(sites)
        self.scores = tuple(scores)
        found = distributions(self.sites, scores)
        self._formats = {key: "float32" if scaled else dtype for key, scaled in found.items()}
        self._all = np.zeros((len(found), NUM_PATTERNS), np.int64)
        self._zeros = np.zeros(len(found), np.int64)
        self._row = {key: row for row, key in enumerate(found)}

    @property
    def counts(self) -> dict[tuple[int, str], np.ndarray]:
        """int64 [65536] by (layer, name): how often each pattern was counted."""
        return {key: self._all[row] for key, row in self._row.items()}

    @property
    def zeros(self) -> dict[tuple[int, str], int]:
        """Counted zeros of both signs by (layer, name)."""
        return {key: int(self._zeros[row]) for key, row in self._row.items()}

    def format(self, layer: int, name: str) -> NumberFormat:
        """Number format of what a histogram counts."""
        return FORMATS[self._formats[layer, name]]

    def magnitudes(self, layer: int, name: str) -> np.ndarray:
        """int64 [32768]: counts by magnitude, both signs folded."""
        counts = self._all[self._row[layer, name]]
        return counts[:NUM_MAGNITUDES] + counts[NUM_MAGNITUDES:]

    def threshold(self, layer: int, name: str, sparsity: float) -> Threshold:
        """The magnitude t with P(|x| < t) < sparsity <= P(|x| <= t); t = 0 for sparsity 0."""
        cumulative = np.cumsum(self.magnitudes(layer, name))
        counted = int(cumulative[-1])
        if sparsity == 0:
            return Threshold(0, self.zeros[layer, name], counted)
        # repr: the sparsity that the user wrote, not its nearest binary fraction
        wanted = -(-Fraction(repr(sparsity)) * counted // 1)
        bucket = int(np.searchsorted(cumulative, int(wanted)))
        shift = self.format(layer, name).count_shift
        return Threshold(((bucket + 1) << shift) - 1, int(cumulative[bucket]), counted)

    def dropped(self, layer: int, name: str, bits: int) -> Threshold | None:
        """What a given threshold drops; None where it lies within a bucket, so that the counts do not say."""
        cumulative = np.cumsum(self.magnitudes(layer, name))
        if bits == 0:
            return Threshold(0, self.zeros[layer, name], int(cumulative[-1]))
        bucket, rest = divmod(bits + 1, 1 << self.format(layer, name).count_shift)
        return None if rest else Threshold(bits, int(cumulative[bucket - 1]), int(cumulative[-1]))

    def add(self, other: Histograms) -> None:
        """Add the counts of a model of the same shape."""
        self._all += other._all
        self._zeros += other._zeros

    def save(self, path: Path, provenance: Provenance) -> None:
        """Write the file described above."""
        self._write(path, {"sparsetrace_histograms": json.dumps(asdict(provenance))})

    def save_progress(self, path: Path, key: str, done: int) -> None:
        """Write the counts of an unfinished calibration, which `resume` of the same key takes up."""
        self._write(path, {"sparsetrace_progress": json.dumps({"key": key, "done": done})})

    def resume(self, path: Path, key: str) -> int:
        """Read the counts of an interrupted calibration; returns how much of it was done, 0 if nothing can be used."""
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="np") as file:
                found = json.loads((file.metadata() or {}).get("sparsetrace_progress", "{}"))
                if found.get("key") != key:
                    return 0
                self._read(file)
        except SafetensorError:
            return 0
        return int(found["done"])

    def _write(self, path: Path, metadata: dict[str, str]) -> None:
        arrays = {f"L{layer:02d}.{name}": counts for (layer, name), counts in self.counts.items()}
        arrays["zeros"] = self._zeros
        with write_beside(path) as partial:
            # `save_file` writes to a temporary file of its own, which a kill would leave
            partial.write_bytes(save(arrays, metadata=metadata))

    def _read(self, file: safe_open) -> None:
        self._zeros[:] = file.get_tensor("zeros")
        for (layer, name), counts in self.counts.items():
            counts[:] = file.get_tensor(f"L{layer:02d}.{name}")

    @staticmethod
    def load(path: Path) -> tuple[Histograms, Provenance]:
        """Read the file described above."""
        try:
            with safe_open(path, framework="np") as file:
                metadata = (file.metadata() or {}).get("sparsetrace_histograms")
                if metadata is None:
                    raise InputError(f"histograms: {path} must be a histogram file of sparsetrace, got another")
                fields = json.loads(metadata)
                parts = tuple((text, shard, shards) for text, shard, shards in fields.pop("parts", ()))
                sites = sites_from_json(fields.pop("sites"))
                scores = tuple(fields.pop("scores", ()))
                provenance = Provenance(**fields, sites=sites, scores=scores, parts=parts)
                histograms = Histograms(sites, provenance.dtype, scores)
                histograms._read(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"histograms: {path} must be a readable histogram file, got {error}") from None
        return histograms, provenance


class ActivationCounter:
    """Counts what a model's activations are, on its device.

    Args:
        sites: of the model; those within layers are counted.
        dtype: of the activations.
        device: where they are counted.
        scores: names of the methods whose scores are counted besides what enters the sites.
    """

    def __init__(
        self, sites: Sequence[Site], dtype: str, device: torch.device | str = "cpu", scores: Sequence[str] = ()
    ) -> None:
        import torch

        self._host = Histograms(sites, dtype, scores)
        self.scores = self._host.scores
        # one tensor, so that a question to all of them is one answer from the device
        self._all = torch.zeros(self._host._all.shape, dtype=torch.int64, device=device)
        self._float32_zeros = torch.zeros(len(self._all), dtype=torch.int64, device=device)
        self._add = _adder(self._all.device)

    def count(self, layer: int, name: str, x: Tensor) -> None:
        """Add every element of x [..., K]."""
        import torch

        x = x.contiguous()
        row = self._host._row[layer, name]
        if shift := self._host.format(layer, name).count_shift:
            self._float32_zeros[row] += (x == 0).sum()
            x = (x.view(torch.int32) >> shift).to(torch.int16).view(torch.float16)
        self._add(x, self._all[row])

    def not_finite(self) -> tuple[int, str] | None:
        """The first layer and site, in the order of execution, that has counted an Inf or NaN."""
        number = FORMATS[self._host.dtype]
        first = number.infinity >> number.count_shift
        positive, negative = self._all[:, first:NUM_MAGNITUDES], self._all[:, NUM_MAGNITUDES + first :]
        if not bool(positive.any() | negative.any()):
            return None
        found = self.histograms()
        for site in found.sites:
            assert site.layer is not None
            if found.magnitudes(site.layer, site.name)[first:].any():
                return site.layer, site.name
        return None

    def histograms(self) -> Histograms:
        """What has been counted so far; the next call puts what it finds into the same ones."""
        host = self._host
        host._all[:] = self._all.cpu().numpy()
        apart = [host.format(*key).count_shift > 0 for key in host._row]
        both_signs = host._all[:, 0] + host._all[:, NUM_MAGNITUDES]
        host._zeros[:] = np.where(apart, self._float32_zeros.cpu().numpy(), both_signs)
        return host

    def resume(self, path: Path, key: str) -> int:
        """Take up the counts of an interrupted calibration, as `Histograms.resume` does."""
        import torch

        if done := self._host.resume(path, key):
            self._all.copy_(torch.from_numpy(self._host._all))
            self._float32_zeros.copy_(torch.from_numpy(self._host._zeros))
        return done


def merge(paths: Sequence[Path], out: Path) -> Provenance:
    """Add up histograms of one model: shards of a text, or several texts.

    Args:
        paths: two or more, or one, which is copied.
        out: the sum; shards 0 to n - 1 of a text give the bytes that the whole text gives.

    Raises:
        InputError: they are of different models, dtypes or scores, something would be counted twice, or a shard is
            missing.
    """
    total, first = Histograms.load(paths[0])
    parts = list(_parts(first))
    tokens = first.tokens
    for path in paths[1:]:
        histograms, provenance = Histograms.load(path)
        for name in ("model_hash", "dtype", "layers", "sites", "scores"):
            if getattr(provenance, name) != getattr(first, name):
                raise InputError(
                    f"histograms: {name} of all files must be that of {paths[0]}, {getattr(first, name)}, "
                    f"got {getattr(provenance, name)} in {path}: merge what was counted on one model, in one way"
                )
        total.add(histograms)
        parts += _parts(provenance)
        tokens += provenance.tokens
    texts: dict[str, dict[int, int]] = {}
    for text, shard, shards in parts:
        if shard in texts.setdefault(text, {}) or shards != next(iter(texts[text].values()), shards):
            raise InputError(f"histograms: every text must be counted once, got shard {shard} of {text[:12]} twice")
        texts[text][shard] = shards
    for text, found in texts.items():
        shards = next(iter(found.values()))
        if missing := sorted(set(range(shards)) - set(found)):
            raise InputError(
                f"histograms: all {shards} shards of text {text[:12]} must be there, got none of {missing}"
            )
    text_hash = next(iter(texts)) if len(texts) == 1 else sha256_json(sorted(texts))
    whole = tuple((text, 0, 1) for text in sorted(texts)) if len(texts) > 1 else ()
    merged = replace(first, text_hash=text_hash, tokens=tokens, parts=whole)
    total.save(out, merged)
    return merged


def _parts(provenance: Provenance) -> tuple[tuple[str, int, int], ...]:
    return provenance.parts or ((provenance.text_hash, 0, 1),)


def _adder(device: torch.device) -> Callable[[Tensor, Tensor], object]:
    """What adds the patterns of a contiguous 16-bit tensor to int64 counts."""
    import torch

    if device.type == "cuda":
        from sparsetrace_kernels.histogram import add_histogram

        return add_histogram

    def add(x: Tensor, counts: Tensor) -> None:
        patterns = x.view(torch.int16).flatten().int() & (NUM_PATTERNS - 1)
        counts += torch.bincount(patterns, minlength=NUM_PATTERNS)

    return add
