"""Exact distributions of activations: counts of bit patterns, one histogram for each layer and name.

A 16-bit float has 65,536 patterns, so counting them loses nothing, takes fixed memory and merges by addition. A float32
is counted by its top 16 bits; a threshold is then the upper edge of a bucket, and zeros are counted separately, so that
the number of activations that a threshold drops is still exact.

| name | of what | dtype |
|---|---|---|
| name of a site: `attn_in`, ... | x at the site | the model's |
| `cats`: a method whose score is `gate` | activation function of `gate` | the model's |
| `wina.q`, ...: a method whose score is `scaled` | abs(x) times the method's scale, per matrix | float32 |

File: safetensors with `LNN.name`, int64 [65536] by pattern, and `zeros`, int64 [histograms], the zeros of both signs in
each: by layer, and in a layer first its sites in the order of execution, then the scores of each counted method by
matrix (methods by name). Metadata: the version of the file, `Provenance`, and the hash of `sparsetrace.core.checked`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sparsetrace.core.checked import BLANK, read_checked, seal
from sparsetrace.core.files import InputError, parse_json, write_beside
from sparsetrace.formats.numbers import FORMATS, NumberFormat
from sparsetrace.formats.sites import Site, layer_sites, sites_from_json
from sparsetrace.methods import METHODS

# Shape suffixes: H histograms, P bit patterns, M magnitudes.

NUM_PATTERNS = 1 << 16
NUM_MAGNITUDES = NUM_PATTERNS // 2
# 2: sites in the metadata, one count of zeros per histogram.
HISTOGRAMS_VERSION = 2


class TextShard(NamedTuple):
    """A part of a text whose activations were counted.

    Args:
        text_hash: of the text and of how it was cut.
        shard: which part.
        shards: number of parts of the text.
    """

    text_hash: str
    shard: int
    shards: int


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
        shards: everything that was added up; empty stands for the one whole text.
    """

    model_hash: str
    text_hash: str
    dtype: str
    tokens: int
    layers: int
    sites: tuple[Site, ...]
    scores: tuple[str, ...] = ()
    shards: tuple[TextShard, ...] = ()

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Provenance:
        """The inverse of `dataclasses.asdict`, after a round trip through JSON."""
        return Provenance(
            **fields
            | {
                "sites": sites_from_json(fields["sites"]),
                "scores": tuple(fields["scores"]),
                "shards": tuple(TextShard(*shard) for shard in fields["shards"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Threshold:
    """A magnitude, and how many of the counted activations it drops.

    Args:
        bits: bit pattern of the magnitude; kept strictly above.
        dropped: activations at or below it.
        counted: all.
    """

    bits: int
    dropped: int
    counted: int


def distributions(sites: Sequence[Site], dtype: str, scores: Sequence[str]) -> dict[tuple[int, str], str]:
    """Every histogram of a model, in the order of the file's `zeros`.

    Args:
        sites: within layers, in the order of execution.
        dtype: of the model.
        scores: names of the methods whose scores are counted besides what enters the sites.

    Returns:
        Number format of what each counts, by layer and name.
    """
    found: dict[tuple[int, str], str] = {}
    for layer, own in groupby(sites, key=lambda site: site.layer):
        assert layer is not None
        layer_own = list(own)
        found |= {(layer, site.name): dtype for site in layer_own}
        for method in scores:
            if METHODS[method].score == "gate":
                found[layer, method] = dtype
            else:
                matrices = [matrix for site in layer_own for matrix in site.matrices]
                found |= {(layer, f"{method}.{matrix}"): "float32" for matrix in matrices}
    return found


class Histograms:
    """Counts of one model, as they lie in its file; all zero at first.

    Args:
        sites: of the model; those within layers are counted.
        dtype: of the activations.
        scores: names of the methods whose scores are counted besides what enters the sites.

    Attributes:
        row: place of each (layer, name) in the arrays.
        counts_HP: int64, how often each pattern was counted.
        zeros_H: int64, counted zeros of both signs.
    """

    def __init__(self, sites: Sequence[Site], dtype: str, scores: Sequence[str] = ()) -> None:
        self.dtype = dtype
        self.sites = layer_sites(sites)
        self.scores = tuple(scores)
        self._dtypes = distributions(self.sites, dtype, scores)
        self.row = {key: row for row, key in enumerate(self._dtypes)}
        self.counts_HP = np.zeros((len(self.row), NUM_PATTERNS), np.int64)
        self.zeros_H = np.zeros(len(self.row), np.int64)

    @property
    def counts(self) -> dict[tuple[int, str], np.ndarray]:
        """int64 [65536] by (layer, name)."""
        return {key: self.counts_HP[row] for key, row in self.row.items()}

    @property
    def zeros(self) -> dict[tuple[int, str], int]:
        """Counted zeros of both signs by (layer, name)."""
        return {key: int(self.zeros_H[row]) for key, row in self.row.items()}

    def format(self, layer: int, name: str) -> NumberFormat:
        """Number format of what a histogram counts."""
        return FORMATS[self._dtypes[layer, name]]

    def magnitudes(self, layer: int, name: str) -> np.ndarray:
        """int64 [32768]: counts by magnitude, both signs added up."""
        counts_P = self.counts_HP[self.row[layer, name]]
        return counts_P[:NUM_MAGNITUDES] + counts_P[NUM_MAGNITUDES:]

    def threshold(self, layer: int, name: str, sparsity: float) -> Threshold:
        """The magnitude t with P(|x| < t) < sparsity <= P(|x| <= t); t = 0 for sparsity 0."""
        cumulative_M = np.cumsum(self.magnitudes(layer, name))
        counted = int(cumulative_M[-1])
        if sparsity == 0:
            return Threshold(0, self.zeros[layer, name], counted)
        # repr: the sparsity that the user wrote, not its nearest binary fraction
        wanted = -(-Fraction(repr(sparsity)) * counted // 1)
        bucket = int(np.searchsorted(cumulative_M, int(wanted)))
        shift = self.format(layer, name).count_shift
        return Threshold(((bucket + 1) << shift) - 1, int(cumulative_M[bucket]), counted)

    def dropped(self, layer: int, name: str, bits: int) -> Threshold | None:
        """What a given threshold drops; None where it lies inside a bucket, whose counts do not tell."""
        cumulative_M = np.cumsum(self.magnitudes(layer, name))
        if bits == 0:
            return Threshold(0, self.zeros[layer, name], int(cumulative_M[-1]))
        bucket, rest = divmod(bits + 1, 1 << self.format(layer, name).count_shift)
        return None if rest else Threshold(bits, int(cumulative_M[bucket - 1]), int(cumulative_M[-1]))

    def add(self, other: Histograms) -> None:
        """Add the counts of a model of the same sites, dtype and scores."""
        self.counts_HP += other.counts_HP
        self.zeros_H += other.zeros_H

    def save(self, path: Path, provenance: Provenance) -> None:
        """Write the file described above."""
        content = {"version": HISTOGRAMS_VERSION} | asdict(provenance) | {"checksum": BLANK}
        self._write(path, {"sparsetrace_histograms": json.dumps(content)})

    def save_progress(self, path: Path, key: str, done: int) -> None:
        """Write the counts of an unfinished calibration, for `resume` with the same key."""
        self._write(path, {"sparsetrace_progress": json.dumps({"key": key, "done": done, "checksum": BLANK})})

    def resume(self, path: Path, key: str) -> int:
        """Read the counts of an interrupted calibration, and return how much of it was done.

        Returns:
            0 where there is no such file, it is cut off, or its key is another; nothing is read then.
        """
        if not path.is_file():
            return 0
        try:
            found, arrays = _contents(path, "sparsetrace_progress")
            if found is None or found.get("key") != key:
                return 0
            self._take(arrays, path)
        except InputError:
            return 0
        return int(found["done"])

    def _write(self, path: Path, metadata: dict[str, str]) -> None:
        arrays = {f"L{layer:02d}.{name}": counts_P for (layer, name), counts_P in self.counts.items()}
        arrays["zeros"] = self.zeros_H
        with write_beside(path) as partial:
            # `save_file` writes to a temporary file of its own, which would stay behind after a kill
            partial.write_bytes(save(arrays, metadata=metadata))
            seal(partial)

    def _take(self, arrays: dict[str, np.ndarray], path: Path) -> None:
        """Set the counts to those of a file, which must be counts of just these distributions."""
        wanted = {f"L{layer:02d}.{name}": row for (layer, name), row in self.row.items()}
        shapes = {name: (np.dtype(np.int64), (NUM_PATTERNS,)) for name in wanted}
        shapes["zeros"] = np.dtype(np.int64), self.zeros_H.shape
        found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        if other := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            raise InputError(
                f"histograms: {path} must hold int64 counts of each distribution of its model, got another or none for "
                f"{', '.join(other)}: calibrate again"
            )
        if negative := [name for name, array in arrays.items() if (array < 0).any()]:
            raise InputError(f"histograms: {path}: {negative[0]} must be counts of at least 0, got others")
        self.zeros_H[:] = arrays["zeros"]
        for name, row in wanted.items():
            self.counts_HP[row] = arrays[name]

    @staticmethod
    def load(path: Path) -> tuple[Histograms, Provenance]:
        """Read the file described above.

        Raises:
            InputError: the file is damaged, no histogram file, or of another version.
        """
        content, arrays = _contents(path, "sparsetrace_histograms")
        if content is None:
            raise InputError(f"histograms: {path} must be a histogram file of sparsetrace, got another")
        content.pop("checksum", None)
        # the first version named none
        if (version := content.pop("version", 1)) != HISTOGRAMS_VERSION:
            raise InputError(
                f"histograms: {path} must have version {HISTOGRAMS_VERSION}, got {version}: calibrate again"
            )
        try:
            provenance = Provenance.from_json(content)
            named = distributions(layer_sites(provenance.sites), provenance.dtype, provenance.scores)
            formats = [FORMATS[dtype] for dtype in named.values()]
            if not all(isinstance(word, str) for word in (provenance.model_hash, provenance.text_hash)):
                raise TypeError("model_hash and text_hash must be texts")
        except (KeyError, TypeError, AttributeError, ValueError, AssertionError) as error:
            raise InputError(f"histograms: {path} must say what it was counted on, got {error!r}") from None
        if len(formats) >= len(arrays):
            raise InputError(
                f"histograms: {path} must hold {len(formats)} distributions and their zeros, got {len(arrays)} arrays: "
                "calibrate again"
            )
        histograms = Histograms(provenance.sites, provenance.dtype, provenance.scores)
        histograms._take(arrays, path)
        return histograms, provenance


def _contents(path: Path, key: str) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """What the metadata of a safetensors file says under a key, None if nothing, and the arrays.

    Raises:
        InputError: the file is missing or damaged.
    """
    data = read_checked(path, "histograms", "a readable histogram file")
    try:
        arrays = load(data)
        # sound, since the library has read it
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise InputError(f"histograms: {path} must be a readable histogram file, got {error}") from None
    text = header.get("__metadata__", {}).get(key)
    if text is None:
        return None, arrays
    content = parse_json(text, f"histograms: the metadata of {path}")
    if not isinstance(content, dict):
        raise InputError(f"histograms: {path} must say what it was counted on, got {content!r}")
    return content, arrays
