"""sparse_gemv and list_gemv against their float64 oracles.

Capture and lists must be equal, bit for bit; sums lie within twice torch's own error.
"""

import pytest
import torch
from kernel_testing import (
    NUM_SLOTS,
    WORDS,
    assert_ring,
    assert_sum_close,
    assert_untouched,
    make_input,
    make_ring,
    make_slot,
    make_weight,
)

from sparsetrace_kernels.compact import compact
from sparsetrace_kernels.configs import GemvConfig
from sparsetrace_kernels.list_gemv import list_gemv
from sparsetrace_kernels.partials import new_partials
from sparsetrace_kernels.reference import compact_ref, keep_segments, list_gemv_ref, sparse_gemv_ref
from sparsetrace_kernels.sparse_gemv import sparse_gemv
from sparsetrace_kernels.torch_ops import mask_operand, threshold_bits_for

HALF = [torch.float16, torch.bfloat16]

# smaller cases without a GPU, since the interpreter runs programs one after the other
WHOLE = torch.cuda.is_available()
CASES = [
    # K, segments
    (1, [1]),
    (64, [128]),
    (100, [257 if WHOLE else 97]),  # neither is a multiple of a block
    (344 if WHOLE else 168, [64, 24, 40]),  # three thresholds, widths that no block divides
    (523 if WHOLE else 211, [33, 95]),
]

SINGLE_CONFIGS = [
    None,
    GemvConfig("predicated", 1, 64, 32, num_warps=1),
    GemvConfig("compacting", 2, 16, 64, num_warps=1),
    GemvConfig("compacting", 1, 16, 32, num_warps=2, num_stages=5, use_dot=True),
]

LIST_CONFIGS = [
    None,
    GemvConfig("list", 3, 16, 32, num_warps=1),
    GemvConfig("list", 1, 16, 64, num_warps=2, num_stages=5, use_dot=True),
]


def case_id(case):
    return "K{}-N{}".format(case[0], "+".join(map(str, case[1])))


def config_id(config):
    return encode(config) or "default"


def encode(config):
    return None if config is None else config.encode()


def make_case(K, segments, dtype, device, sparsity):
    """Draw input, weight and a threshold for each segment, all different, up to the wanted sparsity."""
    x_K = make_input(K, dtype, device)
    weight_KN = make_weight(K, sum(segments), dtype, device)
    wanted = [sparsity, 0.9 * sparsity, 0.5 * sparsity][: len(segments)]
    return x_K, weight_KN, torch.cat([threshold_bits_for(x_K, s) for s in wanted])


def torch_gemv(operand_SK, weight_KN, segments):
    columns = weight_KN.float().split(segments, dim=1)
    y_N = torch.cat([x_K.float() @ w for x_K, w in zip(operand_SK, columns, strict=True)])
    return y_N.to(weight_KN.dtype)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", SINGLE_CONFIGS, ids=config_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_single_matches_oracle(device, case, config, dtype, sparsity):
    K, segments = case
    config = encode(config)
    x_K, weight_KN, bits_S = make_case(K, segments, dtype, device, sparsity)
    values_RSK, mask_RSM = make_ring(len(segments), K, dtype, device)
    partials_W = new_partials(device, WORDS)

    def run(*ring):
        return sparse_gemv(x_K, weight_KN, bits_S, partials_W, segments, None, *ring, config)

    y_N = run(values_RSK, mask_RSM, make_slot(1, device))
    ref_N, operand_SK, mask_SM = sparse_gemv_ref(x_K, weight_KN, bits_S, segments)

    assert_ring(values_RSK, mask_RSM, 1, operand_SK, mask_SM)
    assert_sum_close(y_N, ref_N, torch_gemv(operand_SK, weight_KN, segments))
    assert not partials_W.any()
    # neither capture nor a second run change any bit
    assert torch.equal(run(None, None, None), y_N)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", LIST_CONFIGS, ids=config_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_list_matches_oracle(device, case, config, dtype, sparsity):
    K, segments = case
    config = encode(config)
    x_K, weight_KN, bits_S = make_case(K, segments, dtype, device, sparsity)
    operand_SK = mask_operand(x_K.expand(len(segments), K), keep_segments(x_K, bits_S))
    partials_W = new_partials(device, WORDS)
    found = []
    # one section; three, which is no power of two, and the last is shorter
    for length in (K, -(-K // 3)):
        list_SIL, counts_SI = compact_ref(x_K, bits_S, length=length)
        # entries behind the counts must not matter
        list_SIL = torch.where(torch.arange(length, device=device) < counts_SI[..., None], list_SIL, -1)
        lists = list_SIL, counts_SI, weight_KN

        y_N = list_gemv(*lists, partials_W, segments, config)

        assert_sum_close(y_N, list_gemv_ref(*lists, segments), torch_gemv(operand_SK, weight_KN, segments))
        assert not partials_W.any()
        found.append(y_N)
    # neither other sections nor a second run change any bit
    found.append(list_gemv(*lists, partials_W, segments, config))
    assert all(torch.equal(y_N, found[0]) for y_N in found)


# Triton's interpreter multiplies 0 * Inf in numpy
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", SINGLE_CONFIGS[:3], ids=config_id)
def test_single_scales_the_score_and_not_the_operand(device, config, dtype):
    K, segments = 300, [40, 24]
    x_K, weight_KN, _ = make_case(K, segments, dtype, device, 0.5)
    scale_SK = torch.rand(2, K, generator=torch.Generator().manual_seed(2)).to(device)
    # a score above zero must not set the bit of an input that is zero
    scale_SK[:, 0] = float("inf")
    bits_S = torch.cat([threshold_bits_for(x_K[3:].float().abs() * scale_K[3:], 0.5) for scale_K in scale_SK])
    values_RSK, mask_RSM = make_ring(2, K, dtype, device)
    y_N = sparse_gemv(
        x_K, weight_KN, bits_S, new_partials(device, WORDS), segments, scale_SK, values_RSK, mask_RSM,
        make_slot(0, device), encode(config),
    )  # fmt: skip
    ref_N, operand_SK, mask_SM = sparse_gemv_ref(x_K, weight_KN, bits_S, segments, scale_SK)
    assert_ring(values_RSK, mask_RSM, 0, operand_SK, mask_SM)
    assert_sum_close(y_N, ref_N, torch_gemv(operand_SK, weight_KN, segments))


@pytest.mark.parametrize("number", [-1, NUM_SLOTS])
def test_slot_outside_the_ring_captures_nothing(device, number):
    x_K, weight_KN, bits_S = make_case(100, [32], torch.float16, device, 0.5)
    values_RSK, mask_RSM = make_ring(1, 100, torch.float16, device)
    ring = (None, values_RSK, mask_RSM, make_slot(number, device))
    sparse_gemv(x_K, weight_KN, bits_S, new_partials(device, WORDS), [32], *ring)
    compact(x_K, bits_S, *ring)
    assert_untouched(values_RSK, mask_RSM)


@pytest.mark.parametrize("only", ["values_RSK", "mask_RSM"])
def test_either_ring_alone(device, only):
    x_K, weight_KN, bits_S = make_case(100, [32], torch.float16, device, 0.5)
    rings = dict(zip(("values_RSK", "mask_RSM"), make_ring(1, 100, torch.float16, device), strict=True))
    given = [ring if name == only else None for name, ring in rings.items()]
    sparse_gemv(x_K, weight_KN, bits_S, new_partials(device, WORDS), [32], None, *given, make_slot(2, device))
    _, operand_SK, mask_SM = sparse_gemv_ref(x_K, weight_KN, bits_S, [32])
    assert torch.equal(rings[only][2], operand_SK if only == "values_RSK" else mask_SM)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_not_finite_is_kept_and_reaches_the_output(device, dtype):
    x_K, weight_KN, _ = make_case(64, [32], dtype, device, 0.0)
    x_K[10] = float("nan")
    bits_S = torch.tensor([0x7C00 if dtype == torch.float16 else 0x7F80], dtype=torch.int32, device=device)
    values_RSK, mask_RSM = make_ring(1, 64, dtype, device)
    y_N = sparse_gemv(
        x_K, weight_KN, bits_S, new_partials(device, WORDS), [32], None, values_RSK, mask_RSM, make_slot(0, device)
    )  # fmt: skip
    assert y_N.isnan().all()
    assert values_RSK[0, 0].isnan().nonzero().tolist() == [[10]]
    assert mask_RSM[0, 0].tolist() == [0, 4, 0, 0, 0, 0, 0, 0]


def test_ops_are_well_formed(device):
    x_K, weight_KN, bits_S = make_case(64, [24, 8], torch.float16, device, 0.5)
    values_RSK, mask_RSM = (ring.clone() for ring in make_ring(2, 64, torch.float16, device))
    partials_W = new_partials(device, WORDS)
    slot = make_slot(1, device)
    torch.library.opcheck(sparse_gemv, (x_K, weight_KN, bits_S, partials_W, [24, 8], None, values_RSK, mask_RSM, slot))
    lists = compact_ref(x_K, bits_S, length=40)
    torch.library.opcheck(list_gemv, (*lists, weight_KN, partials_W, [24, 8]))
    list_SIL, counts_SI = lists
    refused = {
        r"list_SIL must be \[S, I, L\] with I in \[1, 128\], got \(2, 129, 1\)": (
            list_SIL.new_zeros(2, 129, 1),
            counts_SI,
        ),
        r"counts_SI must be contiguous torch.int32 \(2, 2\)": (list_SIL, counts_SI[:, :1]),
        "segments must be as many as the lists": (list_SIL[:1].contiguous(), counts_SI[:1].contiguous()),
    }
    for match, wrong in refused.items():
        with pytest.raises(ValueError, match="^list_gemv: " + match):
            list_gemv(*wrong, weight_KN, partials_W, [24, 8])


def refusals():
    half = torch.zeros(64, dtype=torch.float16)
    weight = torch.zeros(64, 32, dtype=torch.float16)
    bits = torch.zeros(1, dtype=torch.int32)
    good = {"x_K": half, "weight_KN": weight, "threshold_bits_S": bits, "segments": [32]}
    good |= dict.fromkeys(("scale_SK", "values_RSK", "mask_RSM", "slot"))
    ring = torch.zeros(2, 1, 64, dtype=torch.float16)
    slot = torch.zeros(1, dtype=torch.int64)
    cases = {
        "fp32 input": ({"x_K": half.float()}, "x_K must be a contiguous, nonempty fp16 or bf16 vector"),
        "strided input": ({"x_K": lambda device: half.repeat(2).to(device)[::2]}, "x_K must be a contiguous"),
        "output-major weight": (
            {"weight_KN": lambda device: weight.T.contiguous().to(device).T},
            r"weight_KN must be contiguous \[K=64, N\]",
        ),
        "other dtype": ({"weight_KN": weight.bfloat16()}, "weight_KN must be torch.float16"),
        "missing segment": ({"segments": [16]}, "segments must be 1 to 3 positive widths that sum to N=32"),
        "int64 threshold": ({"threshold_bits_S": bits.long()}, "threshold_bits_S must be contiguous torch.int32"),
        "half scale": ({"scale_SK": torch.zeros(1, 64, dtype=torch.float16)}, "scale_SK must be contiguous"),
        "ring without slot": ({"values_RSK": ring}, "slot must be given with a ring"),
        "slot without ring": ({"slot": slot}, "slot must be given with a ring only"),
        "narrow mask": ({"mask_RSM": torch.zeros(2, 1, 7, dtype=torch.uint8), "slot": slot}, "mask_RSM must be"),
        "few words": (
            {"partials_W": torch.zeros(127, dtype=torch.int32), "config": "predicated:4:16:32:1:1:0:0"},
            "partials_W must be contiguous with at least 4 x 32 words",
        ),
        "float words": ({"partials_W": torch.zeros(128)}, "partials_W must be an int32 vector"),
        "list config": ({"config": "list:1:16:32:1:1:0:0"}, "must name kernel predicated or compacting"),
        "bad config": ({"config": "fast"}, "text must be what GemvConfig.encode writes"),
    }
    return [pytest.param({**good, **change}, match, id=name) for name, (change, match) in cases.items()]


@pytest.mark.parametrize(("arguments", "match"), refusals())
def test_refuses(device, arguments, match):
    def move(value):
        # a copy to the GPU would make a strided tensor contiguous
        if callable(value):
            return value(device)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    with pytest.raises(ValueError, match=match):
        sparse_gemv(**{"partials_W": new_partials(device, WORDS), **{name: move(v) for name, v in arguments.items()}})


LARGE = [
    # K, segments
    (4096, [4096, 1024, 1024]),
    (4100, [11008]),
    (14336, [4096]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_large_shapes_repeat_bitwise_in_a_graph(device, case, dtype, sparsity):
    K, segments = case
    x_K, weight_KN, bits_S = make_case(K, segments, dtype, device, sparsity)
    values_RSK, mask_RSM = make_ring(len(segments), K, dtype, device)
    partials_W = new_partials(device)
    slot = make_slot(2, device)

    def run():
        single_N = sparse_gemv(x_K, weight_KN, bits_S, partials_W, segments, None, values_RSK, mask_RSM, slot)
        return single_N, list_gemv(*compact(x_K, bits_S, None, None, None, None), weight_KN, partials_W, segments)

    eager = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    ref_N, operand_SK, mask_SM = sparse_gemv_ref(x_K, weight_KN, bits_S, segments)
    for _ in range(20):
        graph.replay()
        for eager_N, captured_N in zip(eager, captured, strict=True):
            assert torch.equal(eager_N, captured_N)
        assert not partials_W.any()
    assert_ring(values_RSK, mask_RSM, 2, operand_SK, mask_SM)
    for y_N in eager:
        assert_sum_close(y_N, ref_N, torch_gemv(operand_SK, weight_KN, segments))


@pytest.mark.gpu
def test_weight_beyond_two_to_the_31_elements(device):
    K, N = 65536, 32832
    x_K = make_input(K, torch.float16, device)
    weight_KN = torch.ones(K, N, dtype=torch.float16, device=device)
    bits_S = threshold_bits_for(x_K, 0.999)
    partials_W = new_partials(device, 256 * N)
    expected = mask_operand(x_K, keep_segments(x_K, bits_S)[0]).double().sum()
    for kernel in ("predicated:256:256:64:1:1:0:0", "compacting:128:32:64:1:1:0:0"):
        y_N = sparse_gemv(x_K, weight_KN, bits_S, partials_W, [N], None, None, None, None, kernel)
        assert (y_N.double() - expected).abs().max() <= 1e-3 * expected.abs() + 1e-2
    y_N = list_gemv(*compact(x_K, bits_S, None, None, None, None), weight_KN, partials_W, [N])
    assert (y_N.double() - expected).abs().max() <= 1e-3 * expected.abs() + 1e-2


def test_compiled_code_keeps_the_capture(device):
    x_K, weight_KN, bits_S = make_case(256, [128], torch.bfloat16, device, 0.5)
    values_RSK, mask_RSM = (ring.clone() for ring in make_ring(1, 256, torch.bfloat16, device))
    partials_W = new_partials(device, WORDS)
    slot = make_slot(1, device)

    @torch.compile(fullgraph=True)
    def step(x_K, values_RSK, mask_RSM):
        return sparse_gemv(x_K * 1.0, weight_KN, bits_S, partials_W, [128], None, values_RSK, mask_RSM, slot) + 1

    y_N = step(x_K, values_RSK, mask_RSM)
    ref_N, operand_SK, mask_SM = sparse_gemv_ref(x_K, weight_KN, bits_S, [128])
    assert torch.equal(values_RSK[1], operand_SK)
    assert torch.equal(mask_RSM[1], mask_SM)
    assert_sum_close(y_N, ref_N + 1, torch_gemv(operand_SK, weight_KN, [128]) + 1)
