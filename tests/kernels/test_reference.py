"""The oracles of lists and histograms against results worked out by hand."""

import torch

from sparsetrace_kernels import reference


def test_list_entry_of_high_rows_round_trips():
    K = 40000
    x_K = torch.zeros(K, dtype=torch.float16)
    x_K[[5, K - 1]] = torch.tensor([1.5, -2.0], dtype=torch.float16)
    list_SIL, counts_SI = reference.compact_ref(x_K, torch.zeros(1, dtype=torch.int32), length=30_000)
    weight_KN = torch.ones(K, 1, dtype=torch.float16)
    assert counts_SI.tolist() == [[1, 1]]
    assert reference.list_gemv_ref(list_SIL, counts_SI, weight_KN, [1]).tolist() == [-0.5]


def test_histogram_counts_signed_zeros_apart():
    counts = reference.histogram_ref(torch.tensor([[0.0, -0.0, 1.0, 1.0]], dtype=torch.bfloat16))
    assert counts.sum() == 4
    assert counts[0] == counts[0x8000] == 1
    assert counts[0x3F80] == 2
