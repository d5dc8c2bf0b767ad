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

An operand that several matrices of a site read, as q, k and v do under equal thresholds, is there once: `held_by` of
each matrix in the manifest names the one under whose name it is. The arrays of a layer and matrix lie side by side, so
that packing one leaf reads one stretch of each block. Capture level `masks` has no values and offsets but
`L07.q.absmax` and `L07.q.l2`, float32 [T]; level `stats` has those and `L07.q.nnz`, int32 [T], alone.
`L07.up.out_mask`, uint8 [T, ceil(N / 8)], is there for each matrix that the method has one of, and lies behind them.
"""

import errno
import io
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrace.core.files import InputError, write_beside

_NAMES = {"U8": "uint8", "U16": "uint16", "U32": "uint32", "I32": "int32", "I64": "int64", "F32": "float32"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for code, name in _NAMES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PREFIX_BYTES = 8
# From this size on a block is written around the page cache, in chunks.
_DIRECT_BYTES = 64 << 20
_DIRECT_CHUNK_BYTES = 16 << 20
_DIRECT_RUN_BYTES = 1 << 20


def write_block(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays in the order given, contiguous, as a safetensors file.

    Arrays that are neighbours in memory too, and large, begin at a page of the file if they do in memory (`fill.0`, ...
    stands between), so that the disk can take them from where they lie.
    """
    header: dict[str, Any] = {}
    pieces: list[np.ndarray] = []
    offset = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal offset
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes

    for names, piece in _runs(arrays):
        on_page = len(piece) >= _DIRECT_RUN_BYTES and _address(piece) % mmap.PAGESIZE == 0
        if on_page and (gap := -offset % mmap.PAGESIZE):
            pieces.append(np.zeros(gap, np.uint8))
            add(f"fill.{len(pieces)}", "U8", (gap,), gap)
        for name in names:
            add(name, _CODES[arrays[name].dtype], arrays[name].shape, arrays[name].nbytes)
        pieces.append(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    direct = offset >= _DIRECT_BYTES
    text += b" " * (-(len(text) + _PREFIX_BYTES) % (mmap.PAGESIZE if direct else _PREFIX_BYTES))
    pieces.insert(0, np.frombuffer(len(text).to_bytes(_PREFIX_BYTES, "little") + text, np.uint8))
    with write_beside(path) as partial:
        if not direct or not _write_direct(partial, pieces):
            with partial.open("wb") as file:
                for piece in pieces:
                    file.write(piece.data)


def _runs(arrays: dict[str, np.ndarray]) -> Iterator[tuple[list[str], np.ndarray]]:
    """The bytes of arrays that lie one after the other in memory, and the arrays' names."""
    names: list[str] = []
    run, end = np.empty(0, np.uint8), -1
    # a block of a large model has hundreds, and Python's lock is held meanwhile
    for name, array in arrays.items():
        piece = np.ascontiguousarray(array)
        # a copy would not outlive this loop
        if (address := _address(piece)) == end and piece.nbytes and piece is array:
            names.append(name)
        else:
            if names:
                yield names, _bytes(run, end)
            names, run = [name], piece
        end = address + piece.nbytes
    if names:
        yield names, _bytes(run, end)


def _bytes(start: np.ndarray, end: int) -> np.ndarray:
    """Memory from the first byte of an array up to an address."""
    flat = start.reshape(-1).view(np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (end - _address(start),), (1,))


def _address(piece: np.ndarray) -> int:
    return int(piece.__array_interface__["data"][0])


def _write_direct(path: Path, pieces: list[np.ndarray]) -> bool:
    """Write bytes around the page cache, which costs a copy and a flush; False where the file system does not know how.

    Large pieces go from where they lie if that is a page's begin; the others through a page-aligned buffer, copied
    without holding Python's lock.
    """
    flag = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o666)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    # page-aligned
    buffer = np.frombuffer(mmap.mmap(-1, _DIRECT_CHUNK_BYTES), np.uint8)
    filled = written = 0
    with os.fdopen(descriptor, "wb", 0) as file:
        try:
            for piece in pieces:
                start = 0
                while start < len(piece):
                    body = (len(piece) - start) // mmap.PAGESIZE * mmap.PAGESIZE
                    aligned = filled % mmap.PAGESIZE == 0 and _address(piece[start:]) % mmap.PAGESIZE == 0
                    if aligned and body >= _DIRECT_RUN_BYTES:
                        _write_whole(file, buffer[:filled].data)
                        _write_whole(file, piece[start : start + body].data)
                        written, filled, start = written + filled + body, 0, start + body
                        continue
                    count = min(len(piece) - start, len(buffer) - filled)
                    buffer[filled : filled + count] = piece[start : start + count]
                    start, filled = start + count, filled + count
                    if filled == len(buffer):
                        _write_whole(file, buffer.data)
                        written, filled = written + filled, 0
            if filled:
                # up to a whole page, of which the file keeps what is ours
                _write_whole(file, buffer[: -(-filled // mmap.PAGESIZE) * mmap.PAGESIZE].data)
            file.truncate(written + filled)
        except OSError as error:
            if error.errno == errno.EINVAL and not written:
                return False
            raise
    return True


def _write_whole(file: io.FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


class Block:
    """A block read by memory map, which is made when an array is first asked for.

    Its header is not kept: that of a large model would take 0.4 MB, and a shard may have thousands of blocks.

    Args:
        path: of the block.

    Attributes:
        size: bytes of the file.

    Raises:
        InputError: the file is shorter than its header says, or has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        with path.open("rb") as file:
            size = self.size = path.stat().st_size
            length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
            if size < _PREFIX_BYTES + length:
                raise InputError(f"dump: {path} must be a whole block, got {size} bytes: generate it again")
            header = json.loads(file.read(length))
            self._start = _PREFIX_BYTES + length
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if size != self._start + end:
                raise InputError(f"dump: {path} must have {self._start + end} bytes, got {size}: generate it again")

    def __contains__(self, name: str) -> bool:
        return self._entry(self._mapped(), name) is not None

    def __getitem__(self, name: str) -> np.ndarray:
        """One array, not copied; it may be unaligned, which numpy handles."""
        # held in a local name: another thread may release the block meanwhile
        mapped = self._mapped()
        entry = self._entry(mapped, name)
        if entry is None:
            raise KeyError(name)
        shape = tuple(entry["shape"])
        offset = self._start + entry["data_offsets"][0]
        return np.frombuffer(mapped, _DTYPES[entry["dtype"]], count=math.prod(shape), offset=offset).reshape(shape)

    def _mapped(self) -> mmap.mmap:
        mapped = self._map
        if mapped is None:
            with self.path.open("rb") as file:
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped

    def _entry(self, mapped: mmap.mmap, name: str) -> dict[str, Any] | None:
        """What the header says of one array."""
        key = f'"{name}":'.encode()
        at = mapped.find(key + b"{", _PREFIX_BYTES, self._start)
        if at < 0:
            return None
        at += len(key)
        entry: dict[str, Any] = json.loads(mapped[at : mapped.find(b"}", at, self._start) + 1])
        return entry

    def release(self) -> None:
        """Give the map back, with its open file and the memory of the pages that were read; arrays in use keep it."""
        self._map = None


def array_prefix(layer: int | None, matrix: str) -> str:
    """What the names of a matrix's arrays begin with: `L07.q`, or `model.lm_head` for one that is in no layer."""
    return f"model.{matrix}" if layer is None else f"L{layer:02d}.{matrix}"


def group_name(group: int) -> str:
    """Stem of a group's files."""
    return f"group-{group:05d}"


def block_name(group: int, block: int) -> str:
    """File name of a group's block."""
    return f"{group_name(group)}.block-{block:03d}.safetensors"
