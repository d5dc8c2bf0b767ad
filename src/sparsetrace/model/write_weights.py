"""Writing a runtime model's weights: each tensor goes to its place as soon as it is made, several at a time."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor

from sparsetrace.core.checksum import Checksum
from sparsetrace.core.files import sync
from sparsetrace.model.checkpoint import Checkpoint
from sparsetrace.model.families.base import RuntimeTensor
from sparsetrace.model.layout import lay_out

# Bytes of the tensors that are made at the same time, at most: they bound the step's memory.
MADE_BYTES = 4 << 30


def write_weights(
    folder: Path,
    tensors: Sequence[RuntimeTensor],
    dtype: str,
    source: Checkpoint,
    report: Callable[[int, int, str], None] | None,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Make and write every runtime tensor, and flush each file once it is full.

    Args:
        folder: gets the files.
        tensors: of the runtime model, in the order in which they are divided into files.
        dtype: of all of them.
        source: holds what they are made of.
        report: called with (tensors done, tensors in all, name).

    Returns:
        What the model's config.json says of each tensor; the hash of the source.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    files = lay_out(folder, tensors, dtype)
    file_of = {name: file for file in files for name in file.offsets}
    counts = sorted((math.prod(tensor.shape) for tensor in tensors), reverse=True)
    # a thread's memory is that of the largest tensor it has made
    most = sum(total * torch_dtype.itemsize <= MADE_BYTES for total in accumulate(counts))
    own = local()

    def begin() -> None:
        # once for each thread: the system takes longer to find memory than the cores to fill it
        own.memory = torch.empty(counts[0], dtype=torch_dtype)

    def make(tensor: RuntimeTensor) -> dict[str, str]:
        made = own.memory[: math.prod(tensor.shape)]
        _make(made.view(tensor.shape), tensor, source)
        data = made.view(torch.uint8).numpy().data
        file = file_of[tensor.name]
        _write_at(file.path, file.offsets[tensor.name], data)
        return {"sha256": hashlib.sha256(data).hexdigest(), "xxh3": str(Checksum(data))}

    for file in files:
        file.path.touch()
        _write_at(file.path, 0, file.header)
    entries: dict[str, dict[str, Any]] = {}
    flushed = []
    with (
        _threads_of_torch() as threads,
        ThreadPoolExecutor(min(threads, max(most, 1)), initializer=begin) as pool,
        ThreadPoolExecutor(1) as flusher,
    ):
        for tensor, hashes in zip(tensors, pool.map(make, tensors), strict=True):
            file = file_of[tensor.name]
            entries[tensor.name] = {
                "file": file.path.name,
                "shape": tensor.shape,
                **hashes,
                "sources": tensor.sources,
            }
            if tensor.name == list(file.offsets)[-1]:
                flushed.append(flusher.submit(sync, file.path))
            if report is not None:
                report(len(entries), len(tensors), tensor.name)
        # while the disk is busy with the last files
        source_hash = source.digest(pool)
        for done in flushed:
            done.result()
    return entries, source_hash


def _make(out: Tensor, tensor: RuntimeTensor, source: Checkpoint) -> None:
    """Fill a runtime tensor."""
    if tensor.site is None:
        for start, strip in source.strips(tensor.sources[0], tensor.shape, out.dtype):
            out[start : start + len(strip)] = strip
        return
    for (matrix, columns), name in zip(tensor.site.columns.items(), tensor.sources, strict=True):
        first = columns.start
        for start, strip_NK in source.strips(name, [tensor.site.outputs(matrix), len(out)], out.dtype):
            # two copies, of which torch does the first in blocks, take a third of the time of one
            out[:, first + start : first + start + len(strip_NK)] = strip_NK.T.contiguous()


@contextmanager
def _threads_of_torch() -> Iterator[int]:
    """Let threads of ours take the place of torch's own, one for one; yields how many those are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _write_at(path: Path, offset: int, data: bytes | memoryview) -> None:
    try:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
    except OSError as error:
        # a write's own error names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
