"""Methods in a running model: dumps against formulas on the model's own numbers, and what is refused.

The model is run once more by hand, position by position, with masks from numpy; the operands and output masks of the
dump must be those.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.calibration.windows import calibration_windows
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Calibration, Capture, Decoding, Machine, PromptSet
from sparsetrace.formats.sites import by_leaf, layer_sites
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.prompts import Sequence
from sparsetrace.generation.selection import holders, select
from sparsetrace.methods import METHODS, NM, Cats, Dense, ExactZeros, Griffin, MatrixRule, Teal, TopK, Wina
from sparsetrace.model.patch import install, observe

CPU = Machine(device="cpu")
# widths of tiny models that 2:4 and 4:8 divide
EVEN = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
SETTINGS = Calibration(tokens=300, sequence_length=17)
AT_ZERO = {
    "teal": Teal(sparsity=0.0),
    "topk": TopK(sparsity=0.0),
    "cats": Cats(sparsity=0.0),
    "wina": Wina(sparsity=0.0),
    "wina-threshold": Wina(sparsity=0.0, select="threshold"),
    "nm": NM(pattern="4:4"),
    "griffin": Griffin(sparsity=0.0),
}


def group_of(rng, lengths):
    ids = [rng.integers(3, 96, length).tolist() for length in lengths]
    return [Sequence(slot, 1000 * slot, 0, slot, "test", slot, "", row) for slot, row in enumerate(ids)]


def run(folder, model, method, group, bits=0, prefill="none", new_tokens=4, rows=None):
    """Tokens and dump blocks of one group."""
    decoder = model.load(torch.device("cpu"))
    leaves = by_leaf(layer_sites(model.sites))
    rules = [MatrixRule(*leaf, bits if method.needs_threshold(leaf[1]) else None) for leaf in leaves]
    patch = install(decoder, method, rules)
    batching = Batching(max_new_tokens=new_tokens, batch_size=len(group))
    engine = Engine(EngineSetup(decoder, patch, Decoding(prefill=prefill), batching, frozenset()))
    selection = select(model.sites, model.config.dtype, patch, Capture())
    recorder = Recorder(selection, rows or engine.block_rows, engine.device)
    recorder.open(folder, 0)
    result = engine.run(group, recorder)
    held = holders([(rule.layer, rule.matrix) for rule in rules], patch.parts)
    blocks = [load_file(folder / name) for name in recorder.close()[0]]
    for arrays in blocks:
        for (layer, matrix), holder in held.items():
            for part in ("offsets", "values", "mask"):
                arrays[f"L{layer:02d}.{matrix}.{part}"] = arrays[f"L{layer:02d}.{holder}.{part}"]
    return result.output_ids, blocks


def rows_of(blocks, layer, matrix, features):
    """token -> dense operand, as float64."""
    found = {}
    for arrays in blocks:
        name = f"L{layer:02d}.{matrix}"
        keep = np.unpackbits(arrays[f"{name}.mask"], axis=1, count=features, bitorder="little").astype(bool)
        dense = np.zeros(keep.shape, np.float32)
        dense[keep] = arrays[f"{name}.values"].view(np.float32)
        found |= dict(zip(arrays["rows.token"].tolist(), dense.astype(np.float64), strict=True))
    return found


def out_masks_of(blocks, layer, matrix, outputs):
    name = f"L{layer:02d}.{matrix}.out_mask"
    return {
        token: np.unpackbits(row, count=outputs, bitorder="little").astype(bool)
        for arrays in blocks
        for token, row in zip(arrays["rows.token"].tolist(), arrays[name], strict=True)
    }


def test_every_method_is_tried_at_zero():
    assert {method.name for method in AT_ZERO.values()} == set(METHODS) - {"dense", "exact_zeros"}


@pytest.mark.parametrize("prefill", ["none", "half"])
@pytest.mark.parametrize("name", AT_ZERO)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparsity_zero_is_dense(tiny, tmp_path, rng, dtype, name, prefill):
    model = tiny.model(tmp_path, rng, torch_dtype=dtype, **EVEN)
    group = group_of(rng, [7, 4])
    tokens, blocks = run(tmp_path / "method", model, AT_ZERO[name], group, prefill=prefill)
    dense_tokens, dense_blocks = run(tmp_path / "dense", model, Dense(), group, prefill=prefill)
    assert tokens == dense_tokens
    for arrays, dense in zip(blocks, dense_blocks, strict=True):
        extra = set(arrays) - set(dense)
        assert {key.split(".", 1)[1] for key in extra} == {f"{m}.out_mask" for m in AT_ZERO[name].out_masks}
        assert not any(arrays[key].any() for key in extra), "no output is left out"
        for key in dense:
            assert arrays[key].tobytes() == dense[key].tobytes(), key


def test_cats_in_the_dump(tiny, tmp_path, rng):
    """`gate` and `up` read everything; `up` has the mask of |silu(gate)| <= t, and `down` is zero there alone."""
    model = tiny.model(tmp_path, rng, **EVEN)
    bits = int(torch.tensor(0.15).view(torch.int32))
    _, blocks = run(tmp_path / "dump", model, Cats(sparsity=0.5), group_of(rng, [5, 3]), bits)
    decoder = model.load(torch.device("cpu"))
    for layer in range(2):
        weight = decoder.layers[layer].mlp_in.weight
        gates, ups, downs = (rows_of(blocks, layer, m, w) for m, w in (("gate", 32), ("up", 32), ("down", 48)))
        dropped = out_masks_of(blocks, layer, "up", 48)
        assert not any(f"L{layer:02d}.gate.out_mask" in arrays for arrays in blocks)
        share = []
        for token, x in gates.items():
            assert np.array_equal(x, ups[token])
            gate, up = (torch.from_numpy(x).float() @ weight).double().numpy().reshape(2, 48)
            active = gate / (1 + np.exp(-gate))
            far = np.abs(np.abs(active) - 0.15) > 1e-5
            assert np.array_equal(dropped[token][far], (np.abs(active) <= 0.15)[far])
            assert np.array_equal(downs[token] == 0, dropped[token])
            assert np.allclose(downs[token], np.where(dropped[token], 0, active * up), atol=1e-5)
            share.append(dropped[token].mean())
        assert 0.02 < np.mean(share) < 0.9


@pytest.mark.parametrize(
    ("prefill", "rows"), [("none", None), ("half", None), ("half", 4)], ids=["none", "half", "chunks"]
)
def test_griffin_in_the_dump(tiny, tmp_path, rng, prefill, rows, monkeypatch):
    """One mask per sequence, from the dense positions of its own prompt, for gate and up; down is zero there."""
    from sparsetrace.generation import engine as engine_module

    if rows:
        monkeypatch.setattr(engine_module, "block_rows", lambda *_: rows)
    model = tiny.model(tmp_path, rng, **EVEN)
    group = group_of(rng, [9, 6])
    _, blocks = run(tmp_path / "dump", model, Griffin(sparsity=0.5), group, prefill=prefill)
    decoder = model.load(torch.device("cpu"))
    for slot, sequence in enumerate(group):
        T = len(sequence.prompt_ids)
        dense = T - (T // 2 if prefill == "half" else 0)
        seen = {}
        with (
            torch.inference_mode(),
            observe(decoder, lambda layer, site, x, seen=seen: seen.update({(layer, site): x})),
        ):
            decoder(torch.tensor([sequence.prompt_ids[:dense]]), torch.arange(dense)[None])
        for layer in range(2):
            z = seen[layer, "mlp_mid"][0].double().numpy()
            score = np.linalg.norm(z / np.linalg.norm(z, axis=1, keepdims=True), axis=0)
            keep = score >= np.sort(score)[-24]
            mine = {t: m for t, m in out_masks_of(blocks, layer, "up", 48).items() if t // 1000 == slot}
            gates = out_masks_of(blocks, layer, "gate", 48)
            downs = rows_of(blocks, layer, "down", 48)
            assert len(mine) == 3 + T - dense
            for token, dropped in mine.items():
                assert np.array_equal(~dropped, keep)
                assert np.array_equal(gates[token], dropped)
                assert not downs[token][dropped].any()
                assert np.count_nonzero(downs[token]) == 24


@pytest.mark.parametrize("name", ["topk", "nm", "wina"])
def test_exact_counts_in_the_dump(tiny, tmp_path, rng, name):
    """Activations of a random model hold no zeros, so what is kept is what is stored: k for every token and matrix."""
    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16", **EVEN)
    method = {"topk": TopK(sparsity=0.35), "nm": NM(pattern="2:4"), "wina": Wina(sparsity=0.35)}[name]
    _, blocks = run(tmp_path / "dump", model, method, group_of(rng, [5, 3]), prefill="all")
    for layer in range(2):
        for matrix in (matrix for at, matrix in by_leaf(model.sites) if at == layer):
            D = by_leaf(model.sites)[layer, matrix].in_features
            k = D // 2 if name == "nm" else D - int(0.35 * D)
            for arrays in blocks:
                assert (np.diff(arrays[f"L{layer:02d}.{matrix}.offsets"]) == k).all()


@pytest.fixture
def counted(tiny, tmp_path, rng, request):
    """A model calibrated with all scores, and its dense activations by brute force."""
    model = tiny.model(tmp_path, rng, torch_dtype=request.param, **EVEN)
    text = tmp_path / "text.txt"
    text.write_text(tiny.words(rng, 500))
    path = tmp_path / "h.safetensors"
    calibrate(CalibrationJob(model, text, path, SETTINGS, CPU, scores=["wina", "cats"]))
    decoder, seen = model.load(torch.device("cpu")), {}

    def see_output(layer, site, y):
        if site == "mlp_in":
            seen.setdefault((layer, "active"), []).append(torch.nn.functional.silu(y.chunk(2, -1)[0]))

    windows = torch.from_numpy(calibration_windows(model.tokenizer(), text, SETTINGS, 128))
    with torch.inference_mode(), observe(decoder, lambda la, s, x: seen.setdefault((la, s), []).append(x), see_output):
        decoder(windows, torch.arange(17).expand_as(windows))
    return model, path, {key: torch.cat(parts) for key, parts in seen.items()}


@pytest.mark.parametrize("counted", ["float32", "bfloat16", "float16"], indirect=True)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.65])
def test_thresholds_drop_what_was_predicted(counted, tmp_path, sparsity):
    """Every threshold method, through its own masks, on the counted text: equal as integers."""
    model, path, seen = counted
    sites = by_leaf(model.sites)
    result = derive_thresholds("x", Cats(sparsity=sparsity), path, tmp_path / "cats.parquet")
    for row, rule in zip(result.rows, result.rules, strict=True):
        if rule.matrix not in ("up", "down"):
            assert (row["threshold"], row["target_sparsity"]) == (None, None)
            continue
        active = seen[rule.layer, "active"]
        keep = result.method.keep_outputs(active, active, rule, None, {})
        dropped = int((active == 0).sum()) if keep is None else int((~keep).sum())
        assert (row["dropped"], row["counted"]) == (dropped, active.numel())
        assert row["target_sparsity"] == sparsity
    assert result.overall()[0] == pytest.approx(sparsity)

    for method in (Wina(sparsity=sparsity, select="threshold"), Teal(sparsity=sparsity)):
        result = derive_thresholds("x", method, path, tmp_path / "t.parquet")
        patch = install(model.load(torch.device("cpu")), method, result.rules)
        for row in result.rows:
            place = sites[row["layer"], row["matrix"]].key
            rule = patch.modules[place].rules[row["matrix"]]
            x = seen[place]
            keep = method.keep(x, rule)
            if keep is None:
                # threshold 0 drops zero scores, which a mask of nonzero inputs need not
                keep = x.float().abs() * rule.scale > 0
            assert (row["dropped"], row["counted"]) == (int((~keep).sum()), x.numel())
            assert method.target(*[row["layer"], row["matrix"]]) == row["target_sparsity"] == sparsity
    assert read_thresholds(tmp_path / "t.parquet", model).rules == result.rules


@pytest.mark.parametrize("method", [Cats(sparsity=0.5), Wina(sparsity=0.5, select="threshold")], ids=lambda m: m.name)
def test_refuses_to_start_without_what_it_needs(tiny, tmp_path, rng, method):
    model = tiny.model(tmp_path, rng, **EVEN)
    tiny.thresholds(tmp_path, model, rng)
    with pytest.raises(
        InputError, match=f"method {method.name} needs, got none of .*: calibrate with --score {method.name}"
    ):
        derive_thresholds("x", method, tmp_path / "histograms.safetensors", tmp_path / "t.parquet")
    bare = [MatrixRule(*leaf, None) for leaf in by_leaf(layer_sites(model.sites))]
    with pytest.raises(InputError, match=f"method {method.name} needs a threshold, got none for layer 0"):
        install(model.load(torch.device("cpu")), method, bare)


def test_refuses_models_that_do_not_fit(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    rules = [MatrixRule(*leaf, None) for leaf in by_leaf(layer_sites(model.sites))]
    with pytest.raises(InputError, match="inputs of every matrix must be a multiple of 8 for 4:8, got 36 at attn_in"):
        install(model.load(torch.device("cpu")), NM(pattern="4:8"), rules)
    with pytest.raises(InputError, match="hidden_act of the model must be relu, got silu"):
        install(model.load(torch.device("cpu")), ExactZeros(), rules)
    decoder = model.load(torch.device("cpu"))
    patch = install(decoder, Griffin(sparsity=0.5), rules)
    with pytest.raises(InputError, match="prefill must be none or half with method griffin"):
        Engine(EngineSetup(decoder, patch, Decoding(prefill="all"), Batching(), frozenset()))


def test_relu_models_make_exact_zeros(tiny, tmp_path, rng):
    """`down` reads relu(gate) * up, half of it zero; logits are those of transformers."""
    transformers = pytest.importorskip("transformers")
    model = tiny.model(tmp_path, rng, hidden_act="relu", **EVEN)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint", attn_implementation="eager").eval()
    ids = torch.from_numpy(rng.integers(3, 96, (1, 9)))
    decoder = model.load(torch.device("cpu"))
    with torch.inference_mode():
        logits = decoder.logits(decoder(ids, torch.arange(9)[None]))
        expected = theirs(ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    _, blocks = run(tmp_path / "dump", model, ExactZeros(), group_of(rng, [5, 3]))
    zeros = [1 - np.diff(arrays["L01.down.offsets"]).mean() / 48 for arrays in blocks]
    assert 0.2 < np.mean(zeros) < 0.8


def test_out_masks_reach_the_workload(tiny, tmp_path, rng):
    import sparsetrace
    from sparsetrace.generation.generate import generate
    from sparsetrace.generation.job import Job
    from sparsetrace.generation.prompts import split, write_split
    from sparsetrace.packing.index import index
    from sparsetrace.packing.pack import pack

    model = tiny.model(tmp_path, rng, **EVEN)
    tiny.thresholds(tmp_path, model, rng)
    table = tmp_path / "griffin.parquet"
    derive_thresholds("griffin-0.5", Griffin(sparsity=0.5), tmp_path / "histograms.safetensors", table)
    batching = Batching(max_new_tokens=4, batch_size=2)
    groups, _ = split(tiny.prompts(tmp_path / "p.jsonl", rng, [4, 6]), model.tokenizer(), 128, PromptSet(), batching)
    write_split(groups, 1, tmp_path / "split.parquet")
    dump = tmp_path / "dump" / "manifest.json"
    split_path, decoding = tmp_path / "split.parquet", Decoding(ignore_eos=True)
    generate(Job(model, split_path, 0, dump, decoding, batching, CPU, thresholds=table))
    pack(dump, tmp_path / "w", tmp_path / "00000.json")
    index([tmp_path / "00000.json"], tmp_path / "w")
    rows = pq.read_table(tmp_path / "w/data/L01/up/part-00000.parquet").to_pylist()
    assert len(rows) == 6
    for row in rows:
        assert sum(byte.bit_count() for byte in row["out_mask"]) == 24
    down = pq.read_table(tmp_path / "w/data/L01/down/part-00000.parquet").to_pylist()
    assert {row["out_mask"] for row in down} == {None}
    for row, other in zip(rows, down, strict=True):
        kept = np.unpackbits(np.frombuffer(other["mask"], np.uint8), bitorder="little")
        assert not (kept & np.unpackbits(np.frombuffer(row["out_mask"], np.uint8), bitorder="little")).any()
    opened = sparsetrace.open(tmp_path / "w")
    token = opened.tokens[0]
    assert np.count_nonzero(opened[1, "down", token]) == 24
