"""The files of a workload: its tables, and the row groups in which the rows of given tokens lie."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError, sha256_json
from sparsetrace.core.folder import Folder
from sparsetrace.formats.columns import decode_rows, operand_columns
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.ragged import runs
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.sites import Leaf
from sparsetrace.formats.versions import refuse_unknown_format
from sparsetrace.workload.selection import layer_count

# Row groups and footers cached for each workload: after a row, its neighbour is often read.
CACHED_ROW_GROUPS = 8
CACHED_FOOTERS = 512
# Row groups are read together up to this size, counted as dense operands, into which they may be expanded: one call of
# Arrow for each small row group would cost more than reading it.
READ_BYTES = 4 << 20


class MissingTokenError(LookupError):
    """A token has no row where it was looked for; the reader turns this into an `InputError`.

    Args:
        token: the first such token.
    """

    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.token = token


def places(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of tokens among ascending numbers.

    Raises:
        MissingTokenError: one of them is not there.
    """
    at = np.searchsorted(numbers, wanted)
    missing = at == len(numbers)
    if len(numbers):
        missing |= numbers[np.minimum(at, len(numbers) - 1)] != wanted
    if missing.any():
        raise MissingTokenError(int(wanted[missing][0]))
    return at


class StoredWorkload:
    """The files of one workload, opened lazily; threads may share it.

    Args:
        folder: of the workload.

    Attributes:
        manifest: content of `manifest.json`.

    Raises:
        InputError: there is no workload, or its version is unknown.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.manifest = folder.read_json("manifest.json")
        refuse_unknown_format(self.manifest, f"open: {folder.where}")
        _refuse_misshapen(self.manifest, f"open: {folder.where}/manifest.json")
        self._entries: dict[str, dict[str, Any]] = {file["path"]: file for file in self.manifest["files"]}
        self._parts: dict[Leaf, list[dict[str, Any]]] = {}
        for file in self.manifest["files"]:
            if "matrix" in file and file["rows"]:
                self._parts.setdefault((file["layer"], file["matrix"]), []).append(file)
        for parts in self._parts.values():
            parts.sort(key=lambda part: part["first_token"])
        self.footer = lru_cache(CACHED_FOOTERS)(self._footer)
        self.recent = lru_cache(CACHED_ROW_GROUPS)(self._row_group)
        self._own_tokens: dict[Leaf, np.ndarray] = {}

    def __reduce__(self) -> tuple[type[StoredWorkload], tuple[Folder]]:
        # a worker process opens the files itself
        return StoredWorkload, (self.folder,)

    @cached_property
    def matrices(self) -> pa.Table:
        """`matrices.parquet`."""
        return self._table("matrices.parquet")

    @cached_property
    def tokens(self) -> pa.Table:
        """`tokens.parquet`."""
        return self._table("tokens.parquet")

    @cached_property
    def sequences(self) -> pa.Table:
        """`sequences.parquet`."""
        return self._table("sequences.parquet")

    def _table(self, name: str) -> pa.Table:
        """A table beside the data files, checked against its hash in the manifest."""
        return self.folder.read_table(name, self._entries.get(name, {}).get("sha256"))

    @cached_property
    def by_leaf(self) -> dict[Leaf, dict[str, Any]]:
        """Rows of `matrices.parquet` by layer and matrix, in its order, which is that of execution."""
        return {(row["layer"], row["matrix"]): row for row in self.matrices.to_pylist()}

    @cached_property
    def layers(self) -> int:
        """Number of layers, up to the last one that was captured."""
        return layer_count(self.by_leaf)

    @cached_property
    def captured(self) -> np.ndarray:
        """int64: numbers of the captured tokens, ascending."""
        return np.sort(self.tokens.filter(pc.field("captured"))["token"].to_numpy())

    def row(self, layer: int | None, matrix: str) -> dict[str, Any]:
        """The row of `matrices.parquet` of one layer and matrix.

        Raises:
            InputError: there is none.
        """
        try:
            return self.by_leaf[layer, matrix]
        except (KeyError, TypeError):
            known = []
            if in_layers := dict.fromkeys(name for number, name in self.by_leaf if number is not None):
                known.append(f"0 to {self.layers - 1} and one of {', '.join(in_layers)}")
            if others := [name for number, name in self.by_leaf if number is None]:
                known.append(f"None and one of {', '.join(others)}")
            raise InputError(
                f"workload: layer and matrix must be {', or '.join(known)}, got {layer} and {matrix!r}"
            ) from None

    def source(self, layer: int | None, matrix: str) -> Leaf:
        """The layer and matrix under which the rows of one layer and matrix are stored."""
        return layer, self.row(layer, matrix)["shares_input_with"] or matrix

    def tokens_of(self, layer: int | None, matrix: str) -> np.ndarray:
        """int64: numbers of the tokens that have a row in one layer and matrix, ascending; `captured` itself if all."""
        source = self.source(layer, matrix)
        if self.row(*source)["rows"] == self.manifest["tokens"]:
            return self.captured
        if source not in self._own_tokens:
            pieces = [np.empty(0, np.int64)]
            for part in self._parts.get(source, []):
                metadata, _, _ = self.footer(part["path"])
                table = self.row_groups(part["path"], 0, metadata.num_row_groups, ("token",))
                pieces.append(table["token"].to_numpy())
            self._own_tokens[source] = np.concatenate(pieces)
        return self._own_tokens[source]

    def locate(
        self, source: Leaf, wanted: np.ndarray, row_bytes: int
    ) -> Iterator[tuple[str, tuple[int, int], np.ndarray]]:
        """Where the rows of some tokens lie.

        Args:
            source: layer and matrix under which the rows are stored.
            wanted: int64, token numbers, ascending.
            row_bytes: bytes of a row in memory; `READ_BYTES` of rows are read at once.

        Yields:
            Path of a file, first and last + 1 of neighbouring row groups in it, and the tokens looked for in these.

        Raises:
            MissingTokenError: a token before the first row.
        """
        parts = self._parts.get(source, [])
        # the last part that begins at the token or before it
        which = np.searchsorted([part["first_token"] for part in parts], wanted, side="right") - 1
        for start, stop in runs(which):
            if which[start] < 0:
                raise MissingTokenError(int(wanted[start]))
            path, chosen = parts[which[start]]["path"], wanted[start:stop]
            metadata, first_tokens, _ = self.footer(path)
            together = max(1, READ_BYTES // (metadata.row_group(0).num_rows * row_bytes))
            group = np.searchsorted(first_tokens, chosen, side="right") - 1
            first = 0
            for low, high in neighbours(group[np.r_[True, np.diff(group) > 0]].tolist(), together):
                last = int(np.searchsorted(group, high))
                yield path, (low, high), chosen[first:last]
                first = last

    def row_groups(self, path: str, start: int, stop: int, columns: tuple[str, ...]) -> pa.Table:
        """Columns of neighbouring row groups; their order may differ."""
        metadata, _, _ = self.footer(path)
        file = self.folder.parquet(path, metadata)
        try:
            return file.read_row_groups(range(start, stop), columns=list(columns), use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(path, error) from None

    def _row_group(self, path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
        """Columns of one row group; `recent` is the same with a cache."""
        return self.row_groups(path, group, group + 1, columns)

    def _footer(self, path: str) -> tuple[pq.FileMetaData, np.ndarray, list[str]]:
        """Metadata, first token of each row group, and columns of a file; `footer` is the same with a cache."""
        metadata = self.folder.footer(path, self._entries.get(path, {}).get("footer_sha256"))
        names = metadata.schema.to_arrow_schema().names
        try:
            column = metadata.schema.names.index("token")
            groups = [metadata.row_group(i).column(column).statistics.min for i in range(metadata.num_row_groups)]
            return metadata, np.array(groups, np.int64), names
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(f"workload: {path} must have tokens with statistics, got {error}") from None


def _damaged(path: str, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    return InputError(f"workload: {path} must be undamaged, got {text}: run `sparsetrace verify`")


# Keys of a manifest that the reader needs, and those of its files; `sparsetrace verify` knows them all.
_MANIFEST = {"dtype": str, "tokens": int, "files": list}
_FILE = {"path": str, "rows": int}
_DATA_FILE = _FILE | {"matrix": str, "first_token": int}


def _refuse_misshapen(manifest: dict[str, Any], where: str) -> None:
    """Refuse a manifest that was damaged or lacks what the reader needs.

    Raises:
        InputError: names the first such key.
    """
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if manifest.get("sha256", (digest := sha256_json(content))) != digest:
        raise InputError(
            f"{where} must have the sha256 that was written into it, got damaged: run `sparsetrace verify`"
        )
    _refuse_keys(manifest, _MANIFEST, where)
    if manifest["dtype"] not in FORMATS:
        raise InputError(f"{where}: dtype must be one of {', '.join(FORMATS)}, got {manifest['dtype']}")
    for file in manifest["files"]:
        if not isinstance(file, dict):
            raise InputError(f"{where}: files must be objects, got {file!r}")
        holds_rows = "matrix" in file and file.get("rows")
        _refuse_keys(file, _DATA_FILE if holds_rows else _FILE, f"{where}: {file.get('path', 'a file')}")
        if holds_rows and not isinstance(file.get("layer", ""), int | None):
            raise InputError(f"{where}: {file['path']}: layer must be a number or null, got {file.get('layer')!r}")


def _refuse_keys(content: dict[str, Any], keys: dict[str, type], where: str) -> None:
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{where}: {key} must be {kind.__name__}, got {content.get(key)!r}")


def read_rows(stored: StoredWorkload, leaf: Leaf, wanted: np.ndarray, values: bool, row_bytes: int) -> Iterator[Rows]:
    """Operands of one layer and matrix, `READ_BYTES` or one row group at a time.

    Args:
        stored: the workload.
        leaf: layer and matrix.
        wanted: int64, token numbers, ascending.
        values: False reads the masks alone.
        row_bytes: bytes of a row in memory.

    Raises:
        MissingTokenError: a token without a row.
    """
    layer, matrix = leaf
    features, number = stored.row(layer, matrix)["in_features"], FORMATS[stored.manifest["dtype"]]
    for path, (first_group, stop_group), chosen in stored.locate(stored.source(layer, matrix), wanted, row_bytes):
        _, _, names = stored.footer(path)
        columns = ("token", *operand_columns(names, values))
        # few rows: those asked for next are likely in the same row group
        if len(chosen) < 8 and stop_group - first_group == 1:
            table = stored.recent(path, first_group, columns)
        else:
            table = stored.row_groups(path, first_group, stop_group, columns)
        at = places(table["token"].to_numpy(), chosen)
        first, last = int(at[0]), int(at[-1])
        try:
            rows = decode_rows(table.slice(first, last + 1 - first), layer, matrix, features, number)
        except (ValueError, IndexError, KeyError, pa.ArrowException) as error:
            raise _damaged(path, error) from None
        # copies only if rows in between are left out
        yield rows.take(at - first)


def neighbours(numbers: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, last + 1) of ascending numbers without a gap, each of at most `most` numbers."""
    start = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], -1], strict=True):
        if following != number + 1 or following - start == most:
            yield start, number + 1
            start = following
