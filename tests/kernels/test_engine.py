"""The Triton engine against the reference rules, float64 products, and the torch engine.

Product by product inside the model: the captured operand equals the reference's masking of the x that the producer
stored, bit for bit; the product is within twice torch's own error of the float64 one on that operand. Whole runs of the
two engines on given tokens then agree to what 16-bit activations allow, and exactly in all that is discrete.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Capture, Decoding
from sparsetrace.formats.architecture import sites_of
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import by_leaf
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.backends import choose_backend
from sparsetrace.generation.blocks import pack_on_host
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.fused import FusedDecoder
from sparsetrace.generation.prompts import Sequence
from sparsetrace.generation.selection import holders, select
from sparsetrace.generation.stage import Stage
from sparsetrace.methods import Dense, MatrixRule, Teal, TopK, Wina
from sparsetrace.model.decoder import KVCache
from sparsetrace.model.patch import install
from sparsetrace_kernels import decode_attention
from sparsetrace_kernels.add_rmsnorm import add_rmsnorm
from sparsetrace_kernels.list_gemv import list_gemv
from sparsetrace_kernels.masked_rows import add_rmsnorm_rows
from sparsetrace_kernels.torch_ops import DENSE, mask_operand

# Triton 3.7's interpreter rounds bf16 by truncation, so there it is tried on the GPU alone
DTYPES = ["float16"] + (["bfloat16"] if torch.cuda.is_available() else [])
# and takes a second for a pass of one layer, so what is there is tried in part
WHOLE = torch.cuda.is_available()
NEW = 9 if WHOLE else 3
MODELS = {
    "gqa": {},
    "mha-wide": {"num_key_value_heads": 4, "intermediate_size": 75},
    "window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4},
}
METHODS = {
    "teal": lambda rules: (Teal(sparsity=0.5), rules),
    "wina": lambda rules: (Wina(sparsity=0.5, select="threshold"), [scaled(rule) for rule in rules]),
    "dense": lambda rules: (Dense(), [MatrixRule(rule.layer, rule.matrix, None) for rule in rules]),
}


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
SITE_NAMES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")

# the second is what each is tried with where not everything is
KINDS = {"torch": "half", "triton": "all"}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Without a GPU, fewer splits of attention: the interpreter runs programs one after the other, 0.1 s each."""
    if not WHOLE:
        monkeypatch.setattr(decode_attention, "TARGET_PROGRAMS", 16)


def scaled(rule):
    """A rule whose threshold is one of a float32 score; every fifth drops nothing."""
    nothing = (rule.layer + MATRICES.index(rule.matrix)) % 5 == 0
    score = np.float32(0 if nothing else 0.4 + 0.1 * MATRICES.index(rule.matrix))
    return MatrixRule(rule.layer, rule.matrix, int(score.view(np.int32)))


def group_of(rng, lengths):
    ids = [rng.integers(3, 96, length).tolist() for length in lengths]
    return [Sequence(7 + slot, 1000 * slot, 3, slot, "test", slot, "", row) for slot, row in enumerate(ids)]


def installed(tiny, folder, rng, device, method="teal", dtype="float16", layers=2 if WHOLE else 1, **changes):
    model = tiny.model(folder, rng, torch_dtype=dtype, num_hidden_layers=layers, **changes)
    decoder = model.load(device)
    kind, rules = METHODS[method](tiny.rules(model, rng))
    return decoder, install(decoder, kind, rules)


def engine_of(
    decoder, patch, decoding, batch, kind="triton", new_tokens=9 if WHOLE else 3, eos=frozenset(), positions=1
):
    batching = Batching(max_new_tokens=new_tokens, batch_size=batch)
    return Engine(EngineSetup(decoder, patch, decoding, batching, eos, kind, positions))


def recorder_of(decoder, patch, rows, device):
    return Recorder(select(decoder.sites, decoder.config.dtype, patch, Capture()), rows, device)


def recorded(engine, group, folder, given=None, capture=None):
    """A group's result and its operands: {(layer, matrix, token): (mask, values)} as bytes, for all that read one."""
    setup = engine.setup
    selection = select(setup.model.sites, setup.model.config.dtype, setup.patch, capture or Capture())
    recorder = Recorder(selection, engine.block_rows, engine.device)
    recorder.open(folder, 0)
    result = engine.run(group, recorder, given)
    found = {}
    held = holders(selection.leaves, selection.parts)
    for name in recorder.close()[0]:
        arrays = load_file(folder / name)
        for stem in {key.rsplit(".", 1)[0] for key in arrays} - {"rows"}:
            offsets, values, mask = (arrays[f"{stem}.{part}"] for part in ("offsets", "values", "mask"))
            for row, token in enumerate(arrays["rows.token"].tolist()):
                operand = mask[row].tobytes(), values[offsets[row] : offsets[row + 1]].tobytes()
                layer = int(stem[1:3])
                for matrix in (m for (at, m), holder in held.items() if (at, holder) == (layer, stem[4:])):
                    assert (layer, matrix, token) not in found
                    found[layer, matrix, token] = operand
    recorder.shutdown()
    return result, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model", "method"), [("gqa", "teal"), ("mha-wide", "wina"), ("window", "dense"), ("window", "teal")]
)
@pytest.mark.parametrize("one", [True, False], ids=["one", "many"])
@torch.inference_mode()
def test_every_product(tiny, tmp_path, rng, device, model, method, one, dtype):
    """All matrices of all layers, on the x that the producer stored."""
    decoder, patch = installed(tiny, tmp_path, rng, device, method, dtype, layers=2, **MODELS[model])
    config = decoder.config
    fused = FusedDecoder(decoder, patch, 16, None)
    recorder = recorder_of(decoder, patch, 8, device)
    fused.capture_into(recorder)
    B, T = (1, 1) if one else (2, 3)
    cache = KVCache(config, B, 16, device)
    for part in (cache.k_LBSGD, cache.v_LBSGD):
        part[:, :, :5].normal_()
    tokens_BT = torch.from_numpy(rng.integers(3, 96, (B, T))).to(device)
    positions_BT = (5 + torch.arange(T, device=device)).expand(B, -1).contiguous()
    # rows of the ring, one beyond it, and one that stays as it is
    rows_n = torch.tensor([3] if one else [2, 7, DENSE, 8, 0, -1], device=device)
    seen = []
    fused.probe = lambda layer, site, x, y: seen.append((layer, site, x.clone(), y.clone()))
    recorder._ring.operands.fill_(torch.nan)
    fused(tokens_BT, positions_BT, cache, rows_n, one=one)

    assert [(layer, site) for layer, site, *_ in seen] == [(layer, site) for layer in range(2) for site in SITE_NAMES]
    dropped = []
    for layer, site, x_nK, y_nN in seen:
        module = patch.modules[layer, site]
        holder = {matrix: part[0] for part in patch.parts[layer, site] for matrix in part}
        for matrix, columns in module.dense.columns.items():
            rule = module.rules[matrix]
            keep = patch.method.keep(x_nK, rule)
            operand_nK = mask_operand(x_nK, torch.ones_like(x_nK, dtype=torch.bool) if keep is None else keep)
            operand_nK = torch.where((rows_n == DENSE)[:, None], x_nK, operand_nK)
            region = recorder._ring._regions[layer, holder[matrix]]
            for row, place in enumerate(rows_n.tolist()):
                if 0 <= place < 8:
                    assert torch.equal(region[place].view(torch.int16), operand_nK[row].view(torch.int16)), matrix
                    dropped.append((operand_nK[row] == 0).float().mean().item())
            untouched = sorted(set(range(8)) - set(rows_n.tolist()))
            assert region[untouched].isnan().all(), "a row was written that nobody asked for"
            weight = module.dense.weight[:, columns]
            exact = operand_nK.double() @ weight.double()
            ours = (y_nN[:, columns].double() - exact).abs().max()
            theirs = ((operand_nK @ weight).double() - exact).abs().max()
            ulp = torch.finfo(x_nK.dtype).eps * exact.abs().max()
            assert ours <= 2 * theirs + ulp, (layer, matrix)
    if method == "teal":
        assert 0.05 < np.mean(dropped) < 0.95, "the thresholds of this test must cut both ways"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "method", "prefill"),
    [(b, m, p) for b in (1, 3) for m in ("teal", "dense") for p in ("none", "half", "all")]
    if WHOLE
    else [(1, "teal", "half"), (3, "dense", "none")],
)
def test_engines_agree_on_given_tokens(tiny, tmp_path, rng, device, batch, method, prefill, dtype):
    """The same tokens through both engines: all that is discrete equal, and where nothing is dropped, operands close.

    Where inputs are dropped, one that lies on the threshold is kept by one engine and not by the other, and changes
    what follows; few masks may differ.
    """
    decoder, patch = installed(tiny, tmp_path, rng, device, method, dtype)
    group = group_of(rng, [6] if batch == 1 else [2, 5])
    given = [rng.integers(3, 96, length).tolist() for length in ([4] if batch == 1 else [2, 4])]
    found = {}
    for kind, replay in (("torch", "steps"), ("triton", "steps"), ("triton", "forced")):
        decoding = Decoding(tokens_from="dense", replay=replay, prefill=prefill)
        engine = engine_of(decoder, patch, decoding, batch, kind)
        result, operands = recorded(engine, group, tmp_path / f"{kind}-{replay}", given)
        assert result.output_ids == given
        columns = ["sequence", "position", "token_id", "captured", "sparsified"]
        fed = sorted(zip(*(result.fed[name].to_pylist() for name in columns), strict=True))
        assert set(result.fed["phase"].to_pylist()) == {"prefill", "forced" if replay == "forced" else "decode"}
        found[kind, replay] = fed, {key: dense_of(decoder.config, key, *kept) for key, kept in operands.items()}
    fed, theirs = found["torch", "steps"]
    for key in (("triton", "steps"), ("triton", "forced")):
        assert found[key][0] == fed
        ours = found[key][1]
        assert ours.keys() == theirs.keys()
        differ = np.mean([((ours[place] != 0) != (theirs[place] != 0)).mean() for place in theirs])
        assert differ < 0.08, "masks of engines that agree differ where an input lies on the threshold alone"
        for place, row in theirs.items():
            if method == "dense":
                slack = 40 * torch.finfo(getattr(torch, dtype)).eps * np.abs(row).max()
                assert np.abs(ours[place] - row).max() <= slack, place


def dense_of(config, key, mask, values):
    """A captured row as float64 [K]."""
    width = by_leaf(sites_of(config))[key[:2]].in_features
    keep = np.unpackbits(np.frombuffer(mask, np.uint8), count=width, bitorder="little").astype(bool)
    row = np.zeros(len(keep))
    row[keep] = FORMATS[config.dtype].to_float(np.frombuffer(values, np.uint16))
    return row


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.8), (2, 0.0)])
def test_capture_changes_nothing_and_runs_repeat(tiny, tmp_path, rng, device, batch, temperature):
    decoder, patch = installed(tiny, tmp_path, rng, device)
    group = group_of(rng, [5, 8][:batch])
    decoding = Decoding(prefill="half", temperature=temperature, seed=int(rng.integers(1 << 20)))
    first, operands = recorded(engine_of(decoder, patch, decoding, batch), group, tmp_path / "first")
    again, same = recorded(engine_of(decoder, patch, decoding, batch, positions=40), group, tmp_path / "again")
    plain = engine_of(decoder, patch, decoding, batch).run(group, None)
    assert operands == same and len(operands) == len(decoder.layers) * 7 * sum(first.fed["captured"].to_pylist())
    assert first.output_ids == again.output_ids == plain.output_ids
    assert first.fed.equals(again.fed)
    assert first.fed.drop_columns("captured").equals(plain.fed.drop_columns("captured"))
    for one, other in zip(sorted(tmp_path.glob("first/*")), sorted(tmp_path.glob("again/*")), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_one_engine_runs_groups_of_any_length(tiny, tmp_path, rng, device):
    """Memory laid out for a longer group, and what an earlier one left in it, change no bit."""
    decoder, patch = installed(tiny, tmp_path, rng, device)
    groups = [group_of(rng, lengths) for lengths in ([4, 3], [9, 1])]
    decoding = Decoding(prefill="half")
    engine = engine_of(decoder, patch, decoding, 2, positions=6)
    for number, group in enumerate(groups):
        alone = recorded(engine_of(decoder, patch, decoding, 2), group, tmp_path / f"alone-{number}")
        shared = recorded(engine, group, tmp_path / f"shared-{number}")
        assert alone[1] == shared[1] and alone[0].output_ids == shared[0].output_ids


@pytest.mark.parametrize("kind", KINDS)
def test_an_ended_sequence_is_not_captured(tiny, tmp_path, rng, device, kind):
    """With an end token that one sequence samples early: rows stop there, and those of its neighbours do not."""
    decoder, patch = installed(tiny, tmp_path, rng, device)
    group = group_of(rng, [5, 8])
    new = 20 if WHOLE else 4
    free = engine_of(decoder, patch, Decoding(), 2, kind, new_tokens=new).run(group, None)
    eos = free.output_ids[0][new // 2]
    result, operands = recorded(
        engine_of(decoder, patch, Decoding(), 2, kind, new_tokens=new, eos=frozenset({eos})), group, tmp_path / kind
    )
    for slot, sequence in enumerate(group):
        ids = free.output_ids[slot]
        ends = ids.index(eos) + 1 if eos in ids else new
        assert result.output_ids[slot] == ids[:ends]
        assert result.stopped[slot] == (eos in ids)
        first = sequence.base + len(sequence.prompt_ids)
        tokens = sorted(token for layer, matrix, token in operands if (layer, matrix) == (0, "up"))
        mine = [token for token in tokens if token // 1000 == slot]
        assert mine == list(range(first, first + ends - 1))


@pytest.mark.parametrize(
    ("kind", "prefill"), [(kind, prefill) for kind in KINDS for prefill in ("half", "all")] if WHOLE else KINDS.items()
)
def test_text_is_captured_whole_or_step_by_step(tiny, tmp_path, rng, device, kind, prefill):
    decoder, patch = installed(tiny, tmp_path, rng, device)
    group = group_of(rng, [1, 5, 2])
    first = [0 if prefill == "all" else length - length // 2 for length in (1, 5, 2)]
    expected = {s.base + p for s, at in zip(group, first, strict=True) for p in range(at, len(s.prompt_ids))}
    for replay in ("forced", "steps"):
        decoding = Decoding(tokens_from="text", prefill=prefill, replay=replay)
        result, operands = recorded(engine_of(decoder, patch, decoding, 4, kind), group, tmp_path / f"{kind}-{replay}")
        assert {token for *_, token in operands} == expected
        assert result.output_ids == [[], [], []] and result.stopped == [False] * 3
        fed = zip(result.fed["sequence"].to_pylist(), result.fed["position"].to_pylist(), strict=True)
        assert sorted(fed) == [(s.sequence, p) for s in group for p in range(len(s.prompt_ids))]
        captured = dict(zip(result.fed["phase"].to_pylist(), result.fed["captured"].to_pylist(), strict=True))
        assert captured.keys() <= ({"forced"} if replay == "forced" else {"prefill", "decode"})


@pytest.mark.parametrize("every", [1, 3] if WHOLE else [3])
def test_samples_are_taken(tiny, tmp_path, rng, device, every):
    """Some layers, matrices and positions: the same bits as of a whole capture, and nothing else."""
    decoder, patch = installed(tiny, tmp_path, rng, device, layers=2)
    group = group_of(rng, [5, 8] if WHOLE else [2, 3])
    decoding = Decoding(prefill="all")
    whole = recorded(engine_of(decoder, patch, decoding, 2), group, tmp_path / "whole")[1]
    chosen = Capture(layers=(1,), matrices=("k", "up", "down"), every=every)
    part = recorded(engine_of(decoder, patch, decoding, 2), group, tmp_path / "part", capture=chosen)[1]
    positions = {key: key[2] % 1000 for key in whole}
    expected = {key for key in whole if key[0] == 1 and key[1] in chosen.matrices and positions[key] % every == 0}
    assert part == {key: whole[key] for key in expected} and expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stage_packs_as_the_host_does(rng, device, dtype):
    """Blocks on their way from the ring: equal to numpy's packing of the same rows, with rows not filled left out."""
    widths = [36, 36, 129]
    for rows, bound, filled in ((9, 9, 9), (9, 7, 4), (9, 3, 0)):
        ring = torch.zeros(sum(widths) * (rows + 1), dtype=getattr(torch, dtype), device=device)
        # an operand holds no -0.0
        ring.copy_(torch.where(torch.rand(ring.shape) < 0.5, torch.randn(ring.shape), 0.0))
        regions, base = [], 0
        for width in widths:
            regions.append(ring[base : base + width * (rows + 1)].view(rows + 1, width))
            base += width * (rows + 1)
        labels = torch.from_numpy(rng.integers(0, 1 << 40, (rows + 1, 3))).to(device)
        # the second region is not captured
        held = {(0, "q"): regions[0], (1, "q"): regions[2]}
        filled_rows = torch.tensor([filled], device=device)
        full = SimpleNamespace(operands=ring, rows=rows, held=held, filled=filled_rows, labels=labels, dropped={})
        stage = Stage(full, FORMATS[dtype].infinity)
        stage.take(full, bound)
        block = stage.fetch()
        assert block.finite and list(block.packed) == list(held)
        assert np.array_equal(block.labels, labels[:filled].cpu().numpy())
        for region, arrays in zip(held.values(), block.packed.values(), strict=True):
            expected = pack_on_host(region[:filled].cpu())
            for one, other in zip(arrays, expected, strict=True):
                assert one.dtype == other.dtype and np.array_equal(one, other)
    regions[2][0, 17] = torch.inf
    full.filled.fill_(1)
    stage.take(full, 3)
    assert not stage.fetch().finite


@pytest.mark.parametrize("prefill", ["none", "half", "all"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_head_reads_what_is_captured_of_it(tiny, tmp_path, rng, device, backend, prefill, monkeypatch):
    """`lm_head` has a row for each captured token whose logits are computed, of just the bits that they come from."""
    if prefill == "half" and not WHOLE:
        # passes of two positions, so that the prompts end in different ones
        monkeypatch.setattr("sparsetrace.generation.selection.BLOCK_BYTES", 2_000)
    decoder, patch = installed(tiny, tmp_path, rng, device, layers=1)
    engine = engine_of(decoder, patch, Decoding(prefill=prefill), 2, backend)
    if device.type == "cuda" and backend == "triton":
        # a graph calls no Python
        engine.backend.graphs = False
    read, plain = [], engine.backend._draw

    def watched(hidden_BC):
        read.append(hidden_BC.clone())
        return plain(hidden_BC)

    engine.backend._draw = watched
    group = group_of(rng, [5, 3])
    capture = Capture(matrices=("down", "lm_head"))
    recorder = Recorder(select(decoder.sites, decoder.config.dtype, patch, capture), engine.block_rows, device)
    # what is not filled must not be taken
    recorder._ring.operands.fill_(torch.nan)
    recorder.open(tmp_path, 0, {sequence.sequence: len(sequence.prompt_ids) - 1 for sequence in group})
    read.clear()
    result = engine.run(group, recorder)
    read = read[-NEW:]
    expected = {}
    for slot, sequence in enumerate(group):
        last = len(sequence.prompt_ids) - 1
        for step in range(len(result.output_ids[slot])):
            if step or prefill != "none":
                expected[sequence.base + last + step] = read[step][slot].cpu().view(torch.int16).numpy().view(np.uint16)
    found, downs = {}, 0
    for name in recorder.close()[0]:
        arrays = load_file(tmp_path / name)
        downs += len(arrays["L00.down.mask"])
        rows = arrays.get("model.lm_head.rows", np.arange(len(arrays["rows.token"])))
        assert len(arrays["model.lm_head.mask"]) == len(rows) == len(arrays["model.lm_head.offsets"]) - 1
        for row, place in enumerate(rows.tolist()):
            dense = np.zeros(decoder.config.hidden_size, np.uint16)
            keep = np.unpackbits(arrays["model.lm_head.mask"][row], count=len(dense), bitorder="little").astype(bool)
            start, stop = arrays["model.lm_head.offsets"][row : row + 2]
            dense[keep] = arrays["model.lm_head.values"][start:stop]
            found[int(arrays["rows.token"][place])] = dense
    recorder.shutdown()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[token], expected[token]) for token in expected)
    assert downs == len(found) if prefill == "none" else downs > len(found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_capturing_the_head_changes_nothing(tiny, tmp_path, rng, device, backend):
    decoder, patch = installed(tiny, tmp_path, rng, device, layers=1)
    group = group_of(rng, [5, 3])
    outputs = []
    for capture in (None, Capture(matrices=("lm_head",))):
        engine = engine_of(decoder, patch, Decoding(prefill="half", temperature=0.8), 2, backend)
        recorder = None
        if capture is not None:
            recorder = Recorder(select(decoder.sites, decoder.config.dtype, patch, capture), engine.block_rows, device)
            recorder.open(tmp_path, 0, {sequence.sequence: len(sequence.prompt_ids) - 1 for sequence in group})
        result = engine.run(group, recorder)
        outputs.append((result.output_ids, result.fed.drop_columns(["captured"]).to_pydict()))
    assert outputs[0] == outputs[1]


def test_refuses_what_the_kernels_cannot_run(tiny, tmp_path, rng):
    wide = tiny.model(tmp_path / "wide", rng, torch_dtype="float32")
    half = tiny.model(tmp_path / "half", rng, torch_dtype="float16")
    rules = tiny.rules(half, rng)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    teal, topk = Teal(sparsity=0.5), TopK(sparsity=0.5)
    assert choose_backend("auto", cpu, half.config, teal, rules) == "torch"
    assert choose_backend("auto", gpu, half.config, teal, rules) == "triton"
    assert choose_backend("torch", gpu, half.config, teal, rules) == "torch"
    assert choose_backend("auto", gpu, wide.config, teal, rules) == "torch"
    assert choose_backend("auto", gpu, half.config, topk, rules) == "torch"
    many = replace(half.config, num_attention_heads=132)
    for device, config, method, words in (
        (cpu, half.config, teal, "without a GPU"),
        (gpu, wide.config, teal, "the model is float32"),
        (gpu, many, teal, "the kernels take 128 heads at most, and the model has 132"),
        (gpu, half.config, topk, "method topk decides by more than a threshold"),
    ):
        with pytest.raises(InputError, match=words):
            choose_backend("triton", device, config, method, rules)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_graph_equals_eager(tiny, tmp_path, rng, device, batch, monkeypatch):
    """Bitwise equal tokens and operands, with the steps in a CUDA graph, and one by one."""
    decoder, patch = installed(tiny, tmp_path, rng, device)
    group = group_of(rng, [5, 8][:batch])
    found = []
    for graphs in (True, False):
        engine = engine_of(decoder, patch, Decoding(prefill="half"), batch, new_tokens=30)
        engine.backend.graphs = graphs
        found.append(recorded(engine, group, tmp_path / str(graphs)))
    assert found[0][1] == found[1][1]
    assert found[0][0].output_ids == found[1][0].output_ids


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", ["all", "half"])
def test_passes_in_a_graph_equal_eager(tiny, tmp_path, rng, device, prefill, monkeypatch):
    """Bitwise equal operands of given texts in passes of one shape, and of groups of other lengths between them."""
    monkeypatch.setattr("sparsetrace.generation.selection.GPU_BLOCK_BYTES", 20_000)
    decoder, patch = installed(tiny, tmp_path, rng, device)
    groups = [group_of(rng, lengths) for lengths in ([61, 40], [57, 57], [61, 9], [30, 30], [61, 61])]
    found = []
    for graphs in (True, False):
        decoding = Decoding(tokens_from="text", prefill=prefill)
        engine = engine_of(decoder, patch, decoding, 2, positions=61)
        engine.backend.graphs = graphs
        recorder = recorder_of(decoder, patch, engine.block_rows, device)
        arrays = []
        for number, group in enumerate(groups):
            folder = tmp_path / str(graphs)
            folder.mkdir(exist_ok=True)
            recorder.open(folder, number)
            engine.run(group, recorder)
            arrays += [(folder / name).read_bytes() for name in recorder.close()[0]]
        recorder.shutdown()
        found.append(arrays)
        assert any(taken.graph is not None for taken in engine.backend.passes.passes.values()) == graphs
    assert len(found[0]) >= 2 * len(groups)
    assert found[0] == found[1]


@pytest.mark.parametrize("one", [True, False], ids=["one", "many"])
def test_compiled_code_captures(tiny, tmp_path, rng, device, one):
    """Under torch.compile the ops run as they are: same bits, and the ring is written, not a copy of it."""
    decoder, patch = installed(tiny, tmp_path, rng, device)
    fused = FusedDecoder(decoder, patch, 16, None)
    site = fused._sites[0, "attn_in"]
    residual_nC = torch.randn(1 if one else 3, decoder.config.hidden_size, device=device).half()
    rows_n = torch.tensor([2] if one else [2, DENSE, 0], device=device)
    norm = decoder.layers[0].attn_norm

    def part(residual_nC, ring_RPK):
        half_nC = residual_nC / 2
        what = (norm.weight, norm.eps, site.thresholds, site.scale)
        if one:
            *_, lists, counts = add_rmsnorm(residual_nC[0], half_nC[0], *what, ring_RPK, None, rows_n)
            return list_gemv(lists, counts, site.weight, fused.partials, site.segments, site.config) * 2
        *_, operand_PnK = add_rmsnorm_rows(residual_nC, half_nC, *what, rows_n, ring_RPK)
        return operand_PnK[0] @ site.weight * 2

    found = []
    for compiled in (False, True):
        recorder = recorder_of(decoder, patch, 4, device)
        recorder._ring.operands.fill_(torch.nan)
        # without a GPU there may be no compiler; the passes that could drop or copy a ring run all the same
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        call = torch.compile(part, fullgraph=True, backend=backend) if compiled else part
        y_nN = call(residual_nC, recorder.region(0, "attn_in"))
        assert not recorder.region(0, "attn_in")[2].isnan().any()
        found.append([recorder._ring.operands.view(torch.int16).clone(), y_nN.view(torch.int16)])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
