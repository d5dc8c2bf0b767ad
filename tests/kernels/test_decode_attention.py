"""decode_attention: stored keys equal those of `model.rotate` bit for bit; outputs lie within twice torch's error."""

# Shape suffixes: B = slots, H = query heads, G = kv heads, D = head dim, S = cache positions, P = rows of the rotary
# tables, E = D / 2, N = (H + 2 G) D, T = 1 token.

import pytest
import torch
from kernel_testing import WORDS, assert_sum_close, make_slot

from sparsetrace.model.decoder import rotate
from sparsetrace_kernels.decode_attention import MAX_SPLITS, choose_splits, decode_attention, decode_attention_list
from sparsetrace_kernels.partials import new_partials
from sparsetrace_kernels.reference import compact_ref, decode_attention_ref, keep_segments
from sparsetrace_kernels.torch_ops import mask_operand, threshold_bits_for

HALF = [torch.float16, torch.bfloat16]
LENGTH = 90

CASES = [
    # H, G, D, window, num_splits
    (4, 4, 64, 0, 1),
    (4, 1, 24, 0, 3),  # three splits that take tiles in turn; a head dim that is no power of two
    (2, 1, 8, 0, 8),  # more splits than tiles
    (2, 2, 96, 0, 2),
    (2, 1, 128, 0, 5),
    (4, 2, 24, 7, 1),
    (4, 1, 64, 20, 4),  # two tiles for four splits
    (1, 1, 6, 1, 2),  # attends to the current token alone
    (2, 1, 320, 0, 3),
]
POSITIONS = [0, 1, 37, 64, LENGTH - 1]


def coarsen(x, dtype, device):
    """Round to eighths, whose rotations are exact, where the interpreter truncates to bf16 and the GPU rounds."""
    if device.type == "cpu" and dtype is torch.bfloat16:
        return (x * 8).round().clamp(-8, 8) / 8
    return x


def make_values(generator, shape, dtype, device):
    """Draw normal values that include zeros of both signs and a subnormal."""
    x = torch.randn(shape, generator=generator)
    x.view(-1)[:3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4])
    return coarsen(x, dtype, device).to(dtype).to(device)


def make_tables(P, D, dtype, device):
    angle_PE = torch.arange(P)[:, None] * 100.0 ** -(torch.arange(0, D, 2) / D)
    return [coarsen(table_PE, dtype, device).to(dtype).to(device) for table_PE in (angle_PE.cos(), angle_PE.sin())]


def make_caches(generator, positions, S, G, D, dtype, device):
    """Make keys and values of three layers, NaN from each slot's position on, and return layer 1."""
    caches = []
    for _ in range(2):
        cache_LBSGD = torch.full((3, len(positions), S, G, D), float("nan"), dtype=dtype, device=device)
        # drawn at full length, so that caches of another length hold the same values
        drawn_BSGD = make_values(generator, (len(positions), LENGTH, G, D), dtype, device)
        for b, position in enumerate(positions):
            stop = max(0, min(position, S, LENGTH))
            cache_LBSGD[1, b, :stop] = drawn_BSGD[b, :stop]
        caches.append(cache_LBSGD[1])
    return caches


class Problem:
    """Inputs of one launch, drawn from a fixed seed; the cache holds what the model stored before these positions."""

    def __init__(self, device, dtype, H, G, D, positions, S=LENGTH):
        generator = torch.Generator().manual_seed(0)
        self.qkv_BN = make_values(generator, (len(positions), (H + 2 * G) * D), dtype, device)
        self.cos_PE, self.sin_PE = make_tables(LENGTH + 100, D, dtype, device)
        self.positions_B = torch.tensor(positions, device=device)
        self.keys_BSGD, self.values_BSGD = make_caches(generator, positions, S, G, D, dtype, device)
        self.partials_W = new_partials(device, WORDS)

    def run(self, window=0, num_splits=1, use_pdl=False):
        y_BN = decode_attention(*self.arguments(window, num_splits), use_pdl)
        assert not self.partials_W.any()
        return y_BN

    def arguments(self, window=0, num_splits=1):
        return (
            self.qkv_BN,
            self.cos_PE,
            self.sin_PE,
            self.positions_B,
            self.keys_BSGD,
            self.values_BSGD,
            self.partials_W,
            window,
            num_splits,
        )

    def reference(self, window=0):
        return decode_attention_ref(*self.arguments()[:6], window)

    def torch_heads(self):
        """Return q, k and v of the tokens, [B, T, heads, D], with q and k rotated by the model's function."""
        B, _, G, D = self.keys_BSGD.shape
        heads = self.qkv_BN.reshape(B, 1, -1, D)
        rows_B = self.positions_B.clamp(0, self.cos_PE.shape[0] - 1)
        tables = [table_PE[rows_B, None, None].repeat(1, 1, 1, 2) for table_PE in (self.cos_PE, self.sin_PE)]
        q_BTHD, k_BTGD, v_BTGD = heads.tensor_split((-2 * G, -G), dim=2)
        return rotate(q_BTHD, *tables), rotate(k_BTGD, *tables), v_BTGD

    def torch_attention(self, window):
        """Attend as the model does, over a cache that already holds the tokens."""
        q_BTHD, _, _ = self.torch_heads()
        S = self.keys_BSGD.shape[1]
        distance_BS = self.positions_B[:, None] - torch.arange(S, device=q_BTHD.device)
        mask_BS = (distance_BS >= 0) & (distance_BS < (window or S))
        # torch multiplies masked values by zero, so NaN would remain NaN
        k_BGSD, v_BGSD = (x.nan_to_num().transpose(1, 2) for x in (self.keys_BSGD, self.values_BSGD))
        y_BHTD = torch.nn.functional.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2), k_BGSD, v_BGSD, attn_mask=mask_BS[:, None, None], enable_gqa=True
        )
        return y_BHTD.flatten(1)


def bits(x):
    return x.contiguous().view(torch.int16)


def assert_stored(problem, before):
    """The caches hold the tokens at their positions, bit for bit, and are unchanged everywhere else."""
    _, k_BTGD, v_BTGD = problem.torch_heads()
    S = problem.keys_BSGD.shape[1]
    for cache_BSGD, old_LBSGD, new_BTGD in zip(
        (problem.keys_BSGD, problem.values_BSGD), before, (k_BTGD, v_BTGD), strict=True
    ):
        expected_LBSGD = old_LBSGD.clone()
        for b, position in enumerate(problem.positions_B.tolist()):
            if 0 <= position < S:
                expected_LBSGD[1, b, position] = new_BTGD[b, 0]
        assert torch.equal(bits(cache_BSGD._base), bits(expected_LBSGD))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("H", "G", "D", "window", "num_splits"),
    [pytest.param(*c, id="H{}-G{}-D{}-window{}-splits{}".format(*c)) for c in CASES],
)
def test_matches_oracle(device, dtype, H, G, D, window, num_splits):
    problem = Problem(device, dtype, H, G, D, POSITIONS)
    before = [cache._base.clone() for cache in (problem.keys_BSGD, problem.values_BSGD)]
    ref_BN, ref_keys_BGD, ref_values_BGD = problem.reference(window)

    y_BN = problem.run(window, num_splits)

    assert_stored(problem, before)
    for cache_BSGD, ref_BGD in ((problem.keys_BSGD, ref_keys_BGD), (problem.values_BSGD, ref_values_BGD)):
        slots_B = torch.arange(len(POSITIONS), device=device)
        assert torch.equal(bits(cache_BSGD[slots_B, problem.positions_B]), bits(ref_BGD))
    assert y_BN.shape == (len(POSITIONS), H * D)
    for y_N, ref_N, torch_N in zip(y_BN, ref_BN, problem.torch_attention(window), strict=True):
        assert_sum_close(y_N, ref_N, torch_N)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_positions_outside_the_cache_store_nothing(device, num_splits):
    positions = [-1, -(2**62), 40, 41, 130, 2**62]
    problem = Problem(device, torch.float16, 2, 1, 24, positions, S=40)
    before = [cache._base.clone() for cache in (problem.keys_BSGD, problem.values_BSGD)]
    for window in (0, 100):
        ref_BN, _, _ = problem.reference(window)
        assert_sum_close(problem.run(window, num_splits), ref_BN, ref_BN.half())
    assert_stored(problem, before)


def test_a_single_split_needs_no_words(device):
    # so that a batch of a thousand slots does not ask for more words than there are
    shape = (device, torch.float16, 2, 1, 24, POSITIONS)
    problem = Problem(*shape)
    problem.partials_W = problem.partials_W[:1]
    assert torch.equal(problem.run(), Problem(*shape).run())


@pytest.mark.parametrize(("window", "num_splits"), [(0, 1), (0, 3), (50, 4)])
def test_depends_on_the_slots_own_tokens_only(device, window, num_splits):
    shape = (device, torch.float16, 2, 1, 24)
    y_BN = Problem(*shape, POSITIONS).run(window, num_splits)
    assert torch.equal(Problem(*shape, POSITIONS).run(window, num_splits), y_BN)
    # another cache length, with another alignment
    assert torch.equal(Problem(*shape, POSITIONS, S=LENGTH + 37).run(window, num_splits), y_BN)
    for b in range(len(POSITIONS)):
        problem = Problem(*shape, POSITIONS)
        for name in ("qkv_BN", "positions_B", "keys_BSGD", "values_BSGD"):
            setattr(problem, name, getattr(problem, name)[b : b + 1])
        assert torch.equal(problem.run(window, num_splits)[0], y_BN[b])


def test_takes_any_strides(device):
    problem = Problem(device, torch.float16, 4, 2, 24, POSITIONS)
    y_BN = problem.run(0, 2)
    strided = Problem(device, torch.float16, 4, 2, 24, POSITIONS)
    # keys with heads before positions, and values in wider rows
    strided.keys_BSGD = strided.keys_BSGD.transpose(1, 2).contiguous().transpose(1, 2)
    strided.values_BSGD = torch.nn.functional.pad(strided.values_BSGD, (3, 2))[..., 3:-2]
    assert torch.equal(strided.run(0, 2), y_BN)
    for name in ("keys_BSGD", "values_BSGD"):
        assert torch.equal(bits(getattr(strided, name)), bits(getattr(problem, name)))


def test_nan_and_infinity_reach_the_output_of_their_head_only(device):
    problem = Problem(device, torch.float16, 4, 2, 24, [80])
    clean_HD = problem.run(0, 2).view(4, 24)
    problem.keys_BSGD[0, 79, 1, 0] = float("nan")
    problem.values_BSGD[0, 3, 0, 5] = float("inf")
    y_HD = problem.run(0, 2).view(4, 24)
    assert y_HD[2:].isnan().all()
    assert (y_HD[:2, 5] == float("inf")).all()
    clean_HD[:2, 5] = float("inf")
    assert torch.equal(y_HD[:2], clean_HD[:2])


@pytest.mark.parametrize("has_scale", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("H", "G", "D", "num_splits"), [(4, 2, 24, 1), (4, 1, 64, 3), (2, 2, 128, 8)])
def test_lists_and_captures(device, H, G, D, num_splits, dtype, has_scale):
    """Output and cache equal those of decode_attention; list, counts and ring equal the oracle's for that output."""
    plain, listed = (Problem(device, dtype, H, G, D, [77]) for _ in range(2))
    y_BN = plain.run(0, num_splits)
    scale_SK = torch.rand(1, H * D, generator=torch.Generator().manual_seed(4)).to(device) if has_scale else None
    score_K = y_BN[0].float().abs() * scale_SK[0] if has_scale else y_BN[0]
    bits_S = threshold_bits_for(score_K, 0.5)
    ring_RSK = torch.full((3, 1, H * D), float("nan"), dtype=dtype, device=device)

    def run(values_RSK, slot):
        found = decode_attention_list(*listed.arguments(0, num_splits), bits_S, scale_SK, values_RSK, slot)
        assert not listed.partials_W.any()
        return found

    found_BN, list_SIL, counts_SI = run(ring_RSK, make_slot(1, device))
    assert torch.equal(bits(found_BN), bits(y_BN))
    for name in ("keys_BSGD", "values_BSGD"):
        assert torch.equal(bits(getattr(listed, name)), bits(getattr(plain, name)))
    ref_SIL, ref_counts_SI = compact_ref(y_BN[0], bits_S, scale_SK, length=D)
    assert torch.equal(counts_SI, ref_counts_SI)
    valid_SIL = torch.arange(D, device=device) < counts_SI[..., None]
    assert torch.equal(torch.where(valid_SIL, list_SIL, 0), ref_SIL)
    operand_K = mask_operand(y_BN[0], keep_segments(y_BN[0], bits_S, scale_SK)[0])
    assert torch.equal(bits(ring_RSK[1, 0]), bits(operand_K))
    assert ring_RSK[[0, 2]].isnan().all()
    # the same without a ring, and with a slot outside it
    before = bits(ring_RSK).clone()
    for again in (run(None, None), run(ring_RSK, make_slot(3, device))):
        assert torch.equal(bits(again[0]), bits(y_BN)) and torch.equal(again[2], counts_SI)
    assert torch.equal(bits(ring_RSK), before)


def test_list_is_for_one_slot(device):
    bits_S = torch.zeros(1, dtype=torch.int32, device=device)
    problem = Problem(device, torch.float16, 4, 2, 8, [3, 0], S=5)
    with pytest.raises(
        ValueError, match="^decode_attention_list: qkv_BN must be of one slot and at most 128 heads, got 2"
    ):
        decode_attention_list(*problem.arguments(), bits_S, None, None, None)
    problem = Problem(device, torch.float16, 4, 2, 8, [3], S=5)
    with pytest.raises(ValueError, match="^decode_attention_list: threshold_bits_S must hold one threshold, got 2"):
        decode_attention_list(*problem.arguments(), bits_S.repeat(2), None, None, None)
    with pytest.raises(ValueError, match="^decode_attention_list: slot must be given with a ring only"):
        decode_attention_list(*problem.arguments(), bits_S, None, None, make_slot(0, device))


def test_splits_are_fewer_the_more_heads_there_are():
    assert [choose_splits(B, 32) for B in (1, 2, 4, 8, 64)] == [8, 4, 2, 1, 1]
    assert choose_splits(1, 1) == MAX_SPLITS
    assert choose_splits(1, 24) == 8


def test_is_a_well_formed_op(device):
    problem = Problem(device, torch.float16, 2, 1, 8, [3, 0], S=5)
    # opcheck compares the caches, and NaN equals nothing
    for cache_BSGD in (problem.keys_BSGD, problem.values_BSGD):
        cache_BSGD.nan_to_num_()
    torch.library.opcheck(decode_attention, problem.arguments(4, 2))
    problem = Problem(device, torch.float16, 2, 1, 8, [3], S=5)
    for cache_BSGD in (problem.keys_BSGD, problem.values_BSGD):
        cache_BSGD.nan_to_num_()
    ring_RSK = torch.zeros(2, 1, 16, dtype=torch.float16, device=device)
    listing = (torch.zeros(1, dtype=torch.int32, device=device), None, ring_RSK, make_slot(1, device))
    # list entries behind the count are undefined, so outputs are not compared between runs
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(decode_attention_list, (*problem.arguments(4, 2), *listing), test_utils=tests)


def test_refuses(device):
    problem = Problem(device, torch.float16, 4, 2, 8, [3, 0], S=5)
    names = ("qkv_BN", "cos_PE", "sin_PE", "positions_B", "keys_BSGD", "values_BSGD", "partials_W")
    names += ("window", "num_splits")

    def refuses(match, **changed):
        arguments = dict(zip(names, problem.arguments(), strict=True)) | changed
        with pytest.raises(ValueError, match="^decode_attention: " + match):
            decode_attention(**arguments)

    refuses("keys_BSGD must be fp16 or bf16, got .*: fp32 models run", keys_BSGD=problem.keys_BSGD.float())
    refuses("keys_BSGD must be a nonempty .* with D even", keys_BSGD=problem.keys_BSGD[..., :7])
    refuses("keys_BSGD must be a nonempty", keys_BSGD=problem.keys_BSGD.mT.contiguous().mT)
    refuses("keys_BSGD must be a nonempty", keys_BSGD=problem.keys_BSGD[0])
    refuses("values_BSGD must be torch.float16", values_BSGD=problem.values_BSGD.bfloat16())
    refuses(r"values_BSGD must be torch.float16 \(2, 5, 2, 8\)", values_BSGD=problem.values_BSGD[:1])
    refuses(r"qkv_BN must hold .*, got \(2, 63\)", qkv_BN=problem.qkv_BN[:, :63])
    refuses("qkv_BN must hold .* a multiple of G=2", qkv_BN=problem.qkv_BN[:, :56])
    refuses("qkv_BN must hold", qkv_BN=problem.qkv_BN[:, :32])
    refuses("qkv_BN must be contiguous torch.float16", qkv_BN=problem.qkv_BN.float())
    refuses("qkv_BN must be contiguous", qkv_BN=problem.qkv_BN[:1])
    refuses(r"cos_PE must have at least S=5 rows, got \(4, 4\)", cos_PE=problem.cos_PE[:4])
    refuses("cos_PE must be contiguous", cos_PE=problem.cos_PE[:, :3])
    refuses("sin_PE must be contiguous", sin_PE=problem.sin_PE[:50])
    refuses("positions_B must be contiguous torch.int64", positions_B=problem.positions_B.int())
    refuses(
        "partials_W must be contiguous with at least 2 x 80 words", partials_W=problem.partials_W[:159], num_splits=2
    )
    refuses("partials_W must be an int32 vector", partials_W=problem.partials_W.long())
    refuses("window must be at least 0, got -1", window=-1)
    refuses(r"num_splits must be in \[1, 32\], got 0", num_splits=0)
    refuses(r"num_splits must be in \[1, 32\], got 33", num_splits=33)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("use_pdl", [False, True])
@pytest.mark.parametrize(("B", "G"), [(1, 32), (1, 8), (64, 8)])
def test_replays_in_a_graph(device, B, G, use_pdl, dtype):
    H, D, window = 32, 128, 60
    num_splits = choose_splits(B, H)
    problem = Problem(device, dtype, H, G, D, [LENGTH - 9] * B)
    problem.run(window, num_splits, use_pdl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_BN = decode_attention(*problem.arguments(window, num_splits), use_pdl)
    for _ in range(5):
        problem.positions_B += 1
        before = [cache._base.clone() for cache in (problem.keys_BSGD, problem.values_BSGD)]
        ref_BN, _, _ = problem.reference(window)
        graph.replay()
        assert_stored(problem, before)
        assert not problem.partials_W.any()
        assert_sum_close(y_BN, ref_BN, problem.torch_attention(window))
        again_BN = y_BN.clone()
        graph.replay()
        assert torch.equal(y_BN, again_BN)
