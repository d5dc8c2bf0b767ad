"""Step 4: dumps become the Parquet workload; imports no torch.

`pack` turns one shard's dump into `data/LNN/matrix/part-<shard>.parquet` and removes the dump's blocks; `index` merges
the shards' tables and writes the manifest, last. The format is docs/format.md.

| output of `pack` | what |
|---|---|
| `workload/data/L07/q/part-00003.parquet` | `schema.data_schema`, one row per token, ascending |
| `parts/00003.tokens.parquet`, `.sequences.parquet` | the shard's tables |
| `parts/00003.json` | every file with rows, nonzeros, token range and sha256 |

Memory: one row group of each thread, and `ORDER_ROWS` rows of the index; the order of a longer shard lies in a nameless
file beside `parts/`, and its files are cut at `FILE_ROWS`, since the footer of each open file grows until it is closed.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace import __version__
from sparsetrace.core.files import InputError, read_json, sha256_file, sha256_json, write_beside, write_json
from sparsetrace.core.provenance import merged
from sparsetrace.formats.columns import Index, as_read_by, encode_rows
from sparsetrace.formats.dump import Block, group_name
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.ragged import offsets_of, runs, take
from sparsetrace.formats.row_statistics import RowStatistics, popcounts, row_norms
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import ROW_GROUP_ROWS, column_encodings, data_schema, leaf, part_name, row_group_rows
from sparsetrace.formats.tables import MATRIX_TABLE, SEQUENCES, TOKENS, teacher_forced_hash
from sparsetrace.formats.versions import DUMP_VERSION, WORKLOAD_REVISION, WORKLOAD_VERSION
from sparsetrace.packing.card import data_card, duckdb_views

# Statistics on the index and the row figures only: on masks and planes they would cost space and select nothing.
STATISTICS = ["layer", "matrix", "token", "sequence", "position", "nnz", "absmax", "l2"]
# Of a dump's manifest: may differ among the shards of one run.
VARYING = ("commit", "smaller_batches", "given")
# As fast as level 1 and up to 1 % smaller on operands of real runs, but 0.2 to 0.5 % larger on bfloat16 at half
# sparsity; level 3 takes twice the time on wide matrices.
ZSTD_LEVEL = 2
SHARD_TABLES = {"tokens": TOKENS, "sequences": SEQUENCES}
# Bytes of the dump that one thread maps before it gives their pages back.
RELEASE_BYTES = 32 << 20
# Blocks that the rows of a row group may lie in; of one that lies in more, so many rows are gathered at a time.
MAPPED_BLOCKS = 64
PIECE_ROWS = ROW_GROUP_ROWS[0]
# What the system maps around a byte that is read; a row of an operand lies in two places, mask and values.
FAULT_BYTES = 2 << 16
# Bytes that are handed to the system at a time: the pages of a narrow matrix have a few hundred each.
SINK_BYTES = 1 << 20
# Rows of a table that are held before they are written.
MERGED_ROWS = 1 << 17
# What all threads may take together, for row groups and for pages of the dump; a wide matrix is packed by fewer.
MEMORY_BYTES = 768 << 20
# Peak bytes of a thread over the dense bytes of its row group, measured: operand, planes, squares, encoded pages.
MEMORY_FACTOR = 8
# Of a row group, until its file is closed: what the footer will say of each column; and rows of a file, which bound it.
FOOTER_BYTES = 20_000
FILE_ROWS = 1 << 22
# Rows whose order is held, and sorted at a time; they take about 100 bytes each meanwhile.
ORDER_ROWS = 1 << 20
# Cells that the tokens of a longer shard are counted in, to cut them into ranges of so many rows.
ORDER_CELLS = 1 << 16
ORDER = np.dtype([("token", "<i8"), ("sequence", "<i4"), ("position", "<i4"), ("block", "<i4"), ("row", "<i4")])


class _Order:
    """Rows of a shard, ascending by token: their index columns, and the block and the row of it where each lies.

    Args:
        blocks: of the shard.
        folder: where a longer shard's order is kept meanwhile, in a file without a name: no kill leaves it behind.

    Attributes:
        distinct: different tokens.
    """

    def __init__(self, blocks: list[Block], folder: Path) -> None:
        tokens = _Tokens(blocks)
        self.distinct = 0
        self._first, self._rows = 0, tokens.rows
        self._held = np.empty(0, ORDER)
        self._file: IO[bytes] | None = None
        if self._rows > ORDER_ROWS:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this object
        for low, high in tokens.ranges():
            rows = tokens.sorted(low, high)
            self.distinct += 1 + int(np.count_nonzero(np.diff(rows["token"]))) if len(rows) else 0
            if self._file is None:
                self._held = rows
            else:
                self._file.write(rows.data)
        if self._file is not None:
            self._file.flush()

    def part(self, chosen: slice) -> "_Order":
        """Some rows in a row, of the same memory or file."""
        part = copy(self)
        start, stop, _ = chosen.indices(self._rows)
        part._first, part._rows = self._first + start, stop - start
        return part

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, chosen: slice) -> np.ndarray:
        """Records of `ORDER`; from several threads at once."""
        start, stop, _ = chosen.indices(self._rows)
        start, stop = self._first + start, self._first + stop
        if self._file is None:
            return self._held[start:stop]
        size = ORDER.itemsize
        return np.frombuffer(os.pread(self._file.fileno(), (stop - start) * size, start * size), ORDER)

    def span(self) -> tuple[int | None, int | None]:
        """First and last token."""
        if not self._rows:
            return None, None
        return int(self[0:1]["token"][0]), int(self[self._rows - 1 : self._rows]["token"][0])


class _Tokens:
    """The tokens of a dump's blocks, a range at a time."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        # of each block: rows, lowest and highest token
        self.spans = np.zeros((len(blocks), 3), np.int64)
        for at, block in enumerate(blocks):
            if len(token := block["rows.token"]):
                self.spans[at] = len(token), token.min(), token.max()
            block.release()

    @property
    def rows(self) -> int:
        return int(self.spans[:, 0].sum())

    def ranges(self) -> Iterable[tuple[int, int]]:
        """Ranges of numbers, both ends included, that ascend and hold all tokens, at most `ORDER_ROWS` rows each."""
        filled = self.spans[self.spans[:, 0] > 0]
        if len(filled):
            yield from self._ranges(int(filled[:, 1].min()), int(filled[:, 2].max()), int(filled[:, 0].sum()))

    def _ranges(self, low: int, high: int, rows: int) -> Iterable[tuple[int, int]]:
        if rows <= ORDER_ROWS or low == high:
            yield low, high
            return
        width = -(-(high - low + 1) // ORDER_CELLS)
        counts = np.zeros(ORDER_CELLS, np.int64)
        for _, block in self._within(low, high):
            token = block["rows.token"]
            token = token[(token >= low) & (token <= high)]
            counts += np.bincount((token - low) // width, minlength=ORDER_CELLS)
            block.release()
        filled = np.flatnonzero(counts).tolist()
        first, held = filled[0], 0
        for cell, following in zip(filled, [*filled[1:], -1], strict=True):
            held += int(counts[cell])
            if following < 0 or held + counts[following] > ORDER_ROWS:
                yield from self._ranges(low + first * width, min(high, low + (cell + 1) * width - 1), held)
                first, held = following, 0

    def sorted(self, low: int, high: int) -> np.ndarray:
        """Records of `ORDER` of the tokens of a range, ascending."""
        pieces = [np.empty(0, ORDER)]
        for number, block in self._within(low, high):
            token = block["rows.token"]
            chosen = np.flatnonzero((token >= low) & (token <= high))
            piece = np.empty(len(chosen), ORDER)
            for name in ("token", "sequence", "position"):
                piece[name] = block[f"rows.{name}"][chosen]
            piece["block"], piece["row"] = number, chosen
            pieces.append(piece)
            block.release()
        rows = np.concatenate(pieces)
        return rows[np.argsort(rows["token"], kind="stable")]

    def _within(self, low: int, high: int) -> Iterable[tuple[int, Block]]:
        rows, first, last = self.spans.T
        for number in np.flatnonzero((rows > 0) & (first <= high) & (last >= low)).tolist():
            yield number, self.blocks[number]


def pack(
    dump_manifest: Path,
    workload: Path,
    out: Path,
    report: Callable[[int, int], None] | None = None,
    *,
    encoding: str = "split",
    share_inputs: bool = False,
    threads: int = 1,
) -> dict[str, Any]:
    """Pack one shard.

    A shard packed before from the same dump is left as it is, also when its blocks are gone by now; one that was
    interrupted goes on after its last finished file. The bytes do not depend on the number of threads.

    Args:
        dump_manifest: `manifest.json` of the shard's dump.
        workload: folder of the data set.
        out: the shard's manifest, `parts/<shard>.json`; the tables are written beside it.
        report: called with (leaves done, leaves in all).
        encoding: one of `schema.ENCODINGS`.
        share_inputs: store the matrices that read one masked input once.
        threads: files written at a time.

    Returns:
        The shard's manifest.
    """
    dump = read_json(dump_manifest, "pack")
    if dump["version"] != DUMP_VERSION:
        raise InputError(f"pack: {dump_manifest} must have version {DUMP_VERSION}, got {dump['version']}")
    if dump.get("capture", {}) is None:
        raise InputError(
            f"pack: {dump_manifest} must be a dump of operands, got tokens alone: give them to `generate --tokens`, "
            "and pack what that writes"
        )
    # The workflow may delete `out` after a kill; this record it does not know.
    record = out.with_name(f".{out.name}.record")
    packed = read_json(record, "pack") if record.is_file() else None
    wanted = sha256_json([dump, __version__, WORKLOAD_VERSION, encoding, share_inputs])
    if packed is None or packed["dump"] != wanted or not _is_whole(packed, workload, out.parent):
        # a data set whose parts are being replaced is not whole until `index` says so again
        (workload / "manifest.json").unlink(missing_ok=True)
        job = _Shard(dump, dump_manifest.parent, workload, out, wanted, encoding, share_inputs)
        packed = job.pack(threads, report)
        write_json(record, packed, indent=None)
    # also one that an earlier call was killed before removing
    _journal(out).unlink(missing_ok=True)
    write_json(out, packed, indent=None)
    for file in dump_manifest.parent.glob("group-*"):
        file.unlink()
    return packed


# Matrices of the dump that read one operand, and which of their files.
_Files = tuple[list[dict[str, Any]], int | None]


def _journal(out: Path) -> Path:
    """One JSON line for each finished file, after a line that names the dump."""
    return out.with_name(f".{out.name}.journal")


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard on its way from dump to Parquet; the fields are `pack`'s."""

    dump: dict[str, Any]
    folder: Path
    workload: Path
    out: Path
    wanted: str
    encoding: str
    share_inputs: bool

    def pack(self, threads: int, report: Callable[[int, int], None] | None) -> dict[str, Any]:
        names = [group_name(group) for group in self.dump["groups"]]
        seals = (read_json(self.folder / f"{name}.json", "pack") for name in names)
        blocks = [Block(self.folder / file) for seal in seals for file in seal["blocks"]]
        order = _Order(blocks, self.out.parent)
        if len(order) != self.dump["rows"] or order.distinct != len(order):
            raise InputError(
                f"pack: {self.folder} must hold {self.dump['rows']} rows of different tokens, got {len(order)} with "
                f"{order.distinct} different: generate it again"
            )
        shared = {}
        if self.share_inputs:
            same = ((matrix, matrix.get("same_input_as")) for matrix in self.dump["matrices"])
            shared = {leaf(matrix["layer"], matrix["matrix"]): other for matrix, other in same if other}
        stored = [m for m in self.dump["matrices"] if leaf(m["layer"], m["matrix"]) not in shared]
        paths = [self._path(matrix, cut) for matrix in stored for cut in _cuts(len(order))]
        done = self._finished()
        # what reads one operand is written together: collecting, taking figures and planes is most of the work
        readers: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for matrix in stored:
            readers.setdefault((matrix["layer"], matrix["held_by"]), []).append(matrix)
        todo: list[_Files] = []
        for matrices, cut in ((matrices, cut) for matrices in readers.values() for cut in _cuts(len(order))):
            if left := [matrix for matrix in matrices if self._path(matrix, cut) not in done]:
                todo.append((left, cut))
        _journal(self.out).parent.mkdir(parents=True, exist_ok=True)
        with _journal(self.out).open("a" if done else "w", encoding="utf-8") as journal:
            if not done:
                _note(journal, {"dump": self.wanted})
            for entries in _in_threads(
                lambda files: self._write_files(*files, blocks, order), todo, _threads(threads, todo, len(order))
            ):
                for entry in entries:
                    _note(journal, entry)
                    done[entry["path"]] = entry
                    if report is not None:
                        report(len(done), len(paths))
        for table, schema in SHARD_TABLES.items():
            with write_beside(self.out.with_suffix(f".{table}.parquet")) as partial:
                _merge([self.folder / f"{name}.{table}.parquet" for name in names], partial, schema)
        return {
            "dump": self.wanted,
            "shard": int(self.out.stem),
            "encoding": self.encoding,
            "shared": shared,
            "manifest": self.dump,
            "files": [done[path] for path in paths],
        }

    def _path(self, matrix: dict[str, Any], cut: int | None) -> str:
        return f"data/{leaf(matrix['layer'], matrix['matrix'])}/{part_name(int(self.out.stem), cut)}"

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Files that an interrupted run of the same dump left whole, by path."""
        if not _journal(self.out).is_file():
            return {}
        content = _journal(self.out).read_bytes()
        # the last line may have been cut off, and the next is written after it
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(_journal(self.out), len(whole))
        entries = [json.loads(line) for line in whole.splitlines()]
        if not entries or entries[0] != {"dump": self.wanted}:
            return {}
        return {e["path"]: e for e in entries[1:] if _has_size(self.workload / e["path"], e["bytes"])}

    def _write_files(
        self, matrices: list[dict[str, Any]], cut: int | None, blocks: list[Block], order: _Order
    ) -> list[dict[str, Any]]:
        """Write the files of matrices that read one operand, a row group at a time; returns their manifest entries."""
        if cut is not None:
            order = order.part(slice(cut * FILE_ROWS, (cut + 1) * FILE_ROWS))
        level = self.dump.get("capture", {}).get("level", "full")
        first = matrices[0]
        schema = data_schema(first["dtype"], self.encoding, level, first["in_features"])
        held = {(other["layer"], other["held_by"]): other["in_features"] for other in self.dump["matrices"]}
        share = first["in_features"] / sum(held.values())
        group_rows, nnz = row_group_rows(first["in_features"]), 0
        paths = [self._path(matrix, cut) for matrix in matrices]
        with ExitStack() as stack:
            outputs = [stack.enter_context(_writer(self.workload / path, schema)) for path in paths]
            writers = [writer for writer, _ in outputs]
            waiting: list[list[pa.Table]] = [[] for _ in matrices]
            for index, figures, rows, out_masks in _pieces(matrices, share, level, blocks, order):
                table = encode_rows(schema, first["layer"], first["matrix"], index, figures, rows)
                nnz += int(figures.nnz.sum())
                for matrix, out_mask, writer, tables in zip(matrices, out_masks, writers, waiting, strict=True):
                    tables.append(as_read_by(table, matrix["matrix"], out_mask))
                    if sum(map(len, tables)) == group_rows:
                        _write_row_group(writer, tables)
            for writer, tables in zip(writers, waiting, strict=True):
                if tables:
                    _write_row_group(writer, tables)
        first_token, last_token = order.span()
        return [
            {
                "path": path,
                "layer": matrix["layer"],
                "matrix": matrix["matrix"],
                "rows": len(order),
                "nnz": nnz,
                "first_token": first_token,
                "last_token": last_token,
                "bytes": sink.size,
                "sha256": sink.digest.hexdigest(),
            }
            for matrix, path, (_, sink) in zip(matrices, paths, outputs, strict=True)
        ]


class _Sink(io.RawIOBase):
    """A file that is hashed on its way to the disk, so that it need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self._file.write(data)
        self.size += written
        return written


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[tuple[pq.ParquetWriter, _Sink]]:
    """A data file, written beside its name."""
    with write_beside(path) as partial, partial.open("wb") as file:
        sink = _Sink(file)
        with (
            pa.output_stream(sink, compression=None, buffer_size=SINK_BYTES) as stream,
            pq.ParquetWriter(stream, schema, **writer_settings(schema)) as writer,
        ):
            yield writer, sink


def _cuts(rows: int) -> list[int | None]:
    """Numbers of the files of one layer and matrix; None for the only one."""
    return [None] if rows <= FILE_ROWS else list(range(-(-rows // FILE_ROWS)))


def writer_settings(schema: pa.Schema) -> dict[str, Any]:
    """What docs/format.md asks of the Parquet writer of a data file."""
    return {
        "compression": "zstd",
        "compression_level": ZSTD_LEVEL,
        "use_dictionary": ["matrix"],
        "column_encoding": column_encodings(schema),
        "write_statistics": STATISTICS,
        "write_page_checksum": True,
    }


def _write_row_group(writer: pq.ParquetWriter, pieces: list[pa.Table]) -> None:
    """Write pieces as one row group, and forget them; joined first, since the bytes depend on where a piece ends."""
    table = pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces).combine_chunks()
    writer.write_table(table, row_group_size=len(table))
    pieces.clear()


def _note(journal: TextIO, entry: dict[str, Any]) -> None:
    journal.write(json.dumps(entry) + "\n")
    journal.flush()


def _in_threads(
    work: Callable[[_Files], list[dict[str, Any]]], items: list[_Files], threads: int
) -> Iterable[list[dict[str, Any]]]:
    """Results in the order of the items; after an error or an interrupt nothing more is begun."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _threads(threads: int, todo: list[_Files], rows: int) -> int:
    """As many as asked for, or as `MEMORY_BYTES` allows."""

    def most(files: _Files) -> int:
        matrices, _ = files
        group_rows = row_group_rows(matrices[0]["in_features"])
        dense = group_rows * matrices[0]["in_features"] * FORMATS[matrices[0]["dtype"]].bits.itemsize
        footers = len(matrices) * FOOTER_BYTES * min(rows, FILE_ROWS) // group_rows
        return MEMORY_FACTOR * dense + 2 * RELEASE_BYTES + footers

    return max(1, min(threads, MEMORY_BYTES // max(map(most, todo), default=1)))


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_whole(packed: dict[str, Any], workload: Path, parts: Path) -> bool:
    tables = [parts / f"{packed['shard']:05d}.{table}.parquet" for table in SHARD_TABLES]
    return all(_has_size(workload / file["path"], file["bytes"]) for file in packed["files"]) and all(
        table.is_file() for table in tables
    )


def _pieces(
    matrices: list[dict[str, Any]], share: float, level: str, blocks: list[Block], order: _Order
) -> Iterable[tuple[Index, RowStatistics, Rows | None, list[np.ndarray | None]]]:
    """Rows of matrices that read one operand in order, no more than a row group at a time.

    Args:
        matrices: of the dump.
        share: of each block that the operand takes, about.
        level: of the capture.
        blocks: of the dump.
        order: of the rows.

    Yields:
        Index, figures and operands of rows, and the `out_mask` of each matrix.
    """
    first = matrices[0]
    layer, width, number = f"L{first['layer']:02d}", first["in_features"], FORMATS[first["dtype"]]
    name = f"{layer}.{first['held_by']}"
    row_bytes = width * number.bits.itemsize
    group_rows, start, mapped = row_group_rows(width), 0, 0
    touched: set[int] = set()
    while start < len(order):
        place = order[start : start + group_rows - start % group_rows]
        used = np.unique(place["block"])
        if len(used) > MAPPED_BLOCKS:
            place = place[:PIECE_ROWS]
            used = np.unique(place["block"])
        start += len(place)
        places = _Places(blocks, place["block"], place["row"])
        index = Index(*(np.ascontiguousarray(place[column]) for column in ("token", "sequence", "position")))
        mask = None if level == "stats" else places.pick(f"{name}.mask")
        if mask is not None and mask.shape[1] != mask_bytes(width):
            raise InputError(f"pack: {name} must have {width} inputs, got {mask.shape[1]} mask bytes")
        rows, bits = None, None
        if level == "full":
            offsets, bits = places.ragged(f"{name}.offsets", f"{name}.values")
            bits = bits.astype(number.bits, copy=False)
            figures = RowStatistics(np.diff(offsets), *row_norms(bits, offsets, number))
        else:
            absmax, l2 = (places.pick(f"{name}.{figure}") for figure in ("absmax", "l2"))
            nnz = places.pick(f"{name}.nnz") if mask is None else popcounts(mask)
            figures = RowStatistics(nnz, absmax, l2)
        if mask is not None:
            kept = offsets_of(figures.nnz)
            rows = Rows(first["layer"], first["matrix"], width, number.name, index.token, mask, kept, bits)
        outputs = [f"{layer}.{matrix['matrix']}.out_mask" for matrix in matrices]
        yield index, figures, rows, [places.pick(name) if places.has(name) else None for name in outputs]
        # rows that lie apart map what is between them
        mapped += min(int(share * sum(blocks[at].size for at in used)), len(place) * (row_bytes + FAULT_BYTES))
        touched.update(used.tolist())
        if mapped > RELEASE_BYTES or start == len(order):
            mapped = 0
            while touched:
                blocks[touched.pop()].release()


class _Places:
    """Where rows of a dump lie: taken from each block at once, then put in order where that is not the blocks' own.

    Args:
        blocks: of the dump.
        block, row: [R], of each row.
    """

    def __init__(self, blocks: list[Block], block: np.ndarray, row: np.ndarray) -> None:
        self._back: np.ndarray | None = None
        if (np.diff(block) < 0).any():
            sorted_R = np.lexsort((row, block))
            block, row = block[sorted_R], row[sorted_R]
            self._back = np.empty_like(sorted_R)
            self._back[sorted_R] = np.arange(len(sorted_R))
        self._parts = [(blocks[block[start]], row[start:stop]) for start, stop in runs(block)]

    def has(self, name: str) -> bool:
        """Whether there is an array of this name."""
        return name in self._parts[0][0]

    def pick(self, name: str) -> np.ndarray:
        """Rows of an array that has one line for each."""
        joined = _joined([block[name][rows] for block, rows in self._parts])
        return joined if self._back is None else joined[self._back]

    def ragged(self, offsets: str, values: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of different length: int64 offsets [R + 1] and values."""
        parts = [take(block[values], block[offsets], rows) for block, rows in self._parts]
        joined = _joined([part for part, _ in parts])
        joined_offsets = offsets_of(_joined([np.diff(part_offsets) for _, part_offsets in parts]))
        if self._back is not None:
            joined, joined_offsets = take(joined, joined_offsets, self._back)
        return joined_offsets, joined


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def index(
    parts: list[Path], workload: Path, weight_masks: Path | None = None, study: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Merge the shards' tables and write the data set's manifest, last.

    Args:
        parts: `parts/<shard>.json` of every shard.
        workload: folder of the data set.
        weight_masks: table of the pruned model, if the run used one.
        study: the part of the study file that makes this data set, from which it can be made again.

    Raises:
        InputError: shards of different runs, the same shard twice, or a file that is not there.
    """
    shards = sorted((read_json(part, "index") | {"at": part} for part in parts), key=lambda shard: shard["shard"])
    if [shard["shard"] for shard in shards] != list(range(len(shards))):
        raise InputError(f"index: shards must be 0 to {len(shards) - 1}, got {[shard['shard'] for shard in shards]}")
    first = shards[0]["manifest"]
    same = [name for name in first if name not in ("key", "prompts", "groups", "rows", *VARYING)]
    for shard in shards:
        other = [name for name in same if shard["manifest"][name] != first[name]]
        other += [name for name in ("encoding", "shared") if shard[name] != shards[0][name]]
        if other:
            raise InputError(f"index: shards must be of one run, got {shard['at']} with another {', '.join(other)}")
        if not _is_whole(shard, workload, shard["at"].parent):
            raise InputError(f"index: {shard['at']} must have all its files, got some missing: pack it again")
    _remove_strangers(workload / "data", {file["path"] for shard in shards for file in shard["files"]}, workload)

    tables = []
    for table, schema in SHARD_TABLES.items():
        with write_beside(workload / f"{table}.parquet") as partial:
            count = _merge([shard["at"].with_suffix(f".{table}.parquet") for shard in shards], partial, schema)
        tables.append(_table_entry(workload, f"{table}.parquet", count))
    given = None
    if first.get("given") is not None:
        given = teacher_forced_hash(pq.read_table(workload / "sequences.parquet", partitioning=None))
    rows = sum(shard["manifest"]["rows"] for shard in shards)
    matrices = _matrices(shards, rows)
    with write_beside(workload / "matrices.parquet") as partial:
        pq.write_table(matrices, partial, compression="zstd")
    tables.append(_table_entry(workload, "matrices.parquet", len(matrices)))
    if weight_masks is not None:
        with write_beside(workload / "weight_masks.parquet") as partial:
            shutil.copyfile(weight_masks, partial)
        tables.append(_table_entry(workload, "weight_masks.parquet", pq.read_metadata(weight_masks).num_rows))
    else:
        (workload / "weight_masks.parquet").unlink(missing_ok=True)

    capture = first.get("capture", {"level": "full"})
    encoding, share_inputs = shards[0]["encoding"], bool(shards[0]["shared"])
    with write_beside(workload / "views.sql") as partial:
        views = duckdb_views(first["dtype"], encoding, capture["level"], share_inputs)
        partial.write_text(views, encoding="utf-8")
    tables.append(_table_entry(workload, "views.sql", 0))

    model = ("model_hash", "source", "source_hash", "dtype")
    settings = ("label", "method", "parameters", "calibration", "decoding", "batching")
    manifest = {
        "format": "sparsetrace-workload",
        "version": WORKLOAD_VERSION,
        "revision": WORKLOAD_REVISION,
        **{name: first[name] for name in (*model, *settings)},
        "capture": capture,
        "encoding": encoding,
        "share_inputs": share_inputs,
        "given": given,
        "engine": first.get("engine", "torch"),
        "device": first["device"],
        "threads": first["threads"],
        "versions": {**first["versions"], "pyarrow": pa.__version__, "sparsetrace": __version__},
        "packed_with": {"python": platform.python_version(), "numpy": np.__version__},
        "tuning": first.get("tuning"),
        **merged(shard["manifest"] for shard in shards),
        "study": study,
        "tokens": rows,
        "rows": rows * len(first["matrices"]),
        "nnz": sum(matrices["nnz"].to_pylist()),
        "files": [file for shard in shards for file in shard["files"]] + tables,
    }
    with write_beside(workload / "README.md") as partial:
        partial.write_text(data_card(manifest, matrices), encoding="utf-8")
    write_json(workload / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
    return manifest


def _matrices(shards: list[dict[str, Any]], rows: int) -> pa.Table:
    nnz: dict[str, int] = {}
    for shard in shards:
        for file in shard["files"]:
            key = leaf(file["layer"], file["matrix"])
            nnz[key] = nnz.get(key, 0) + file["nnz"]
    table = []
    for matrix in shards[0]["manifest"]["matrices"]:
        other = shards[0]["shared"].get(leaf(matrix["layer"], matrix["matrix"]))
        kept = nnz[leaf(matrix["layer"], other or matrix["matrix"])]
        inputs = rows * matrix["in_features"]
        counted = {"rows": rows, "nnz": kept, "achieved_sparsity": 1 - kept / inputs if inputs else None}
        table.append(matrix | counted | {"shares_input_with": other})
    return pa.Table.from_pylist(table, schema=MATRIX_TABLE)


def _merge(pieces: list[Path], out: Path, schema: pa.Schema) -> int:
    """Write tables one after another as one file, `MERGED_ROWS` or more a row group; returns the rows."""
    rows = 0
    with pq.ParquetWriter(out, schema, compression="zstd", write_page_checksum=True) as writer:
        waiting: list[pa.Table] = []
        for number, piece in enumerate(pieces, start=1):
            # in under half the time of `read_table`, which takes a file for a data set
            waiting.append(pq.ParquetFile(piece).read(use_threads=False))
            if number == len(pieces) or sum(map(len, waiting)) >= MERGED_ROWS:
                rows += sum(map(len, waiting))
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
    return rows


def _table_entry(workload: Path, name: str, rows: int) -> dict[str, Any]:
    path = workload / name
    return {"path": name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _remove_strangers(data: Path, known: set[str], workload: Path) -> None:
    """Remove parts that an earlier study with more shards left; a reader would take them for rows."""
    for file in data.rglob("*.parquet"):
        if file.relative_to(workload).as_posix() not in known:
            file.unlink()
    for folder in data.iterdir():
        if not any(folder.rglob("*.parquet")):
            shutil.rmtree(folder)
