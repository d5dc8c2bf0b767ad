"""Outputs that a method does not compute, compared across the files of a workload that is sound otherwise."""

from collections.abc import Iterator

import numpy as np

from sparsetrace.formats.schema import leaf
from sparsetrace.methods import Method
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.verify_faults import Fault

# The matrix that reads the outputs of those in `method.out_masks`, multiplied elementwise.
READS_OUTPUTS = "down"


def output_faults(workload: Workload, method: Method) -> Iterator[Fault]:
    """Whether outputs that are not computed are the same where they must be, and dropped in what reads them."""
    if workload.level == "stats":
        return
    sequences = workload.fed()["sequence"].to_numpy()
    for layer in dict.fromkeys(layer for layer, _ in workload.leaves if layer is not None):
        stored = [matrix for matrix in method.out_masks if (layer, matrix) in workload.leaves]
        held: dict[int, np.ndarray] = {}
        for first in workload.blocks(layer, stored[0], values=False) if stored else ():
            others = [workload.matrix(layer, matrix, first.token, values=False) for matrix in stored[1:]]
            assert first.out_mask is not None
            for other in others:
                if other.out_mask is None or not np.array_equal(other.out_mask, first.out_mask):
                    yield Fault(f"data/{leaf(layer, other.matrix)}", f"out_mask must be that of {first.matrix}")
            if (layer, READS_OUTPUTS) in workload.leaves:
                reads = workload.matrix(layer, READS_OUTPUTS, first.token, values=False)
                if (wrong := (reads.mask & first.out_mask).any(axis=1)).any():
                    yield Fault(
                        f"data/{leaf(layer, READS_OUTPUTS)}",
                        f"column mask: must keep no input that {first.matrix} did not compute, got one in token "
                        f"{first.token[wrong][0]}",
                    )
            if method.outputs_by_sequence:
                of = sequences[np.searchsorted(workload.tokens, first.token)]
                for sequence in np.unique(of).tolist():
                    masks = first.out_mask[of == sequence]
                    if (masks != held.setdefault(sequence, masks[0])).any():
                        what = f"column out_mask: must be one for all of sequence {sequence}, got several"
                        yield Fault(f"data/{leaf(layer, first.matrix)}", what)
