"""A family beyond Llama's, from checkpoint to verified data set; transformers' own model of it is the oracle.

What is captured is compared with what enters each of transformers' multiplies when its inputs are masked alike
(docs/architecture.md, Numbers). How config.json is read is tested in test_convert.py, the decoder alone in
test_model.py.
"""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import sparsetrace
from sparsetrace.cli.main import cli
from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.generation.backends import choose_backend
from sparsetrace.methods import Teal
from sparsetrace.model.families.registry import FAMILIES
from sparsetrace.model.runtime import open_model

transformers = pytest.importorskip("transformers")

MODULES = {matrix: f"self_attn.{matrix}_proj" for matrix in ("q", "k", "v", "o")} | {
    matrix: f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")
}


def run(*words):
    """One command, which must end well; what it printed."""
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def qwen3(request, tiny, tmp_path_factory):
    """Folder of a tiny random checkpoint with all that is made of it; transformers' model."""
    folder = tmp_path_factory.mktemp("qwen3")
    rng = tiny.rng(f"qwen3 {request.param}")
    config = transformers.Qwen3Config(
        hidden_size=36,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=tiny.vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=request.param,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
        attn_implementation="eager",
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
    theirs.save_pretrained(tiny.tokenizer(folder / "checkpoint"))
    (folder / "text.txt").write_text(tiny.words(rng, 700))
    tiny.prompts(folder / "prompts.jsonl", rng, [4, 9, 2])
    run("convert", folder / "checkpoint", "--out", folder / "model")
    calibration = ["--tokens", 400, "--sequence-length", 20, "--device", "cpu"]
    run("calibrate", folder / "model", "--text", folder / "text.txt", "--out", folder / "h.safetensors", *calibration)
    batching = ["--batch-size", 2, "--max-new-tokens", 6]
    run("split", folder / "model", "--prompts", folder / "prompts.jsonl", "--out", folder / "split.parquet", *batching)
    for label, method in {"dense": ["dense"], "teal-0.5": ["teal", "--set", "sparsity=0.5"]}.items():
        own = folder / label
        run("thresholds", folder / "h.safetensors", "--method", *method, "--out", own / "t.parquet")
        run(
            *("generate", folder / "model", "--thresholds", own / "t.parquet", "--prompts", folder / "split.parquet"),
            *("--out", own / "dump" / "00000" / "manifest.json", "--prefill", "all", "--ignore-eos", *batching),
            *("--device", "cpu"),
        )
        parts = own / "parts" / "00000.json"
        run("pack", own / "dump" / "00000" / "manifest.json", "--workload", own / "workload", "--out", parts)
        run("index", parts, "--workload", own / "workload")
    return folder, theirs


@pytest.mark.parametrize("label", ["dense", "teal-0.5"])
def test_the_data_set_is_whole(qwen3, label):
    folder, _ = qwen3
    out = run("verify", folder / label / "workload", "--recompute", 3, "--model", folder / "model", "--device", "cpu")
    assert "no fault" in out
    ds = sparsetrace.open(folder / label / "workload")
    assert ds.leaves == [(layer, matrix) for layer in range(2) for matrix in MODULES]
    widths = {row["matrix"]: (row["in_features"], row["out_features"]) for row in ds.matrix_table.to_pylist()}
    assert widths == {
        **{"q": (36, 40), "k": (36, 20), "v": (36, 20), "o": (40, 36)},
        **{"gate": (36, 43), "up": (36, 43), "down": (43, 36)},
    }


@pytest.mark.parametrize("label", ["dense", "teal-0.5"])
@torch.inference_mode()
def test_what_is_captured_enters_transformers_multiplies(qwen3, label):
    folder, theirs = qwen3
    ds = sparsetrace.open(folder / label / "workload")
    thresholds = {(row["layer"], row["matrix"]): row["threshold"] for row in ds.matrix_table.to_pylist()}
    assert {threshold is None for threshold in thresholds.values()} == {label == "dense"}
    dropped, compared = 0, set()

    def compare(leaf, rows):
        threshold = thresholds[leaf] or 0.0

        def hook(_, inputs):
            nonlocal dropped
            (x_TK,) = inputs[0]
            keep_TK, tolerance = torch.from_numpy(rows.keep()), 1e-5 * x_TK.abs().max()
            clear_TK = (x_TK.abs() - threshold).abs() > tolerance
            assert torch.equal(keep_TK[clear_TK], (x_TK.abs() > threshold)[clear_TK])
            assert (torch.from_numpy(rows.dense()) - x_TK * keep_TK).abs().max() <= tolerance
            dropped += int((~keep_TK).sum())
            compared.add(leaf)
            # what follows sees the same input, also where a magnitude lies at the threshold
            return (inputs[0] * keep_TK,)

        return hook

    for sequence in pq.read_table(folder / label / "workload" / "sequences.parquet").to_pylist():
        ids = [*sequence["prompt_ids"], *sequence["output_ids"]]
        chosen = ds.select(sequence=sequence["sequence"])
        # the last sampled token is never fed
        assert len(chosen.tokens) == len(ids) - 1
        hooks = [
            theirs.get_submodule(f"model.layers.{layer}.{MODULES[matrix]}").register_forward_pre_hook(
                compare((layer, matrix), chosen.matrix(layer, matrix))
            )
            for layer, matrix in ds.leaves
        ]
        logits_TV = theirs(torch.tensor(ids[:-1])[None]).logits[0]
        for hook in hooks:
            hook.remove()
        assert logits_TV[len(sequence["prompt_ids"]) - 1 :].argmax(-1).tolist() == sequence["output_ids"]
    assert compared == set(ds.leaves)
    assert (dropped > 0) == (label != "dense")


def test_a_gpu_runs_it_on_the_torch_backend(qwen3):
    """The kernels have no norms of queries and keys: `auto` takes torch, and `triton` is refused."""
    folder, _ = qwen3
    gpu, teal = torch.device("cuda"), Teal(sparsity=0.5)
    config = replace(open_model(folder / "model").config, dtype="bfloat16")
    assert config.qk_norm
    assert choose_backend("auto", gpu, config, teal, []) == choose_backend("torch", gpu, config, teal, []) == "torch"
    with pytest.raises(InputError, match="must be torch or auto here, got triton: the kernels have no norms of"):
        choose_backend("triton", gpu, config, teal, [])
    assert choose_backend("auto", gpu, replace(config, qk_norm=False), teal, []) == "triton"


def test_hashes_of_models_without_such_norms_are_those_of_before(qwen3, tiny, tmp_path, rng):
    """The field is recorded, and hashed, only where it says something."""
    folder, _ = qwen3
    assert json.loads((folder / "model" / "config.json").read_text())["architecture"]["qk_norm"] is True
    model = tiny.model(tmp_path, rng)
    assert "qk_norm" not in json.loads((model.folder / "config.json").read_text())["architecture"]
    assert not model.config.qk_norm
    assert ModelConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config


def test_each_family_stands_under_its_own_name():
    assert {name: family.model_type for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    for family in FAMILIES.values():
        assert hasattr(transformers, family.architecture)
