"""Reading a folder that lies on a disk or at a URL that pyarrow or fsspec can open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError


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
            InputError: there is no such file.
        """
        try:
            return self._files.open_input_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"open: {self.where}/{name} must be a file, got nothing there") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object."""
        with self.open(name) as file:
            try:
                content = json.loads(file.read())
            except (OSError, ValueError) as error:
                raise InputError(f"open: {self.where}/{name} must be JSON that can be read, got {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"open: {self.where}/{name} must be a JSON object, got {type(content).__name__}")
        return content

    def read_table(self, name: str) -> pa.Table:
        """Read a whole Parquet file.

        Raises:
            InputError: it is missing or damaged.
        """
        return self.parquet(name).read(use_threads=False)

    def parquet(self, name: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """Open a Parquet file; with its metadata given this takes about 20 us, so that threads need not share one."""
        try:
            return pq.ParquetFile(self.open(name), metadata=metadata)
        # fsspec raises a plain ValueError where a web server supports no random access
        except (OSError, ValueError) as error:
            raise InputError(f"workload: {self.where}/{name} must be a whole Parquet file, got {error}") from None


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
