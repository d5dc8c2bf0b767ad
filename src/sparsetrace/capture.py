"""Taking the operands out of a running model and writing them as dump blocks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.dump import block_name, write_block
from sparsetrace.files import InputError
from sparsetrace.model import ModelConfig
from sparsetrace.ragged import offsets_of
from sparsetrace.rows import row_figures
from sparsetrace.schema import FORMATS, MATRICES, SITE_OF, mask_bytes
from sparsetrace.settings import Capture
from sparsetrace_kernels.reference import pack_bits

# Host memory that one block's rows may take; with the model's width it fixes the rows of a block.
BLOCK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """Captured rows of one forward pass, in the order of its flattened [B, T].

    Args:
        index: int64 [n], position in the flattened batch.
        token, sequence, position: int64 [n], the index columns of each.
    """

    index: np.ndarray
    token: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


def block_rows(config: ModelConfig, batch: int) -> int:
    """Rows of one block: what fits `BLOCK_BYTES`, but at least one pass of the batch."""
    width = sum(config.in_features(SITE_OF[matrix]) for matrix in MATRICES) * config.num_hidden_layers
    return max(batch, BLOCK_BYTES // (width * FORMATS[config.dtype].bits.itemsize))


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


class Recorder:
    """Collects one group's operands and writes full blocks; memory is that of one block.

    Args:
        folder: of the shard's dump.
        group: number of the group.
        config: of the model.
        rows: of a block; no pass captures more.
        device: of the model.
        out_masks: matrices of which the method says which outputs are not computed.
        capture: what is kept; None keeps all.
    """

    def __init__(
        self,
        folder: Path,
        group: int,
        config: ModelConfig,
        rows: int,
        device: torch.device,
        out_masks: tuple[str, ...] = (),
        capture: Capture | None = None,
    ) -> None:
        self.folder = folder
        self.group = group
        self.config = config
        self.capture = capture or Capture()
        self.blocks: list[str] = []
        self.rows = 0
        self._capacity = rows
        self._buffers = {
            (layer, matrix): torch.empty(
                rows, config.in_features(SITE_OF[matrix]), dtype=config.torch_dtype, device=device
            )
            for layer, matrix in captured_matrices(config, self.capture)
        }
        self._dropped = {
            (layer, matrix): torch.empty(
                rows, mask_bytes(config.out_features(matrix)), dtype=torch.uint8, device=device
            )
            for layer, matrix in self._buffers
            if matrix in out_masks and self.capture.level != "stats"
        }
        self._pending: list[Rows] = []
        self._filled = 0
        self._index: Tensor | None = None

    def samples(self, positions_BT: np.ndarray) -> np.ndarray:
        """bool [B, T]: which positions are kept of those that are sparsified."""
        chosen: np.ndarray = positions_BT % self.capture.every == 0
        return chosen

    def begin(self, rows: Rows) -> None:
        """Announce the rows that the coming pass captures."""
        assert len(rows.index) <= self._capacity
        if self._filled + len(rows.index) > self._capacity:
            self._flush()
        device = next(iter(self._buffers.values())).device
        self._index = torch.from_numpy(rows.index).to(device)
        self._pending.append(rows)

    def record(self, layer: int, matrix: str, operand_BTK: Tensor) -> None:
        """Take the announced rows of an operand; `patch.Patch.record`."""
        assert self._index is not None
        if (layer, matrix) not in self._buffers:
            return
        rows = self._buffers[layer, matrix][self._filled : self._filled + len(self._index)]
        torch.index_select(operand_BTK.flatten(0, 1), 0, self._index, out=rows)

    def record_outputs(self, layer: int, matrix: str, dropped_BTN: Tensor) -> None:
        """Take the announced rows of the outputs that are not computed; `patch.Patch.record_outputs`."""
        assert self._index is not None
        if (layer, matrix) not in self._dropped:
            return
        rows = self._dropped[layer, matrix][self._filled : self._filled + len(self._index)]
        rows.copy_(pack_bits(dropped_BTN.flatten(0, 1).index_select(0, self._index)))

    def end(self) -> None:
        """The pass is over."""
        assert self._index is not None
        self._filled += len(self._index)
        self._index = None

    def close(self) -> None:
        """Write what is left."""
        if self._filled:
            self._flush()

    def _flush(self) -> None:
        rows = {
            name: np.concatenate([getattr(pending, name) for pending in self._pending])
            for name in ("token", "sequence", "position")
        }
        arrays = {
            "rows.token": rows["token"],
            "rows.sequence": rows["sequence"].astype(np.int32),
            "rows.position": rows["position"].astype(np.int32),
        }
        for (layer, matrix), buffer in self._buffers.items():
            bits = _patterns(buffer[: self._filled])
            self._refuse_not_finite(layer, matrix, bits, rows)
            # the operand holds no -0.0, so a pattern is zero exactly where the input was dropped
            keep = bits != 0
            name = f"L{layer:02d}.{matrix}"
            nnz, values = keep.sum(1), bits[keep]
            offsets = offsets_of(nnz)
            if self.capture.level == "full":
                arrays |= {f"{name}.offsets": offsets, f"{name}.values": values}
            else:
                figures = row_figures(values, offsets, FORMATS[self.config.dtype])
                arrays |= {f"{name}.absmax": figures[0], f"{name}.l2": figures[1]}
            if self.capture.level == "stats":
                arrays[f"{name}.nnz"] = nnz.astype(np.int32)
            else:
                arrays[f"{name}.mask"] = np.packbits(keep, axis=1, bitorder="little")
            if (layer, matrix) in self._dropped:
                arrays[f"{name}.out_mask"] = self._dropped[layer, matrix][: self._filled].cpu().numpy()
        file = block_name(self.group, len(self.blocks))
        write_block(self.folder / file, arrays)
        self.blocks.append(file)
        self.rows += self._filled
        self._pending, self._filled = [], 0

    def _refuse_not_finite(self, layer: int, matrix: str, bits: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        number = FORMATS[self.config.dtype]
        bad = (bits & (number.sign - 1)) >= number.infinity
        if bad.any():
            row = int(bad.any(1).argmax())
            raise InputError(
                f"generate: activations must be finite, got Inf or NaN in layer {layer}, matrix {matrix}, token "
                f"{rows['token'][row]} (sequence {rows['sequence'][row]}, position {rows['position'][row]}): "
                "the checkpoint may need a dtype of wider range"
            )


def _patterns(x: Tensor) -> np.ndarray:
    """Bit patterns of a tensor, on the host."""
    itemsize = x.element_size()
    integers: np.ndarray = x.cpu().view(torch.int16 if itemsize == 2 else torch.int32).numpy()
    return integers.view(np.uint16 if itemsize == 2 else np.uint32)
