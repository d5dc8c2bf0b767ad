"""The draws of the i.i.d. twin, against masks that earlier versions drew: a published twin must stay the same.

How the twin is read and that it has the density of the rows is in test_read.
"""

import hashlib

import numpy as np
import pytest

from sparsetrace.formats.ragged import offsets_of
from sparsetrace.formats.rows import Rows
from sparsetrace.workload.twin import leaf_key, twin

GOLDEN = [
    # layer, matrix, masks of three rows, hash of their values; drawn by the code before matrices had open names
    (0, "q", "0b6806603d04721906", "0bbabcbcb1e8"),
    (1, "v", "ea8b141a2108887014", "1776064b8b69"),
    (2, "up", "9dcc05075005f1ca09", "cb532db0dc90"),
    (5, "o", "320512728201045405", "9b94267e7b24"),
    (7, "gate", "2152001c1406842611", "18062d908645"),
    (0, "down", "906208de8b01878f04", "37a62943d14a"),
    (31, "k", "9afc07484911098312", "f32f104eb555"),
]


def rows_of(layer, matrix, features=21, tokens=(3, 4, 700)):
    """Row t keeps every (t + 2)-th input; the bit patterns count up from 1."""
    keep = np.stack([np.arange(features) % (t + 2) == 0 for t in range(len(tokens))])
    bits = np.arange(1, keep.sum() + 1).astype(np.uint16)
    mask = np.packbits(keep, axis=1, bitorder="little")
    return Rows(layer, matrix, features, "float16", np.array(tokens), mask, offsets_of(keep.sum(1)), bits)


@pytest.mark.parametrize(("layer", "matrix", "mask", "values"), GOLDEN)
def test_draws_of_the_first_matrices(layer, matrix, mask, values):
    drawn = twin(rows_of(layer, matrix), 0.375, 11)
    assert drawn.mask.tobytes().hex() == mask
    assert hashlib.sha256(drawn.bits.tobytes()).hexdigest().startswith(values)


def test_draws_of_any_other_matrix():
    """Keyed by the hash of its folder, which meets none of the numbered ones."""
    digest = hashlib.sha256(b"model/lm_head").digest()
    assert leaf_key(None, "lm_head") == int.from_bytes(digest[:8], "little") | 1 << 63
    keys = [leaf_key(layer, matrix) for layer in range(40) for _, matrix, *_ in GOLDEN]
    assert sorted(keys) == list(range(7 * 40))
    others = [leaf_key(None, "lm_head"), leaf_key(None, "q"), leaf_key(0, "lm_head"), leaf_key(1, "lm_head")]
    assert len(set(others)) == 4
    assert min(others) >= 1 << 63
    with np.errstate(all="raise"):
        drawn = [twin(rows_of(layer, "lm_head"), 0.5, (1 << 64) - 1).mask for layer in (None, 0)]
    assert not np.array_equal(*drawn)
