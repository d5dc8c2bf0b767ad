"""Reading the safetensors files of a Hugging Face checkpoint: which tensors there are, and their checked contents."""

from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.model.weight_files import INDEX, open_weights, weight_files

# Rows of a weight that are checked, cast and transposed at a time: they fit the processor's cache.
STRIP_ROWS = 256


class Checkpoint:
    """The weights of a checkpoint folder; files are opened at once, tensors read when asked for.

    Args:
        folder: holds `model.safetensors`, or else shards with `model.safetensors.index.json`.

    Raises:
        InputError: a file is missing or broken, the index does not fit the files, or two files hold the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.files, weight_map = weight_files(folder)
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self._file_of: dict[str, Any] = {}
        for file in self.files:
            self._open(file)
        if weight_map is not None and (absent := sorted(set(weight_map) - set(self._file_of))):
            raise InputError(
                f"convert: {folder / INDEX}: tensors must be in the files it names, got none for {_some(absent)}"
            )

    def _open(self, file: Path) -> None:
        handle = open_weights(file, "pt")
        for name in handle.keys():  # noqa: SIM118  # not a mapping
            if name in self._file_of:
                raise InputError(f"convert: {file}: tensor {name} must be in one file only, got it twice")
            self._file_of[name] = handle
            self.shapes[name] = list(handle.get_slice(name).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def strips(self, name: str, shape: list[int], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Read a tensor in strips of rows, cast to `dtype`.

        Yields:
            The first row of each strip, and the strip.

        Raises:
            InputError: another shape, no floating-point type, or a value that is not finite, as stored or as cast.
        """
        if name not in self._file_of:
            raise InputError(f"convert: {self.folder}: tensor {name} must be there, got none of that name")
        if self.shapes[name] != shape:
            raise InputError(f"convert: {self.folder}: tensor {name} must have shape {shape}, got {self.shapes[name]}")
        stored = self._file_of[name].get_tensor(name)
        if not stored.is_floating_point() or stored.element_size() < 2:
            raise InputError(f"convert: {self.folder}: tensor {name} must be fp16, bf16 or fp32, got {stored.dtype}")
        for start in range(0, len(stored), STRIP_ROWS):
            strip = stored[start : start + STRIP_ROWS].to(dtype)
            if not _is_finite(strip):
                if not _is_finite(stored):
                    raise InputError(f"convert: {self.folder}: tensor {name} must be finite, got NaN or Inf")
                raise InputError(f"convert: {self.folder}: tensor {name} must fit {dtype}, got {stored.abs().max():g}")
            yield start, strip

    def refuse_other_values(self, name: str, other: str, shape: list[int], dtype: torch.dtype) -> None:
        """Refuse two tensors that config.json ties, but that differ once they are cast to `dtype`."""
        pairs = zip(self.strips(name, shape, dtype), self.strips(other, shape, dtype), strict=True)
        for (start, strip), (_, own) in pairs:
            if not torch.equal(strip, own):
                raise InputError(
                    f"convert: {self.folder}: tensors {name} and {other} must be equal where config.json says "
                    f"tie_word_embeddings, got other values from row {start} on: set tie_word_embeddings to false to "
                    "keep both, as transformers 5 does, or remove one"
                )

    def refuse_unexpected(self, wanted: set[str], spare: set[str]) -> None:
        """Refuse a checkpoint that lacks a wanted tensor, or holds one that is neither wanted nor spare."""
        if missing := sorted(wanted - set(self._file_of)):
            raise InputError(f"convert: {self.folder}: tensors must be complete, got none for {_some(missing)}")
        # rotary buffers were once saved, and are computed anew
        extra = sorted(name for name in set(self._file_of) - wanted - spare if not name.endswith("rotary_emb.inv_freq"))
        if extra:
            raise InputError(
                f"convert: {self.folder}: tensors must be those of the architecture, got also {_some(extra)}"
            )

    def digest(self, pool: Executor) -> str:
        """sha256 over the names and bytes of config and weights."""
        files = [self.folder / "config.json", *self.files]
        digests = zip(files, pool.map(sha256_file, files), strict=True)
        return sha256_json([[file.name, digest] for file, digest in digests])


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_finite(x: Tensor) -> bool:
    # one pass, four times as fast as isfinite: both extremes are NaN if anything is
    return all(bool(extreme.isfinite()) for extreme in x.aminmax()) if x.numel() else True
