"""A fault that `verify` finds, and what all its checks share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrace.core.files import sha256_file
from sparsetrace.core.folder import footer_sha256


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong.

    Args:
        where: file, or `workload`.
        what: the rule and what was found.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def file_faults(folder: Path, entry: dict[str, Any]) -> Iterator[Fault]:
    """Whether a file is there with the size and the hash in the manifest.

    Args:
        folder: of the workload.
        entry: its entry in the manifest.
    """
    path = folder / entry["path"]
    if not path.is_file():
        yield Fault(entry["path"], "must be there, got nothing")
    elif path.stat().st_size != entry["bytes"]:
        yield Fault(entry["path"], f"must have {entry['bytes']} bytes, got {path.stat().st_size}")
    elif (digest := sha256_file(path)) != entry["sha256"]:
        yield Fault(entry["path"], f"must have sha256 {entry['sha256'][:12]}, got {digest[:12]}")
    elif "footer_sha256" in entry and entry["footer_sha256"] != (footer := footer_sha256(path)):
        yield Fault("manifest.json", f"footer_sha256 of {entry['path']} must be {footer}, got {entry['footer_sha256']}")


def named(layer: int | None, matrix: str) -> str:
    """A layer and matrix in the words of a fault."""
    return matrix if layer is None else f"layer {layer} {matrix}"


def one_line(error: Exception) -> str:
    """The message of an error, on one line of limited length."""
    return " ".join(str(error).split())[:200]
