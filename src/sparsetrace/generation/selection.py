"""What of a model is captured, and under which name each operand is held in the dump."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Capture, Decoding
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Leaf, Parts, Site, by_leaf, layer_sites
from sparsetrace.methods import operand_parts
from sparsetrace.model.patch import Patch

# Memory that the rows of a block may take; with the model's widths it fixes the rows of a block and of a prefill pass.
BLOCK_BYTES = 256 << 20
GPU_BLOCK_BYTES = 1 << 30

# The output head reads the last hidden state of a position whose logits are computed.
HEAD: Leaf = (None, "lm_head")


@dataclass(frozen=True, slots=True)
class Selection:
    """What the recorder takes.

    Args:
        sites: of the model.
        dtype: of the operands.
        parts: which matrices of each site read the same operand.
        out_masks: matrices for which the method says which outputs are not computed.
        capture: which layers, matrices and positions, and how much of each operand.
    """

    sites: tuple[Site, ...]
    dtype: str
    parts: Parts
    out_masks: tuple[str, ...]
    capture: Capture

    @property
    def leaves(self) -> list[Leaf]:
        """Layer and name of every matrix that is captured, in the order of execution."""
        return captured_matrices(self.sites, self.capture)


def select(sites: tuple[Site, ...], dtype: str, patch: Patch, capture: Capture) -> Selection:
    """The selection of a model with a method installed."""
    parts = operand_parts(patch.method, sites, patch.rules)
    return Selection(sites, dtype, parts, patch.method.out_masks, capture)


def captured_matrices(sites: Sequence[Site], capture: Capture) -> list[Leaf]:
    """Layer and name of every matrix that is captured, in the order of execution.

    A matrix that belongs to no layer is captured where `capture.matrices` names it, whatever the layers.

    Raises:
        InputError: the model has no such layer or matrix.
    """
    layers = {site.layer for site in layer_sites(sites)}
    if beyond := [layer for layer in capture.layers if layer not in layers]:
        raise InputError(f"capture: layers must be 0 to {len(layers) - 1}, got {beyond[0]}")
    known = dict.fromkeys(matrix for _, matrix in by_leaf(sites))
    if unknown := [matrix for matrix in capture.matrices if matrix not in known]:
        raise InputError(f"capture: matrices must be among {', '.join(known)}, got {unknown[0]}")
    return [
        (layer, matrix)
        for layer, matrix in by_leaf(sites)
        if (matrix in capture.matrices if capture.matrices else layer is not None)
        and (layer is None or not capture.layers or layer in capture.layers)
    ]


def refuse_head_without_logits(capture: Capture, decoding: Decoding) -> None:
    """Refuse to capture the output head where it multiplies nothing.

    Raises:
        InputError: tokens are given, so no logits are computed.
    """
    if HEAD[1] in capture.matrices and decoding.tokens_from != "own":
        raise InputError(
            f"capture: matrices must not name {HEAD[1]} with tokens_from {decoding.tokens_from}, which computes no "
            "logits: leave it out, or set `tokens_from: own`"
        )


def holders(chosen: Sequence[Leaf], parts: Parts) -> dict[Leaf, str]:
    """For each captured matrix, the name under which the dump holds its operand: the first captured that reads it."""
    held: dict[Leaf, str] = {}
    for (layer, _), site_parts in parts.items():
        for part in site_parts:
            captured = [matrix for matrix in part if (layer, matrix) in chosen]
            held |= {(layer, matrix): captured[0] for matrix in captured}
    return held


def block_rows(sites: Sequence[Site], parts: Parts, dtype: str, batch: int, device: torch.device) -> int:
    """Rows of one block: as many as fit the memory with all operands within layers, but at least a pass of the batch.

    It also fixes how many positions of a prompt are fed at a time, so it must not depend on what is captured.
    """
    width = sum(site.in_features * len(parts[site.key]) for site in layer_sites(sites))
    room = GPU_BLOCK_BYTES if device.type == "cuda" else BLOCK_BYTES
    return max(batch, room // (width * FORMATS[dtype].bits.itemsize))
