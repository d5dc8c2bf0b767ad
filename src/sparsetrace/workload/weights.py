"""What a workload is multiplied with: weights of a converted or an original checkpoint, by memory map, in numpy."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.core.folder import Folder
from sparsetrace.formats.dtypes import STORED_DTYPES
from sparsetrace.formats.numbers import FORMATS

_PREFIX_BYTES = 8


class Checkpoint:
    """A folder of safetensors files, memory-mapped when a tensor is first read.

    Args:
        folder: a runtime model made by `sparsetrace convert`, or the Hugging Face folder that it was made from.

    Raises:
        InputError: there is no safetensors file, or one that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"weights: {folder} must be a checkpoint folder, got no safetensors file there")
        self._tensors = {name: (file, entry) for file in files for name, entry in _header(file).items()}
        self._map = lru_cache(None)(_map)
        self._checked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def patterns(self, name: str) -> tuple[np.ndarray, str]:
        """Bit patterns of a tensor, without a copy, and its dtype."""
        if name not in self._tensors:
            raise InputError(f"weights: {self.folder} must hold {name}, got no such tensor: give the workload's model")
        file, entry = self._tensors[name]
        if entry["dtype"] not in STORED_DTYPES:
            raise InputError(f"weights: {name} must be one of {', '.join(STORED_DTYPES)}, got {entry['dtype']}")
        dtype = STORED_DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        mapped = np.frombuffer(
            self._map(file), FORMATS[dtype].bits, int(np.prod(shape)), entry["start"] + entry["data_offsets"][0]
        )
        return mapped.reshape(shape), dtype

    def weight(self, matrix: dict[str, Any], dtype: str) -> np.ndarray:
        """Bit patterns [in, out] of one matrix in the workload's dtype; a view of the file if stored like that.

        Args:
            matrix: a row of `matrices.parquet`.
            dtype: of the workload; an original checkpoint in another is rounded to it, as `convert` does.

        Raises:
            InputError: the tensor is missing or has another shape.
        """
        if matrix["weight"] in self:
            merged, _ = self.patterns(matrix["weight"])
            # the runtime model keeps matrices outside layers as the checkpoint does, [out, in]
            merged = merged.T if matrix["layer"] is None else merged
            start = matrix["weight_column"]
            patterns = merged[:, start : start + matrix["out_features"]]
        else:
            stored, own = self.patterns(matrix["source_weight"])
            patterns = stored.T
            if own != dtype:
                patterns = FORMATS[dtype].from_float(FORMATS[own].to_float(np.ascontiguousarray(patterns)))
        if patterns.shape != (matrix["in_features"], matrix["out_features"]):
            raise InputError(
                f"weights: {matrix['source_weight']} in {self.folder} must be [in={matrix['in_features']}, "
                f"out={matrix['out_features']}], got {list(patterns.shape)}"
            )
        return patterns

    def check_once(self, matrix: dict[str, Any], rows: Iterable[dict[str, Any]], sampled: bool, dtype: str) -> None:
        """`check`, once for each runtime tensor.

        Args:
            matrix: a row of `matrices.parquet`.
            rows: all rows of `matrices.parquet`.
            sampled: whether only some matrices were captured.
            dtype: of the workload.
        """
        if matrix["weight"] not in self._checked:
            self.check(matrix, site_rows(matrix, rows, sampled), dtype)
            self._checked.add(matrix["weight"])

    def check(self, matrix: dict[str, Any], siblings: list[dict[str, Any]], dtype: str) -> None:
        """Refuse weights whose hash is not that of the workload's.

        The hash is of the runtime tensor, which holds all matrices of a site. For an original checkpoint it can be
        computed only if the workload has a row for each of them; otherwise nothing is checked.

        Args:
            matrix: a row of `matrices.parquet`.
            siblings: from `site_rows`.
            dtype: of the workload.

        Raises:
            InputError: another hash.
        """
        if matrix["weight"] in self:
            merged, _ = self.patterns(matrix["weight"])
        elif siblings:
            merged = np.concatenate([self.weight(sibling, dtype) for sibling in siblings], axis=1)
            merged = merged.T if matrix["layer"] is None else merged
        else:
            return
        found = hashlib.sha256(np.ascontiguousarray(merged).data).hexdigest()
        if found != matrix["weight_sha256"]:
            raise InputError(
                f"weights: {matrix['weight']} must have sha256 {matrix['weight_sha256'][:12]}, got {found[:12]} in "
                f"{self.folder}: give the model that the workload was made with"
            )


def read_weight_mask(folder: Folder, matrix: dict[str, Any], footer_sha256: str | None) -> np.ndarray | None:
    """Which weights of one matrix a weight-side method kept, from `weight_masks.parquet`.

    Args:
        folder: of the workload.
        matrix: a row of `matrices.parquet`.
        footer_sha256: of the table's file, in the manifest; None if it has none.

    Returns:
        bool [in, out]; None if the table lacks the matrix, whose weights are then all kept.
    """
    file = folder.parquet("weight_masks.parquet", folder.footer("weight_masks.parquet", footer_sha256))
    for group in range(file.num_row_groups):
        named = file.read_row_group(group, columns=["layer", "matrix"])
        if (named["layer"][0].as_py(), named["matrix"][0].as_py()) == (matrix["layer"], matrix["matrix"]):
            masks = file.read_row_group(group, columns=["mask"])["mask"].to_pylist()
            packed = np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1)
            return np.unpackbits(packed, axis=1, count=matrix["out_features"], bitorder="little").view(bool)
    return None


def site_rows(matrix: dict[str, Any], rows: Iterable[dict[str, Any]], sampled: bool) -> list[dict[str, Any]]:
    """The rows of all matrices of a site, in the order of their columns; empty if the workload lacks some of them.

    Args:
        matrix: a row of `matrices.parquet`.
        rows: all rows of `matrices.parquet`.
        sampled: whether only some matrices were captured.
    """
    own = [row for row in rows if (row["layer"], row["site"]) == (matrix["layer"], matrix["site"])]
    columns = matrix.get("weight_columns")
    # version 1 did not say how many columns the site has
    whole = not sampled if columns is None else sum(row["out_features"] for row in own) == columns
    return sorted(own, key=lambda row: row["weight_column"]) if whole else []


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Header entries of a safetensors file by tensor, each with the `start` of the data; the data is not read.

    Raises:
        InputError: the file is cut short or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_PREFIX_BYTES), "little")
        # in a file of another format, these bytes may be any number
        text = opened.read(min(length, size))
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        start = _PREFIX_BYTES + length
        needed = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"weights: {file} must be a safetensors file, got {error!r}") from None
    if size < needed:
        raise InputError(f"weights: {file} must have {needed} bytes, got {size}: copy it again")
    return {name: entry | {"start": start} for name, entry in header.items()}


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
