"""The dump: what generation writes and packing reads, raw blocks in the layout of safetensors files.

One shard's folder:

| file | what |
|---|---|
| `group-00003.block-000.safetensors` | rows of one group; its final name says that it is complete |
| `group-00003.tokens.parquet` | `schema.TOKENS`: every position fed |
| `group-00003.sequences.parquet` | `schema.SEQUENCES` |
| `group-00003.json` | the seal, written last: key of the run, blocks, rows |
| `manifest.json` | written when every group of the shard is sealed |

One block of T rows:

| array | dtype | what |
|---|---|---|
| `rows.token`, `rows.sequence`, `rows.position` | int64, int32, int32 [T] | in the order of execution |
| `L07.q.offsets` | int64 [T + 1] | where each row's values begin |
| `L07.q.values` | uint16 or uint32 [nnz] | bit patterns of the kept values |
| `L07.q.mask` | uint8 [T, ceil(K / 8)] | kept inputs, lowest bit first, trailing bits zero |

The arrays of a layer and matrix lie side by side, so that packing one leaf reads one stretch of each block. Capture
level `masks` has no values and offsets but `L07.q.absmax` and `L07.q.l2`, float32 [T]; level `stats` has those and
`L07.q.nnz`, int32 [T], alone. `L07.q.out_mask`, uint8 [T, ceil(N / 8)], is there where the method has one.
"""

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrace.files import InputError, write_beside

_CODES = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "int32": "I32", "int64": "I64", "float32": "F32"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in _CODES.items()}
_PREFIX_BYTES = 8


def write_block(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays in the order given, contiguous, as a safetensors file."""
    header: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_beside(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(_PREFIX_BYTES, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


class Block:
    """A block read by memory map, which is made when an array is first asked for.

    Args:
        path: of the block.

    Raises:
        InputError: the file is shorter than its header says, or has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
            if size < _PREFIX_BYTES + length:
                raise InputError(f"dump: {path} must be a whole block, got {size} bytes: generate it again")
            self._header = json.loads(file.read(length))
            self._start = _PREFIX_BYTES + length
            end = max((entry["data_offsets"][1] for entry in self._header.values()), default=0)
            if size != self._start + end:
                raise InputError(f"dump: {path} must have {self._start + end} bytes, got {size}: generate it again")

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def __getitem__(self, name: str) -> np.ndarray:
        """One array, not copied; it may be unaligned, which numpy handles."""
        entry = self._header[name]
        shape = tuple(entry["shape"])
        offset = self._start + entry["data_offsets"][0]
        count = int(np.prod(shape))
        # held in a local name: another thread may release the block meanwhile
        mapped = self._map
        if mapped is None:
            with self.path.open("rb") as file:
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, _DTYPES[entry["dtype"]], count=count, offset=offset).reshape(shape)

    def release(self) -> None:
        """Give the map back, with its open file and the memory of the pages that were read; arrays in use keep it."""
        self._map = None


def group_name(group: int) -> str:
    """Stem of a group's files."""
    return f"group-{group:05d}"


def block_name(group: int, block: int) -> str:
    """File name of a group's block."""
    return f"{group_name(group)}.block-{block:03d}.safetensors"
