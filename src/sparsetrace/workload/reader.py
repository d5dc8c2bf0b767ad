"""Reads a workload, lazily and with numpy and pyarrow alone; threads may share it.

```python
ds = sparsetrace.open("results/demo/default/teal-0.5/workload")
ds[2, "down", 17]                                    # the operand as a dense numpy vector
ds.sparse(2, "down", 17)                             # (indices, values)
ds.matrix(2, "down").csr()                           # all its tokens as scipy CSR
ds.matrix(None, "lm_head")                           # a matrix of the model as a whole, which is in no layer
ds.select(phase="decode", position=slice(0, 64))     # a selection, with the same methods
ds.twin(seed=0)                                      # the same, masks at random
```
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.core.files import InputError
from sparsetrace.core.folder import Folder
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.rows import Rows, join, no_rows
from sparsetrace.formats.schema import data_schema, leaf
from sparsetrace.formats.sites import Leaf
from sparsetrace.formats.tables import PHASES
from sparsetrace.workload.schedule import Step, batches, replay
from sparsetrace.workload.selection import Choice, Tokens, choose, choose_leaves, choose_names, integers, one_token
from sparsetrace.workload.stored import MissingTokenError, StoredWorkload, places, read_rows
from sparsetrace.workload.summary import summary
from sparsetrace.workload.twin import Twin
from sparsetrace.workload.weights import Checkpoint, read_weight_mask

ROW_STATISTICS = ("token", "sequence", "position", "nnz", "absmax", "l2")
ROW_STATISTICS_BYTES = 28


class Workload:
    """A packed workload or a selection of it, read lazily; threads may share it.

    A matrix is addressed by its layer and its name; the layer is None for one that belongs to the model as a whole,
    such as `lm_head`. Such a matrix may have rows for some of the captured tokens only, which `tokens_of` gives; asking
    for the row of another token is refused.

    Args:
        path: the folder that holds `manifest.json`, on disk or at a URL that pyarrow or fsspec can open.
        model: folder of the converted model, or of the checkpoint it was made from, for `weight` and `product`.
        filesystem: a pyarrow or fsspec file system in which `path` is a path.

    Raises:
        InputError: there is no workload, or its version is unknown.
    """

    def __init__(self, path: str | Path, model: str | Path | None = None, filesystem: Any = None) -> None:
        self._stored = StoredWorkload(Folder(path, filesystem))
        self.path = Path(path) if self._stored.folder.local and filesystem is None else str(path)
        self.model = None if model is None else Path(model)
        self._checkpoint: Checkpoint | None = None
        # None: everything is selected
        self._tokens: np.ndarray | None = None
        self._leaves: list[Leaf] | None = None
        self._twin: Twin | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checkpoint": None}

    def __repr__(self) -> str:
        selection = []
        if self._tokens is not None:
            selection.append(f"  selected  {len(self.tokens):,} tokens of {len(self.leaves)} matrices")
        if self._twin is not None:
            selection.append(f"  masks     i.i.d. twin, seed {self._twin.seed}")
        return summary(self._stored, selection)

    @property
    def manifest(self) -> dict[str, Any]:
        """`manifest.json`."""
        return self._stored.manifest

    @property
    def level(self) -> str:
        """How much was captured of each operand, one of `schema.LEVELS`."""
        return str(self.manifest.get("capture", {}).get("level", "full"))

    @property
    def layers(self) -> int:
        """Number of layers, up to the last one that was captured."""
        return self._stored.layers

    @property
    def leaves(self) -> list[Leaf]:
        """Every (layer, matrix) of this selection, in the order of execution; the layer is None outside layers."""
        return list(self._stored.by_leaf) if self._leaves is None else self._leaves

    @property
    def matrix_table(self) -> pa.Table:
        """`matrices.parquet`: shapes, thresholds, sparsity of every layer and matrix of the whole workload."""
        return self._stored.matrices

    @property
    def token_table(self) -> pa.Table:
        """`tokens.parquet`: every position fed through the model."""
        return self._stored.tokens

    @property
    def sequence_table(self) -> pa.Table:
        """`sequences.parquet`: prompts and outputs."""
        return self._stored.sequences

    @property
    def tokens(self) -> np.ndarray:
        """int64: numbers of the captured tokens of this selection, ascending."""
        return self._stored.captured if self._tokens is None else self._tokens

    def tokens_of(self, layer: int | None, matrix: str) -> np.ndarray:
        """int64: numbers of the tokens of this selection that have a row in one layer and matrix, ascending.

        All of `tokens`, except for a matrix that saw some tokens only: of a prompt, `lm_head` sees the last position.

        Raises:
            InputError: no such layer or matrix.
        """
        own = self._stored.tokens_of(layer, matrix)
        if self._tokens is None:
            return own
        return self._tokens if own is self._stored.captured else own[np.isin(own, self._tokens, assume_unique=True)]

    def fed(self) -> pa.Table:
        """`tokens.parquet` of the tokens of this selection, ascending: phase, group, step and slot of each."""
        table = self.token_table.sort_by("token")
        at = np.searchsorted(table["token"].to_numpy(), self.tokens)
        return table.take(pa.array(at))

    def features(self, layer: int | None, matrix: str) -> int:
        """Inputs of a matrix."""
        return int(self._stored.row(layer, matrix)["in_features"])

    def outputs(self, layer: int | None, matrix: str) -> int:
        """Outputs of a matrix."""
        return int(self._stored.row(layer, matrix)["out_features"])

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
        """A selection of this workload, with the same methods; only `tokens.parquet` is read.

        Each argument is a value, a slice of values (start included, stop not, step from the start) or several values;
        all must hold. Tokens, sequences and positions that do not occur select nothing. Layer numbers select matrices
        within these layers; `lm_head`, which is in no layer, is selected if `layer` is left out.

        Raises:
            InputError: no such layer, matrix or phase, or something that is not a number where one is needed.
        """
        selected = copy.copy(self)
        selected._leaves = choose_leaves(self.leaves, self._stored.by_leaf, layer, matrix)
        phases = choose_names(phase, PHASES, "phase")
        table = self.fed()
        keep = choose(self.tokens, token, "token")
        keep &= choose(table["sequence"].to_numpy(), sequence, "sequence")
        keep &= choose(table["position"].to_numpy(), position, "position")
        keep &= pc.is_in(table["phase"].cast(pa.string()), pa.array(phases)).to_numpy().astype(bool)
        selected._tokens = self.tokens[keep]
        return selected

    def twin(self, seed: int = 0) -> Workload:
        """The i.i.d. twin of this selection: the same tokens with random masks, see `sparsetrace.workload.twin`.

        The density of each layer and matrix is that of this selection; selecting from the twin does not change it.

        Raises:
            InputError: a seed that is not 0 to 2**64 - 1.
        """
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
            raise InputError(f"twin: seed must be 0 to 2**64 - 1, got {seed!r}")
        drawn = copy.copy(self)
        drawn._twin = Twin(int(seed), self.density)
        return drawn

    def __getitem__(self, key: tuple[int | None, str, Tokens]) -> np.ndarray:
        """`ds[layer, matrix, token]`: dense [D]; with a slice or list of tokens, dense [T, D].

        A slice counts tokens by number, as `ds.tokens` gives them; numbers without a row are skipped.
        """
        if not isinstance(key, tuple) or len(key) != 3:
            raise InputError(f"workload: index must be [layer, matrix, token], got {key!r}")
        layer, matrix, tokens = key
        rows = self.matrix(layer, matrix, tokens).dense()
        return rows[0] if isinstance(tokens, int | np.integer) else rows

    def sparse(self, layer: int | None, matrix: str, token: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices int32 [nnz], values [nnz]) of one operand."""
        rows = self.matrix(layer, matrix, one_token(token))
        return rows.indices(), rows.values

    def matrix(self, layer: int | None, matrix: str, tokens: Tokens = None, values: bool = True) -> Rows:
        """Operands of one layer and matrix.

        Args:
            layer, matrix: whose operands; one of `leaves`.
            tokens: a number, a slice of numbers, a list of numbers in any order, or None for all.
            values: False reads the masks alone.

        Raises:
            InputError: no such layer or matrix, or a number that has no row there.
        """
        wanted = self._numbers(layer, matrix, tokens)
        ascending = np.argsort(wanted, kind="stable")
        row_bytes = self._dense_bytes(layer, matrix) if values else mask_bytes(self.features(layer, matrix))
        pieces = list(self._blocks(layer, matrix, wanted[ascending], values, row_bytes))
        if not pieces:
            held = values and self.level == "full"
            return no_rows(layer, matrix, self.features(layer, matrix), self.manifest["dtype"], held)
        back = np.empty_like(ascending)
        back[ascending] = np.arange(len(ascending))
        return join(pieces).take(back)

    def blocks(
        self, layer: int | None, matrix: str, values: bool = True, tokens: np.ndarray | None = None
    ) -> Iterator[Rows]:
        """Operands of one layer and matrix, ascending by token, `stored.READ_BYTES` or one row group at a time.

        Args:
            layer, matrix: whose operands; one of `leaves`.
            values: False reads the masks alone.
            tokens: numbers, ascending; None for all.

        Raises:
            InputError: no such layer or matrix, or tokens that have no row there or do not ascend.
        """
        wanted = self._numbers(layer, matrix, tokens)
        if not (np.diff(wanted) > 0).all():
            raise InputError("blocks: tokens must ascend, got others: use matrix(), which takes any order")
        return self._blocks(layer, matrix, wanted, values, self._dense_bytes(layer, matrix))

    def figures(self, layer: int | None, matrix: str) -> pa.Table:
        """Row statistics as stored: token, sequence, position, nnz, absmax and l2 of each row of one layer and matrix.

        Raises:
            InputError: no such layer or matrix, or a twin, of which nothing is stored.
        """
        if self._twin is not None:
            raise InputError("figures: rows must be real ones, got the i.i.d. twin: use matrix(layer, matrix).nnz")
        source, wanted = self._stored.source(layer, matrix), self.tokens_of(layer, matrix)
        pieces = []
        try:
            for path, groups, chosen in self._stored.locate(source, wanted, ROW_STATISTICS_BYTES):
                table = self._stored.row_groups(path, *groups, ROW_STATISTICS).select(ROW_STATISTICS)
                pieces.append(table.take(pa.array(places(table["token"].to_numpy(), chosen))))
        except MissingTokenError as missing:
            raise self._refusal(layer, matrix, missing.token) from None
        empty = data_schema(self.manifest["dtype"], level="stats").empty_table().select(ROW_STATISTICS)
        return pa.concat_tables(pieces) if pieces else empty

    def density(self, layer: int | None, matrix: str) -> float:
        """Share of the inputs that the rows of one layer and matrix keep, over this selection.

        For a twin, the probability with which an input is kept.
        """
        if self._twin is not None:
            return self._twin.density(layer, matrix)
        if self._tokens is None:
            row = self._stored.row(layer, matrix)
            kept, rows = row["nnz"], row["rows"]
        else:
            table = self.figures(layer, matrix)
            kept, rows = pc.sum(table["nnz"]).as_py() or 0, len(table)
        return float(kept / (rows * self.features(layer, matrix))) if rows else 0.0

    def replay(self, values: bool = False) -> Iterator[Step]:
        """Walk this selection in the order of execution, a step at a time.

        ```python
        for step in ds.replay():
            for rows in step:            # layer by layer, matrix by matrix
                rows.layer, rows.matrix, rows.keep()
        ```

        Args:
            values: False reads the masks alone.
        """
        return replay(self, values and self.level == "full")

    def batches(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Token numbers of rows multiplied together, as they were or regrouped; see `schedule.batches`."""
        if size is not None and (not isinstance(size, int | np.integer) or size < 1):
            raise InputError(f"batches: size must be a whole number of at least 1, got {size}")
        return batches(self, size)

    def weight(self, layer: int | None, matrix: str, model: str | Path | None = None) -> np.ndarray:
        """The weight [in, out] that the operands of one layer and matrix are multiplied with.

        Args:
            layer, matrix: whose operands; one of `leaves`.
            model: folder of the converted model or of its checkpoint; None for the one given to `open`.

        Returns:
            float16 or float32, a view of the file where it is stored so; a bfloat16 weight is widened to float32.

        Raises:
            InputError: no model was named, or it is not the one that the workload was made with.
        """
        number = FORMATS[self.manifest["dtype"]]
        return number.to_float(self._weight_patterns(layer, matrix, model))

    def weight_mask(self, layer: int | None, matrix: str) -> np.ndarray | None:
        """Which weights a weight-side method kept, bool [in, out] as `weight` is; None if it kept all."""
        row = self._stored.row(layer, matrix)
        entry = next((file for file in self.manifest["files"] if file["path"] == "weight_masks.parquet"), None)
        if entry is None:
            return None
        return read_weight_mask(self._stored.folder, row, entry.get("footer_sha256"))

    def product(self, layer: int | None, matrix: str, token: int) -> np.ndarray:
        """y = x W of one row, float32 [out], from the weight rows of the kept inputs, summed in float64.

        Outputs that the method leaves out are 0.
        """
        rows = self.matrix(layer, matrix, one_token(token))
        number = FORMATS[self.manifest["dtype"]]
        weight = number.to_float(self._weight_patterns(layer, matrix, None)[rows.indices()])
        y = (rows.values.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
        if rows.out_mask is not None:
            y[np.unpackbits(rows.out_mask[0], count=len(y), bitorder="little").view(bool)] = 0
        return y

    def _weight_patterns(self, layer: int | None, matrix: str, model: str | Path | None) -> np.ndarray:
        folder = self.model if model is None else Path(model)
        if folder is None:
            raise InputError("workload: model must be named for its weights, got none: open(path, model=FOLDER)")
        row, dtype = self._stored.row(layer, matrix), self.manifest["dtype"]
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.folder != folder:
            checkpoint = self._checkpoint = Checkpoint(folder)
        sampled = bool(self.manifest.get("capture", {}).get("matrices"))
        checkpoint.check_once(row, self._stored.by_leaf.values(), sampled, dtype)
        return checkpoint.weight(row, dtype)

    def _numbers(self, layer: int | None, matrix: str, tokens: Tokens) -> np.ndarray:
        """int64: token numbers that a caller asks for, in the order given."""
        if tokens is None:
            return self.tokens_of(layer, matrix)
        if isinstance(tokens, slice):
            if tokens.step not in (None, 1):
                # of the numbers, or of the captured ones? `select` says
                raise InputError(f"workload: a slice of tokens must have step 1, got {tokens.step}")
            own = self.tokens_of(layer, matrix)
            return own[choose(own, tokens, "token")]
        wanted = integers(tokens, "token")
        if self._tokens is not None:
            try:
                places(self._tokens, wanted)
            except MissingTokenError as missing:
                raise self._refusal(layer, matrix, missing.token) from None
        return wanted

    def _refusal(self, layer: int | None, matrix: str, token: int) -> InputError:
        """The error for a token that has no row in one layer and matrix."""
        own, rule, source = self.tokens, "was captured", "ds.tokens"
        if token in own:
            own = self.tokens_of(layer, matrix)
            rule, source = f"has a row in {leaf(layer, matrix)}", f"ds.tokens_of({layer}, {matrix!r})"
        span = f"{len(own)} between {own[0]} and {own[-1]}" if len(own) else "none"
        return InputError(f"workload: token must be one that {rule} (see {source}: {span}), got {token}")

    def _dense_bytes(self, layer: int | None, matrix: str) -> int:
        """Bytes of a dense row."""
        return self.features(layer, matrix) * FORMATS[self.manifest["dtype"]].bits.itemsize

    def _blocks(
        self, layer: int | None, matrix: str, wanted: np.ndarray, values: bool, row_bytes: int
    ) -> Iterator[Rows]:
        if self.level == "stats":
            raise InputError("workload: operands must have been captured, got level `stats`: use figures()")
        try:
            for rows in read_rows(self._stored, (layer, matrix), wanted, values, row_bytes):
                yield rows if self._twin is None else self._twin.of(rows)
        except MissingTokenError as missing:
            raise self._refusal(layer, matrix, missing.token) from None


def open(path: str | Path, model: str | Path | None = None, filesystem: Any = None) -> Workload:
    """Open a workload folder; the arguments are those of `Workload`. Reads as `sparsetrace.open`."""
    return Workload(path, model, filesystem)
