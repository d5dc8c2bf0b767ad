"""Captured operands against forward pre-hooks on the transformers model, patched with the same thresholds.

The hook compares what transformers feeds each matrix with the captured operand: masks agree wherever the input is not
within 1e-5 max|x| of the threshold, values within that (docs/architecture.md, Numbers). Then the matrix is fed the
captured operand, so that an input on the threshold does not carry over into the next comparison. Dump blocks are read
with the safetensors library.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Capture, Conversion, Decoding
from sparsetrace.formats.architecture import sites_of
from sparsetrace.formats.dump import Block
from sparsetrace.generation import selection
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.prompts import Sequence
from sparsetrace.generation.selection import Selection, block_rows, captured_matrices, holders
from sparsetrace.methods import METHODS, Dense, MatrixRule, Teal
from sparsetrace.model.convert import convert
from sparsetrace.model.decoder import Projection
from sparsetrace.model.patch import SparseProjection, install, observe

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
TOLERANCE = 1e-5
MODULES = {matrix: f"self_attn.{matrix}_proj" for matrix in "qkvo"} | {
    matrix: f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")
}
CASES = [
    # id, architecture, changes to the configuration
    ("llama-gqa", "Llama", {"num_key_value_heads": 2}),
    ("llama-tied", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("mistral-gqa-window", "Mistral", {"num_key_value_heads": 1, "sliding_window": 4}),
]


@pytest.fixture(scope="module", params=[pytest.param(case, id=case[0]) for case in CASES])
def pair(request, tiny, tmp_path_factory):
    """A random transformers model, and the same converted."""
    transformers = pytest.importorskip("transformers")
    case, architecture, changes = request.param
    folder = tmp_path_factory.mktemp("capture")
    tiny.rng(f"capture {case}")
    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=36,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        vocab_size=tiny.vocabulary,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **changes,
    )
    theirs = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    theirs.save_pretrained(tiny.tokenizer(folder / "checkpoint"))
    return theirs, convert(folder / "checkpoint", folder / "model", Conversion())


def group_of(rng, lengths, group=0, vocabulary=96) -> list[Sequence]:
    """Sequences of random ids, with gaps between their token numbers."""
    sequences = []
    for slot, length in enumerate(lengths):
        ids = rng.integers(3, vocabulary, length).tolist()
        sequences.append(Sequence(10 + slot, 1000 * (slot + 1), group, slot, "test", slot, "", ids))
    return sequences


def apart(config):
    """Parts of a model whose matrices read operands of their own."""
    return {site.key: [[matrix] for matrix in site.matrices] for site in sites_of(config)}


def recorder_of(config, rows, device="cpu", parts=None, capture=None):
    """A recorder of a model whose matrices read operands of their own, unless said otherwise."""
    selection = Selection(sites_of(config), config.dtype, parts or apart(config), (), capture or Capture())
    return Recorder(selection, rows, torch.device(device))


def operands(folder, blocks, features) -> dict[tuple[int, str, int], np.ndarray]:
    """Dense operands of dump blocks by (layer, matrix, token), as bit patterns, for matrices that have arrays."""
    found = {}
    for name in blocks:
        arrays = load_file(folder / name)
        for matrix_name in {key.rsplit(".", 1)[0] for key in arrays} - {"rows"}:
            layer, matrix = int(matrix_name[1:3]), matrix_name[4:]
            offsets, values = arrays[f"{matrix_name}.offsets"], arrays[f"{matrix_name}.values"]
            bits = np.unpackbits(arrays[f"{matrix_name}.mask"], axis=1, bitorder="little")
            assert not bits[:, features[matrix] :].any(), "trailing mask bits must be zero"
            for row, token in enumerate(arrays["rows.token"].tolist()):
                dense = np.zeros(features[matrix], values.dtype)
                dense[bits[row, : features[matrix]].astype(bool)] = values[offsets[row] : offsets[row + 1]]
                assert (layer, matrix, token) not in found
                found[layer, matrix, token] = dense
    return found


def record_group(engine, group, folder, number=0):
    """Run a group and write its operands: the result, names of the blocks, and the number of rows."""
    recorder = recorder_of(engine.setup.model.config, engine.block_rows, engine.device)
    recorder.open(folder, number)
    result = engine.run(group, recorder)
    return result, *recorder.close()


def place(recorder, rows, index, token, sequence, position):
    """Announce a pass of `rows` rows, of which those at `index` are captured."""
    captured = torch.from_numpy(np.isin(np.arange(rows), index)).to(recorder.device)
    positions, bases, numbers = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
    positions[index], numbers[index] = torch.from_numpy(position), torch.from_numpy(sequence)
    bases[index] = torch.from_numpy(token - position)
    recorder.reserve(len(index))
    recorder.place(captured, *(part.to(recorder.device) for part in (positions, bases, numbers)))


def features_of(config) -> dict[str, int]:
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    return dict.fromkeys(("q", "k", "v", "gate", "up"), hidden) | {"o": heads, "down": config.intermediate_size}


def captured_positions(prefill: str, prompt: int, outputs: int) -> list[int]:
    """The policy, in so many words: part of the prompt, and every sampled token but the last."""
    first = {"none": prompt, "half": prompt - prompt // 2, "all": 0}[prefill]
    return list(range(first, prompt + outputs - 1))


def check_sequence(theirs, sequence, output_ids, prefill, captured, thresholds) -> int:
    """Feed one sequence through transformers, as the engine should have; returns the number of operands compared."""
    length = len(sequence.prompt_ids)
    sparse = set(captured_positions(prefill, length, len(output_ids)))
    fed = sequence.prompt_ids + output_ids[:-1]
    state = {"start": 0}
    compared = 0

    def compare(layer, matrix):
        def hook(_, inputs):
            nonlocal compared
            x_TK = inputs[0][0].clone()
            for row in range(len(x_TK)):
                if state["start"] + row not in sparse:
                    continue
                x_K, t = x_TK[row].numpy(), thresholds[layer, matrix]
                operand_K = captured[layer, matrix, sequence.base + state["start"] + row].view(np.float32)
                slack = TOLERANCE * np.abs(x_K).max()
                clear_K = np.abs(np.abs(x_K) - t) > slack
                kept_K = operand_K != 0
                assert (kept_K == (np.abs(x_K) > t))[clear_K].all()
                assert (np.abs(operand_K - x_K) <= slack)[kept_K].all()
                x_TK[row] = torch.from_numpy(operand_K)
                compared += 1
            return (x_TK[None],)

        return hook

    handles = [
        block.get_submodule(MODULES[matrix]).register_forward_pre_hook(compare(layer, matrix))
        for layer, block in enumerate(theirs.model.layers)
        for matrix in MATRICES
    ]
    past = None
    logits = []
    bounds = [0, *range(length, len(fed) + 1)]
    with torch.inference_mode():
        for start, stop in pairwise(bounds):
            state["start"] = start
            reference = theirs(torch.tensor([fed[start:stop]]), past_key_values=past, use_cache=True)
            past = reference.past_key_values
            logits.append(reference.logits[0, -1])
    for handle in handles:
        handle.remove()
    # greedy: the token that was sampled is one of the likeliest, to the same tolerance
    for step, logits_V in enumerate(logits):
        assert logits_V.max() - logits_V[output_ids[step]] <= 2 * TOLERANCE * logits_V.abs().max()
    return compared


@pytest.mark.parametrize("prefill", ["none", "half", "all"])
def test_operands_are_those_of_patched_transformers(pair, tiny, tmp_path, rng, machine, prefill):
    theirs, model = pair
    rules = tiny.rules(model, rng)
    thresholds = {(r.layer, r.matrix): np.array([r.threshold_bits], np.uint32).view(np.float32)[0] for r in rules}
    decoder = model.load(torch.device(machine.device))
    patch = install(decoder, Teal(sparsity=0.5), rules)
    batching = Batching(max_new_tokens=9, batch_size=4)
    engine = Engine(EngineSetup(decoder, patch, Decoding(prefill=prefill), batching, frozenset()))
    group = group_of(rng, [1, 7, 12])
    result, blocks, rows = record_group(engine, group, tmp_path)

    captured = operands(tmp_path, blocks, features_of(model.config))
    expected = {
        sequence.base + position
        for sequence, ids in zip(group, result.output_ids, strict=True)
        for position in captured_positions(prefill, len(sequence.prompt_ids), len(ids))
    }
    assert set(captured) == {(layer, matrix, token) for layer in range(2) for matrix in MATRICES for token in expected}
    compared = sum(
        check_sequence(theirs, sequence, ids, prefill, captured, thresholds)
        for sequence, ids in zip(group, result.output_ids, strict=True)
    )
    assert compared == len(captured) == 2 * 7 * rows
    dropped = np.mean([(operand == 0).mean() for operand in captured.values()])
    assert 0.05 < dropped < 0.95, "the thresholds of this test must cut both ways"


@pytest.mark.parametrize("prefill", ["none", "half", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_capture_changes_nothing(tiny, tmp_path, rng, machine, dtype, prefill, monkeypatch):
    """Bitwise equal tokens, hidden states and logits, with capture on and off; also where blocks are small."""
    monkeypatch.setattr(selection, "BLOCK_BYTES", 30_000)
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    rules = tiny.rules(model, rng)
    group = group_of(rng, [5, 2, 11])
    seen = {}
    for recording in (True, False):
        decoder = model.load(torch.device(machine.device))
        patch = install(decoder, Teal(sparsity=0.5), rules)
        batching = Batching(max_new_tokens=6, batch_size=4)
        engine = Engine(EngineSetup(decoder, patch, Decoding(prefill=prefill, temperature=0.7), batching, frozenset()))
        plain, bits = decoder.logits, []

        def watched(hidden_C, plain=plain, bits=bits):
            logits = plain(hidden_C)
            bits.extend([hidden_C.float().cpu().numpy().tobytes(), logits.cpu().numpy().tobytes()])
            return logits

        monkeypatch.setattr(decoder, "logits", watched)
        result = record_group(engine, group, tmp_path)[0] if recording else engine.run(group, None)
        columns = result.fed.drop_columns(["captured"]).to_pydict()
        seen[recording] = (result.output_ids, result.stopped, columns, bits)
        assert any(result.fed["captured"].to_pylist()) == recording
    assert len(seen[True][3]) == 2 * 6
    assert seen[True] == seen[False]


@pytest.mark.parametrize("prefill", ["none", "half", "all"])
def test_recorded_tensor_is_the_multiplied_one(tiny, tmp_path, rng, machine, prefill, monkeypatch):
    """Contract 1, bit for bit: the block holds what `@` was given, seen by a torch dispatch mode.

    On a CPU `@` is given float32 copies, in which every operand must be a bfloat16 still.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16")
    decoder = model.load(torch.device(machine.device))
    patch = install(decoder, Teal(sparsity=0.5), tiny.rules(model, rng))
    weights = {}
    for layer, block in enumerate(decoder.layers):
        for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid"):
            dense = getattr(block, site).dense
            for matrix, columns in dense.columns.items():
                weights[layer, matrix] = (dense.weight.data_ptr(), columns, dense.weight.shape[1])
    multiplied = {key: [] for key in weights}
    # of each copy: itself, so that nothing else comes to lie there, and where the original lies
    copies = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if op in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
                copies[result.data_ptr()] = result, args[0].data_ptr()
            if op in (torch.ops.aten.matmul.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                left, right = args[:2]
                _, origin = copies.get(right.data_ptr(), (right, right.data_ptr()))
                for key, (pointer, columns, width) in weights.items():
                    offset = (origin - pointer) // 2
                    inside = 0 <= offset < width and offset <= columns.start
                    if inside and columns.stop <= offset + right.shape[-1] and patch.sparsified_BT is not False:
                        rows = left.reshape(-1, left.shape[-1])
                        exact = rows.to(torch.bfloat16)
                        assert torch.equal(exact.float(), rows.float())
                        multiplied[key].append(exact.view(torch.int16).cpu().numpy().view(np.uint16).copy())
            return result

    batching = Batching(max_new_tokens=4, batch_size=2)
    engine = Engine(EngineSetup(decoder, patch, Decoding(prefill=prefill), batching, frozenset()))
    group = group_of(rng, [6, 6])
    with Watch():
        _, blocks, _ = record_group(engine, group, tmp_path)
    captured = operands(tmp_path, blocks, features_of(model.config))
    passes = ([6] if prefill != "none" else []) + [1, 1, 1]
    for key, operand_rows in multiplied.items():
        assert [len(rows) for rows in operand_rows] == [2 * T for T in passes], key
        start = 0 if prefill != "none" else 6
        for rows, T in zip(operand_rows, passes, strict=True):
            for slot in range(2):
                for row in range(T):
                    token = group[slot].base + start + row
                    if start + row in captured_positions(prefill, 6, 4):
                        assert np.array_equal(captured[*key, token], rows[slot * T + row])
                        assert not (rows[slot * T + row] == 0x8000).any(), "an operand holds no -0.0"
            start += T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sparsity_zero_is_dense(tiny, tmp_path, rng, machine, dtype):
    """Same tokens, and the same operands but for -0.0, which no operand holds."""
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    group = group_of(rng, [4, 9])
    results = []
    for method in (Teal(sparsity=0.0), Dense()):
        decoder = model.load(torch.device(machine.device))
        bits = 0 if method.needs_thresholds else None
        rules = [MatrixRule(layer, matrix, bits) for layer in range(2) for matrix in MATRICES]
        patch = install(decoder, method, rules)
        engine = Engine(
            EngineSetup(decoder, patch, Decoding(prefill="all"), Batching(max_new_tokens=5, batch_size=2), frozenset())
        )
        folder = tmp_path / method.name
        result, blocks, _ = record_group(engine, group, folder)
        results.append((result.output_ids, [(folder / name).read_bytes() for name in blocks]))
    assert results[0] == results[1]


def test_signed_zeros_and_denormals(rng):
    """What is kept, on every kind of number: exactly |x| > t as bit patterns, -0.0 never."""
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 0.5, -0.5, 0.50000006, float("inf"), float("nan")])
    for t, expected in ((0.0, [2, 3, 4, 5, 6, 7, 8, 9]), (0.5, [7, 8, 9])):
        bits = int(torch.tensor(t).view(torch.int32))
        keep = METHODS["teal"](sparsity=0.5).keep(x, MatrixRule(0, "q", bits))
        operand = torch.where(keep & (x != 0), x, 0.0)
        assert operand.view(torch.int32).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_block_holds_the_operands(tiny, tmp_path, rng, dtype, device):
    """The recorder alone: rows picked from a pass, rows with nothing and with everything kept, several blocks."""
    config = tiny.model(tmp_path, rng, torch_dtype=dtype).config
    recorder = recorder_of(config, 5, device)
    recorder.open(tmp_path, 7)
    expected = {}
    widths = features_of(config)
    token = 100
    for T in (3, 1, 4, 5, 2):
        picked = np.sort(rng.permutation(2 * T)[: rng.integers(1, min(5, 2 * T) + 1)])
        numbers = token + np.arange(len(picked)) * 3
        token += 50
        place(recorder, 2 * T, picked, numbers, numbers // 7, numbers % 7)
        for layer in range(2):
            for matrix in MATRICES:
                x = torch.randn(2, T, widths[matrix]) * (torch.rand(2, T, 1) < 0.8)
                x = torch.where(torch.rand(x.shape) < 0.5, x, torch.zeros(())) if matrix != "up" else x
                x = torch.where(x == 0, torch.zeros(()), x).to(config.torch_dtype)
                recorder.record(layer, matrix, x.to(device))
                patterns = x.view(torch.int32 if dtype == "float32" else torch.int16).flatten(0, 1).numpy()
                for row, number in zip(picked, numbers.tolist(), strict=True):
                    expected[layer, matrix, number] = patterns[row]
    blocks, total = recorder.close()
    found = operands(tmp_path, blocks, widths)
    assert len(blocks) > 1
    assert found.keys() == expected.keys()
    for key, patterns in expected.items():
        assert np.array_equal(found[key].view(patterns.dtype), patterns), key
    rows = [load_file(tmp_path / name) for name in blocks]
    for arrays in rows:
        assert np.array_equal(arrays["rows.sequence"], arrays["rows.token"] // 7)
        assert np.array_equal(arrays["rows.position"], arrays["rows.token"] % 7)
        assert len(arrays["rows.token"]) <= 5
    assert sum(len(arrays["rows.token"]) for arrays in rows) == total


@pytest.mark.parametrize(
    ("matrices", "expected"),
    [
        ((), {"q": "q", "k": "q", "v": "v", "o": "o", "gate": "gate", "up": "gate", "down": "down"}),
        (("k", "v", "up"), {"k": "k", "v": "v", "up": "up"}),
    ],
    ids=["all", "some"],
)
def test_an_operand_that_several_read_is_held_once(tiny, tmp_path, rng, device, matrices, expected):
    """Under the name of the first captured matrix that reads it; the others' arrays are not there."""
    config = tiny.model(tmp_path, rng, torch_dtype="float16").config
    parts = apart(config) | {(0, "attn_in"): [["q", "k"], ["v"]], (0, "mlp_in"): [["gate", "up"]]}
    chosen = Capture(layers=(0,), matrices=matrices)
    assert holders(captured_matrices(sites_of(config), chosen), parts) == {
        (0, m): holder for m, holder in expected.items()
    }
    recorder = recorder_of(config, 4, device, parts, chosen)
    recorder.open(tmp_path, 0)
    index = np.arange(3)
    place(recorder, 3, index, index, index, index)
    widths = {site.key: site.in_features for site in sites_of(config)}
    fed = {}
    for layer in range(2):
        for key, site_parts in ((key, parts[key]) for key in parts if key[0] == layer):
            for part in site_parts:
                x = torch.randn(3, 1, widths[key]).half()
                for matrix in part:
                    fed[layer, matrix] = x
                    recorder.record(layer, matrix, x.to(device))
    blocks, rows = recorder.close()
    found = operands(tmp_path, blocks, features_of(config))
    assert rows == 3
    assert {key[:2] for key in found} == {(0, holder) for holder in expected.values()}
    for (layer, matrix, token), patterns in found.items():
        assert np.array_equal(patterns, fed[layer, matrix][token, 0].view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_names_what_is_not_finite(tiny, tmp_path, rng, value):
    config = tiny.model(tmp_path, rng, torch_dtype="float16").config
    recorder = recorder_of(config, 8)
    recorder.open(tmp_path / "dump", 0)
    index = np.arange(3)
    place(recorder, 3, index, index + 40, index + 5, index + 9)
    for layer in range(2):
        for matrix in MATRICES:
            x = torch.ones(1, 3, features_of(config)[matrix], dtype=torch.float16)
            if (layer, matrix) == (1, "gate"):
                x[0, 2, 7] = value
            recorder.record(layer, matrix, x)
    with pytest.raises(InputError, match=r"layer 1, matrix gate, token 42 \(sequence 7, position 11\)"):
        recorder.close()
    assert not list((tmp_path / "dump").glob("*")), "no block may be left of the pass"


def test_names_the_activation_that_overflows(tiny, tmp_path, rng):
    """A float16 model whose gate overflows in the prompt: layer, matrix and token are named, captured or not."""
    config = tiny.config | {"torch_dtype": "float16"}
    tensors = tiny.weights(rng, config)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 30_000
    tensors["model.layers.1.mlp.up_proj.weight"].clamp_(-60_000, 60_000)
    model = convert(tiny.write(tmp_path / "checkpoint", config, tensors), tmp_path / "model", Conversion())
    group = group_of(rng, [5, 3])
    for prefill in ("all", "half", "none"):
        decoder = model.load(torch.device("cpu"))
        patch = install(decoder, Teal(sparsity=0.5), tiny.rules(model, rng, 0.1))
        engine = Engine(
            EngineSetup(
                decoder, patch, Decoding(prefill=prefill), Batching(max_new_tokens=4, batch_size=2), frozenset()
            )
        )
        with pytest.raises(InputError, match=r"layer 1, matrix down, token 1000 \(sequence 10, position 0\)"):
            record_group(engine, group, tmp_path / prefill)


def test_block_rows_hold_a_batch_and_fit_the_memory(tiny, tmp_path, rng, monkeypatch):
    config = tiny.model(tmp_path, rng, torch_dtype="bfloat16").config
    row_bytes = 2 * (5 * 36 + 32 + 43) * 2
    monkeypatch.setattr(selection, "BLOCK_BYTES", 10 * row_bytes + 1)
    assert block_rows(sites_of(config), apart(config), config.dtype, 4, torch.device("cpu")) == 10
    assert block_rows(sites_of(config), apart(config), config.dtype, 11, torch.device("cpu")) == 11
    # an operand that several read takes its room once
    sites = sites_of(config)
    together = {site.key: [list(site.matrices)] for site in sites}
    rows = block_rows(sites, together, config.dtype, 4, torch.device("cpu"))
    assert rows == 10 * (5 * 36 + 32 + 43) // (2 * 36 + 32 + 43)


def test_observe_sees_every_site_and_leaves_no_hook(tiny, tmp_path, rng):
    decoder = tiny.model(tmp_path, rng).load(torch.device("cpu"))
    tokens_BT = torch.from_numpy(rng.integers(0, 96, (2, 3)))
    positions_BT = torch.arange(3).expand(2, -1)
    seen = []
    with torch.inference_mode():
        with observe(decoder, lambda layer, site, x: seen.append((layer, site, tuple(x.shape)))):
            inside = decoder(tokens_BT, positions_BT)
        outside = decoder(tokens_BT, positions_BT)
    assert seen == [
        (layer, site, (2, 3, width))
        for layer in range(2)
        for site, width in (("attn_in", 36), ("attn_out", 32), ("mlp_in", 36), ("mlp_mid", 43))
    ]
    assert torch.equal(inside, outside)
    assert not any(module._forward_pre_hooks for module in decoder.modules())


def test_neighbours_of_one_threshold_share_a_multiply(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    decoder = model.load(torch.device("cpu"))
    install(decoder, Teal(sparsity=0.5), tiny.rules(model, rng))
    parts = decoder.layers[0].attn_in.parts
    assert [[rule.matrix for rule in rules] for rules, _ in parts] == [["q", "k"], ["v"]]
    assert [columns for _, columns in parts] == [slice(0, 48), slice(48, 64)]
    assert isinstance(decoder.layers[0].attn_in, SparseProjection)
    assert isinstance(decoder.layers[0].attn_in.dense, Projection)


def test_install_refuses_what_does_not_fit(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    rules = tiny.rules(model, rng)
    with pytest.raises(InputError, match="got none for layer 1 down"):
        install(model.load(torch.device("cpu")), Teal(sparsity=0.5), rules[:-1])
    with pytest.raises(InputError, match="must be those of a model of 2 layers, got 15"):
        install(model.load(torch.device("cpu")), Teal(sparsity=0.5), [*rules, MatrixRule(2, "q", 0)])
    bare = [MatrixRule(r.layer, r.matrix, None if (r.layer, r.matrix) == (1, "o") else 0) for r in rules]
    with pytest.raises(InputError, match="method teal needs a threshold, got none for layer 1 o"):
        install(model.load(torch.device("cpu")), Teal(sparsity=0.5), bare)


def test_block_reader_agrees_with_safetensors(tiny, tmp_path, rng):
    config = tiny.model(tmp_path, rng).config
    recorder = recorder_of(config, 4)
    recorder.open(tmp_path, 0)
    index = np.arange(4)
    place(recorder, 4, index, index, index, index)
    for layer in range(2):
        for matrix in MATRICES:
            recorder.record(layer, matrix, torch.randn(4, 1, features_of(config)[matrix]))
    (file,), _ = recorder.close()
    block = Block(tmp_path / file)
    for name, array in load_file(tmp_path / file).items():
        assert np.array_equal(block[name], array)
        assert block[name].dtype == array.dtype
