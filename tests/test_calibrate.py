"""Calibration against the activations themselves: collected, counted and thresholded by brute force."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sparsetrace.calibration import windows as windows_module
from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.calibration.windows import calibration_windows
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Calibration, Conversion, Machine
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import by_leaf, layer_sites
from sparsetrace.formats.tables import THRESHOLDS
from sparsetrace.methods import Dense, Teal
from sparsetrace.model.convert import convert
from sparsetrace.model.patch import observe
from sparsetrace.model.runtime import set_up_torch

CPU = Machine(device="cpu")
SETTINGS = Calibration(tokens=300, sequence_length=17)


def text_of(tiny, folder, rng, words):
    path = folder / "text.txt"
    path.write_text(tiny.words(rng, words))
    return path


@torch.inference_mode()
def dense_activations(model, windows_WT, batch) -> dict[tuple[int, str], np.ndarray]:
    """Bit patterns of everything that enters each site of the dense model, in batches of the same shape."""
    decoder = model.load(torch.device("cpu"))
    seen = {}

    def see(layer, site, x_BTK):
        integers = torch.int32 if x_BTK.dtype == torch.float32 else torch.int16
        patterns = x_BTK.contiguous().view(integers).numpy().view(FORMATS[model.config.dtype].bits)
        seen.setdefault((layer, site), []).append(patterns.reshape(-1, x_BTK.shape[-1]).copy())

    with observe(decoder, see):
        for start in range(0, len(windows_WT), batch):
            tokens_BT = torch.from_numpy(windows_WT[start : start + batch])
            decoder(tokens_BT, torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT))
    return {key: np.concatenate(parts) for key, parts in seen.items()}


@pytest.mark.parametrize("pass_tokens", [4096, 40], ids=["one pass", "many passes"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_achieved_sparsity_is_the_prediction_as_integers(tiny, tmp_path, rng, dtype, pass_tokens, monkeypatch):
    monkeypatch.setattr(windows_module, "PASS_TOKENS", pass_tokens)
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    text = text_of(tiny, tmp_path, rng, 500)
    told = []
    calibrate(CalibrationJob(model, text, tmp_path / "h.safetensors", SETTINGS, CPU), lambda *args: told.append(args))
    windows_WT = calibration_windows(model.tokenizer(), text, SETTINGS, 128)
    assert windows_WT.shape == (18, 17)
    activations = dense_activations(model, windows_WT, max(1, pass_tokens // 17))
    sites = by_leaf(layer_sites(model.sites))
    assert len(sites) == 14
    assert told[-1] == (18 * 17, 18 * 17)

    histograms, provenance = Histograms.load(tmp_path / "h.safetensors")
    assert (provenance.model_hash, provenance.tokens, provenance.dtype) == (model.model_hash, 18 * 17, dtype)
    shift = 16 if dtype == "float32" else 0
    for key, patterns in activations.items():
        assert np.array_equal(np.bincount(patterns.ravel() >> shift, minlength=65536), histograms.counts[key])
    for sparsity in (0.0, 0.25, 0.5, 0.65, 0.93):
        result = derive_thresholds("x", Teal(sparsity=sparsity), tmp_path / "h.safetensors", tmp_path / "t.parquet")
        assert [(row["layer"], row["matrix"]) for row in result.rows] == list(sites)
        for row in result.rows:
            patterns = activations[sites[row["layer"], row["matrix"]].key]
            magnitudes = patterns & (FORMATS[dtype].sign - 1)
            # what the rule "keep |x| > t" drops, counted one by one
            assert row["dropped"] == int((magnitudes <= row["threshold_bits"]).sum())
            assert row["counted"] == patterns.size
            assert row["calibrated_sparsity"] == row["dropped"] / row["counted"]
            assert row["target_sparsity"] == sparsity
            if sparsity:
                below = int((magnitudes >> shift < row["threshold_bits"] >> shift).sum())
                assert below < sparsity * patterns.size <= row["dropped"]
            bits = np.array([row["threshold_bits"]], FORMATS[dtype].bits)
            value = torch.from_numpy(bits.view(np.int32 if shift else np.int16)).view(getattr(torch, dtype))
            assert float(value) == row["threshold"]
        dropped, total = (sum(row[name] for row in result.rows) for name in ("dropped", "counted"))
        assert result.overall() == (pytest.approx(sparsity), dropped / total)


def test_masks_of_the_method_drop_what_was_predicted(tiny, tmp_path, rng):
    """The same through `Method.keep`, on the activations of the dense model."""
    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16")
    text = text_of(tiny, tmp_path, rng, 500)
    calibrate(CalibrationJob(model, text, tmp_path / "h.safetensors", SETTINGS, CPU))
    method = Teal(sparsity=0.5)
    result = derive_thresholds("x", method, tmp_path / "h.safetensors", tmp_path / "t.parquet")
    activations = dense_activations(model, calibration_windows(model.tokenizer(), text, SETTINGS, 128), 4096)
    sites = by_leaf(model.sites)
    for rule, row in zip(result.rules, result.rows, strict=True):
        x = torch.from_numpy(activations[sites[rule.layer, rule.matrix].key].view(np.int16)).view(torch.bfloat16)
        assert int((~method.keep(x, rule)).sum()) == row["dropped"]


def test_two_runs_give_identical_files(tiny, tmp_path, rng, machine):
    model = tiny.model(tmp_path, rng)
    text = text_of(tiny, tmp_path, rng, 500)
    for name in ("a", "b"):
        calibrate(CalibrationJob(model, text, tmp_path / name / "h.safetensors", SETTINGS, machine))
        derive_thresholds("l", Teal(sparsity=0.5), tmp_path / name / "h.safetensors", tmp_path / name / "t.parquet")
    for file in ("h.safetensors", "t.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("bos", [1, None])
def test_windows_are_pieces_of_the_text(tiny, tmp_path, rng, bos):
    """All pieces in order when all are asked for, else a seeded choice of them, still in order."""
    model = tiny.model(tmp_path, rng, bos_token_id=bos)
    text = text_of(tiny, tmp_path, rng, 103)
    ids = [int(word[1:]) for word in text.read_text().split()]
    begin = [] if bos is None else [bos]
    body = 10 - len(begin)
    pieces = [begin + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]

    def windows(**changes):
        return calibration_windows(model.tokenizer(), text, Calibration(**{"sequence_length": 10} | changes), 128)

    assert windows(tokens=10 * len(pieces)).tolist() == pieces
    chosen = {seed: windows(tokens=35, seed=seed).tolist() for seed in range(5)}
    for rows in chosen.values():
        assert len(rows) == 4
        at = [pieces.index(row) for row in rows]
        assert at == sorted(set(at))
    assert len({str(rows) for rows in chosen.values()}) > 1
    assert windows(tokens=35, seed=3).tolist() == chosen[3]
    with pytest.raises(InputError, match=f"tokens must be at most {10 * len(pieces)} .* got {10 * len(pieces) + 1}"):
        windows(tokens=10 * len(pieces) + 1)


def test_refuses_sequences_beyond_the_context(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    text = text_of(tiny, tmp_path, rng, 300)
    with pytest.raises(InputError, match="sequence_length must be at most the context of 128, got 129"):
        calibrate(CalibrationJob(model, text, tmp_path / "h", Calibration(tokens=129, sequence_length=129), CPU))
    assert not (tmp_path / "h").exists()


def test_refuses_scores_that_the_model_does_not_have(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    sites = tuple(replace(site, matrices=("fc", "up")) if site.key == (1, "mlp_in") else site for site in model.sites)
    text = text_of(tiny, tmp_path, rng, 500)
    job = CalibrationJob(replace(model, sites=sites), text, tmp_path / "h", SETTINGS, CPU, scores=("cats",))
    with pytest.raises(InputError, match="method cats: every layer must have .* got no gate in layer 1"):
        calibrate(job)
    assert not (tmp_path / "h").exists()


def test_names_the_activation_that_is_not_finite(tiny, tmp_path, rng, monkeypatch):
    """One word's embedding overflows float16 in the second layer: layer, site and token of the text are named."""
    monkeypatch.setattr(windows_module, "PASS_TOKENS", 34)
    config = tiny.config | {"torch_dtype": "float16"}
    tensors = tiny.weights(rng, config)
    word = 50
    tensors["model.embed_tokens.weight"][:] = 0
    # the only word with anything in channel 0, which is the only one that the second layer's mlp blows up
    tensors["model.embed_tokens.weight"][:, 1:] = torch.randn(96, 35).half()
    tensors["model.embed_tokens.weight"][word, 0] = 5
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:] = 0
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:] = 0
    for name in ("gate", "up"):
        weight = tensors[f"model.layers.1.mlp.{name}_proj.weight"]
        weight *= 0.1
        weight[:, 0] = 1000
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = 1
    model = convert(tiny.write(tmp_path / "checkpoint", config, tensors), tmp_path / "model", Conversion())
    words = [f"w{i}" for i in rng.integers(51, 96, 160)]
    words[77] = f"w{word}"
    (tmp_path / "text.txt").write_text(" ".join(words))
    # windows of 16 words after a begin token: word 77 is in window 4, at position 1 + 13
    with pytest.raises(InputError, match=f"Inf or NaN in layer 1, site mlp_mid, token {4 * 17 + 14} "):
        settings = Calibration(tokens=170, sequence_length=17)
        calibrate(CalibrationJob(model, tmp_path / "text.txt", tmp_path / "h.safetensors", settings, CPU))
    assert not (tmp_path / "h.safetensors").exists()


def test_table_is_read_back(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    path = tiny.thresholds(tmp_path, model, rng, 0.4)
    assert pq.read_schema(path).equals(THRESHOLDS)
    found = read_thresholds(path, model)
    expected = derive_thresholds("teal-0.4", Teal(sparsity=0.4), tmp_path / "histograms.safetensors", tmp_path / "t")
    assert found == expected
    assert [rule.threshold_bits for rule in found.rules] == [row["threshold_bits"] for row in found.rows]


def test_dense_has_no_thresholds(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    tiny.thresholds(tmp_path, model, rng)
    result = derive_thresholds("dense", Dense(), tmp_path / "histograms.safetensors", tmp_path / "t.parquet")
    assert {row["threshold_bits"] for row in result.rows} == {None}
    assert result.overall() == (None, None)
    assert read_thresholds(tmp_path / "t.parquet", model) == result


def test_refuses_thresholds_of_another_model(tiny, tmp_path, rng):
    model = tiny.model(tmp_path / "one", rng)
    other = tiny.model(tmp_path / "other", rng)
    path = tiny.thresholds(tmp_path, model, rng)
    with pytest.raises(InputError, match="must be calibrated on this model .* calibrate again"):
        read_thresholds(path, other)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="must be a threshold table of sparsetrace, got another Parquet file"):
        read_thresholds(tmp_path / "x.parquet", model)


def test_matrices_of_one_site_share_a_threshold(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    rules = read_thresholds(tiny.thresholds(tmp_path, model, rng), model).rules
    bits = {(rule.layer, rule.matrix): rule.threshold_bits for rule in rules}
    for site in layer_sites(model.sites):
        assert len({bits[leaf] for leaf in site.leaves}) == 1


def test_refuses_a_gpu_that_is_not_there(tiny, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device must be cpu or auto where torch sees no GPU, got cuda"):
        set_up_torch(Machine(device="cuda"))
    assert set_up_torch(Machine(device="auto")) == torch.device("cpu")
