"""The kernel behind the pure-read floor reads every row once: its sums equal torch's."""

import pytest
import torch

from sparsetrace_kernels.timing import _read_kernel

BLOCK = 64


@pytest.mark.parametrize(("num_rows", "num_programs"), [(1, 1), (7, 3), (3, 8)])
def test_every_row_is_read_once(device, num_rows, num_programs):
    x = torch.randint(0, 100, (num_rows * BLOCK,), dtype=torch.int32, device=device)
    out = torch.empty(num_programs, dtype=torch.int32, device=device)
    _read_kernel[(num_programs,)](x, out, num_rows, BLOCK=BLOCK)
    rows = x.view(num_rows, BLOCK).sum(1)
    assert out.tolist() == [int(rows[i::num_programs].sum()) for i in range(num_programs)]
