"""The data files that a shard's packing has finished, so that an interrupted one goes on after the last of them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sparsetrace.core.files import InputError, parse_json, sha256_json
from sparsetrace.packing.parts import has_size


class Journal:
    """One line of JSON for each finished file, after a line that names the dump; each beside its own hash.

    Args:
        out: the shard's manifest, beside which the journal lies.
        dump: hash of the dump and of how it is packed; the files of any other are not continued.
    """

    def __init__(self, out: Path, dump: str) -> None:
        self._path = out.with_name(f".{out.name}.journal")
        self._head = {"dump": dump}
        self._file: TextIO | None = None

    def finished(self, workload: Path) -> dict[str, dict[str, Any]]:
        """Manifest entries of the finished files that are still whole, by path."""
        if not self._path.is_file():
            return {}
        content = self._path.read_bytes()
        # the last line may have been cut off, and the next one is appended after it
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self._path, len(whole))
        try:
            entries = [_unsealed(parse_json(line, str(self._path))) for line in whole.splitlines()]
        except InputError:
            # damaged: every file is written again
            return {}
        if not entries or entries[0] != self._head:
            return {}
        return {entry["path"]: entry for entry in entries[1:] if has_size(workload / entry["path"], entry["bytes"])}

    @contextmanager
    def writing(self, goes_on: bool) -> Iterator[None]:
        """Keep the journal open for `note`.

        Args:
            goes_on: append to the journal; otherwise begin a new one.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a" if goes_on else "w", encoding="utf-8") as self._file:
            if not goes_on:
                self.note(self._head)
            yield

    def note(self, entry: dict[str, Any]) -> None:
        """Append one entry."""
        assert self._file is not None
        self._file.write(json.dumps([entry, sha256_json(entry)]) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Delete the journal."""
        self._path.unlink(missing_ok=True)


def _unsealed(line: Any) -> dict[str, Any]:
    """The entry of a line, which must be as it was written."""
    if not isinstance(line, list) or len(line) != 2 or sha256_json(line[0]) != line[1]:
        raise InputError("pack: a line of the journal must be an entry and its hash, got another")
    entry: dict[str, Any] = line[0]
    return entry
