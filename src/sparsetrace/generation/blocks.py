"""A full ring as the arrays of a dump block, on the host."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsetrace.formats.dump import array_prefix
from sparsetrace.formats.numbers import FORMATS, NumberFormat
from sparsetrace.formats.ragged import offsets_of, take
from sparsetrace.formats.row_statistics import row_norms
from sparsetrace.formats.sites import Leaf
from sparsetrace.generation.ring import LABELS
from sparsetrace.model.finite import not_finite


class PackedRows(NamedTuple):
    """Rows of one operand: offsets int64 [T + 1], bit patterns [nnz], bitmask uint8 [T, M]."""

    offsets: np.ndarray
    values: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, slots=True)
class HostBlock:
    """What a ring held, on the host.

    Args:
        labels: int64 [T, 3], see `ring.LABELS`.
        packed: rows of each operand.
        dropped: bitmask of the outputs that are not computed, uint8 [T, M].
        finite: whether the device has seen that no operand holds an Inf or NaN; False where nobody has looked.
    """

    labels: np.ndarray
    packed: dict[Leaf, PackedRows]
    dropped: dict[Leaf, np.ndarray]
    finite: bool = False


def pack_on_host(operand_nK: Tensor) -> PackedRows:
    """Rows of an operand on the CPU; copies."""
    itemsize = operand_nK.element_size()
    integers: np.ndarray = operand_nK.view(torch.int16 if itemsize == 2 else torch.int32).numpy()
    bits = integers.view(np.uint16 if itemsize == 2 else np.uint32)
    # the operand holds no -0.0, so a pattern is zero exactly where the input was dropped
    keep = bits != 0
    return PackedRows(offsets_of(keep.sum(1)), bits[keep], np.packbits(keep, axis=1, bitorder="little"))


def block_arrays(
    block: HostBlock, dtype: str, level: str, logits_from: dict[int, int] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a block, see `sparsetrace.formats.dump`.

    Args:
        block: at least one row.
        dtype: of the operands.
        level: how much of each operand is kept, one of `schema.LEVELS`.
        logits_from: for each sequence, the first position whose logits are computed: a matrix in no layer has rows from
            there on only.

    Raises:
        InputError: an operand is not finite.
    """
    number = FORMATS[dtype]
    labels = dict(zip(LABELS, block.labels.T, strict=True))
    arrays = {
        "rows.token": np.ascontiguousarray(labels["token"]),
        "rows.sequence": labels["sequence"].astype(np.int32),
        "rows.position": labels["position"].astype(np.int32),
    }
    for (layer, matrix), packed in block.packed.items():
        name = array_prefix(layer, matrix)
        own = labels
        if layer is None:
            assert logits_from is not None
            first = np.array([logits_from[sequence] for sequence in labels["sequence"].tolist()])
            if len(rows := np.flatnonzero(labels["position"] >= first)) < len(first):
                values, offsets = take(packed.values, packed.offsets, rows)
                packed = PackedRows(offsets, values, packed.mask[rows])
                arrays[f"{name}.rows"] = rows.astype(np.int32)
                own = {label: column[rows] for label, column in labels.items()}
        if not block.finite:
            _refuse_not_finite((layer, matrix), packed, number, own)
        if level == "full":
            arrays |= {f"{name}.offsets": packed.offsets, f"{name}.values": packed.values}
        else:
            absmax, l2 = row_norms(packed.values, packed.offsets, number)
            arrays |= {f"{name}.absmax": absmax, f"{name}.l2": l2}
        if level == "stats":
            arrays[f"{name}.nnz"] = np.diff(packed.offsets).astype(np.int32)
        else:
            arrays[f"{name}.mask"] = packed.mask
    return arrays | {f"{array_prefix(*leaf)}.out_mask": mask for leaf, mask in block.dropped.items()}


def _refuse_not_finite(leaf: Leaf, packed: PackedRows, number: NumberFormat, labels: dict[str, np.ndarray]) -> None:
    bad = (packed.values & (number.sign - 1)) >= number.infinity
    if bad.any():
        row = int(np.searchsorted(packed.offsets, int(bad.argmax()), side="right")) - 1
        layer, matrix = leaf
        where = "the model" if layer is None else f"layer {layer}"
        raise not_finite(
            "generate",
            f"{where}, matrix {matrix}, token {labels['token'][row]} (sequence {labels['sequence'][row]}, position "
            f"{labels['position'][row]})",
        )
