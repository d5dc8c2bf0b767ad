"""Masks compared across sequences that decode together, and across neighbouring layers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.formats.ragged import runs
from sparsetrace.formats.row_statistics import popcounts
from sparsetrace.formats.sites import Leaf
from sparsetrace.workload import stats_chunks
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.stats_chunks import words
from sparsetrace.workload.stats_tables import SIZES

# Steps of a bundle of sequences that are read at once.
BATCH_STEPS = 32


def batch_unions(workload: Workload, leaf: Leaf, fed: pa.Table) -> dict[int, list[int]]:
    """For each size: unions of the n-th decode tokens of as many sequences, and the inputs kept in all of them.

    The decoding sequences are taken in order, `size` at a time; a union counts where each of them has an n-th token.

    Args:
        workload: any selection.
        leaf: layer and matrix.
        fed: rows of `tokens.parquet` of the tokens that have a row there, ascending.
    """
    decode = np.flatnonzero(pc.equal(fed["phase"].cast(pa.string()), "decode").to_numpy())
    token, sequence = fed["token"].to_numpy()[decode], fed["sequence"].to_numpy()[decode]
    bounds = list(runs(sequence))
    found = {size: [0, 0] for size in SIZES}
    most = max(SIZES)
    width = -(-workload.features(*leaf) // 64)
    for at in range(0, len(bounds), most):
        bundle = bounds[at : at + most]
        longest = max(stop - start for start, stop in bundle)
        for first in range(0, longest, BATCH_STEPS):
            masks = np.zeros((BATCH_STEPS, most, width), np.uint64)
            there = np.zeros((BATCH_STEPS, most), bool)
            near = [
                (slot, start + first, min(start + first + BATCH_STEPS, stop))
                for slot, (start, stop) in enumerate(bundle)
            ]
            near = [(slot, start, stop) for slot, start, stop in near if start < stop]
            slots = np.concatenate([np.full(stop - start, slot) for slot, start, stop in near])
            steps = np.concatenate([np.arange(stop - start) for _, start, stop in near])
            chosen = np.concatenate([token[start:stop] for _, start, stop in near])
            masks[steps, slots] = words(workload.matrix(*leaf, chosen, values=False).mask)
            there[steps, slots] = True
            for size in SIZES:
                whole = there.reshape(BATCH_STEPS, -1, size).all(axis=2)
                union = np.bitwise_or.reduce(masks.reshape(BATCH_STEPS, -1, size, width), axis=2)
                found[size][0] += int(whole.sum())
                found[size][1] += int(popcounts(union[whole]).sum())
    return found


def across_layers(workload: Workload) -> Iterator[dict[str, Any]]:
    """Rows of the table `layers`: overlap of a token's masks in neighbouring layers of equal width."""
    leaves = [(layer, matrix) for layer, matrix in workload.leaves if layer is not None]
    for name in dict.fromkeys(matrix for _, matrix in leaves):
        for layer in (layer for layer, matrix in leaves if matrix == name):
            if (layer + 1, name) not in leaves:
                continue
            if workload.features(layer, name) != workload.features(layer + 1, name):
                continue
            tokens, others = (workload.tokens_of(at, name) for at in (layer, layer + 1))
            tokens = tokens if tokens is others else np.intersect1d(tokens, others, assume_unique=True)
            pairs, total = 0, 0.0
            for start in range(0, len(tokens), stats_chunks.CHUNK_ROWS):
                chosen = tokens[start : start + stats_chunks.CHUNK_ROWS]
                a, b = (words(workload.matrix(at, name, chosen, values=False).mask) for at in (layer, layer + 1))
                both, either = popcounts(a & b), popcounts(a | b)
                pairs += int((either > 0).sum())
                total += float((both[either > 0] / either[either > 0]).sum())
            if pairs:
                row = {"matrix": name, "layer": layer, "next_layer": layer + 1}
                yield row | {"pairs": pairs, "jaccard": total / pairs}
