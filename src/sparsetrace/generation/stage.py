"""A block on its way from the GPU to the disk.

Masking has been done when a ring is full: one launch packs it on the device, and a side stream copies the result to
pinned memory while decoding goes on.
"""

import numpy as np
import torch
from torch import Tensor

from sparsetrace.formats.numbers import mask_bytes
from sparsetrace.formats.sites import Leaf
from sparsetrace.generation.blocks import HostBlock, PackedRows
from sparsetrace.generation.ring import LABELS, Ring


class Stage:
    """One block on its way from the ring to the disk: packed on the device, copied to pinned memory by a side stream.

    Args:
        ring: whose rows it takes; patterns of all kinds are moved as integers.
        infinity: bit pattern of Inf in the ring's dtype.
    """

    def __init__(self, ring: Ring, infinity: int) -> None:
        # imported late: the torch backend also runs where Triton is not installed
        from sparsetrace_kernels.pack import chunk_table, pack_regions

        self._pack = pack_regions
        regions = list(ring.held.values())
        self._leaves = list(ring.held)
        self._patterns = torch.int16 if ring.operands.element_size() == 2 else torch.int32
        self._infinity = infinity
        self._widths = [region.shape[1] for region in regions]
        self._capacity, device = ring.rows + 1, ring.operands.device
        rows = ring.rows
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
        self._dropped: dict[Leaf, Tensor] = {}

    def take(self, ring: Ring, bound: int) -> None:
        """Pack the ring's first rows, at most `bound`, in stream order; the ring is free for what comes after."""
        self._bound = bound
        device = self._device
        device["nonfinite"].zero_()
        device["filled"].copy_(ring.filled)
        device["labels"][: bound * len(LABELS)].copy_(ring.labels[:bound].flatten())
        self._pack(
            ring.operands.view(self._patterns),
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
        self._dropped = {leaf: buffer[:bound].clone() for leaf, buffer in ring.dropped.items()}
        if self._packed is not None:
            self._packed.record()

    def fetch(self) -> HostBlock:
        """Wait for what `take` began and copy it, in a writing thread; the arrays are views of the stage's memory."""
        bound, num_regions = self._bound, len(self._widths)
        self._copy({"filled": 1, "nonfinite": 1, "starts": num_regions * bound + 1, "labels": bound * len(LABELS)})
        rows = int(self._host["filled"])
        starts = self._host["starts"].numpy()[: num_regions * bound + 1]
        self._copy({"values": int(starts[-1]), "masks": bound * sum(map(mask_bytes, self._widths))})
        values = self._host["values"].numpy().view(np.uint16 if self._patterns is torch.int16 else np.uint32)
        packed: dict[Leaf, PackedRows] = {}
        at = 0
        for region, (leaf, width) in enumerate(zip(self._leaves, self._widths, strict=True)):
            absolute = starts[region * bound : region * bound + rows + 1]
            mask = self._host["masks"].numpy()[at : at + bound * mask_bytes(width)].reshape(bound, -1)[:rows]
            packed[leaf] = PackedRows(absolute - absolute[0], values[absolute[0] : absolute[-1]], mask)
            at += bound * mask_bytes(width)
        labels = self._host["labels"].numpy()[: bound * len(LABELS)].reshape(bound, -1)[:rows]
        dropped = {leaf: buffer[:rows].cpu().numpy() for leaf, buffer in self._dropped.items()}
        return HostBlock(labels, packed, dropped, finite=not int(self._host["nonfinite"]))

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
