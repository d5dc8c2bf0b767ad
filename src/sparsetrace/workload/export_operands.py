"""The operands that an exporter writes, read a row group at a time or all at once, and its options."""

from collections.abc import Iterator
from dataclasses import dataclass

from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.rows import Rows, join, no_rows
from sparsetrace.workload.reader import Workload


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the weight lies in the memory that is traced: the row of input i at `base + i * stride`.

    Args:
        base: address of the row of input 0, bytes.
        stride: bytes from one row to the next; None for rows without a gap, outputs x bytes per value.
        line: bytes of one access.
        bundle: number of rows fetched together: those of inputs with equal i // bundle.
        cycles: cycles between two accesses, for traces that carry a time.
    """

    base: int = 0
    stride: int | None = None
    line: int = 64
    bundle: int = 1
    cycles: int = 1

    def __post_init__(self) -> None:
        for name, least in (("base", 0), ("line", 1), ("bundle", 1), ("cycles", 0)):
            if getattr(self, name) < least:
                raise InputError(f"export: {name} must be at least {least}, got {getattr(self, name)}")
        if self.stride is not None and self.stride < 1:
            raise InputError(f"export: stride must be at least 1, got {self.stride}")


@dataclass(frozen=True, slots=True)
class Operands:
    """Operands of one layer and matrix, with the options of the export.

    Args:
        workload: any selection, or its twin.
        layer, matrix: whose operands.
        layout: of the weight, for the memory traces.
        tile: inputs of a tile, for `density`.
    """

    workload: Workload
    layer: int | None
    matrix: str
    layout: Layout
    tile: int

    @property
    def tokens(self) -> int:
        """Number of tokens that have a row."""
        return len(self.workload.tokens_of(self.layer, self.matrix))

    @property
    def features(self) -> int:
        """Inputs of the matrix."""
        return self.workload.features(self.layer, self.matrix)

    @property
    def dtype(self) -> str:
        """Of the operands."""
        return str(self.workload.manifest["dtype"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the weight."""
        return self.workload.outputs(self.layer, self.matrix) * FORMATS[self.dtype].bits.itemsize

    def blocks(self, values: bool) -> Iterator[Rows]:
        """The rows, ascending by token, a row group or less at a time."""
        return self.workload.blocks(self.layer, self.matrix, values=values)

    def rows(self, values: bool) -> Rows:
        """All rows at once."""
        return join([*self.blocks(values)] or [no_rows(self.layer, self.matrix, self.features, self.dtype, values)])
