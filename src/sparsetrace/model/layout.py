"""The layout of a runtime model's weight files, known before any tensor is made; without torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrace.formats.dtypes import STORED_CODES
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.model.families.base import RuntimeTensor

# A new file begins once the last one holds this many bytes.
FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file, laid out as its library does it, whose tensors may be written in any order.

    Args:
        path: where it lies.
        header: what precedes the tensors.
        offsets: of each tensor, from the beginning of the file.
    """

    path: Path
    header: bytes
    offsets: dict[str, int]


def lay_out(folder: Path, tensors: Sequence[RuntimeTensor], dtype: str) -> list[WeightFile]:
    """Divide the tensors into files, in the order given."""
    itemsize = FORMATS[dtype].bits.itemsize
    sizes = {tensor.name: math.prod(tensor.shape) * itemsize for tensor in tensors}
    groups: list[list[RuntimeTensor]] = [[]]
    for tensor in tensors:
        if sum(sizes[other.name] for other in groups[-1]) >= FILE_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    files = []
    for number, group in enumerate(groups):
        # all are of one type, so that names alone decide the order
        content: dict[str, Any] = {"__metadata__": {"format": "sparsetrace-model"}}
        starts, end = {}, 0
        for tensor in sorted(group, key=lambda tensor: tensor.name):
            starts[tensor.name], end = end, end + sizes[tensor.name]
            content[tensor.name] = {
                "dtype": STORED_CODES[dtype],
                "shape": tensor.shape,
                "data_offsets": [starts[tensor.name], end],
            }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {tensor.name: len(header) + starts[tensor.name] for tensor in group}
        files.append(WeightFile(folder / f"weights-{number:05d}.safetensors", header, offsets))
    return files
