"""Reading a workload: numpy and pyarrow only, lazily, from several threads at once.

```python
ds = sparsetrace.open("results/demo/default/teal-0.5/workload")
ds[2, "down", 17]                                    # the operand as a dense numpy vector
ds.sparse(2, "down", 17)                             # (indices, values)
ds.matrix(2, "down").csr()                           # all its tokens as scipy CSR
ds.select(phase="decode", position=slice(0, 64))     # a part, with the same methods
ds.twin(seed=0)                                      # the same, masks at random
```
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsetrace.core.files import InputError
from sparsetrace.core.folder import Folder
from sparsetrace.formats.columns import decode_rows, operand_columns
from sparsetrace.formats.names import MATRICES, SITE_OF
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.ragged import runs
from sparsetrace.formats.rows import Rows, join, no_rows
from sparsetrace.formats.tables import PHASES
from sparsetrace.formats.versions import refuse_unknown_format
from sparsetrace.workload.schedule import Step, batches, replay
from sparsetrace.workload.twin import twin
from sparsetrace.workload.weights import Checkpoint

Tokens = int | slice | Iterable[int] | np.ndarray | None
Choice = int | slice | Iterable[int] | None
# Read row groups and file footers kept, per workload: a row is often followed by its neighbour.
CACHED_ROW_GROUPS = 8
CACHED_FOOTERS = 512
# Bytes of the row groups that are read together: a call of Arrow for each would cost more than what it reads. Of rows
# that are handed out one piece after another it is dense bytes, into which they may be made.
READ_BYTES = 4 << 20
FIGURES = ["token", "sequence", "position", "nnz", "absmax", "l2"]
# of one row
FIGURES_BYTES = 28


class _Files:
    """The files of one workload; holds nothing that threads could not share."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.manifest = folder.read_json("manifest.json")
        where = folder.where
        refuse_unknown_format(self.manifest, f"open: {where}")
        self.parts: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for file in self.manifest["files"]:
            if "matrix" in file and file["rows"]:
                self.parts.setdefault((file["layer"], file["matrix"]), []).append(file)
        for parts in self.parts.values():
            parts.sort(key=lambda part: part["first_token"])
        self.footer = lru_cache(CACHED_FOOTERS)(self._footer)
        self.recent = lru_cache(CACHED_ROW_GROUPS)(self.row_group)

    def __reduce__(self) -> tuple[type[_Files], tuple[Folder]]:
        # a worker process opens the files anew
        return _Files, (self.folder,)

    @cached_property
    def matrices(self) -> pa.Table:
        return self.folder.read_table("matrices.parquet")

    @cached_property
    def tokens(self) -> pa.Table:
        return self.folder.read_table("tokens.parquet")

    @cached_property
    def sequences(self) -> pa.Table:
        return self.folder.read_table("sequences.parquet")

    @cached_property
    def by_leaf(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Rows of `matrices.parquet`, in the order of execution."""
        rows = {(row["layer"], row["matrix"]): row for row in self.matrices.to_pylist()}
        return dict(sorted(rows.items(), key=lambda item: (item[0][0], MATRICES.index(item[0][1]))))

    def _footer(self, path: str) -> tuple[pq.FileMetaData, np.ndarray, list[str]]:
        """A part's metadata, the first token of each of its row groups, and its columns."""
        file = self.folder.parquet(path)
        names = file.schema_arrow.names
        column = file.metadata.schema.names.index("token")
        groups = (file.metadata.row_group(i).column(column).statistics.min for i in range(file.num_row_groups))
        return file.metadata, np.fromiter(groups, np.int64), names

    def row_group(self, path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
        """Columns of one row group, in an order that may differ."""
        return self.row_groups(path, group, group + 1, columns)

    def row_groups(self, path: str, start: int, stop: int, columns: tuple[str, ...]) -> pa.Table:
        """Columns of neighbouring row groups, in an order that may differ."""
        metadata, _, _ = self.footer(path)
        file = self.folder.parquet(path, metadata)
        try:
            return file.read_row_groups(range(start, stop), columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"workload: {path} must be undamaged, got {error}: run `sparsetrace verify`") from None


class Workload:
    """A packed workload or a part of one, opened lazily; safe to read from several threads.

    Args:
        path: the folder that holds `manifest.json`, on disk or at a URL that pyarrow or fsspec can open.
        model: folder of the converted model, or of the checkpoint it was made from, for `weight` and `product`.
        filesystem: a pyarrow or fsspec file system in which `path` is a path.

    Raises:
        InputError: there is no workload, or its version is unknown.
    """

    def __init__(self, path: str | Path, model: str | Path | None = None, filesystem: Any = None) -> None:
        self._files = _Files(Folder(path, filesystem))
        self.path = Path(path) if self._files.folder.local and filesystem is None else str(path)
        self.model = None if model is None else Path(model)
        self._checkpoint: Checkpoint | None = None
        self._chosen: np.ndarray | None = None
        self._leaves: list[tuple[int, str]] | None = None
        self._twin: _Twin | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checkpoint": None}

    @property
    def manifest(self) -> dict[str, Any]:
        """`manifest.json`."""
        return self._files.manifest

    @property
    def level(self) -> str:
        """What was captured of each operand, one of `schema.LEVELS`."""
        return str(self.manifest.get("capture", {}).get("level", "full"))

    @property
    def layers(self) -> int:
        """Number of layers, up to the last one that was captured."""
        return 1 + max(layer for layer, _ in self._files.by_leaf)

    @property
    def leaves(self) -> list[tuple[int, str]]:
        """Every (layer, matrix) of this selection, in the order of execution."""
        return list(self._files.by_leaf) if self._leaves is None else self._leaves

    @property
    def matrix_table(self) -> pa.Table:
        """`matrices.parquet`: shapes, thresholds, sparsity of every layer and matrix of the whole workload."""
        return self._files.matrices

    @property
    def token_table(self) -> pa.Table:
        """`tokens.parquet`: every position fed through the model."""
        return self._files.tokens

    @property
    def sequence_table(self) -> pa.Table:
        """`sequences.parquet`: prompts and outputs."""
        return self._files.sequences

    @cached_property
    def tokens(self) -> np.ndarray:
        """int64: numbers of the captured tokens of this selection, ascending."""
        if self._chosen is not None:
            return self._chosen
        captured = self.token_table.filter(pc.field("captured"))
        return np.sort(captured["token"].to_numpy())

    def fed(self) -> pa.Table:
        """`tokens.parquet` of the tokens of this selection, ascending: phase, group, step and slot of each."""
        table = self.token_table.sort_by("token")
        at = np.searchsorted(table["token"].to_numpy(), self.tokens)
        return table.take(pa.array(at))

    def features(self, layer: int, matrix: str) -> int:
        """Inputs of a matrix."""
        return int(self._row(layer, matrix)["in_features"])

    def select(
        self,
        *,
        layer: Choice = None,
        matrix: str | Iterable[str] | None = None,
        token: Choice = None,
        sequence: Choice = None,
        position: Choice = None,
        phase: str | Iterable[str] | None = None,
    ) -> Workload:
        """A part of this workload, with the same methods; nothing is read but `tokens.parquet`.

        Each argument is a value, a slice of values (start included, stop not, step from the start) or several values;
        all must hold. Tokens, sequences and positions that do not occur select nothing.

        Raises:
            InputError: no such layer, matrix or phase, or what is no number where one is needed.
        """
        part = copy.copy(self)
        part.__dict__.pop("tokens", None)
        matrices = _names(matrix, MATRICES, "matrix")
        phases = _names(phase, PHASES, "phase")
        known = np.arange(self.layers)
        if layer is None or isinstance(layer, slice):
            layers = known[_chosen(known, layer, "layer")]
        else:
            layers = _integers(layer, "layer")
        if not len(layers) or not np.isin(layers, known).all():
            asked = layer if isinstance(layer, slice) else ", ".join(map(str, layers)) or "none"
            raise InputError(f"workload: layer must be 0 to {self.layers - 1}, got {asked}")
        part._leaves = [(i, name) for i, name in self.leaves if i in layers and name in matrices]
        table = self.fed()
        keep = _chosen(self.tokens, token, "token")
        keep &= _chosen(table["sequence"].to_numpy(), sequence, "sequence")
        keep &= _chosen(table["position"].to_numpy(), position, "position")
        keep &= pc.is_in(table["phase"].cast(pa.string()), pa.array(phases)).to_numpy().astype(bool)
        part._chosen = self.tokens[keep]
        return part

    def twin(self, seed: int = 0) -> Workload:
        """The i.i.d. twin of this selection: the same tokens, masks drawn at random, see `sparsetrace.workload.twin`.

        The density of a layer and matrix is that of this selection; a part of a twin keeps the twin's own.

        Raises:
            InputError: a seed that is not 0 to 2**64 - 1.
        """
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
            raise InputError(f"twin: seed must be 0 to 2**64 - 1, got {seed!r}")
        part = copy.copy(self)
        part._twin = _Twin(self, seed)
        return part

    def __getitem__(self, key: tuple[int, str, Tokens]) -> np.ndarray:
        """`ds[layer, matrix, token]`: dense [D]; with a slice or list of tokens, dense [T, D].

        A slice counts tokens by number, as `ds.tokens` gives them; numbers that were not captured are skipped.
        """
        if not isinstance(key, tuple) or len(key) != 3:
            raise InputError(f"workload: index must be [layer, matrix, token], got {key!r}")
        layer, matrix, tokens = key
        rows = self.matrix(layer, matrix, tokens).dense()
        return rows[0] if isinstance(tokens, int | np.integer) else rows

    def sparse(self, layer: int, matrix: str, token: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices int32 [nnz], values [nnz]) of one operand."""
        rows = self.matrix(layer, matrix, _one(token))
        return rows.indices(), rows.values

    def matrix(self, layer: int, matrix: str, tokens: Tokens = None, values: bool = True) -> Rows:
        """Operands of one layer and matrix.

        Args:
            layer, matrix: which.
            tokens: a number, a slice of numbers, a list of numbers in any order, or None for all.
            values: False reads the masks alone.

        Raises:
            InputError: no such layer or matrix, or a number that was not captured.
        """
        wanted = self._numbers(tokens)
        ascending = np.argsort(wanted, kind="stable")
        row_bytes = self._dense_bytes(layer, matrix) if values else mask_bytes(self.features(layer, matrix))
        pieces = list(self._blocks(layer, matrix, wanted[ascending], values, row_bytes))
        if not pieces:
            held = values and self.level == "full"
            return no_rows(layer, matrix, self.features(layer, matrix), self.manifest["dtype"], held)
        back = np.empty_like(ascending)
        back[ascending] = np.arange(len(ascending))
        return join(pieces).take(back)

    def blocks(self, layer: int, matrix: str, values: bool = True, tokens: np.ndarray | None = None) -> Iterator[Rows]:
        """Operands of one layer and matrix, ascending by token, at most `READ_BYTES` or one row group at a time.

        Args:
            layer, matrix: which.
            values: False reads the masks alone.
            tokens: numbers, ascending; None for all.

        Raises:
            InputError: no such layer or matrix, or tokens that were not captured or do not ascend.
        """
        wanted = self.tokens if tokens is None else self._numbers(tokens)
        if not (np.diff(wanted) > 0).all():
            raise InputError("blocks: tokens must ascend, got others: use matrix(), which takes any order")
        return self._blocks(layer, matrix, wanted, values, self._dense_bytes(layer, matrix))

    def figures(self, layer: int, matrix: str) -> pa.Table:
        """token, sequence, position, nnz, absmax and l2 of each row of one layer and matrix, as stored.

        Raises:
            InputError: no such layer or matrix, or a twin, of which nothing is stored.
        """
        if self._twin is not None:
            raise InputError("figures: rows must be real ones, got the i.i.d. twin: use matrix(layer, matrix).nnz")
        source = self._source(layer, matrix)
        pieces = []
        for path, groups, wanted in self._places(source, self.tokens, FIGURES_BYTES):
            table = self._files.row_groups(path, *groups, tuple(FIGURES)).select(FIGURES)
            pieces.append(table.take(pa.array(self._found(table["token"].to_numpy(), wanted))))
        types = (pa.int64(), pa.int32(), pa.int32(), pa.int32(), pa.float32(), pa.float32())
        empty = pa.schema(list(zip(FIGURES, types, strict=True))).empty_table()
        return pa.concat_tables(pieces) if pieces else empty

    def density(self, layer: int, matrix: str) -> float:
        """Share of the inputs that the rows of one layer and matrix keep, over this selection.

        Of a twin it is the probability with which its inputs are kept.
        """
        if self._twin is not None:
            return self._twin.density(layer, matrix)
        if self._chosen is None:
            kept, rows = self._row(layer, matrix)["nnz"], self._row(layer, matrix)["rows"]
        else:
            kept, rows = pc.sum(self.figures(layer, matrix)["nnz"]).as_py() or 0, len(self.tokens)
        return float(kept / (rows * self.features(layer, matrix))) if rows else 0.0

    def replay(self, values: bool = False) -> Iterator[Step]:
        """Walk this selection in the order of execution: steps, and in each the layers, and in each the matrices.

        ```python
        for step in ds.replay():
            for rows in step:            # layer by layer, matrix by matrix
                rows.layer, rows.matrix, rows.keep()
        ```

        Args:
            values: read the values too; otherwise masks only.
        """
        return replay(self, values and self.level == "full")

    def batches(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Token numbers of rows multiplied together: as they were, or regrouped, see `schedule.batches`."""
        if size is not None and (not isinstance(size, int | np.integer) or size < 1):
            raise InputError(f"batches: size must be a whole number of at least 1, got {size}")
        return batches(self, size)

    def weight(self, layer: int, matrix: str, model: str | Path | None = None) -> np.ndarray:
        """The weight [in, out] that the operands of one layer and matrix are multiplied with.

        Args:
            layer, matrix: which.
            model: folder of the converted model or of its checkpoint; that given to `open` if None.

        Returns:
            float16 or float32, a view of the file where it is stored so; a bfloat16 weight is widened to float32.

        Raises:
            InputError: no model was named, or it is not the one that the workload was made with.
        """
        number = FORMATS[self.manifest["dtype"]]
        return number.to_float(self._weight_patterns(layer, matrix, model))

    def weight_mask(self, layer: int, matrix: str) -> np.ndarray | None:
        """Which weights a weight-side method kept, bool [in, out] as `weight` is; None for a dense model."""
        row = self._row(layer, matrix)
        if not any(file["path"] == "weight_masks.parquet" for file in self.manifest["files"]):
            return None
        file = self._files.folder.parquet("weight_masks.parquet")
        groups = (file.read_row_group(group, columns=["layer", "matrix"]) for group in range(file.num_row_groups))
        wanted = next(
            group
            for group, table in enumerate(groups)
            if (table["layer"][0].as_py(), table["matrix"][0].as_py()) == (layer, matrix)
        )
        masks = file.read_row_group(wanted, columns=["mask"])["mask"].to_pylist()
        packed = np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1)
        return np.unpackbits(packed, axis=1, count=row["out_features"], bitorder="little").view(bool)

    def product(self, layer: int, matrix: str, token: int) -> np.ndarray:
        """y = x W of one row, float32 [out], from the weight rows of the kept inputs, summed in float64.

        Outputs that the method says are not computed are 0.
        """
        rows = self.matrix(layer, matrix, _one(token))
        number = FORMATS[self.manifest["dtype"]]
        weight = number.to_float(self._weight_patterns(layer, matrix, None)[rows.indices()])
        y = (rows.values.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
        if rows.out_mask is not None:
            y[np.unpackbits(rows.out_mask[0], count=len(y), bitorder="little").view(bool)] = 0
        return y

    def _weight_patterns(self, layer: int, matrix: str, model: str | Path | None) -> np.ndarray:
        folder = self.model if model is None else Path(model)
        if folder is None:
            raise InputError("workload: model must be named for its weights, got none: open(path, model=FOLDER)")
        row, dtype = self._row(layer, matrix), self.manifest["dtype"]
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.folder != folder:
            checkpoint = self._checkpoint = Checkpoint(folder)
        site = [self._files.by_leaf.get((layer, name)) for name in MATRICES if SITE_OF[name] == row["site"]]
        checkpoint.check_once(row, [sibling for sibling in site if sibling is not None], dtype)
        return checkpoint.weight(row, dtype)

    def _row(self, layer: int, matrix: str) -> dict[str, Any]:
        try:
            return self._files.by_leaf[layer, matrix]
        except (KeyError, TypeError):
            raise InputError(
                f"workload: layer and matrix must be 0 to {self.layers - 1} and one of {', '.join(MATRICES)}, "
                f"got {layer} and {matrix!r}"
            ) from None

    def _source(self, layer: int, matrix: str) -> tuple[int, str]:
        """Where the rows of a layer and matrix are stored."""
        return layer, self._row(layer, matrix)["shares_input_with"] or matrix

    def _numbers(self, tokens: Tokens) -> np.ndarray:
        if tokens is None:
            return self.tokens
        if isinstance(tokens, slice):
            if tokens.step not in (None, 1):
                # of the numbers, or of the captured ones? `select` says
                raise InputError(f"workload: a slice of tokens must have step 1, got {tokens.step}")
            return self.tokens[_chosen(self.tokens, tokens, "token")]
        wanted = _integers(tokens, "token")
        if self._chosen is not None:
            self._found(self._chosen, wanted)
        return wanted

    def _found(self, numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Places of tokens among ascending numbers, all of which must be there."""
        at = np.searchsorted(numbers, wanted)
        missing = at == len(numbers)
        if len(numbers):
            missing |= numbers[np.minimum(at, len(numbers) - 1)] != wanted
        if missing.any():
            span = f"{len(self.tokens)} between {self.tokens[0]} and {self.tokens[-1]}" if len(self.tokens) else "none"
            raise InputError(
                f"workload: token must be one that was captured (see ds.tokens: {span}), got {wanted[missing][0]}"
            )
        return at

    def _places(
        self, source: tuple[int, str], wanted: np.ndarray, row_bytes: int
    ) -> Iterator[tuple[str, tuple[int, int], np.ndarray]]:
        """Part, neighbouring row groups (first, last + 1) and tokens, for ascending tokens of a stored leaf."""
        parts = self._files.parts.get(source, [])
        # a part that starts after a token does not hold it
        which = np.searchsorted([part["first_token"] for part in parts], wanted, side="right") - 1
        for start, stop in runs(which):
            if which[start] < 0:
                self._found(np.empty(0, np.int64), wanted[start:])
            path, chosen = parts[which[start]]["path"], wanted[start:stop]
            metadata, first_tokens, _ = self._files.footer(path)
            together = max(1, READ_BYTES // (metadata.row_group(0).num_rows * row_bytes))
            group = np.searchsorted(first_tokens, chosen, side="right") - 1
            first = 0
            for low, high in _neighbours(group[np.r_[True, np.diff(group) > 0]].tolist(), together):
                last = int(np.searchsorted(group, high))
                yield path, (low, high), chosen[first:last]
                first = last

    def _dense_bytes(self, layer: int, matrix: str) -> int:
        """Of a row."""
        return self.features(layer, matrix) * FORMATS[self.manifest["dtype"]].bits.itemsize

    def _blocks(self, layer: int, matrix: str, wanted: np.ndarray, values: bool, row_bytes: int) -> Iterator[Rows]:
        source = self._source(layer, matrix)
        features, number = self.features(layer, matrix), FORMATS[self.manifest["dtype"]]
        if self.level == "stats":
            raise InputError("workload: operands must have been captured, got level `stats`: use figures()")
        for path, (first_group, stop_group), chosen in self._places(source, wanted, row_bytes):
            names = self._files.footer(path)[2]
            columns = ("token", *operand_columns(names, values))
            # one row of many: the next one asked for is likely its neighbour
            if len(chosen) < 8 and stop_group - first_group == 1:
                table = self._files.recent(path, first_group, columns)
            else:
                table = self._files.row_groups(path, first_group, stop_group, columns)
            at = self._found(table["token"].to_numpy(), chosen)
            if len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
                rows = decode_rows(table.slice(at[0], len(at)), layer, matrix, features, number)
            else:
                first = int(at[0])
                near = table.slice(first, int(at[-1]) + 1 - first)
                rows = decode_rows(near, layer, matrix, features, number).take(at - first)
            if self._twin is not None:
                rows = twin(rows, self._twin.density(layer, matrix), self._twin.seed)
            yield rows

    def __repr__(self) -> str:
        table = self.matrix_table.to_pydict()
        lines = [
            f"sparsetrace workload {self._files.folder.where}",
            f"  model     {self.manifest['source']}, {self.layers} layers, {self.manifest['dtype']}",
            f"  method    {self.manifest['label']}",
            f"  tokens    {self.manifest['tokens']:,} captured of {self.token_table.num_rows:,} fed, "
            f"in {self.sequence_table.num_rows:,} sequences",
            f"  rows      {self.manifest['rows']:,} (layer x matrix x token), {self.manifest['nnz']:,} nonzeros",
            f"  on disk   {sum(file['bytes'] for file in self.manifest['files']) / 1e6:,.1f} MB",
        ]
        if self._chosen is not None:
            lines.append(f"  selected  {len(self.tokens):,} tokens of {len(self.leaves)} matrices")
        if self._twin is not None:
            lines.append(f"  masks     i.i.d. twin, seed {self._twin.seed}")
        lines += ["", f"  {'matrix':8}{'inputs':>8}{'outputs':>9}{'target':>9}{'calibrated':>12}{'achieved':>10}"]
        for matrix in MATRICES:
            at = [i for i, name in enumerate(table["matrix"]) if name == matrix]
            if not at:
                continue
            shares = [
                _mean([table[f"{kind}_sparsity"][i] for i in at]) for kind in ("target", "calibrated", "achieved")
            ]
            cells = ["-" if share is None else f"{share:.4f}" for share in shares]
            lines.append(
                f"  {matrix:8}{table['in_features'][at[0]]:>8}{table['out_features'][at[0]]:>9}"
                f"{cells[0]:>9}{cells[1]:>12}{cells[2]:>10}"
            )
        return "\n".join(lines)


class _Twin:
    """What the twin of a selection needs to know of it."""

    def __init__(self, of: Workload, seed: int) -> None:
        self.of = of
        self.seed = seed
        self._densities: dict[tuple[int, str], float] = {}

    def density(self, layer: int, matrix: str) -> float:
        if (layer, matrix) not in self._densities:
            self._densities[layer, matrix] = self.of.density(layer, matrix)
        return self._densities[layer, matrix]


def open(path: str | Path, model: str | Path | None = None, filesystem: Any = None) -> Workload:
    """Open a workload folder; the arguments are those of `Workload`. Reads as `sparsetrace.open`."""
    return Workload(path, model, filesystem)


def _neighbours(numbers: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, last + 1) of ascending numbers without a gap, at most so many each."""
    start = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], -1], strict=True):
        if following != number + 1 or following - start == most:
            yield start, number + 1
            start = following


def _names(wanted: str | Iterable[str] | None, known: tuple[str, ...], what: str) -> list[str]:
    if wanted is None:
        return list(known)
    names = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"workload: {what} must be among {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return names


def _chosen(numbers: np.ndarray, choice: Choice, what: str) -> np.ndarray:
    """bool: which numbers a choice takes."""
    if choice is None:
        return np.ones(len(numbers), bool)
    if not isinstance(choice, slice):
        return np.isin(numbers, _integers(choice, what))
    start = 0 if choice.start is None else choice.start
    step = 1 if choice.step is None else choice.step
    bounds = (start, start if choice.stop is None else choice.stop, step)
    if not all(isinstance(bound, int | np.integer) for bound in bounds) or min(bounds) < 0 or step < 1:
        raise InputError(
            f"workload: a slice of {what} must have a start and stop from 0 and a step from 1, got {choice}"
        )
    keep = numbers >= start
    if choice.stop is not None:
        keep &= numbers < choice.stop
    return keep if step == 1 else keep & ((numbers - start) % step == 0)


def _integers(choice: int | Iterable[int] | np.ndarray, what: str) -> np.ndarray:
    """int64 [n]: a number or several, in the order given; a truth value or a fraction is none."""
    several = isinstance(choice, Iterable) and not isinstance(choice, str | np.ndarray)
    numbers = np.atleast_1d(np.asarray(list(choice) if several else choice))  # type: ignore[arg-type]
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
        got = reprlib.repr(choice)
        raise InputError(f"workload: {what} must be a whole number, a slice or a list of them, got {got}")
    return numbers.astype(np.int64)


def _one(token: int) -> int:
    """A token, where a slice or several would run together in one flat answer."""
    if not isinstance(token, int | np.integer):
        raise InputError(f"workload: token must be one number, got {token!r}: use matrix() for several")
    return int(token)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
