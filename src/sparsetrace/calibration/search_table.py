"""Search table of one layer: for each step of a greedy search, the sparsity of each matrix and the error it causes.

| column | unit | what |
|---|---|---|
| `effective_sparsity` | fraction | of the layer's parameters |
| `error`, `uniform_error` | norm | of the layer's output: by the search, and with every matrix at that sparsity |
| a column for each matrix | fraction | its target |
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsetrace.core.checked import read_checked_table, write_checked_table
from sparsetrace.core.files import InputError, parse_json

# The columns that belong to the layer; every other one is a matrix's.
LAYER_COLUMNS = ("effective_sparsity", "error", "uniform_error")


@dataclass(frozen=True, slots=True)
class SearchTable:
    """The columns of a table.

    Args:
        matrices: of the layer, in order.
        effective: sparsity of the whole layer, weighted by parameters.
        error, uniform_error: of the layer's output, by the search and with all matrices at `effective`.
        sparsities: for each step, that of each matrix.
    """

    matrices: Sequence[str]
    effective: Sequence[float]
    error: Sequence[float]
    uniform_error: Sequence[float]
    sparsities: Sequence[dict[str, float]]

    def worse_than_uniform(self) -> list[int]:
        """Steps at which the error of the search is larger than that of uniform sparsity."""
        return [step for step in range(len(self.error)) if self.error[step] > self.uniform_error[step]]

    def lookup(self, target: float, where: str) -> tuple[dict[str, float], bool]:
        """Sparsities for a target: those of the step nearest to it, as in TEAL's code.

        Args:
            target: of the layer, 0 <= target < 1.
            where: for messages.

        Returns:
            Sparsity of each matrix, and whether they are all the target because the step is worse than uniform.

        Raises:
            InputError: the table ends before the target.
        """
        if target == 0:
            return dict.fromkeys(self.matrices, 0.0), False
        if not self.effective or target > self.effective[-1]:
            reach = self.effective[-1] if self.effective else 0.0
            raise InputError(f"{where}: sparsity must be at most {reach:.4f}, where its table ends, got {target}")
        step = min(range(len(self.effective)), key=lambda i: abs(self.effective[i] - target))
        if self.error[step] > self.uniform_error[step]:
            return dict.fromkeys(self.matrices, target), True
        found = dict(self.sparsities[step])
        if bad := [number for number in found.values() if not 0 <= number < 1]:
            raise InputError(
                f"{where}: each matrix's sparsity must be at least 0 and below 1, got {bad[0]} for {target}"
            )
        return found, False


def search_table_schema(matrices: Sequence[str]) -> pa.Schema:
    """Schema of the table of a layer with these matrices."""
    return pa.schema([pa.field(name, pa.float64(), nullable=False) for name in (*LAYER_COLUMNS, *matrices)])


def write_search_table(
    path: Path, identity: Mapping[str, Any], matrices: Sequence[str], rows: Sequence[Mapping[str, float]]
) -> pa.Table:
    """Write a table.

    Args:
        path: of the Parquet file.
        identity: what was searched and on what.
        matrices: of the layer, in order.
        rows: a value for each column, by step.
    """
    metadata = {"sparsetrace_greedy": json.dumps(identity)}
    table = pa.Table.from_pylist(list(rows), schema=search_table_schema(matrices).with_metadata(metadata))
    write_checked_table(table, path)
    return table


def read_search_table(path: Path) -> tuple[dict[str, Any], SearchTable]:
    """The identity that a table was written with, and the table.

    Raises:
        InputError: there is none.
    """
    if not path.is_file():
        raise InputError(f"allocate: {path} must be a greedy table, got nothing there: run `sparsetrace allocate`")
    table = read_checked_table(path, "allocate", "a greedy table")
    metadata = (table.schema.metadata or {}).get(b"sparsetrace_greedy")
    if metadata is None:
        raise InputError(f"allocate: {path} must be a greedy table of sparsetrace, got another Parquet file")
    identity = parse_json(metadata, f"allocate: the metadata of {path}")
    if not isinstance(identity, dict) or {"model_hash", "method", "layer"} - identity.keys():
        raise InputError(f"allocate: {path} must name its model, method and layer, got {identity!r}")
    matrices = [name for name in table.column_names if name not in LAYER_COLUMNS]
    if not table.schema.equals(search_table_schema(matrices)):
        raise InputError(
            f"allocate: {path} must have the columns of a greedy table, got {', '.join(table.column_names)}"
        )
    columns = {name: table[name].to_pylist() for name in table.column_names}
    effective, error, uniform_error = (columns[name] for name in LAYER_COLUMNS)
    refuse_no_search(columns, matrices, effective, f"allocate: {path}")
    sparsities = table.select(matrices).to_pylist()
    return identity, SearchTable(matrices, effective, error, uniform_error, sparsities)


def refuse_no_search(
    columns: Mapping[str, Sequence[float]], matrices: Sequence[str], effective: Sequence[float], where: str
) -> None:
    """Refuse numbers that no search makes.

    Args:
        columns: of a table, by name.
        matrices: names of the columns that hold sparsities.
        effective: sparsity of the whole layer in each row.
        where: for the message, `<step>: <place>`.

    Raises:
        InputError: a number is not finite, sparsities do not ascend, or one is not in [0, 1).
    """
    for name, column in columns.items():
        if bad := [number for number in column if number is None or not math.isfinite(number)]:
            raise InputError(f"{where}: {name} must be finite numbers, got {bad[0]}")
    if list(effective) != sorted(effective):
        raise InputError(f"{where} must list ascending finite effective sparsities, got another order")
    for name, column in [("effective sparsity", effective), *((name, columns[name]) for name in matrices)]:
        if bad := [number for number in column if not 0 <= number < 1]:
            raise InputError(f"{where}: {name} must be at least 0 and below 1, got {bad[0]}")
