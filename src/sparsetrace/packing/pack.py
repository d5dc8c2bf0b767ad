"""Step 4, one shard: its dump becomes Parquet data files, without torch; `index` then makes all shards one data set.

docs/format.md specifies the files, `parts.py` lists them. The dump's blocks are removed once every file is written.

Memory: a row group per thread, and `order.ORDER_ROWS` rows of the index. A longer shard keeps its order in an unnamed
file beside its manifest, and its data files are split after `FILE_ROWS` rows, since the Parquet footer of an open file
grows until the file is closed.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsetrace import __version__
from sparsetrace.core.files import (
    InputError,
    read_sealed_json,
    sha256_file,
    sha256_json,
    write_beside,
    write_sealed_json,
)
from sparsetrace.formats.columns import as_read_by, encode_rows
from sparsetrace.formats.dump import Block, group_name, read_manifest, read_seal
from sparsetrace.formats.schema import data_schema, leaf, part_name
from sparsetrace.formats.versions import WORKLOAD_REVISION, WORKLOAD_VERSION
from sparsetrace.packing.data_file import data_file
from sparsetrace.packing.gather import RELEASE_BYTES, Operand, gather, operand_prefix
from sparsetrace.packing.journal import Journal
from sparsetrace.packing.order import ORDER_ROWS, SORT_BYTES, Orders
from sparsetrace.packing.parts import PACKED_KEYS, SHARD_TABLES, is_whole
from sparsetrace.packing.tables import merge_tables

# Memory of all threads together, for row groups and mapped pages of the dump: wide matrices get fewer threads.
MEMORY_BYTES = 768 << 20
# Peak memory of a thread over the dense bytes of its row group, measured: operand, planes, squares, encoded pages.
MEMORY_FACTOR = 8
# Footer memory per row group of a file, all columns together, held until the file is closed.
FOOTER_BYTES = 20_000
# Rows after which a data file is split, which bounds its footer.
FILE_ROWS = 1 << 22


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

    A shard that was packed before from the same dump is left as it is, even when its blocks are gone by now; an
    interrupted one goes on after its last finished file. The bytes do not depend on the number of threads.

    Args:
        dump_manifest: `manifest.json` of the shard's dump.
        workload: folder of the data set.
        out: manifest of the packed shard, `parts/<shard>.json`, which is written last; its tables lie beside it.
        report: called with (data files done, data files in all).
        encoding: one of `schema.ENCODINGS`.
        share_inputs: store matrices that read the same masked input once.
        threads: data files written at a time.

    Returns:
        The manifest of the packed shard.
    """
    dump = read_manifest(dump_manifest, "pack")
    if dump.get("capture", {}) is None:
        raise InputError(
            f"pack: {dump_manifest} must be a dump of operands, got tokens alone: give them to `generate --tokens`, "
            "and pack what that writes"
        )
    # a copy of the manifest that survives where a workflow deletes `out` after a kill
    record = out.with_name(f".{out.name}.record")
    packed = read_sealed_json(record, "pack", PACKED_KEYS) if record.is_file() else None
    wanted = sha256_json([dump, __version__, WORKLOAD_VERSION, WORKLOAD_REVISION, encoding, share_inputs])
    journal = Journal(out, wanted)
    if packed is None or packed["dump"] != wanted or not is_whole(packed, workload, out.parent):
        # while some of its files are replaced a data set is not whole; `index` completes it again
        (workload / "manifest.json").unlink(missing_ok=True)
        shard = _Shard(dump, dump_manifest.parent, workload, out, encoding, share_inputs)
        packed = {"dump": wanted} | shard.pack(journal, threads, report)
        write_sealed_json(record, packed, indent=None)
    # also a journal that an earlier call was killed before removing
    journal.remove()
    sealed = write_sealed_json(out, packed, indent=None)
    for file in dump_manifest.parent.glob("group-*"):
        file.unlink()
    return sealed


@dataclass(frozen=True, slots=True)
class _Job:
    """The data files of one operand, or one cut of them, which are written together.

    Args:
        operand: with the matrices that get a file.
        cut: number of the cut; None where the files are not split.
    """

    operand: Operand
    cut: int | None


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard to be packed; the fields are arguments of `pack`, `folder` is that of the dump."""

    dump: dict[str, Any]
    folder: Path
    workload: Path
    out: Path
    encoding: str
    share_inputs: bool

    def pack(self, journal: Journal, threads: int, report: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Write every file that is not finished yet; returns the shard's manifest."""
        names = [group_name(group) for group in self.dump["groups"]]
        seals = (read_seal(self.folder / f"{name}.json", "pack") for name in names)
        blocks = [Block(self.folder / file) for seal in seals for file in seal["blocks"]]
        orders = Orders(blocks, self.out.parent)
        found = orders.all_tokens
        if len(found) != self.dump["rows"] or found.distinct != len(found):
            raise InputError(
                f"pack: {self.folder} must hold {self.dump['rows']} rows of different tokens, got {len(found)} with "
                f"{found.distinct} different: generate it again"
            )
        shared = {}
        if self.share_inputs:
            same = ((matrix, matrix.get("same_input_as")) for matrix in self.dump["matrices"])
            shared = {leaf(matrix["layer"], matrix["matrix"]): other for matrix, other in same if other}
        stored = [matrix for matrix in self.dump["matrices"] if leaf(matrix["layer"], matrix["matrix"]) not in shared]
        paths = [self._path(matrix, cut) for matrix in stored for cut in _cuts(orders.rows(operand_prefix(matrix)))]
        done = journal.finished(self.workload)
        todo = list(self._unfinished(self._operands(stored, orders), done))
        threads = _threads(threads, todo, orders)
        with journal.writing(goes_on=bool(done)):
            for entries in _in_threads(lambda job: self._write_files(job, blocks, orders), todo, threads):
                for entry in entries:
                    journal.note(entry)
                    done[entry["path"]] = entry
                    if report is not None:
                        report(len(done), len(paths))
        tables = {}
        for table, schema in SHARD_TABLES.items():
            with write_beside(self.out.with_suffix(f".{table}.parquet")) as partial:
                merge_tables([self.folder / f"{name}.{table}.parquet" for name in names], partial, schema, "pack")
                tables[table] = sha256_file(partial)
        return {
            "shard": int(self.out.stem),
            "encoding": self.encoding,
            "shared": shared,
            "manifest": self.dump,
            "files": [done[path] for path in paths],
            "tables": tables,
        }

    def _path(self, matrix: dict[str, Any], cut: int | None) -> str:
        return f"data/{leaf(matrix['layer'], matrix['matrix'])}/{part_name(int(self.out.stem), cut)}"

    def _operands(self, stored: list[dict[str, Any]], orders: Orders) -> list[Operand]:
        """The operands of the matrices that get files.

        Matrices that read one operand are written together, since most of the work is gathering it and computing its
        statistics and planes.
        """
        weights = {
            prefix: matrix["in_features"] * orders.rows(prefix)
            for matrix in self.dump["matrices"]
            for prefix in [operand_prefix(matrix)]
        }
        readers: dict[str, list[dict[str, Any]]] = {}
        for matrix in stored:
            readers.setdefault(operand_prefix(matrix), []).append(matrix)
        total = max(1, sum(weights.values()))
        return [
            Operand(tuple(matrices), orders.rows(prefix), weights[prefix] / total)
            for prefix, matrices in readers.items()
        ]

    def _unfinished(self, operands: list[Operand], done: dict[str, dict[str, Any]]) -> Iterator[_Job]:
        """What is left to be written."""
        for operand in operands:
            for cut in _cuts(operand.rows):
                if left := [matrix for matrix in operand.matrices if self._path(matrix, cut) not in done]:
                    yield _Job(replace(operand, matrices=tuple(left)), cut)

    def _write_files(self, job: _Job, blocks: list[Block], orders: Orders) -> list[dict[str, Any]]:
        """Write the files of one job, a row group at a time; returns their manifest entries."""
        operand, order = job.operand, orders.of(job.operand.prefix)
        if job.cut is not None:
            order = order.within(slice(job.cut * FILE_ROWS, (job.cut + 1) * FILE_ROWS))
        level = self.dump.get("capture", {}).get("level", "full")
        in_layer = operand.layer is not None
        schema = data_schema(operand.number.name, self.encoding, level, operand.features, in_layer)
        first, nnz = operand.matrices[0]["matrix"], 0
        paths = [self._path(matrix, job.cut) for matrix in operand.matrices]
        with ExitStack() as stack:
            files = [stack.enter_context(data_file(self.workload / path, schema, operand.group_rows)) for path in paths]
            for piece in gather(operand, level, blocks, order):
                table = encode_rows(schema, operand.layer, first, piece.index, piece.statistics, piece.rows)
                nnz += int(piece.statistics.nnz.sum())
                for matrix, out_mask, file in zip(operand.matrices, piece.out_masks, files, strict=True):
                    file.add(as_read_by(table, matrix["matrix"], out_mask))
        first_token, last_token = order.token_range()
        return [
            {
                "path": path,
                "layer": operand.layer,
                "matrix": matrix["matrix"],
                "rows": len(order),
                "nnz": nnz,
                "first_token": first_token,
                "last_token": last_token,
                "bytes": file.size,
                "sha256": file.sha256,
                "footer_sha256": file.footer_sha256,
            }
            for matrix, path, file in zip(operand.matrices, paths, files, strict=True)
        ]


def _cuts(rows: int) -> list[int | None]:
    """Numbers of the files of one matrix; None for a single file."""
    return [None] if rows <= FILE_ROWS else list(range(-(-rows // FILE_ROWS)))


def _in_threads(
    work: Callable[[_Job], list[dict[str, Any]]], jobs: list[_Job], threads: int
) -> Iterable[list[dict[str, Any]]]:
    """Results in the order of the jobs; after an error or an interrupt no further job begins."""
    if threads == 1:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(work, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


def _threads(threads: int, jobs: list[_Job], orders: Orders) -> int:
    """As many threads as asked for, or as `MEMORY_BYTES` allows."""

    def peak(operand: Operand) -> int:
        footers = len(operand.matrices) * FOOTER_BYTES * min(operand.rows, FILE_ROWS) // operand.group_rows
        sort = SORT_BYTES * min(operand.rows, ORDER_ROWS) if orders.is_partial(operand.prefix) else 0
        return MEMORY_FACTOR * operand.group_rows * operand.row_bytes + 2 * RELEASE_BYTES + footers + sort

    return max(1, min(threads, MEMORY_BYTES // max((peak(job.operand) for job in jobs), default=1)))
