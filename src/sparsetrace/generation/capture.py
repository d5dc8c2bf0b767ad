"""Taking the operands out of a running model and writing them as dump blocks.

A full ring is packed (on a GPU by one launch there, into one of two stages whose copy to pinned memory and to the disk
overlaps with decoding) and filled anew.
"""

# Shape suffixes: n rows of a pass, B slots, T positions, K input features, N output features.

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.formats.dump import block_name, write_block
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.generation.blocks import HostBlock, block_arrays, pack_on_host
from sparsetrace.generation.ring import Ring
from sparsetrace.generation.selection import HEAD, Selection
from sparsetrace.generation.stage import Stage
from sparsetrace.generation.writer import PENDING, BlockWriter

WriteBlock = Callable[[Path, dict[str, np.ndarray]], None]


class Recorder:
    """Collects a group's operands and writes full blocks; its memory is that of a ring and, on a GPU, of two stages.

    Args:
        selection: what is captured.
        rows: of a block; no pass captures more.
        device: of the model.
        write: takes each block, in a thread.
    """

    def __init__(self, selection: Selection, rows: int, device: torch.device, write: WriteBlock = write_block) -> None:
        self.capture = selection.capture
        self._dtype = selection.dtype
        self._writer = BlockWriter()
        self._write = write
        self._ring = Ring(selection, rows, device)
        self.takes_head = self._ring.takes(HEAD)
        self.nowhere = rows
        self.device = device
        # at most as many rows are filled: what the host knows without asking the device
        self._bound = 0
        self._rows_n: Tensor | None = None
        self._folder, self._group, self._blocks = Path(), 0, 0
        self._logits_from: dict[int, int] = {}
        self._stages: list[Stage] = []
        if device.type == "cuda":
            self._stages = [Stage(self._ring, FORMATS[selection.dtype].infinity) for _ in range(PENDING)]

    def open(self, folder: Path, group: int, logits_from: dict[int, int] | None = None) -> None:
        """Begin a group.

        Args:
            folder: of its blocks.
            group: number.
            logits_from: for each sequence, the first position whose logits are computed; needed where the input of
                the output head is captured.
        """
        self._folder, self._group, self._blocks = folder, group, 0
        self._logits_from = logits_from or {}
        self._bound = 0
        self._ring.filled.zero_()

    def reserve(self, rows: int) -> None:
        """Make room for a pass that captures at most `rows`."""
        assert rows <= self._ring.rows
        if self._bound + rows > self._ring.rows:
            self._flush()
        self._bound += rows

    def place(self, chosen_n: Tensor, positions_n: Tensor, bases_n: Tensor, numbers_n: Tensor) -> Tensor:
        """Choose the ring row of each row of the coming pass; see `Ring.place`."""
        self._rows_n = self._ring.place(chosen_n, positions_n, bases_n, numbers_n)
        return self._rows_n

    def region(self, layer: int | None, site: str) -> Tensor | None:
        """Where kernels store a site's operands; see `Ring.region`."""
        return self._ring.region(layer, site)

    def record(self, layer: int, matrix: str, operand_BTK: Tensor) -> None:
        """Take the placed rows of an operand, once for all matrices that read it; `patch.Patch.record`."""
        assert self._rows_n is not None
        self._ring.store((layer, matrix), self._rows_n, operand_BTK.flatten(0, 1))

    def record_outputs(self, layer: int, matrix: str, dropped_BTN: Tensor) -> None:
        """Take the placed rows of the outputs that are not computed; `patch.Patch.record_outputs`."""
        assert self._rows_n is not None
        self._ring.store_outputs((layer, matrix), self._rows_n, dropped_BTN.flatten(0, 1))

    def record_head(self, rows_B: Tensor, operand_BC: Tensor) -> None:
        """Take what the output head reads of each slot.

        Args:
            rows_B: int64, rows as placed.
            operand_BC: without -0.0.
        """
        self._ring.store(HEAD, rows_B, operand_BC)

    def clear_head(self, rows_n: Tensor) -> None:
        """Set placed rows to zero, before `record_head` fills some of them: what is left is looked at for NaN."""
        self._ring.clear(HEAD, rows_n)

    def close(self, then: Callable[[list[str], int], None] | None = None) -> tuple[list[str], int]:
        """End the group: write what is left; see `BlockWriter.close`."""
        self._flush()
        return self._writer.close(then)

    def wait(self) -> None:
        """Wait until every group is sealed; raises what writing or sealing raised."""
        self._writer.wait()

    def shutdown(self) -> None:
        """Leave; what has not begun to be written is not."""
        self._writer.shutdown()

    def abandon(self) -> None:
        """Drop the group and the blocks that it has written."""
        for name in self._writer.abandon():
            (self._folder / name).unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._bound:
            return
        name = block_name(self._group, self._blocks)
        path = self._folder / name
        self._blocks += 1
        self._writer.ready()
        if self._stages:
            # the one used longest ago: `BlockWriter.ready` has seen to it that it is free
            self._stages.append(stage := self._stages.pop(0))
            stage.take(self._ring, self._bound)
            self._writer.submit(name, partial(self._write_stage, stage, path, self._logits_from))
        else:
            rows = int(self._ring.filled)
            block = HostBlock(
                self._ring.labels[:rows].numpy().copy(),
                {leaf: pack_on_host(region[:rows]) for leaf, region in self._ring.held.items()},
                {leaf: buffer[:rows].numpy().copy() for leaf, buffer in self._ring.dropped.items()},
            )
            # here, not in the thread that writes: an operand that is not finite ends the run at once
            arrays = block_arrays(block, self._dtype, self.capture.level, self._logits_from)
            if rows:
                self._writer.submit(name, partial(self._write_arrays, path, arrays, rows))
        self._ring.filled.zero_()
        self._bound = 0

    def _write_arrays(self, path: Path, arrays: dict[str, np.ndarray], rows: int) -> int:
        self._write(path, arrays)
        return rows

    def _write_stage(self, stage: Stage, path: Path, logits_from: dict[int, int]) -> int:
        block = stage.fetch()
        if len(block.labels):
            arrays = block_arrays(block, self._dtype, self.capture.level, logits_from)
            # as they lie in memory: offsets, all values, all masks
            kinds = {"values": 1, "mask": 2}
            in_memory = sorted(arrays, key=lambda name: kinds.get(name.rsplit(".", 1)[1], 0))
            self._write(path, {name: arrays[name] for name in in_memory})
        return len(block.labels)
