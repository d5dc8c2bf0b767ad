"""Rows of a long computation, kept in a file of JSON lines so that an interrupted one goes on where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsetrace.core.files import InputError, parse_json

Row = dict[str, float]


@contextmanager
def journal(path: Path, key: str) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """Rows found before, and a function that adds one to them and to the file.

    The file is removed when the block ends well, and stays when it does not.

    Args:
        path: of the file; rows of another key are dropped.
        key: of everything that the rows depend on.
    """
    rows = _read(path, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:

        def write(entry: object) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        def add(row: Row) -> None:
            write(row)
            rows.append(row)

        for entry in ({"key": key}, *rows):
            write(entry)
        yield rows, add
    path.unlink()


def _read(path: Path, key: str) -> list[Row]:
    if not path.is_file():
        return []
    # the last line may have been cut off
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        entries = [parse_json(line, str(path)) for line in lines]
    except InputError:
        # damaged: the rows are computed again
        return []
    return entries[1:] if entries and entries[0] == {"key": key} else []
