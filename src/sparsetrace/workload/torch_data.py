"""Operands as torch data sets for training loops, each item a tensor [D] in the model's own dtype."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparsetrace.core.files import InputError
from sparsetrace.workload.reader import Workload


class OperandDataset(Dataset[Tensor]):
    """Map-style: item i is the dense operand [D] of token `workload.tokens[i]`.

    Args:
        workload: any selection.
        layer, matrix: which.

    Raises:
        InputError: no such layer or matrix, or values that were not captured: here, not in a worker.
    """

    def __init__(self, workload: Workload, layer: int, matrix: str) -> None:
        _check(workload, layer, matrix)
        self.workload = workload
        self.layer = layer
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.workload.tokens)

    def __getitem__(self, i: int) -> Tensor:
        return self.__getitems__([i])[0]

    def __getitems__(self, at: list[int]) -> list[Tensor]:
        """A batch at once, which torch's loader asks for: each row group is read one time."""
        rows = self.workload.matrix(self.layer, self.matrix, self.workload.tokens[np.asarray(at)])
        return list(rows.torch())


class OperandStream(IterableDataset[Tensor]):
    """Iterable: dense operands [D], ascending by token, each in one worker only.

    Args:
        workload: any selection.
        layer, matrix: which.

    Raises:
        InputError: no such layer or matrix, or values that were not captured: here, not in a worker.
    """

    def __init__(self, workload: Workload, layer: int, matrix: str) -> None:
        _check(workload, layer, matrix)
        self.workload = workload
        self.layer = layer
        self.matrix = matrix

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        tokens = self.workload.tokens
        # contiguous shares: a row group is decoded by one worker, but where two meet
        own = tokens[len(tokens) * number // count : len(tokens) * (number + 1) // count]
        for rows in self.workload.blocks(self.layer, self.matrix, tokens=own):
            yield from rows.torch()


def _check(workload: Workload, layer: int, matrix: str) -> None:
    workload.features(layer, matrix)
    if workload.level != "full":
        raise InputError(f"torch_data: values must have been captured, got capture level `{workload.level}`")
