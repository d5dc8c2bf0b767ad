"""Files that are written whole or not at all, their hashes, and the error that users see.

Every file is written under a temporary name beside its final one and then renamed: a file with its final name is
complete, whatever was killed.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HASH_CHUNK_BYTES = 1 << 22
# Characters of a message's line, at its begin and end, that are kept of a longer one.
MESSAGE_HEAD, MESSAGE_TAIL = 700, 250


class InputError(ValueError):
    """An error that a user can cause and mend; the command line prints it as one line, without a traceback.

    Form: `<where>: <name> must be <rule>, got <value>`, then the reason or the remedy. A line that a value from a file
    makes very long is cut in the middle, since its end says what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(_cut, message.split("\n"))))


def _cut(line: str) -> str:
    if len(line) <= MESSAGE_HEAD + MESSAGE_TAIL:
        return line
    return f"{line[:MESSAGE_HEAD]} ... {line[-MESSAGE_TAIL:]}"


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
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # of a full disk the system does not say which file was written
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
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
    return parse_json_object(read_regular(path, where), f"{where}: {path}")


def parse_json_object(text: str | bytes, where: str, what: str = "JSON") -> dict[str, Any]:
    """The object of a JSON text; arguments as in `parse_json`.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    content = parse_json(text, where, what)
    if not isinstance(content, dict):
        raise InputError(f"{where} must be a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str | bytes, where: str, what: str = "JSON") -> Any:
    """The value of a JSON text.

    Args:
        text: in UTF-8 if bytes.
        where: for the message, `<step>: <place>`.
        what: what it must be, for the message.

    Raises:
        InputError: no JSON, a key that stands twice in one object, nesting that is too deep, or a number of thousands
            of digits.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_distinct)
    except RecursionError:
        raise InputError(f"{where} must be {what} of a few levels, got deeper nesting") from None
    # what the parser raises, of characters, syntax and numbers, is always this
    except ValueError as error:
        raise InputError(f"{where} must be {what}, got {' '.join(str(error).split())}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def write_sealed_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> dict[str, Any]:
    """`write_json` of an object with its own hash under `sha256`, which `read_sealed_json` checks; returns both."""
    sealed = content | {"sha256": sha256_json(content)}
    write_json(path, sealed, indent)
    return sealed


def read_sealed_json(path: Path, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that was written with its own hash; one without was written by hand.

    Args:
        path: of the file.
        where: name of the step, for messages.
        keys: that it must have.

    Returns:
        The object without its hash.

    Raises:
        InputError: the file is missing, damaged, or lacks a key.
    """
    content = read_json(path, where)
    digest = content.pop("sha256", None)
    if digest is not None and digest != sha256_json(content):
        raise InputError(f"{where}: {path} must have the sha256 that it was written with, got damaged: make it again")
    if missing := [key for key in keys if key not in content]:
        raise InputError(f"{where}: {path} must have {', '.join(missing)}, got no such key: make it again")
    return content


def read_regular(path: Path, where: str, what: str = "a file", most: int | None = None) -> bytes:
    """The bytes of a regular file; pipes and devices, which may never end, are refused.

    Args:
        path: of the file.
        where: name of the step, for messages.
        what: what the file must be, for messages.
        most: bytes that it may have.

    Raises:
        InputError: there is no such file, it cannot be read, or it is longer.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            raise InputError(f"{where}: {path} must be {what}, got {kind}")
        if most is not None and found.st_size > most:
            raise InputError(f"{where}: {path} must have at most {most:,} bytes, got {found.st_size:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{where}: {path} must be {what}, got nothing there") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        # a path may hold what no file name can, such as a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{where}: {str(path)!r} must be {what} that can be read, got {reason}") from None


def inside(folder: Path, name: str, where: str) -> Path:
    """Path of a file that a manifest or an index names, which must lie in the folder of that manifest or index.

    Links may lead elsewhere within the folder, and in the cache of the Hugging Face hub to its `blobs`, where all files
    of a snapshot are.

    Args:
        folder: in which the file must lie.
        name: as it stands in the manifest, with `/` between its parts.
        where: for the message, `<step>: <place>`.

    Raises:
        InputError: an absolute name, one with `..`, or a link that leads outside.
    """
    refuse_outside_name(name, where)
    path = folder / name
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    allowed = [root]
    if "snapshots" in root.parts:
        allowed.append(Path(*root.parts[: root.parts.index("snapshots")], "blobs"))
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{where} must name files in its own folder, got {name!r}, a link to {real}")
    return path


def refuse_outside_name(name: Any, where: str) -> None:
    """Refuse the name of a file that could lie outside the folder it is relative to; see `inside`."""
    known = isinstance(name, str) and name and not set(name) & {"\0", "\\"}
    if not known or name.startswith("/") or {"..", "."} & set(name.split("/")):
        raise InputError(f"{where} must name files by a path below its own folder, got {name!r}")


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
