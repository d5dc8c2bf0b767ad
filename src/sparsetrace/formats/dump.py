"""The dump, which generation writes and packing reads: raw blocks in the layout of safetensors files.

Folder of one shard:

| file | what |
|---|---|
| `group-00003.block-000.safetensors` | rows of one group; complete once it has this name |
| `group-00003.tokens.parquet` | `tables.TOKENS`: every position fed |
| `group-00003.sequences.parquet` | `tables.SEQUENCES` |
| `group-00003.json` | the seal, written last: key of the run, blocks, rows |
| `manifest.json` | written when every group of the shard is sealed |

Arrays of a block of T rows, one row per captured token:

| array | level | dtype | what |
|---|---|---|---|
| `rows.token`, `rows.sequence`, `rows.position` | all | int64, int32, int32 [T] | index, in the order of execution |
| `L07.q.rows` | all | int32 [n] | only where the operand has rows for some tokens only: which of the T, ascending |
| `L07.q.offsets` | `full` | int64 [n + 1] | where each row's values begin |
| `L07.q.values` | `full` | uint16 or uint32 [nnz] | bit patterns of the kept values |
| `L07.q.mask` | `full`, `masks` | uint8 [n, ceil(K / 8)] | kept inputs, lowest bit first, trailing bits zero |
| `L07.q.absmax`, `L07.q.l2` | `masks`, `stats` | float32 [n] | largest magnitude and Euclidean norm of each row |
| `L07.q.nnz` | `stats` | int32 [n] | number of kept inputs of each row |
| `L07.up.out_mask` | `full`, `masks` | uint8 [n, ceil(N / 8)] | outputs left out; under some methods |

`L07.q` is `array_prefix(7, "q")`; a matrix of the model as a whole, such as `lm_head`, has `model.lm_head`. Without
`<prefix>.rows`, n = T. An operand that several matrices of a site read, as q, k and v do under equal thresholds, is
stored once: `held_by` of each matrix in the manifest names the matrix whose prefix it has. The order of the arrays in
a block carries no meaning.

The header's `__metadata__` holds the XXH3-64 of each array's bytes in hexadecimal, under the array's name, and under
`header` that of the header itself, computed with 16 zeros in its place. `Block` checks both; arrays named `fill.0`, ...
are padding and have none. A block without `__metadata__` was written by another program and is not checked. The JSON
files hold their own hash under `sha256`, and the tables theirs, see `sparsetrace.core.checked`.
"""

import errno
import io
import json
import math
import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sparsetrace.core.files import InputError, parse_json, read_sealed_json, write_beside
from sparsetrace.formats.versions import DUMP_VERSION

_NAMES = {"U8": "uint8", "U16": "uint16", "U32": "uint32", "I32": "int32", "I64": "int64", "F32": "float32"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for code, name in _NAMES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PREFIX_BYTES = 8
# Key of a header's own checksum, and what stands there while it is computed.
_HEADER_SUM = b'"header":"'
_NO_SUM = "0" * 16
# What to do about a damaged block: `generate` leaves sealed groups alone.
_REMEDY = "delete the folder of the dump and generate it again"
# Bytes of an array that are checked at a time: few enough to stay in a core's cache.
_CHECKED_BYTES = 1 << 18
# Arrays with a row for each row of their operand, and how many they have beyond these.
_ROWS_BEYOND = {"offsets": 1, "mask": 0, "absmax": 0, "l2": 0, "nnz": 0}
# Blocks of at least this size are written with direct I/O, which bypasses the page cache, in chunks.
_DIRECT_BYTES = 64 << 20
_DIRECT_CHUNK_BYTES = 16 << 20
_DIRECT_RUN_BYTES = 1 << 20


def write_block(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays in the order given, contiguous, as a safetensors file.

    A large run of arrays that are adjacent in memory and begin at a memory page also begins at a page of the file
    (padding arrays `fill.0`, ... come before it), so that direct I/O can write it without a copy.
    """
    header: dict[str, Any] = {"__metadata__": dict.fromkeys(("header", *arrays), _NO_SUM)}
    views: dict[str, memoryview] = {}
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
        start = 0
        for name in names:
            nbytes = arrays[name].nbytes
            add(name, _CODES[arrays[name].dtype], arrays[name].shape, nbytes)
            views[name] = piece[start : start + nbytes].data
            start += nbytes
        pieces.append(piece)
    direct = offset >= _DIRECT_BYTES
    # its length is known before its checksums are
    pieces.insert(0, np.frombuffer(_header_bytes(header, direct), np.uint8))
    with write_beside(path) as partial, ThreadPoolExecutor(1) as pool:
        # beside the writing, which waits for the disk
        sums = pool.submit(lambda: {name: xxhash.xxh3_64_hexdigest(view) for name, view in views.items()})
        if not direct or not _write_direct(partial, pieces):
            with partial.open("wb") as file:
                for piece in pieces:
                    file.write(piece.data)
        header["__metadata__"] = {"header": _NO_SUM} | sums.result()
        with partial.open("r+b") as begin:
            begin.write(_header_bytes(header, direct))


def _header_bytes(header: dict[str, Any], direct: bool) -> bytes:
    """The first bytes of a block: length of the header, the header with its own checksum, and padding."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _PREFIX_BYTES) % (mmap.PAGESIZE if direct else _PREFIX_BYTES))
    text = text.replace(_HEADER_SUM + _NO_SUM.encode(), _HEADER_SUM + xxhash.xxh3_64_hexdigest(text).encode(), 1)
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def _runs(arrays: dict[str, np.ndarray]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Runs of arrays that are adjacent in memory: the names of each run's arrays, and its bytes."""
    names: list[str] = []
    run, end = np.empty(0, np.uint8), -1
    # kept cheap: a block of a large model has hundreds of arrays, and this loop holds the GIL
    for name, array in arrays.items():
        piece = np.ascontiguousarray(array)
        # a contiguous copy is freed before its run is written
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
    """View of the memory from an array's first byte up to an address."""
    flat = start.reshape(-1).view(np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (end - _address(start),), (1,))


def _address(piece: np.ndarray) -> int:
    return int(piece.__array_interface__["data"][0])


def _write_direct(path: Path, pieces: list[np.ndarray]) -> bool:
    """Write with direct I/O, which saves a copy and a flush of the page cache; False if the file system has none.

    Large page-aligned pieces are written from where they lie; all others are copied, without holding the GIL, into a
    page-aligned buffer first.
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
                # rounded up to a whole page; `truncate` removes the excess
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
    """A block, memory-mapped when an array is first read.

    The header is not kept: for a large model it takes 0.4 MB, and a shard may have thousands of blocks.

    Args:
        path: file of the block.

    Attributes:
        size: bytes of the file.
        rows: number of rows T.
        partial: number of rows of each operand, by prefix, that has rows for some of the T tokens only.

    Raises:
        InputError: the file is not as long as its header says or has none, or an array has another number of rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        # arrays that were found as they were written; each is read whole for that, once
        self._checked: set[str] = set()
        header = self._read_header()
        self._has_sums = header.pop("__metadata__", None) is not None
        self.rows, self.partial = 0, {}
        try:
            self.rows = int(header["rows.token"]["shape"][0]) if "rows.token" in header else 0
            self.partial = {
                name.removesuffix(".rows"): int(entry["shape"][0])
                for name, entry in header.items()
                if name.endswith(".rows")
            }
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if self.size == self._start + end and self.rows:
                self._check_rows(header)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"dump: {path} must have the header of a block, got {error!r}: {_REMEDY}") from None
        if self.size != self._start + end:
            raise InputError(f"dump: {path} must have {self._start + end} bytes, got {self.size}: generate it again")

    def _read_header(self) -> dict[str, Any]:
        """The header, which is as it was written where it says so."""
        path = self.path
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise InputError(f"dump: {path} must be a block, got nothing there: {_REMEDY}") from None
        with file:
            size = self.size = path.stat().st_size
            length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
            if size < _PREFIX_BYTES + length:
                raise InputError(f"dump: {path} must be a whole block, got {size} bytes: generate it again")
            text = file.read(length)
        self._start = _PREFIX_BYTES + length
        head, key, rest = text.partition(_HEADER_SUM)
        digits = len(_NO_SUM)
        if key and rest[:digits] != xxhash.xxh3_64_hexdigest(head + key + _NO_SUM.encode() + rest[digits:]).encode():
            raise InputError(f"dump: {path} must have the header that was written, got damaged: {_REMEDY}")
        try:
            header = parse_json(text, f"dump: the header of {path}")
        except InputError as error:
            raise InputError(f"{error}: generate it again") from None
        if not isinstance(header, dict):
            raise InputError(f"dump: {path} must have the header of a block, got {type(header).__name__}: {_REMEDY}")
        return header

    def _check_rows(self, header: dict[str, Any]) -> None:
        """Refuse an array with more or fewer rows than its operand; output masks may belong to one of another name."""
        for name, entry in header.items():
            operand, _, kind = name.rpartition(".")
            if kind in _ROWS_BEYOND:
                rows = self.partial.get(operand, self.rows) + _ROWS_BEYOND[kind]
                if entry["shape"][0] != rows:
                    raise InputError(
                        f"dump: {self.path} must have {rows} rows of {name}, got {entry['shape'][0]}: generate it again"
                    )

    def __contains__(self, name: str) -> bool:
        return self._entry(self._mapped(), name) is not None

    def __getitem__(self, name: str) -> np.ndarray:
        """One array, not copied; it may be unaligned, which numpy handles."""
        # a local reference, since another thread may release the block meanwhile
        mapped = self._mapped()
        entry = self._entry(mapped, name)
        if entry is None:
            raise KeyError(name)
        shape = tuple(entry["shape"])
        offset = self._start + entry["data_offsets"][0]
        if self._has_sums and name not in self._checked:
            self._check(mapped, name, offset, entry["data_offsets"][1] - entry["data_offsets"][0])
        return np.frombuffer(mapped, _DTYPES[entry["dtype"]], count=math.prod(shape), offset=offset).reshape(shape)

    def _check(self, mapped: mmap.mmap, name: str, offset: int, nbytes: int) -> None:
        """Refuse an array whose bytes are not those that were written.

        They are read by calls, not through the map, whose pages would count as memory of the process.
        """
        key = f'"{name}":"'.encode()
        at = mapped.find(key, _PREFIX_BYTES, self._start) + len(key)
        wanted, found = bytes(mapped[at : at + len(_NO_SUM)]), xxhash.xxh3_64()
        with self.path.open("rb", 0) as file:
            file.seek(offset)
            buffer = memoryview(bytearray(min(nbytes, _CHECKED_BYTES)))
            while nbytes and (count := file.readinto(buffer[:nbytes])):
                found.update(buffer[:count])
                nbytes -= count
        if found.hexdigest().encode() != wanted:
            raise InputError(f"dump: {self.path} must have {name} as it was written, got damaged: {_REMEDY}")
        self._checked.add(sys.intern(name))

    def _mapped(self) -> mmap.mmap:
        mapped = self._map
        if mapped is None:
            with self.path.open("rb") as file:
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped

    def _entry(self, mapped: mmap.mmap, name: str) -> dict[str, Any] | None:
        """Header entry of one array; None if there is no such array."""
        key = f'"{name}":'.encode()
        at = mapped.find(key + b"{", _PREFIX_BYTES, self._start)
        if at < 0:
            return None
        at += len(key)
        entry: dict[str, Any] = json.loads(mapped[at : mapped.find(b"}", at, self._start) + 1])
        return entry

    def release(self) -> None:
        """Close the memory map and free the pages that were read, once no array over them is in use any more."""
        self._map = None


def group_name(group: int) -> str:
    """Stem of the names of a group's files."""
    return f"group-{group:05d}"


def read_seal(path: Path, where: str) -> dict[str, Any]:
    """The seal of a group.

    Args:
        path: of the seal.
        where: name of the step, for messages.

    Raises:
        InputError: it is missing or damaged.
    """
    seal = read_sealed_json(path, where, ("key", "blocks", "rows"))
    names = seal["blocks"]
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{where}: {path} must name the blocks beside it, got {names!r}: {_REMEDY}")
    if type(seal["rows"]) is not int:
        raise InputError(f"{where}: {path}: rows must be a whole number, got {seal['rows']!r}: {_REMEDY}")
    return seal


def read_manifest(path: Path, where: str) -> dict[str, Any]:
    """The manifest of a dump.

    Args:
        path: of the manifest.
        where: name of the step, for messages.

    Raises:
        InputError: it is missing or damaged, or of another version.
    """
    manifest = read_sealed_json(path, where, ("version",))
    if manifest["version"] != DUMP_VERSION:
        raise InputError(f"{where}: {path} must have version {DUMP_VERSION}, got {manifest['version']}")
    if missing := [key for key in ("groups", "rows", "matrices", "method", "model_hash") if key not in manifest]:
        raise InputError(f"{where}: {path} must have {', '.join(missing)}, got no such key: {_REMEDY}")
    groups = manifest["groups"]
    if not isinstance(groups, list) or not all(type(group) is int for group in groups):
        raise InputError(f"{where}: {path}: groups must be whole numbers, got {groups!r}: {_REMEDY}")
    return manifest


def block_name(group: int, block: int) -> str:
    """File name of one of a group's blocks."""
    return f"{group_name(group)}.block-{block:03d}.safetensors"


def array_prefix(layer: int | None, matrix: str) -> str:
    """First part of the names of an operand's arrays in a block.

    Args:
        layer: layer number; None where the matrix belongs to the model as a whole.
        matrix: name of the matrix under which the operand is stored.
    """
    return f"model.{matrix}" if layer is None else f"L{layer:02d}.{matrix}"
