"""rotate_rows equals `model.rotate` in every bit of queries, keys and values, and writes nothing else."""

import pytest
import torch

from sparsetrace.model.decoder import rotate
from sparsetrace_kernels.reference import rotate_rows_ref
from sparsetrace_kernels.rotate_rows import rotate_rows

CASES = [
    # B, T, H, G, D, S
    (1, 1, 1, 1, 2, 3),
    (2, 3, 4, 2, 8, 9),
    (3, 2, 20, 5, 24, 7),
]
# Triton 3.7's interpreter truncates to bf16, so bf16 takes eighths and cosines of 0 and 1, which need no rounding
DTYPES = [torch.float16, torch.bfloat16]


def inputs(device, B, T, H, G, D, S, dtype):
    n, exact = B * T, dtype == torch.bfloat16 and device.type == "cpu"
    qkv_nN = torch.randn(n, (H + 2 * G) * D, device=device)
    cos_PE, sin_PE = torch.randn(2, S + 2, D // 2, device=device).unbind()
    if exact:
        qkv_nN, cos_PE, sin_PE = (qkv_nN * 8).round() / 8, (cos_PE > 0).float(), (sin_PE > 0).float()
    positions_n = torch.stack([torch.randperm(S, device=device)[:T] for _ in range(B)]).flatten()
    cache = torch.full((2, 3, B, S, G, D), torch.nan, device=device, dtype=dtype)[:, 1]
    tables = (table.to(dtype).contiguous() for table in (cos_PE, sin_PE))
    return qkv_nN.to(dtype), *tables, positions_n, cache[0], cache[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotates_and_stores(device, rng, case, dtype):
    B, T, H, G, D, _ = case
    qkv_nN, cos_PE, sin_PE, positions_n, keys, values = inputs(device, *case, dtype)
    q_nK = rotate_rows(qkv_nN, cos_PE, sin_PE, positions_n, keys, values)

    q_BTHD, k_BTGD, v_BTGD = qkv_nN.view(B, T, -1, D).tensor_split((H, H + G), dim=2)
    factors = [table[positions_n].repeat(1, 2).view(B, T, 1, D) for table in (cos_PE, sin_PE)]
    expected_keys, expected_values = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    slots = torch.arange(B, device=device)[:, None]
    expected_keys[slots, positions_n.view(B, T)] = rotate(k_BTGD, *factors)
    expected_values[slots, positions_n.view(B, T)] = v_BTGD
    expected = rotate(q_BTHD, *factors).reshape(B * T, -1)
    reference = rotate_rows_ref(qkv_nN, cos_PE, sin_PE, positions_n, G)
    assert torch.equal(reference[0], expected)
    for ours, theirs in ((q_nK, expected), (keys, expected_keys), (values, expected_values)):
        # where nothing was written, both are NaN
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_positions_outside_the_cache_store_nothing(device, rng):
    qkv_nN, cos_PE, sin_PE, positions_n, keys, values = inputs(device, 1, 3, 2, 1, 8, 5, torch.float16)
    positions_n.copy_(torch.tensor([-3, 5, 900]))
    rotate_rows(qkv_nN, cos_PE, sin_PE, positions_n, keys, values)
    assert keys.isnan().all() and values.isnan().all()


def test_is_a_well_formed_op(device, rng):
    arguments = inputs(device, 2, 2, 4, 2, 8, 6, torch.float16)
    arguments = (*arguments[:4], arguments[4].nan_to_num().clone(), arguments[5].nan_to_num().clone())
    torch.library.opcheck(rotate_rows, arguments)


def test_refusals(device, rng):
    qkv_nN, cos_PE, sin_PE, positions_n, keys, values = inputs(device, 2, 2, 4, 2, 8, 6, torch.float16)
    for change, words in (
        ({"qkv_nN": qkv_nN[:3]}, "equally many rows for each of 2 slots"),
        ({"qkv_nN": qkv_nN[:, :-8].contiguous()}, "a multiple of G=2"),
        ({"qkv_nN": qkv_nN.bfloat16()}, "qkv_nN must be contiguous torch.float16"),
        ({"cos_PE": cos_PE[:, 1:]}, "cos_PE must be contiguous"),
        ({"positions_n": positions_n.int()}, "positions_n must be contiguous torch.int64"),
        ({"values_BSGD": values[:, 1:]}, "values_BSGD must be"),
    ):
        arguments = {
            "qkv_nN": qkv_nN,
            "cos_PE": cos_PE,
            "sin_PE": sin_PE,
            "positions_n": positions_n,
            "keys_BSGD": keys,
            "values_BSGD": values,
        }
        with pytest.raises(ValueError, match=f"rotate_rows: .*{words}"):
            rotate_rows(**arguments | change)
