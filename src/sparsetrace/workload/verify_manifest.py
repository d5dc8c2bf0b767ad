"""The manifest of a workload: the keys that it must have, their types, and its method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from sparsetrace.core.files import InputError, inside, refuse_outside_name
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.schema import ENCODINGS, LEVELS
from sparsetrace.methods import METHODS, Method
from sparsetrace.workload.verify_faults import Fault, one_line

# Types of the manifest's keys, and of those of its files: docs/format.md says what they mean.
MANIFEST: dict[str, type | UnionType] = {
    **dict.fromkeys(("model_hash", "source", "source_hash", "dtype", "label", "method", "encoding", "device"), str),
    **dict.fromkeys(("parameters", "decoding", "batching", "capture", "versions", "packed_with"), dict),
    **dict.fromkeys(("threads", "tokens", "rows", "nnz"), int),
    **dict.fromkeys(("given", "tuning"), str | None),
    **dict.fromkeys(("calibration", "study"), dict | None),
    **{"share_inputs": bool, "engine": str, "smaller_batches": dict, "commits": list, "files": list},
}
FILE: dict[str, type | UnionType] = {"path": str, "rows": int, "bytes": int, "sha256": str}
DATA_FILE: dict[str, type | UnionType] = FILE | {
    **{"layer": int | None, "matrix": str, "nnz": int},
    **{"first_token": int | None, "last_token": int | None},
}


def manifest_faults(manifest: dict[str, Any]) -> Iterator[Fault]:
    """Keys that the manifest, or one of its files, lacks or that hold what they cannot."""
    parts = [("", manifest, MANIFEST)]
    if isinstance(manifest.get("files"), list):
        for file in manifest["files"]:
            if not isinstance(file, dict):
                yield Fault("manifest.json", f"files must be objects, got {file!r}")
                continue
            holds_rows = "layer" in file or str(file.get("path", "")).startswith("data/")
            parts.append((f" of {file.get('path', 'a file')}", file, DATA_FILE if holds_rows else FILE))
    for of, part, types in parts:
        for key, kind in types.items():
            if key not in part:
                yield Fault("manifest.json", f"{key}{of} must be there, got nothing")
            elif not isinstance(part[key], kind):
                name = getattr(kind, "__name__", str(kind))
                yield Fault("manifest.json", f"{key}{of} must be {name}, got {part[key]!r}")
            elif key == "path":
                try:
                    refuse_outside_name(part[key], "files")
                except InputError as error:
                    yield Fault("manifest.json", str(error))
    capture = manifest.get("capture")
    level = capture.get("level") if isinstance(capture, dict) else None
    for key, value, among in (
        ("dtype", manifest.get("dtype"), tuple(FORMATS)),
        ("encoding", manifest.get("encoding"), ENCODINGS),
        ("level", level, LEVELS),
    ):
        if value not in among:
            yield Fault("manifest.json", f"{key} must be one of {', '.join(among)}, got {value}")


def link_faults(folder: Path, manifest: dict[str, Any]) -> Iterator[Fault]:
    """Files of the manifest that are links to a place outside the folder.

    Args:
        folder: of the workload.
        manifest: with names that lie below it.
    """
    for file in manifest["files"]:
        try:
            inside(folder, file["path"], "files")
        except InputError as error:
            yield Fault("manifest.json", str(error))


def method_of(manifest: dict[str, Any], faults: list[Fault]) -> Method | None:
    """The method of the manifest; None if this package does not have it, so that its rule cannot be checked.

    Args:
        manifest: of the workload.
        faults: receives a fault if the parameters are not the method's.
    """
    if manifest["method"] not in METHODS:
        return None
    try:
        return METHODS[manifest["method"]](**manifest["parameters"])
    except (ValueError, TypeError) as error:
        what = f"parameters must be those of method {manifest['method']}, got {one_line(error)}"
        faults.append(Fault("manifest.json", what))
        return None
