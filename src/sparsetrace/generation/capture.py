"""Taking the operands out of a running model and writing them as dump blocks.

A ring on the model's device takes the rows of every captured matrix, by number, so that the same code captures in eager
mode and inside a CUDA graph. A full ring is packed (on a GPU by one launch there, into one of two stages whose copy to
pinned memory and to the disk overlaps with decoding) and filled anew.
"""

# Shape suffixes: n rows of a pass, R rows of the ring, P parts of a site (matrices that read one operand), B slots,
# T positions, K input features, N output features.

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Capture
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.formats.dump import block_name, write_block
from sparsetrace.formats.names import MATRICES, SITE_OF, SITES, Parts
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.ragged import offsets_of
from sparsetrace.formats.row_statistics import row_norms
from sparsetrace.generation.writer import PENDING, BlockWriter
from sparsetrace_kernels.reference import pack_bits, place_rows_ref

# Memory that one block's rows may take; with the model's width it fixes the rows of a block, and of a prefill pass.
BLOCK_BYTES = 256 << 20
GPU_BLOCK_BYTES = 1 << 30

# Columns of the ring's labels.
LABELS = ("token", "sequence", "position")

WriteBlock = Callable[[Path, dict[str, np.ndarray]], None]


def block_rows(config: ModelConfig, parts: Parts, batch: int, device: torch.device) -> int:
    """Rows of one block of all operands: what fits the memory, but at least one pass of the batch."""
    width = sum(config.in_features(site) * len(site_parts) for (_, site), site_parts in parts.items())
    room = GPU_BLOCK_BYTES if device.type == "cuda" else BLOCK_BYTES
    return max(batch, room // (width * FORMATS[config.dtype].bits.itemsize))


def captured_matrices(config: ModelConfig, capture: Capture) -> list[tuple[int, str]]:
    """Every (layer, matrix) that is captured, in the order of execution.

    Raises:
        InputError: the model has no such layer.
    """
    layers = range(config.num_hidden_layers)
    if beyond := [layer for layer in capture.layers if layer not in layers]:
        raise InputError(f"capture: layers must be 0 to {len(layers) - 1}, got {beyond[0]}")
    return [
        (layer, matrix)
        for layer in layers
        for matrix in MATRICES
        if (not capture.layers or layer in capture.layers) and (not capture.matrices or matrix in capture.matrices)
    ]


def holders(chosen: list[tuple[int, str]], parts: Parts) -> dict[tuple[int, str], str]:
    """The matrix under whose name the dump holds the operand of each captured one: the first captured that reads it."""
    held: dict[tuple[int, str], str] = {}
    for (layer, _), site_parts in parts.items():
        for part in site_parts:
            captured = [matrix for matrix in part if (layer, matrix) in chosen]
            held |= {(layer, matrix): captured[0] for matrix in captured}
    return held


class Recorder:
    """Collects a group's operands and writes full blocks; its memory is that of a ring and, on a GPU, of two stages.

    What several matrices read is held once.

    Args:
        config: of the model.
        rows: of a block; no pass captures more.
        device: of the model.
        parts: which matrices read one operand.
        out_masks: matrices of which the method says which outputs are not computed.
        capture: what is kept; None keeps all.
        write: takes each block, in a thread.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        device: torch.device,
        parts: Parts,
        out_masks: tuple[str, ...] = (),
        capture: Capture | None = None,
        write: WriteBlock = write_block,
    ) -> None:
        self.config = config
        self.capture = capture or Capture()
        self.device = device
        self._writer = BlockWriter()
        self._write = write
        self._capacity = rows
        chosen = captured_matrices(config, self.capture)
        held = holders(chosen, parts)
        # all parts of a site side by side, since one launch captures for them all
        sites = dict.fromkeys((layer, SITE_OF[matrix]) for layer, matrix in chosen)
        self._num_parts = {key: len(parts[key]) for key in sites}
        widths = {(layer, part[0]): config.in_features(site) for layer, site in sites for part in parts[layer, site]}
        # the last row takes whatever is not captured
        self._ring = torch.empty(sum(widths.values()) * (rows + 1), dtype=config.torch_dtype, device=device)
        # by the first matrix of each part
        self._regions: dict[tuple[int, str], Tensor] = {}
        base = 0
        for key, width in widths.items():
            self._regions[key] = self._ring[base : base + width * (rows + 1)].view(rows + 1, width)
            base += width * (rows + 1)
        self._dumped = {
            (layer, held[layer, matrix]): self._regions[layer, part[0]]
            for layer, site in sites
            for part in parts[layer, site]
            for matrix in part
            if (layer, matrix) in held
        }
        self._dropped = {
            (layer, matrix): torch.empty(
                rows + 1, mask_bytes(config.out_features(matrix)), dtype=torch.uint8, device=device
            )
            for layer, matrix in chosen
            if matrix in out_masks and self.capture.level != "stats"
        }
        self._labels = torch.empty(rows + 1, len(LABELS), dtype=torch.int64, device=device)
        self._filled = torch.zeros(1, dtype=torch.int64, device=device)
        self._place = place_rows_ref
        if device.type == "cuda":
            # imported late: the torch engine also runs where Triton is not installed
            from sparsetrace_kernels.decode_state import place_rows

            self._place = place_rows
        # at most as many rows are filled: what the host knows without asking the device
        self._bound = 0
        self._rows_n: Tensor | None = None
        self._folder, self._group, self._blocks = Path(), 0, 0
        self._stages: list[_Stage] = []
        if device.type == "cuda":
            regions = list(self._dumped.values())
            self._stages = [_Stage(self._ring, regions, FORMATS[config.dtype].infinity) for _ in range(PENDING)]

    def open(self, folder: Path, group: int) -> None:
        """Begin a group, whose blocks go to `folder`."""
        self._folder, self._group, self._blocks = folder, group, 0
        self._bound = 0
        self._filled.zero_()

    def samples(self, positions_BT: np.ndarray) -> np.ndarray:
        """bool, shape of the positions: which are kept of those that are sparsified."""
        chosen: np.ndarray = positions_BT % self.capture.every == 0
        return chosen

    def reserve(self, rows: int) -> None:
        """Make room for a pass that captures at most `rows`."""
        assert rows <= self._capacity
        if self._bound + rows > self._capacity:
            self._flush()
        self._bound += rows

    def place(self, chosen_n: Tensor, positions_n: Tensor, bases_n: Tensor, numbers_n: Tensor) -> Tensor:
        """Choose the ring row of each row of the coming pass; works on the device alone.

        Args:
            chosen_n: bool, rows that are captured if their position is sampled.
            positions_n, bases_n, numbers_n: int64, of each; its sequence's first token number, and its number.

        Returns:
            int64 [n]; where not captured, a number beyond the rows of `ring`.
        """
        self._rows_n = self._place(
            chosen_n, positions_n, bases_n, numbers_n, self.capture.every, self._labels, self._filled
        )
        return self._rows_n

    def ring(self, layer: int, site: str) -> Tensor | None:
        """[R, P, K] view of what a site's parts fill; None where none of its matrices is captured."""
        first = (layer, SITES[site][0])
        if first not in self._regions:
            return None
        region = self._regions[first]
        rows, width = region.shape
        shape = (rows - 1, self._num_parts[layer, site], width)
        return self._ring.as_strided(shape, (width, rows * width, 1), region.storage_offset())

    def record(self, layer: int, matrix: str, operand_BTK: Tensor) -> None:
        """Take the placed rows of an operand, once for all that read it; `patch.Patch.record`."""
        assert self._rows_n is not None
        if (layer, matrix) in self._regions:
            self._regions[layer, matrix].index_copy_(0, self._rows_n, operand_BTK.flatten(0, 1))

    def record_outputs(self, layer: int, matrix: str, dropped_BTN: Tensor) -> None:
        """Take the placed rows of the outputs that are not computed; `patch.Patch.record_outputs`."""
        assert self._rows_n is not None
        if (layer, matrix) in self._dropped:
            self._dropped[layer, matrix].index_copy_(0, self._rows_n, pack_bits(dropped_BTN.flatten(0, 1)))

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
        if self.device.type == "cuda":
            # the one used longest ago: `BlockWriter.ready` has seen to it that it is free
            self._stages.append(stage := self._stages.pop(0))
            stage.take(self._ring, self._bound, self._filled, self._labels, self._dropped)
            self._writer.submit(name, partial(self._write_stage, stage, path))
        else:
            rows = int(self._filled)
            packed = {key: _pack_on_host(region[:rows]) for key, region in self._dumped.items()}
            dropped = {key: buffer[:rows].numpy().copy() for key, buffer in self._dropped.items()}
            arrays = self._arrays(self._labels[:rows].numpy().copy(), packed, dropped)
            if rows:
                self._writer.submit(name, partial(self._write_arrays, path, arrays, rows))
        self._filled.zero_()
        self._bound = 0

    def _write_arrays(self, path: Path, arrays: dict[str, np.ndarray], rows: int) -> int:
        self._write(path, arrays)
        return rows

    def _write_stage(self, stage: "_Stage", path: Path) -> int:
        labels, packed, dropped = stage.fetch()
        if len(labels):
            arrays = self._arrays(
                labels, dict(zip(self._dumped, packed, strict=True)), dropped, looked_through=stage.finite
            )
            # as they lie in memory: offsets, all values, all masks
            kinds = {"values": 1, "mask": 2}
            in_memory = sorted(arrays, key=lambda name: kinds.get(name.rsplit(".", 1)[1], 0))
            self._write(path, {name: arrays[name] for name in in_memory})
        return len(labels)

    def _arrays(
        self,
        labels: np.ndarray,
        packed: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]],
        dropped: dict[tuple[int, str], np.ndarray],
        looked_through: bool = False,
    ) -> dict[str, np.ndarray]:
        """The arrays of a block, from (offsets, values, mask) of each matrix."""
        rows = dict(zip(LABELS, labels.T, strict=True))
        arrays = {
            "rows.token": np.ascontiguousarray(rows["token"]),
            "rows.sequence": rows["sequence"].astype(np.int32),
            "rows.position": rows["position"].astype(np.int32),
        }
        for (layer, matrix), (offsets, values, mask) in packed.items():
            if not looked_through:
                self._refuse_not_finite(layer, matrix, values, offsets, rows)
            name = f"L{layer:02d}.{matrix}"
            if self.capture.level == "full":
                arrays |= {f"{name}.offsets": offsets, f"{name}.values": values}
            else:
                figures = row_norms(values, offsets, FORMATS[self.config.dtype])
                arrays |= {f"{name}.absmax": figures[0], f"{name}.l2": figures[1]}
            if self.capture.level == "stats":
                arrays[f"{name}.nnz"] = np.diff(offsets).astype(np.int32)
            else:
                arrays[f"{name}.mask"] = mask
        arrays |= {f"L{layer:02d}.{matrix}.out_mask": mask for (layer, matrix), mask in dropped.items()}
        return arrays

    def _refuse_not_finite(
        self, layer: int, matrix: str, values: np.ndarray, offsets: np.ndarray, rows: dict[str, np.ndarray]
    ) -> None:
        number = FORMATS[self.config.dtype]
        bad = (values & (number.sign - 1)) >= number.infinity
        if bad.any():
            row = int(np.searchsorted(offsets, int(bad.argmax()), side="right")) - 1
            raise InputError(
                f"generate: activations must be finite, got Inf or NaN in layer {layer}, matrix {matrix}, token "
                f"{rows['token'][row]} (sequence {rows['sequence'][row]}, position {rows['position'][row]}): "
                "the checkpoint may need a dtype of wider range"
            )


def _pack_on_host(operand_nK: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, kept bit patterns and bitmask of rows; copies."""
    itemsize = operand_nK.element_size()
    integers: np.ndarray = operand_nK.view(torch.int16 if itemsize == 2 else torch.int32).numpy()
    bits = integers.view(np.uint16 if itemsize == 2 else np.uint32)
    # the operand holds no -0.0, so a pattern is zero exactly where the input was dropped
    keep = bits != 0
    return offsets_of(keep.sum(1)), bits[keep], np.packbits(keep, axis=1, bitorder="little")


class _Stage:
    """One block on its way from the ring to the disk: packed on the device, copied to pinned memory by a side stream.

    Args:
        ring: the device's buffer; patterns of all kinds are moved as integers.
        regions: of the captured matrices, [R + 1, K] views into it, in the order of the block.
        infinity: bit pattern of Inf in the ring's dtype.
    """

    def __init__(self, ring: Tensor, regions: list[Tensor], infinity: int) -> None:
        # imported late: the torch engine also runs where Triton is not installed
        from sparsetrace_kernels.pack import chunk_table, pack_regions

        self._pack = pack_regions
        self._patterns = torch.int16 if ring.element_size() == 2 else torch.int32
        self._infinity = infinity
        self._widths = [region.shape[1] for region in regions]
        self._capacity, device = regions[0].shape[0], ring.device
        rows = self._capacity - 1
        starts = [int(region.storage_offset()) for region in regions]
        self._table = chunk_table(self._widths, self._capacity, device, starts)
        sizes = {
            "values": (rows * sum(self._widths), self._patterns),
            "masks": (rows * sum(map(mask_bytes, self._widths)), torch.uint8),
            "starts": (rows * len(regions) + 1, torch.int64),
            "labels": ((rows + 1) * len(LABELS), torch.int64),
            "filled": (1, torch.int64),
            "nonfinite": (1, torch.int32),
        }
        self._device = {n: torch.empty(size, dtype=dtype, device=device) for n, (size, dtype) in sizes.items()}
        pin = device.type == "cuda"
        self._host = {n: torch.empty(size, dtype=dtype, pin_memory=pin) for n, (size, dtype) in sizes.items()}
        self._side = torch.cuda.Stream(device) if pin else None
        self._packed = torch.cuda.Event() if pin else None
        self._bound = 0
        self._dropped: dict[tuple[int, str], Tensor] = {}
        self.finite = True

    def take(
        self, ring: Tensor, bound: int, filled: Tensor, labels: Tensor, dropped: dict[tuple[int, str], Tensor]
    ) -> None:
        """Pack the first rows of the ring, at most `bound`, in stream order; the ring is free for what comes after."""
        self._bound = bound
        device = self._device
        device["nonfinite"].zero_()
        device["filled"].copy_(filled)
        device["labels"][: bound * len(LABELS)].copy_(labels[:bound].flatten())
        self._pack(
            ring.view(self._patterns),
            self._table,
            self._widths,
            self._capacity,
            bound,
            device["filled"],
            device["values"],
            device["masks"],
            device["starts"][: len(self._widths) * bound + 1],
            device["nonfinite"],
            self._infinity,
        )
        self._dropped = {key: buffer[:bound].clone() for key, buffer in dropped.items()}
        if self._packed is not None:
            self._packed.record()

    def fetch(
        self,
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]], dict[tuple[int, str], np.ndarray]]:
        """Wait for what `take` began and copy it; called by a writing thread.

        Returns:
            Labels [rows, 3]; offsets, values and bitmask of each region; dropped outputs. Views of the stage's memory.
        """
        bound, num_regions = self._bound, len(self._widths)
        self._copy({"filled": 1, "nonfinite": 1, "starts": num_regions * bound + 1, "labels": bound * len(LABELS)})
        rows = int(self._host["filled"])
        self.finite = not int(self._host["nonfinite"])
        starts = self._host["starts"].numpy()[: num_regions * bound + 1]
        self._copy({"values": int(starts[-1]), "masks": bound * sum(map(mask_bytes, self._widths))})
        values = self._host["values"].numpy().view(np.uint16 if self._patterns is torch.int16 else np.uint32)
        packed = []
        at = 0
        for region, width in enumerate(self._widths):
            absolute = starts[region * bound : region * bound + rows + 1]
            mask = self._host["masks"].numpy()[at : at + bound * mask_bytes(width)].reshape(bound, -1)[:rows]
            packed.append((absolute - absolute[0], values[absolute[0] : absolute[-1]], mask))
            at += bound * mask_bytes(width)
        labels = self._host["labels"].numpy()[: bound * len(LABELS)].reshape(bound, -1)[:rows]
        return labels, packed, {key: buffer[:rows].cpu().numpy() for key, buffer in self._dropped.items()}

    def _copy(self, counts: dict[str, int]) -> None:
        """Bring the first `count` entries of each buffer to the host."""
        if self._side is None:
            for name, count in counts.items():
                self._host[name][:count].copy_(self._device[name][:count])
            return
        with torch.cuda.stream(self._side):
            assert self._packed is not None
            self._side.wait_event(self._packed)
            for name, count in counts.items():
                self._host[name][:count].copy_(self._device[name][:count], non_blocking=True)
        self._side.synchronize()
