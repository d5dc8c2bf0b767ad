"""Conversion against the checkpoint's own tensors; every fault is named, and a failed conversion leaves no output."""

import errno
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Conversion
from sparsetrace.model import layout, write_weights
from sparsetrace.model.convert import convert
from sparsetrace.model.read_config import read_config
from sparsetrace.model.runtime import describe, open_model


def runtime_tensors(model) -> dict[str, torch.Tensor]:
    files = sorted({entry["file"] for entry in model.tensors.values()})
    return {name: tensor for file in files for name, tensor in load_file(model.folder / file).items()}


def write_sharded(folder, tiny, config, tensors, parts):
    """The same checkpoint in several files with an index."""
    tiny.tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = {name: tensors[name] for name in names[part::parts]}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refused(checkpoint, out, match, conversion=None):
    """Conversion fails with a message, and leaves neither an output nor a partial one."""
    with pytest.raises(InputError, match=match) as error:
        convert(checkpoint, out, conversion or Conversion())
    assert str(error.value).startswith(("convert:", "tokenizer:"))
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_tensor_is_the_checkpoints_own(tiny, tmp_path, rng, dtype, family):
    """[in, out] order, the matrices of a site side by side, bit for bit."""
    config = tiny.config | {"torch_dtype": dtype} | (tiny.qwen3 if family == "qwen3" else {})
    source = tiny.weights(rng, config)
    model = convert(tiny.write(tmp_path / "checkpoint", config, source), tmp_path / "model", Conversion())
    found = runtime_tensors(model)
    expected = {
        "embedding": source["model.embed_tokens.weight"],
        "lm_head": source["lm_head.weight"],
        "norm.weight": source["model.norm.weight"],
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        expected[f"layers.{layer}.attn_norm.weight"] = source[f"{prefix}.input_layernorm.weight"]
        expected[f"layers.{layer}.mlp_norm.weight"] = source[f"{prefix}.post_attention_layernorm.weight"]
        if family == "qwen3":
            expected[f"layers.{layer}.q_norm.weight"] = source[f"{prefix}.self_attn.q_norm.weight"]
            expected[f"layers.{layer}.k_norm.weight"] = source[f"{prefix}.self_attn.k_norm.weight"]
        for site, names in (
            ("attn_in", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("attn_out", ["self_attn.o_proj"]),
            ("mlp_in", ["mlp.gate_proj", "mlp.up_proj"]),
            ("mlp_mid", ["mlp.down_proj"]),
        ):
            names = [f"{prefix}.{name}.weight" for name in names]
            expected[f"layers.{layer}.{site}.weight"] = torch.cat([source[name].T for name in names], 1)
            (found_site,) = (one for one in model.sites if one.key == (layer, site))
            assert [model.source_weight(leaf) for leaf in found_site.leaves] == names
    assert found.keys() == expected.keys() == model.tensors.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor), name
        assert model.tensors[name]["shape"] == list(tensor.shape)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_casts_as_torch_does(tiny, tmp_path, rng, dtype):
    source = tiny.weights(rng, tiny.config)
    model = convert(tiny.write(tmp_path / "c", tiny.config, source), tmp_path / "m", Conversion(dtype=dtype))
    assert model.config.dtype == dtype
    down = source["model.layers.1.mlp.down_proj.weight"].to(getattr(torch, dtype)).T
    assert torch.equal(runtime_tensors(model)["layers.1.mlp_mid.weight"], down)


def test_sharded_or_not_is_the_same_model(tiny, tmp_path, rng):
    source = tiny.weights(rng, tiny.config)
    one = convert(tiny.write(tmp_path / "one", tiny.config, source), tmp_path / "a", Conversion())
    two = convert(write_sharded(tmp_path / "two", tiny, tiny.config, source, 2), tmp_path / "b", Conversion())
    five = convert(write_sharded(tmp_path / "five", tiny, tiny.config, source, 5), tmp_path / "c", Conversion())
    assert one.model_hash == two.model_hash == five.model_hash
    assert one.tensors == two.tensors == five.tensors
    assert len({one.source_hash, two.source_hash, five.source_hash}) == 3
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_small_output_files_hold_the_same_model(tiny, tmp_path, rng, monkeypatch):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    one = convert(checkpoint, tmp_path / "a", Conversion())
    monkeypatch.setattr(layout, "FILE_BYTES", 5000)
    many = convert(checkpoint, tmp_path / "b", Conversion())
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert one.model_hash == many.model_hash
    for file in (tmp_path / "b").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "theirs", metadata={"format": "sparsetrace-model"})
        assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
    left, right = one.load(torch.device("cpu")).state_dict(), many.load(torch.device("cpu")).state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_threads_are_torchs_and_bounded_by_memory(tiny, tmp_path, rng, monkeypatch):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    one = convert(checkpoint, tmp_path / "a", Conversion())
    seen = set()

    def make(*args):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return own(*args)

    own = write_weights._make
    monkeypatch.setattr(write_weights, "_make", make)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = convert(checkpoint, tmp_path / "b", Conversion())
        assert torch.get_num_threads() == 3
        assert 1 <= len(seen) <= 3 and {threads for _, threads in seen} == {1}
        seen.clear()
        monkeypatch.setattr(write_weights, "MADE_BYTES", 1)
        assert convert(checkpoint, tmp_path / "c1", Conversion()).tensors == several.tensors == one.tensors
        assert len(seen) == 1
    finally:
        torch.set_num_threads(before)


def test_a_full_disk_is_named_with_the_file():
    with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}.*'/dev/full'"):
        write_weights._write_at(Path("/dev/full"), 0, b"x")


def test_any_change_of_a_weight_changes_the_hash(tiny, tmp_path, rng):
    source = tiny.weights(rng, tiny.config)
    hashes = set()
    for number, name in enumerate([None, "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]):
        changed = {key: tensor.clone() for key, tensor in source.items()}
        if name:
            changed[name].view(torch.int32).flatten()[-1] ^= 1
        checkpoint = tiny.write(tmp_path / f"c{number}", tiny.config, changed)
        hashes.add(convert(checkpoint, tmp_path / f"m{number}", Conversion()).model_hash)
    config = tiny.config | {"rope_theta": 10001.0}
    hashes.add(convert(tiny.write(tmp_path / "c", config, source), tmp_path / "m", Conversion()).model_hash)
    assert len(hashes) == 4


@pytest.mark.parametrize("held", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_under_either_name(tiny, tmp_path, rng, held):
    config = tiny.config | {"tie_word_embeddings": True}
    source = tiny.weights(rng, config)
    table = source.pop("model.embed_tokens.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"] if held == "both" else [held]
    source |= {name: table.clone() for name in names}
    model = convert(tiny.write(tmp_path / "c", config, source), tmp_path / "m", Conversion())
    decoder = model.load(torch.device("cpu"))
    assert torch.equal(decoder.embedding, table)
    assert decoder.lm_head.data_ptr() == decoder.embedding.data_ptr()
    assert "lm_head" not in model.tensors


def test_converting_again_replaces_the_model(tiny, tmp_path, rng):
    first = convert(tiny.checkpoint(tmp_path / "c1", rng), tmp_path / "m", Conversion())
    second = convert(tiny.checkpoint(tmp_path / "c2", rng), tmp_path / "m", Conversion())
    assert first.model_hash != second.model_hash
    assert open_model(tmp_path / "m") == second
    assert open_model(tmp_path / "m" / "config.json") == second
    assert "2 layers of 7 matrices" in describe(second)


def test_leaves_a_foreign_folder_alone(tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="must be new or hold an earlier result, since it is replaced, got thesis.tex"):
        convert(checkpoint, tmp_path / "m", Conversion())
    assert (tmp_path / "m" / "thesis.tex").read_text() == "years of work"


def test_replaces_a_result_whose_description_is_gone(tiny, tmp_path, rng):
    """A workflow deletes the output it declares, config.json, before it converts again."""
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    first = convert(checkpoint, tmp_path / "m", Conversion())
    (tmp_path / "m" / "config.json").unlink()
    assert convert(checkpoint, tmp_path / "m", Conversion()) == first


def test_does_not_replace_the_checkpoint_itself(tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(
        InputError, match="must be new or hold an earlier result, since it is replaced, got model.safetensors"
    ):
        convert(checkpoint, checkpoint, Conversion())
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before


def drop(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, make):
    return lambda config, tensors: tensors.update({name: make(tensors.get(name))})


def poke(name, value):
    def change(config, tensors):
        tensors[name][-1, -1] = value

    return change


WEIGHT = "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS = [
    # id, change, message
    ("missing", drop(WEIGHT), f"tensors must be complete, got none for {WEIGHT}"),
    ("no-embedding", drop("model.embed_tokens.weight"), "got none for model.embed_tokens.weight"),
    ("no-head", drop("lm_head.weight"), "got none for lm_head.weight"),
    ("unexpected", put("model.layers.0.mlp.bias", lambda _: torch.zeros(3)), "got also model.layers.0.mlp.bias"),
    ("third-layer", put("model.layers.2.mlp.up_proj.weight", lambda _: torch.zeros(3)), "got also model.layers.2"),
    ("misshapen", put(WEIGHT, lambda x: x[:-1].clone()), rf"{WEIGHT} must have shape \[43, 36\], got \[42, 36\]"),
    ("transposed", put(WEIGHT, lambda x: x.T.contiguous()), rf"{WEIGHT} must have shape \[43, 36\], got \[36, 43\]"),
    ("nan", poke(WEIGHT, float("nan")), f"{WEIGHT} must be finite, got NaN or Inf"),
    ("inf", poke("model.embed_tokens.weight", float("-inf")), "embed_tokens.weight must be finite, got NaN or Inf"),
    ("integers", put(WEIGHT, lambda x: x.int()), f"{WEIGHT} must be fp16, bf16 or fp32, got torch.int32"),
    ("fp8", put(WEIGHT, lambda x: x.to(torch.float8_e4m3fn)), f"{WEIGHT} must be fp16, bf16 or fp32"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD_TENSORS])
@pytest.mark.parametrize("parts", [1, 3])
def test_refuses_tensors(tiny, tmp_path, rng, change, message, parts):
    config, tensors = dict(tiny.config), tiny.weights(rng, tiny.config)
    change(config, tensors)
    folder = tmp_path / "checkpoint"
    if parts == 1:
        tiny.write(folder, config, tensors)
    else:
        write_sharded(folder, tiny, config, tensors, parts)
    refused(folder, tmp_path / "model", message)


def test_refuses_what_a_dtype_cannot_hold(tiny, tmp_path, rng):
    tensors = tiny.weights(rng, tiny.config)
    tensors[WEIGHT][3, 4] = 70_000
    checkpoint = tiny.write(tmp_path / "c", tiny.config, tensors)
    refused(checkpoint, tmp_path / "m", f"{WEIGHT} must fit torch.float16, got 70000", Conversion(dtype="float16"))
    assert convert(checkpoint, tmp_path / "m", Conversion(dtype="bfloat16")).config.dtype == "bfloat16"


def test_saved_rotary_buffers_are_no_matter(tiny, tmp_path, rng):
    tensors = tiny.weights(rng, tiny.config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    convert(tiny.write(tmp_path / "c", tiny.config, tensors), tmp_path / "m", Conversion())


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
BAD_CONFIGS = [
    # id, changes, message
    ("type", {"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen3, got 'gpt2'"),
    ("no-type", {"model_type": None}, "model_type must be one of llama, mistral, qwen3, got None"),
    ("architecture", {"architectures": ["LlamaForSequenceClassification"]}, "architectures must be"),
    ("unknown", {"logit_softcap": 30.0, "mystery": 1}, "got logit_softcap, mystery: .* ignore_fields"),
    ("activation", {"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'relu', got 'gelu'"),
    ("bias", {"attention_bias": True}, "attention_bias must be False, got True"),
    ("quantised", {"quantization_config": {"bits": 4}}, "quantization_config must be None"),
    ("rope", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be default or llama3, got 'linear'"),
    ("rope3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "got none for low_freq_factor"),
    ("heads", {"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
    ("negative", {"intermediate_size": -1}, "intermediate_size must be a positive integer, got -1"),
    ("text", {"hidden_size": "36"}, "hidden_size must be a positive integer, got '36'"),
    ("absent", {"max_position_embeddings": None}, "max_position_embeddings must be a positive integer, got None"),
    ("dtype", {"torch_dtype": "int8"}, "torch_dtype must be one of float16, bfloat16, float32, got 'int8'"),
    ("window", {"sliding_window": 0} | MISTRAL, "sliding_window must be a positive integer, got 0"),
    ("eos", {"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list of them, got '</s>'"),
]


@pytest.mark.parametrize(("changes", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD_CONFIGS])
def test_refuses_configurations(tiny, tmp_path, rng, changes, message):
    tensors = tiny.weights(rng, tiny.config)
    refused(tiny.write(tmp_path / "c", tiny.config | changes, tensors), tmp_path / "m", message)


def test_fields_said_to_be_harmless_are(tiny, tmp_path, rng):
    tensors = tiny.weights(rng, tiny.config)
    checkpoint = tiny.write(tmp_path / "c", tiny.config | {"mystery": 1}, tensors)
    convert(checkpoint, tmp_path / "m", Conversion(ignore_fields=("mystery",)))


@pytest.mark.parametrize("value", ["gelu", None, ["silu"]])
def test_ignore_fields_cannot_stand_for_an_activation_function(tiny, tmp_path, rng, value):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng, hidden_act=value)
    message = re.escape(f"hidden_act must be 'silu' or 'relu', got {value!r}: ignore_fields cannot stand for")
    refused(checkpoint, tmp_path / "m", message, Conversion(ignore_fields=("hidden_act",)))
    known = tiny.checkpoint(tmp_path / "k", rng, hidden_act="relu")
    assert convert(known, tmp_path / "m", Conversion(ignore_fields=("hidden_act",))).config.hidden_act == "relu"


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_refuses_truncated_files(tiny, tmp_path, rng, keep):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:keep])
    refused(checkpoint, tmp_path / "m", "model.safetensors must be a whole safetensors file")


def test_refuses_files_that_are_not_there(tiny, tmp_path, rng):
    refused(tmp_path / "nowhere", tmp_path / "m", "nowhere/config.json must be a file, got nothing there")
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.bin")
    refused(checkpoint, tmp_path / "m", "model.safetensors must be a safetensors file, got nothing there")


def test_refuses_a_wrong_index(tiny, tmp_path, rng):
    checkpoint = write_sharded(tmp_path / "c", tiny, tiny.config, tiny.weights(rng, tiny.config), 2)
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"].popitem()[1]
    content["weight_map"]["model.ghost"] = file
    index.write_text(json.dumps(content))
    refused(checkpoint, tmp_path / "m", "tensors must be in the files it names, got none for model.ghost")
    index.write_text(json.dumps({"weight_map": [1]}))
    refused(checkpoint, tmp_path / "m", r"weight_map must be an object that names files, got \[1\]")
    index.write_text("{")
    refused(checkpoint, tmp_path / "m", "index.json must be JSON")
    index.unlink()
    refused(checkpoint, tmp_path / "m", "model.safetensors must be a safetensors file, got nothing there")


def test_refuses_the_same_tensor_twice(tiny, tmp_path, rng):
    tensors = tiny.weights(rng, tiny.config)
    checkpoint = write_sharded(tmp_path / "c", tiny, tiny.config, tensors, 2)
    second = checkpoint / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}, second)
    refused(checkpoint, tmp_path / "m", "tensor model.embed_tokens.weight must be in one file only, got it twice")


def test_failure_keeps_the_earlier_model(tiny, tmp_path, rng):
    model = convert(tiny.checkpoint(tmp_path / "c", rng), tmp_path / "m", Conversion())
    tensors = tiny.weights(rng, tiny.config)
    tensors[WEIGHT][0, 0] = float("nan")
    with pytest.raises(InputError, match="must be finite"):
        convert(tiny.write(tmp_path / "bad", tiny.config, tensors), tmp_path / "m", Conversion())
    assert open_model(tmp_path / "m") == model
    model.load(torch.device("cpu"))


def test_tokenizer_is_copied_with_its_settings(tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    (checkpoint / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    (checkpoint / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7], "bos_token_id": 5}')
    model = convert(checkpoint, tmp_path / "m", Conversion())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (model.folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert model.bos is None
    assert model.eos == {2, 7}
    assert model.tokenizer().encode("w3 w9", "test") == [3, 9]


def test_refuses_a_checkpoint_without_tokenizer(tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    (checkpoint / "tokenizer.json").unlink()
    refused(checkpoint, tmp_path / "m", "must hold tokenizer.json or tokenizer.model, got neither")
    (checkpoint / "tokenizer.model").write_bytes(b"not a model")
    refused(checkpoint, tmp_path / "m", "must hold a readable tokenizer")


def test_refuses_a_model_that_is_none(tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    with pytest.raises(
        InputError, match="must be a converted model, got another config.json: run `sparsetrace convert`"
    ):
        open_model(checkpoint)
    model = convert(checkpoint, tmp_path / "m", Conversion())
    content = json.loads((model.folder / "config.json").read_text())
    (model.folder / "config.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(InputError, match="must have version 3, got 99: convert again"):
        open_model(model.folder)


def other_width(sites):
    sites[1]["out_features"][0] += 1


@pytest.mark.parametrize("change", [other_width, lambda sites: sites.pop(), lambda sites: sites.reverse()])
def test_refuses_recorded_sites_that_are_not_the_decoders(tiny, tmp_path, rng, change):
    model = convert(tiny.checkpoint(tmp_path / "c", rng), tmp_path / "m", Conversion())
    path = model.folder / "config.json"
    content = json.loads(path.read_text())
    assert len(content["sites"]) == 2 * 4 + 1
    change(content["sites"])
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        open_model(model.folder).load(torch.device("cpu"))
    assert str(error.value) == f"model: {model.folder}: sites must be those of the decoder, got others: convert again"


def test_refuses_truncated_weights_when_loading(tiny, tmp_path, rng):
    model = convert(tiny.checkpoint(tmp_path / "c", rng), tmp_path / "m", Conversion())
    file = model.folder / "weights-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="must be whole, got .*: convert again"):
        model.load(torch.device("cpu"))


ABSENT = [
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "tie_word_embeddings",
    "hidden_act",
]
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}


def window_of(theirs) -> int | None:
    """The window that transformers gives to all layers."""
    if theirs.model_type == "qwen3":
        (kind,) = set(theirs.layer_types)
        return theirs.sliding_window if kind == "sliding_attention" else None
    return theirs.sliding_window if theirs.model_type == "mistral" else None


@pytest.mark.parametrize("model_type", list(CLASSES))
@pytest.mark.parametrize(
    "absent", [pytest.param((name,), id=name) for name in ABSENT] + [pytest.param(ABSENT, id="all")]
)
def test_absent_fields_mean_what_they_mean_to_transformers(tiny, tmp_path, model_type, absent):
    """Old and trimmed config.json files: the default is transformers', field by field."""
    transformers = pytest.importorskip("transformers")
    raw = tiny.config | {
        "model_type": model_type,
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "num_attention_heads": 32,
        "hidden_size": 128,
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "rope_scaling": None,
    }
    raw = {name: value for name, value in raw.items() if name not in absent}
    config_class = getattr(transformers, f"{CLASSES[model_type]}Config")
    theirs = config_class(**{k: v for k, v in raw.items() if k != "model_type"})
    family, ours = read_config(raw, Conversion(), tmp_path)
    assert family.model_type == model_type
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == window_of(theirs)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.hidden_act == theirs.hidden_act
    assert ours.qk_norm == (model_type == "qwen3")


FULL, SLIDING = "full_attention", "sliding_attention"
USED = {"use_sliding_window": True}
QWEN3_WINDOWS = [
    # id, changes to a config of 2 layers
    ("absent", {}),
    ("absent-but-used", USED),
    ("not-used", {"sliding_window": 5, "max_window_layers": 0}),
    ("all-layers", USED | {"sliding_window": 5, "max_window_layers": 0}),
    ("all-layers-by-default", USED | {"max_window_layers": 0}),
    ("no-layer", USED | {"sliding_window": 5, "max_window_layers": 2}),
    ("null", USED | {"sliding_window": None, "max_window_layers": 0}),
    ("types-full", USED | {"sliding_window": 5, "max_window_layers": 0, "layer_types": [FULL, FULL]}),
    ("types-sliding", USED | {"sliding_window": 5, "max_window_layers": 2, "layer_types": [SLIDING, SLIDING]}),
    ("types-null", USED | {"sliding_window": 5, "max_window_layers": 0, "layer_types": None}),
]


@pytest.mark.parametrize("changes", [pytest.param(case[1], id=case[0]) for case in QWEN3_WINDOWS])
def test_window_of_qwen3_is_transformers(tiny, tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    raw = tiny.config | tiny.qwen3 | changes
    theirs = transformers.Qwen3Config(**{name: value for name, value in raw.items() if name != "model_type"})
    assert read_config(raw, Conversion(), tmp_path)[1].sliding_window == window_of(theirs)


BAD_QWEN3 = [
    # id, changes to a config of 2 layers, message
    ("some-layers", USED | {"max_window_layers": 1}, f"the same for all layers, got 1 of {FULL} and 1 of {SLIDING}"),
    ("mixed-types", {"layer_types": [SLIDING, FULL]}, f"the same for all layers, got 1 of {FULL} and 1 of {SLIDING}"),
    ("sliding-not-used", {"layer_types": [SLIDING] * 2}, "sliding_window must be given and used where layer_types are"),
    ("sliding-null", USED | {"sliding_window": None, "layer_types": [SLIDING] * 2}, "sliding_window must be given"),
    ("too-few-types", {"layer_types": [FULL]}, "for each of 2 layers, got ['full_attention']"),
    ("unknown-type", {"layer_types": [FULL, "chunked_attention"]}, "full_attention or sliding_attention for each of 2"),
    ("no-list", {"layer_types": FULL}, "for each of 2 layers, got 'full_attention'"),
    ("window", USED | {"sliding_window": -1, "max_window_layers": 0}, "sliding_window must be a positive integer"),
    ("max-window-layers", USED | {"max_window_layers": None}, "max_window_layers must be an integer, got None"),
    ("head-dim", {"head_dim": None}, "head_dim must be a positive integer, got None"),
    ("bias", {"attention_bias": True}, "attention_bias must be False, got True"),
    ("architecture", {"architectures": ["LlamaForCausalLM"]}, "architectures must be [Qwen3ForCausalLM], got"),
]


@pytest.mark.parametrize(("changes", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD_QWEN3])
def test_refuses_configurations_of_qwen3(tiny, tmp_path, rng, changes, message):
    tensors = tiny.weights(rng, tiny.config | tiny.qwen3)
    checkpoint = tiny.write(tmp_path / "c", tiny.config | tiny.qwen3 | changes, tensors)
    refused(checkpoint, tmp_path / "m", re.escape(message), Conversion(ignore_fields=("layer_types",)))


def test_fields_of_one_family_are_unknown_to_another(tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng, use_sliding_window=False)
    refused(checkpoint, tmp_path / "m", "fields must be ones whose effect is known, got use_sliding_window")


def test_refuses_a_norm_of_the_wrong_width(tiny, tmp_path, rng):
    tensors = tiny.weights(rng, tiny.config | tiny.qwen3)
    name = "model.layers.0.self_attn.k_norm.weight"
    tensors[name] = torch.ones(36)
    checkpoint = tiny.write(tmp_path / "c", tiny.config | tiny.qwen3, tensors)
    refused(checkpoint, tmp_path / "m", rf"{name} must have shape \[8\], got \[36\]")
