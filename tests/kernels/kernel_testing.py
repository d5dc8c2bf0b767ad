"""Helpers of the kernel tests: inputs, poisoned rings, the bound on the error of a sum."""

# Shape suffixes: K = input features, N = output features, S = column segments, R = ring slots, M = ceil(K / 8).

import torch

NUM_SLOTS = 3
# words for partial sums; few, since tests check that all are zero again
WORDS = 1 << 19
POISON_BYTE = 0xA5


def make_input(K, dtype, device, seed=0):
    """Draw a normal vector that also holds zeros of both signs and a subnormal."""
    generator = torch.Generator().manual_seed(seed)
    x_K = torch.randn(K, generator=generator).to(dtype)
    if K >= 4:
        x_K[:3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4])
    return x_K.to(device)


def make_weight(K, N, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, N, generator=generator).to(dtype).to(device)


def make_ring(S, K, dtype, device):
    """Make poisoned rings whose segments lie in wider rows, as in views of one large ring."""
    num_bytes = -(-K // 8)
    values = torch.full((NUM_SLOTS, S + 1, K + 5), float("nan"), dtype=dtype, device=device)
    mask = torch.full((NUM_SLOTS, S + 1, num_bytes + 3), POISON_BYTE, dtype=torch.uint8, device=device)
    return values[:, 1:, :K], mask[:, 1:, :num_bytes]


def make_slot(number, device):
    return torch.tensor([number], dtype=torch.int64, device=device)


def assert_ring(values_RSK, mask_RSM, number, operand_SK, mask_SM):
    """The slot holds exactly the operand and its bitmask, and everything else is still poisoned."""
    assert torch.equal(values_RSK[number].view(torch.int16), operand_SK.view(torch.int16))
    assert torch.equal(mask_RSM[number], mask_SM)
    assert_untouched(values_RSK, mask_RSM, except_slot=number)


def assert_untouched(values_RSK, mask_RSM, except_slot=None):
    others = [r for r in range(NUM_SLOTS) if r != except_slot]
    assert values_RSK[others].isnan().all()
    assert (mask_RSM[others] == POISON_BYTE).all()
    # the row of a segment before the first one of the views
    base = values_RSK._base
    assert base is None or base[:, 0].isnan().all()


def assert_sum_close(y_N, ref_N, torch_N):
    """The error against float64 is at most twice that of torch in the same dtype, plus one rounding."""
    assert not y_N.isnan().any()
    ulp = torch.finfo(y_N.dtype).eps * ref_N.abs().max()
    assert (y_N.double() - ref_N).abs().max() <= 2 * (torch_N.double() - ref_N).abs().max() + ulp
