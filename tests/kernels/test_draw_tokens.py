"""draw_tokens against `torch_ops.sample` on the same draws: the tokens are equal."""

# Shape suffixes: B = slots, V = vocabulary, P = positions, C = arrival counters, 1 = one entry.

import pytest
import torch

from sparsetrace_kernels.checks import new_arrivals
from sparsetrace_kernels.draw_tokens import CHUNK_V, draw_tokens
from sparsetrace_kernels.torch_ops import sample

CASES = [
    # B, V, dtype
    (1, 1, torch.float16),
    (3, 97, torch.float32),
    (2, CHUNK_V, torch.bfloat16),
    (5, 2 * CHUNK_V + 5, torch.float16),  # the last chunk is nearly empty
    (1, 32000, torch.float16),
]
P = 7


def problem(rng, device, B, V, dtype):
    logits_BV = (4 * torch.from_numpy(rng.standard_normal((B, V)))).to(dtype).to(device)
    uniform_BP = torch.from_numpy(rng.random((B, P))).to(device)
    positions_B = torch.from_numpy(rng.integers(0, P, B)).to(device)
    return logits_BV, uniform_BP, positions_B


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("B", "V", "dtype"), [pytest.param(*c, id="B{}-V{}-{}".format(*c)) for c in CASES])
def test_matches_oracle(rng, device, B, V, dtype, temperature):
    arrivals_C = new_arrivals(device)
    temperature_1 = torch.tensor([temperature], dtype=torch.float64, device=device) if temperature else None
    for _ in range(4):
        logits_BV, uniform_BP, positions_B = problem(rng, device, B, V, dtype)
        next_B, finite_B = draw_tokens(logits_BV, uniform_BP, positions_B, temperature_1, arrivals_C)
        drawn_B1 = uniform_BP.gather(1, positions_B[:, None])
        assert torch.equal(next_B, sample(logits_BV.float(), drawn_B1, temperature, 0))
        assert finite_B.all() and not arrivals_C.any()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_no_draw_leaves_the_vocabulary(device, u):
    V = CHUNK_V + 3
    logits_BV = torch.zeros(2, V, device=device)
    logits_BV[1, 5:] = -1000
    uniform_BP = torch.full((2, 1), u, dtype=torch.float64, device=device)
    temperature_1 = torch.ones(1, dtype=torch.float64, device=device)
    zeros_B = torch.zeros(2, dtype=torch.int64, device=device)
    next_B, _ = draw_tokens(logits_BV, uniform_BP, zeros_B, temperature_1, new_arrivals(device))
    assert next_B.tolist() == ([0, 0] if u == 0 else [V - 1, 4])


def test_the_first_of_the_largest_is_the_likeliest(device):
    logits_BV = torch.zeros(2, 2 * CHUNK_V, dtype=torch.float16, device=device)
    logits_BV[0, [9, 70, CHUNK_V + 1]] = 3.0
    logits_BV[1, [CHUNK_V + 4, CHUNK_V + 9]] = 3.0
    uniform_BP = torch.full((2, 1), 0.99, dtype=torch.float64, device=device)
    zeros_B = torch.zeros(2, dtype=torch.int64, device=device)
    next_B, _ = draw_tokens(logits_BV, uniform_BP, zeros_B, None, new_arrivals(device))
    assert next_B.tolist() == [9, CHUNK_V + 4]


# Triton's interpreter compares NaN in numpy
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_reports_which_slot_is_not_finite(device, value, temperature):
    V = CHUNK_V + 60
    logits_BV = torch.zeros(3, V, device=device)
    logits_BV[1, V - 1] = value
    temperature_1 = None if temperature is None else torch.tensor([temperature], dtype=torch.float64, device=device)
    uniform_BP = torch.full((3, 1), 0.5, dtype=torch.float64, device=device)
    zeros_B = torch.zeros(3, dtype=torch.int64, device=device)
    next_B, finite_B = draw_tokens(logits_BV, uniform_BP, zeros_B, temperature_1, new_arrivals(device))
    assert finite_B.tolist() == [True, False, True]
    assert ((next_B >= 0) & (next_B < V)).all()


def test_is_a_well_formed_op(rng, device):
    temperature_1 = torch.ones(1, dtype=torch.float64, device=device)
    torch.library.opcheck(
        draw_tokens, (*problem(rng, device, 2, 33, torch.float16), temperature_1, new_arrivals(device))
    )


def test_refuses(rng, device):
    names = ("logits_BV", "uniform_BP", "positions_B")
    good = dict(zip(names, problem(rng, device, 2, 9, torch.float16), strict=True))
    good |= {"temperature": None, "arrivals_C": new_arrivals(device)}
    for match, wrong in (
        (
            "logits_BV must be a nonempty floating-point matrix, got torch.int64",
            {"logits_BV": good["positions_B"][None]},
        ),
        ("logits_BV must be contiguous", {"logits_BV": good["logits_BV"].T}),
        ("uniform_BP must be contiguous torch.float64", {"uniform_BP": good["uniform_BP"].float()}),
        ("positions_B must be contiguous torch.int64", {"positions_B": good["positions_B"].int()}),
        ("temperature must be contiguous torch.float64", {"temperature": torch.ones(1, device=device)}),
        ("arrivals_C must be contiguous with at least 2", {"arrivals_C": good["arrivals_C"][:1]}),
    ):
        with pytest.raises(ValueError, match="^draw_tokens: " + match):
            draw_tokens(**good | wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 64])
def test_repeats_in_a_graph(rng, device, B):
    logits_BV, uniform_BP, positions_B = problem(rng, device, B, 128_256, torch.bfloat16)
    temperature_1 = torch.tensor([0.8], dtype=torch.float64, device=device)
    arrivals_C = new_arrivals(device)
    draw_tokens(logits_BV, uniform_BP, positions_B, temperature_1, arrivals_C)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        next_B, finite_B = draw_tokens(logits_BV, uniform_BP, positions_B, temperature_1, arrivals_C)
    for _ in range(10):
        logits_BV.normal_(0, 3)
        uniform_BP.uniform_()
        graph.replay()
        drawn_B1 = uniform_BP.gather(1, positions_B[:, None])
        assert torch.equal(next_B, sample(logits_BV.float(), drawn_B1, 0.8, 0))
        assert finite_B.all()
