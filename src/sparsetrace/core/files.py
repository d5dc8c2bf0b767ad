"""Files that are written whole or not at all, their hashes, and the error that users see.

Every file is written under a temporary name beside its final one and then renamed: a file with its final name is
complete, whatever was killed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HASH_CHUNK_BYTES = 1 << 22


class InputError(ValueError):
    """An error that a user can cause and mend; the command line prints it as one line, without a traceback.

    Form: `<where>: <name> must be <rule>, got <value>`, then the reason or the remedy.
    """


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, renamed to `path` if the block succeeds and removed if it raises.

    A killed run leaves at most one `.NAME.partial`, which the next run overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def refuse_unexpected_files(folder: Path, expected: tuple[str, ...], where: str) -> None:
    """Refuse to replace a folder that holds files which the step does not write.

    Some of the step's own files may be missing: Snakemake deletes declared outputs before it runs a step again.

    Args:
        folder: folder to be replaced; may not exist.
        expected: glob patterns of the names that the step writes.
        where: name of the step, for the message.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{where}: {folder} must be a folder, got a file: choose another")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if unexpected := [name for name in names if not any(fnmatch(name, pattern) for pattern in expected)]:
        raise InputError(
            f"{where}: {folder} must be new or hold an earlier result, since it is replaced, got {unexpected[0]} "
            "there: choose another"
        )


@contextmanager
def write_folder_beside(path: Path) -> Iterator[Path]:
    """`write_beside` for a whole folder; an earlier folder at `path` stays whole until it is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, earlier = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "earlier"))

    def restore() -> None:
        if earlier.exists() and not path.exists():
            earlier.rename(path)

    shutil.rmtree(partial, ignore_errors=True)
    restore()
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        shutil.rmtree(earlier, ignore_errors=True)
        if path.exists():
            path.rename(earlier)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        restore()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk: no rename may reach the disk before the renamed data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write `content`, keys in the order given, with a final newline; with indent None, by json's faster C encoder."""
    with write_beside(path) as partial:
        partial.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: {path} must be a file, got nothing there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {path} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: {path} must be a JSON object, got {type(content).__name__}")
    return content


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(content: Any) -> str:
    """Hex sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
