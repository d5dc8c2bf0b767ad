"""Writes one data file: Parquet as docs/format.md specifies it, hashed on the way to the disk."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.core.files import write_beside
from sparsetrace.core.folder import footer_sha256
from sparsetrace.formats.schema import INDEXED, column_encodings

# As fast as level 1 and up to 1 % smaller on operands of real runs, though 0.2 to 0.5 % larger on bfloat16 at half
# sparsity. Level 3 takes twice the time on wide matrices.
ZSTD_LEVEL = 2
# Bytes per write to the file: the pages of a narrow matrix have a few hundred each.
SINK_BYTES = 1 << 20


class DataFile:
    """A data file that is being written, one full row group after another.

    Args:
        writer: writer of the file.
        sink: where its bytes go.
        group_rows: rows of a full row group; no table that is added may reach beyond the end of one.
    """

    def __init__(self, writer: pq.ParquetWriter, sink: "_HashingSink", group_rows: int) -> None:
        self._writer = writer
        self._sink = sink
        self._group_rows = group_rows
        # of the footer, once the file is closed
        self.footer_sha256 = ""
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table)
        if sum(map(len, self._waiting)) == self._group_rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait for more, as a row group of their own."""
        if not self._waiting:
            return
        # joined first: the bytes depend on where a table ends
        table = self._waiting[0] if len(self._waiting) == 1 else pa.concat_tables(self._waiting).combine_chunks()
        self._writer.write_table(table, row_group_size=len(table))
        self._waiting.clear()

    @property
    def size(self) -> int:
        """Bytes of the file, once it is closed."""
        return self._sink.size

    @property
    def sha256(self) -> str:
        """Hex sha256 of the file, once it is closed."""
        return self._sink.digest.hexdigest()


@contextmanager
def data_file(path: Path, schema: pa.Schema, group_rows: int) -> Iterator[DataFile]:
    """Write a data file, which gets its name when the block ends well.

    Args:
        path: of the file.
        schema: from `schema.data_schema`.
        group_rows: rows of a full row group.
    """
    with write_beside(path) as partial, partial.open("wb") as file:
        sink = _HashingSink(file)
        with (
            pa.output_stream(sink, compression=None, buffer_size=SINK_BYTES) as stream,
            pq.ParquetWriter(stream, schema, **writer_settings(schema)) as writer,
        ):
            written = DataFile(writer, sink, group_rows)
            yield written
            written.flush()
        file.flush()
        written.footer_sha256 = footer_sha256(partial)


def writer_settings(schema: pa.Schema) -> dict[str, Any]:
    """Arguments of the Parquet writer of a data file."""
    return {
        "compression": "zstd",
        "compression_level": ZSTD_LEVEL,
        "use_dictionary": ["matrix"],
        "column_encoding": column_encodings(schema),
        "write_statistics": list(INDEXED),
        "write_page_checksum": True,
    }


class _HashingSink(io.RawIOBase):
    """A file that is hashed while it is written, so that it need not be read again."""

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
