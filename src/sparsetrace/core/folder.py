"""Reading a folder that lies on a disk or at a URL that pyarrow or fsspec can open."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError, inside, parse_json_object, refuse_outside_name

# The end of a Parquet file, behind its footer: the footer's length and four letters.
_TAIL_BYTES = 8


class Folder:
    """A folder to read from; threads may share it.

    Args:
        where: a local path, or a URL such as `s3://bucket/workload` (pyarrow) or `memory://workload` (fsspec).
        filesystem: file system of pyarrow or fsspec, if it needs credentials or options; `where` is then a path in it.
            None opens `where` itself.

    Attributes:
        where: the folder's place, for messages; a URL without the parts that may be secret.
    """

    def __init__(self, where: str | Path, filesystem: Any = None) -> None:
        self.where = str(where)
        if filesystem is not None:
            self._files, self._base = pafs._ensure_filesystem(filesystem), self.where
        elif "://" in self.where:
            self._files, self._base = _from_url(self.where)
            self.where = _without_secrets(self.where)
        else:
            self._files, self._base = pafs.LocalFileSystem(), str(Path(where).absolute())
        # names that were found to lie in the folder
        self._inside: set[str] = set()

    @property
    def local(self) -> bool:
        """Whether the folder is in this machine's own file system."""
        return isinstance(self._files, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Path of a file within the file system."""
        return f"{self._base.rstrip('/')}/{name}"

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for random access.

        Raises:
            InputError: there is no such file, or its name or a link leads out of the folder.
        """
        if name not in self._inside:
            if self.local:
                inside(Path(self._base), name, f"open: {self.where}")
            else:
                refuse_outside_name(name, f"open: {self.where}")
            self._inside.add(name)
        try:
            return self._files.open_input_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"open: {self.where}/{name} must be a file, got nothing there") from None
        except OSError as error:
            raise InputError(f"open: {self.where}/{name} must be a file that can be read, got {error}") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object."""
        return parse_json_object(self._read(name), f"open: {self.where}/{name}", "JSON that can be read")

    def read_table(self, name: str, sha256: str | None = None) -> pa.Table:
        """Read a whole Parquet file.

        Args:
            name: of the file.
            sha256: that it must have; None checks its pages alone.

        Raises:
            InputError: it is missing or damaged.
        """
        data = self._read(name)
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise self._damaged(name, f"sha256 {found[:12]} instead of {sha256[:12]}")
        try:
            return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(name, error) from None

    def parquet(self, name: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """Open a Parquet file whose pages are checked as they are read.

        With its metadata given this takes about 20 us, so that threads need not share one.
        """
        try:
            return pq.ParquetFile(self.open(name), metadata=metadata, page_checksum_verification=True)
        # fsspec raises a plain ValueError where a web server supports no random access
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise self._damaged(name, error) from None

    def footer(self, name: str, sha256: str | None) -> pq.FileMetaData:
        """Metadata of a Parquet file.

        Args:
            name: of the file.
            sha256: that the footer must have, see `footer_sha256`; None checks nothing.

        Raises:
            InputError: the file is missing or its footer is damaged.
        """
        try:
            with self.open(name) as file:
                size = file.size()
                tail = file.read_at(_TAIL_BYTES, max(0, size - _TAIL_BYTES))
                length = int.from_bytes(tail[:4], "little") + _TAIL_BYTES
                data = file.read_at(min(length, size), max(0, size - length))
            if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
                raise self._damaged(name, f"a footer of sha256 {found[:12]} instead of {sha256[:12]}")
            return pq.read_metadata(pa.BufferReader(data))
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, InputError):
                raise
            raise self._damaged(name, error) from None

    def _read(self, name: str) -> bytes:
        try:
            with self.open(name) as file:
                return bytes(file.read())
        except OSError as error:
            raise InputError(f"open: {self.where}/{name} must be a file that can be read, got {error}") from None

    def _damaged(self, name: str, got: object) -> InputError:
        text = " ".join(str(got).split())
        return InputError(f"workload: {self.where}/{name} must be a whole Parquet file, got {text}")


def footer_sha256(path: Path) -> str:
    """Hex sha256 of the footer of a Parquet file, with the eight bytes behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES))
        length = int.from_bytes(file.read(4), "little") + _TAIL_BYTES
        # of a file in another format, these bytes may be any number
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read()).hexdigest()


def _without_secrets(url: str) -> str:
    """A URL without user, password and options."""
    return re.sub(r"://[^/]*@", "://", url.split("?")[0])


def _from_url(url: str) -> tuple[Any, str]:
    shown = _without_secrets(url)
    try:
        files, path = pafs.FileSystem.from_uri(url)
        return files, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise InputError(f"open: fsspec must be installed for {shown}, got none: pip install fsspec") from None
    try:
        files, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"open: {shown} must be a URL that pyarrow or fsspec knows, got {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(files)), path
