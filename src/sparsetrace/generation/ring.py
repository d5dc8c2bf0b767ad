"""The ring: device memory that takes the captured operands of the coming block, row by row.

Rows are placed by number, on the device alone, so that the same code captures in eager mode and inside a CUDA graph.
"""

# Shape suffixes: n rows of a pass, R rows of the ring, P parts of a site (matrices that read one operand), K input
# features, N output features, M bytes of a bitmask.

import torch
from torch import Tensor

from sparsetrace.formats.numbers import mask_bytes
from sparsetrace.formats.sites import Leaf, SiteKey, by_leaf
from sparsetrace.generation.selection import Selection, holders
from sparsetrace_kernels import torch_ops
from sparsetrace_kernels.torch_ops import pack_bits

# Columns of the ring's labels.
LABELS = ("token", "sequence", "position")


class Ring:
    """Memory for the operands, dropped outputs and labels of a number of rows; an operand that several matrices read is
    held once.

    Args:
        selection: what is captured.
        rows: capacity.
        device: of the model.

    Attributes:
        operands: one allocation for all operands, of the model's dtype.
        held: [R + 1, K] region of each operand, under the matrix whose name it has in the dump. The last row takes
            whatever is not captured.
        dropped: uint8 [R + 1, M], outputs that are not computed, for each matrix that the method says so of.
        labels: int64 [R + 1, 3], see `LABELS`.
        filled: int64 [1], rows in use.
    """

    def __init__(self, selection: Selection, rows: int, device: torch.device) -> None:
        chosen, of = selection.leaves, by_leaf(selection.sites)
        holder = holders(chosen, selection.parts)
        self.rows = rows
        self._every = selection.capture.every
        # all parts of a site side by side, since one launch captures them all
        sites = {site.key: site for site in (of[leaf] for leaf in chosen)}
        self._parts: dict[SiteKey, list[list[str]]] = {key: selection.parts[key] for key in sites}
        widths = {
            (layer, part[0]): sites[layer, name].in_features
            for (layer, name), parts in self._parts.items()
            for part in parts
        }
        self.operands = torch.empty(
            sum(widths.values()) * (rows + 1), dtype=getattr(torch, selection.dtype), device=device
        )
        # by the first matrix of each part
        self._regions: dict[Leaf, Tensor] = {}
        base = 0
        for leaf, width in widths.items():
            self._regions[leaf] = self.operands[base : base + width * (rows + 1)].view(rows + 1, width)
            base += width * (rows + 1)
        self.held: dict[Leaf, Tensor] = {
            (layer, holder[layer, matrix]): self._regions[layer, part[0]]
            for (layer, _), parts in self._parts.items()
            for part in parts
            for matrix in part
            if (layer, matrix) in holder
        }
        self.dropped: dict[Leaf, Tensor] = {
            leaf: torch.empty(rows + 1, mask_bytes(of[leaf].outputs(leaf[1])), dtype=torch.uint8, device=device)
            for leaf in chosen
            if leaf[1] in selection.out_masks and selection.capture.level != "stats"
        }
        self.labels = torch.empty(rows + 1, len(LABELS), dtype=torch.int64, device=device)
        self.filled = torch.zeros(1, dtype=torch.int64, device=device)
        self._place = torch_ops.place_rows
        if device.type == "cuda":
            # imported late: the torch backend also runs where Triton is not installed
            from sparsetrace_kernels.decode_state import place_rows

            self._place = place_rows

    def place(self, chosen_n: Tensor, positions_n: Tensor, bases_n: Tensor, numbers_n: Tensor) -> Tensor:
        """Choose the ring row of each row of the coming pass, and label it.

        Args:
            chosen_n: bool, rows that are captured if their position is sampled.
            positions_n, bases_n, numbers_n: int64, of each; its sequence's first token number, and its number.

        Returns:
            int64 [n]; where not captured, the number of the last row.
        """
        placed: Tensor = self._place(chosen_n, positions_n, bases_n, numbers_n, self._every, self.labels, self.filled)
        return placed

    def region(self, layer: int | None, site: str) -> Tensor | None:
        """[R, P, K] view of what a site's parts fill; None where none of its matrices is captured."""
        if (layer, site) not in self._parts:
            return None
        parts = self._parts[layer, site]
        first = self._regions[layer, parts[0][0]]
        rows, width = first.shape
        shape = (rows - 1, len(parts), width)
        return self.operands.as_strided(shape, (width, rows * width, 1), first.storage_offset())

    def takes(self, leaf: Leaf) -> bool:
        """Whether an operand is captured that goes by the name of this matrix."""
        return leaf in self._regions

    def store(self, leaf: Leaf, rows_n: Tensor, operand_nK: Tensor) -> None:
        """Take rows of an operand, under the first matrix of its part; nothing where that is not captured."""
        if leaf in self._regions:
            self._regions[leaf].index_copy_(0, rows_n, operand_nK)

    def clear(self, leaf: Leaf, rows_n: Tensor) -> None:
        """Set rows of an operand to zero."""
        self._regions[leaf].index_fill_(0, rows_n, 0)

    def store_outputs(self, leaf: Leaf, rows_n: Tensor, dropped_nN: Tensor) -> None:
        """Take rows of the outputs that are not computed; nothing where they are not captured."""
        if leaf in self.dropped:
            self.dropped[leaf].index_copy_(0, rows_n, pack_bits(dropped_nN))
