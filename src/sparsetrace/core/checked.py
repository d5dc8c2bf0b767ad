"""Small files that carry the SHA-256 of their own bytes, so that a step notices damage to what another step wrote.

The digest stands in the file's metadata, after `MARK`, and is that of the file with 64 zeros in its place. A file
without the mark was written by hand, or by another program, and is taken as it is.
"""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError, read_regular, write_beside

MARK = "sparsetrace-sha256="
DIGITS = 64
# What a writer puts into the metadata before `seal` replaces the zeros.
BLANK = MARK + "0" * DIGITS


def seal(path: Path) -> None:
    """Replace the zeros of `BLANK`, which the file must hold, by the digest."""
    data = path.read_bytes()
    at = _place(data)
    assert data[at : at + DIGITS] == b"0" * DIGITS
    with path.open("r+b") as file:
        file.seek(at)
        file.write(_digest(data, at).encode())


def read_checked(path: Path, where: str, what: str) -> bytes:
    """The bytes of a file that is as it was written.

    Args:
        path: of the file.
        where: name of the step, for messages.
        what: what the file must be, for messages.

    Raises:
        InputError: the file is missing, no regular file, or not the one that was sealed.
    """
    data = read_regular(path, where, what)
    at = _place(data)
    if at >= 0 and data[at : at + DIGITS] != _digest(data, at).encode():
        raise InputError(
            f"{where}: {path} must be {what}, got other bytes than the sha256 in it is of: it is damaged, make it again"
        )
    return data


def write_checked_table(table: pa.Table, path: Path) -> None:
    """Write a table as a Parquet file that `read_checked_table` reads."""
    with write_beside(path) as partial:
        with pq.ParquetWriter(partial, table.schema, write_page_checksum=True) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"sparsetrace_checksum": BLANK})
        seal(partial)


def read_checked_table(path: Path, where: str, what: str, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file that `write_checked_table` wrote, or another program.

    Args:
        path: of the file.
        where: name of the step, for messages.
        what: what the file must be, for messages.
        schema: columns that it must have, in this order; None takes any.

    Raises:
        InputError: the file is missing, damaged, no Parquet file, or has other columns.
    """
    data = read_checked(path, where, what)
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{where}: {path} must be {what}, got {' '.join(str(error).split())}") from None
    if schema is not None and not table.schema.equals(schema):
        got = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise InputError(f"{where}: {path} must be {what}, got other columns: {got}")
    return table


def _place(data: bytes) -> int:
    """Where the digest begins, -1 if there is none: in a Parquet file after the data, in a safetensors file before."""
    mark = MARK.encode()
    at = data.rfind(mark) if data.startswith(b"PAR1") else data.find(mark)
    return at + len(mark) if 0 <= at <= len(data) - len(mark) - DIGITS else -1


def _digest(data: bytes, at: int) -> str:
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(b"0" * DIGITS)
    digest.update(view[at + DIGITS :])
    return digest.hexdigest()
