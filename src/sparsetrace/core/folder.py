"""A folder on disk or at any URL that pyarrow or fsspec can open: reading only."""

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
    """A folder that is read; may be shared by threads.

    Args:
        where: a local path, or a URL such as `s3://bucket/workload` (pyarrow) or `memory://workload` (fsspec).
        filesystem: of pyarrow or fsspec, for one that needs credentials or options; `where` is then a path in it.

    Attributes:
        where: for messages; of a URL without what may be secret.
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
        """Whether it lies on a disk of this machine."""
        return isinstance(self._files, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """A file's path in the file system."""
        return f"{self._base.rstrip('/')}/{name}"

    def open(self, name: str) -> pa.NativeFile:
        """A file, for reading at any place.

        Raises:
            InputError: there is none.
        """
        try:
            return self._files.open_input_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"open: {self.where}/{name} must be a file, got nothing there") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        with self.open(name) as file:
            try:
                content = json.loads(file.read())
            except (OSError, ValueError) as error:
                raise InputError(f"open: {self.where}/{name} must be JSON that can be read, got {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"open: {self.where}/{name} must be a JSON object, got {type(content).__name__}")
        return content

    def read_table(self, name: str) -> pa.Table:
        """A whole Parquet file.

        Raises:
            InputError: it is missing or damaged.
        """
        return self.parquet(name).read(use_threads=False)

    def parquet(self, name: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """A Parquet file; given its metadata, opening one costs some 20 us, so that threads need share none."""
        try:
            return pq.ParquetFile(self.open(name), metadata=metadata)
        # fsspec says in a plain ValueError that a web server cannot read at any place
        except (OSError, ValueError) as error:
            raise InputError(f"workload: {self.where}/{name} must be a whole Parquet file, got {error}") from None


def _without_secrets(url: str) -> str:
    """A URL without user, key and options."""
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
