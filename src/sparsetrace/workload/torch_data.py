"""Operands as torch data sets for training loops, each item a tensor [D] in the model's own dtype."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparsetrace.core.files import InputError
from sparsetrace.workload.reader import Workload


class _Operands:
    """Operands of one layer and matrix.

    Args:
        workload: any selection.
        layer, matrix: whose operands.

    Raises:
        InputError: no such layer or matrix, or values that were not captured: here, not in a worker.
    """

    def __init__(self, workload: Workload, layer: int | None, matrix: str) -> None:
        workload.features(layer, matrix)
        if workload.level != "full":
            raise InputError(f"torch_data: values must have been captured, got capture level `{workload.level}`")
        self.workload = workload
        self.layer = layer
        self.matrix = matrix

    @property
    def tokens(self) -> np.ndarray:
        """int64: numbers of the tokens that have a row, ascending."""
        return self.workload.tokens_of(self.layer, self.matrix)


class OperandDataset(_Operands, Dataset[Tensor]):
    """Map-style: item i is the dense operand [D] of the i-th token that has a row, `tokens[i]`."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Tensor:
        return self.__getitems__([i])[0]

    def __getitems__(self, at: list[int]) -> list[Tensor]:
        """A batch at once, which torch's loader asks for: each row group is read one time."""
        rows = self.workload.matrix(self.layer, self.matrix, self.tokens[np.asarray(at)])
        return list(rows.torch())


class OperandStream(_Operands, IterableDataset[Tensor]):
    """Iterable: dense operands [D], ascending by token, each in one worker only."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        tokens = self.tokens
        # contiguous shares, so that only row groups where two shares meet are decoded by two workers
        own = tokens[len(tokens) * number // count : len(tokens) * (number + 1) // count]
        for rows in self.workload.blocks(self.layer, self.matrix, tokens=own):
            yield from rows.torch()
