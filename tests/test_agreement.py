"""What config.json and the tensors say must agree; transformers, which loads the same folder, is the oracle."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Conversion
from sparsetrace.model.convert import convert
from sparsetrace.model.runtime import open_model
from sparsetrace.study.study import parse_study

transformers = pytest.importorskip("transformers")


def refused(checkpoint, out, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        convert(checkpoint, out, Conversion())
    assert str(error.value).startswith("convert:") and "\n" not in str(error.value)
    assert not out.exists()


@torch.inference_mode()
def assert_transformers_logits(checkpoint, out):
    ids = torch.tensor([[1, *range(5, 40)]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", attn_implementation="eager")
    model = convert(checkpoint, out, Conversion())
    assert model.config.torch_dtype == theirs.dtype
    decoder = model.load(torch.device("cpu"))
    logits = decoder.logits(decoder(ids, torch.arange(ids.shape[1])[None]))
    expected = theirs(ids).logits.float()
    tolerance = 1e-5 if theirs.dtype == torch.float32 else 0.05
    assert (logits.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_a_tied_head_must_be_the_embedding(tiny, tmp_path, rng):
    """transformers 5 keeps both and warns, transformers 4 drops the head: which one is meant is not for us to say."""
    tensors = tiny.weights(rng, tiny.config)
    checkpoint = tiny.write(tmp_path / "c", tiny.config | {"tie_word_embeddings": True}, tensors)
    names = "tensors model.embed_tokens.weight and lm_head.weight must be equal where config.json says tie_word_embed"
    refused(checkpoint, tmp_path / "m", names)
    one = tensors["model.embed_tokens.weight"].clone()
    one[50, 7] += 1
    save_file(tensors | {"lm_head.weight": one}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(checkpoint, tmp_path / "m", names)
    # as the message says
    tiny.write(tmp_path / "c", tiny.config | {"tie_word_embeddings": False}, tensors)
    assert_transformers_logits(checkpoint, tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_dtype_that_is_not_named_is_the_tensors(tiny, tmp_path, rng, dtype):
    tensors = tiny.weights(rng, tiny.config | {"torch_dtype": dtype})
    # saved in float32 by old versions, whatever the weights were
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    config = {name: value for name, value in tiny.config.items() if name != "torch_dtype"}
    checkpoint = tiny.write(tmp_path / "c", config, tensors)
    assert_transformers_logits(checkpoint, tmp_path / "m")
    assert open_model(tmp_path / "m").config.dtype == dtype


def test_tensors_of_several_types_need_a_dtype(tiny, tmp_path, rng):
    tensors = tiny.weights(rng, tiny.config | {"torch_dtype": "bfloat16"})
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    config = tiny.config | {"torch_dtype": None}
    checkpoint = tiny.write(tmp_path / "c", config, tensors)
    refused(checkpoint, tmp_path / "m", "got 20 of BF16 and 1 of F32: choose a dtype")
    assert convert(checkpoint, tmp_path / "m", Conversion(dtype="bfloat16")).config.dtype == "bfloat16"
    tiny.write(checkpoint, config | {"dtype": "float16"}, tensors)
    assert convert(checkpoint, tmp_path / "m", Conversion()).config.dtype == "float16"


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = [
    # id, changes
    ("top", {"rope_theta": 5e5}),
    ("parameters", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("twice-the-same", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}),
    ("scaling", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "type": "llama3"} | LLAMA3}),
    ("both", {"rope_theta": 7e3} | dict.fromkeys(("rope_scaling", "rope_parameters"), {"type": "llama3"} | LLAMA3)),
    ("parameters-llama3", {"rope_theta": None, "rope_parameters": {"type": "llama3", "rope_theta": 9e3} | LLAMA3}),
    ("integer", {"rope_theta": 10**6}),
]


@pytest.mark.parametrize("changes", [pytest.param(case[1], id=case[0]) for case in ROPES])
def test_rope_is_transformers(tiny, tmp_path, rng, changes):
    checkpoint = tiny.write(tmp_path / "c", tiny.config, tiny.weights(rng, tiny.config))
    config = {name: value for name, value in (tiny.config | changes).items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert_transformers_logits(checkpoint, tmp_path / "m")


NAN = math.nan
CONTRADICTIONS = [
    # id, changes, message
    (
        "theta-twice",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta must be the same wherever it is given, got 10000.0 in rope_theta, 500000.0 in rope_parameters.rope",
    ),
    (
        "theta-in-scaling",
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta must be the same wherever it is given, got 10000.0 in rope_theta, 500000.0 in rope_scaling.rope",
    ),
    (
        "by-layer-type",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        "rope_parameters must be the same for all layers, got one for full_attention",
    ),
    (
        "two-scalings",
        {"rope_scaling": {"type": "llama3"} | LLAMA3, "rope_parameters": {"type": "llama3"} | LLAMA3 | {"factor": 2.0}},
        "RoPE scaling must be the same wherever it is given",
    ),
    (
        "scaled-in-one",
        {"rope_scaling": {"type": "llama3"} | LLAMA3, "rope_parameters": {"rope_type": "default"}},
        "RoPE scaling must be the same wherever it is given",
    ),
    ("two-types", {"rope_scaling": {"type": "llama3", "rope_type": "default"} | LLAMA3}, "type must be the same"),
    ("part", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "effect is known, got partial_rotary_factor"),
    ("two-dtypes", {"dtype": "float16"}, "dtype must be the same wherever it is given, got float32 in torch_dtype, fl"),
]
TYPES = [
    ("theta-zero", {"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
    ("theta-negative", {"rope_theta": -1e4}, "rope_theta must be a positive number, got -10000.0"),
    ("theta-nan", {"rope_theta": NAN}, "rope_theta must be a positive number, got nan"),
    ("theta-inf", {"rope_theta": math.inf}, "rope_theta must be a positive number, got inf"),
    ("theta-huge", {"rope_theta": 10**400}, "rope_theta must be a positive number, got 1000"),
    ("theta-text", {"rope_theta": "1e6"}, "rope_theta must be a positive number, got '1e6'"),
    ("theta-true", {"rope_theta": True}, "rope_theta must be a positive number, got True"),
    ("eps-nan", {"rms_norm_eps": NAN}, "rms_norm_eps must be a positive number, got nan"),
    ("eps-negative", {"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number, got -1e-05"),
    ("eps-null", {"rms_norm_eps": None}, "rms_norm_eps must be a positive number, got None"),
    ("eps-list", {"rms_norm_eps": [1e-5]}, "rms_norm_eps must be a positive number, got [1e-05]"),
    ("odd-head", {"head_dim": 9}, "head_dim must be even, since halves of it are rotated, got 9"),
    ("head-of-a-part", {"head_dim": None, "hidden_size": 38}, "hidden_size must be a multiple of num_attention_heads"),
    ("scaling-text", {"rope_scaling": "llama3"}, "rope_scaling must be an object, got 'llama3'"),
    ("scaling-list", {"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
    ("factor-text", {"rope_scaling": {"type": "llama3"} | LLAMA3 | {"factor": "8"}}, "factor must be a positive numb"),
    (
        "factors",
        {"rope_scaling": {"type": "llama3"} | LLAMA3 | {"low_freq_factor": 4}},
        "must be above low_freq_",
    ),
    ("dtype-object", {"torch_dtype": {"": "float16"}}, "torch_dtype must be one of float16, bfloat16, float32, got {'"),
    ("dtype-number", {"torch_dtype": 16}, "torch_dtype must be one of float16, bfloat16, float32, got 16"),
    ("tied-text", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ("type-list", {"model_type": ["llama"]}, "model_type must be one of llama, mistral, qwen3, got ['llama']"),
    ("architectures", {"architectures": "LlamaForCausalLM"}, "architectures must be [LlamaForCausalLM], got"),
    ("eos-text", {"eos_token_id": [2, "3"]}, "eos_token_id must be an integer or a list of them, got [2, '3']"),
    ("eos-true", {"eos_token_id": True}, "eos_token_id must be an integer or a list of them, got True"),
    ("eos-negative", {"eos_token_id": -1}, "eos_token_id must be an integer or a list of them, got -1"),
]


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("plain") / "c", tiny.rng("agreement"))


@pytest.mark.parametrize(
    ("changes", "message"), [pytest.param(*case[1:], id=case[0]) for case in [*CONTRADICTIONS, *TYPES]]
)
def test_refuses_what_contradicts_itself_or_is_of_another_type(tiny, plain, tmp_path, changes, message):
    shutil.copytree(plain, tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps(tiny.config | changes))
    refused(tmp_path / "c", tmp_path / "m", message)


@pytest.mark.parametrize("names", [["model-00001-of-00002.safetensors"], ["model.safetensors"], [7]])
def test_a_whole_file_goes_before_an_index(tiny, plain, tmp_path, names):
    """As in transformers: an index may be left over from another download."""
    checkpoint = shutil.copytree(plain, tmp_path / "c")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}))
    assert_transformers_logits(checkpoint, tmp_path / "m")


@pytest.mark.parametrize("name", [7, "..", "../other.safetensors", "/other.safetensors", "sub/other.safetensors", ""])
def test_an_index_names_files_of_its_folder(plain, tmp_path, name):
    checkpoint = shutil.copytree(plain, tmp_path / "c")
    (checkpoint / "model.safetensors").rename(tmp_path / "other.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(checkpoint, tmp_path / "m", f"weight_map must name files of its folder, got {name!r}")


def study(checkpoint):
    models = {"m": {"checkpoint": str(checkpoint), "calibration_text": "c.txt"}}
    runs = {"r": {"prompts": "q.txt", "methods": [{"name": "dense"}]}}
    return parse_study({"results": "r", "models": models, "runs": runs}, "test")


def test_the_scheduler_counts_the_files_that_are_read(tiny, plain, tmp_path):
    """Not `consolidated.safetensors`, the same weights in another form, nor shards that a whole file stands for."""
    checkpoint = shutil.copytree(plain, tmp_path / "c")
    whole, size = checkpoint / "model.safetensors", (checkpoint / "model.safetensors").stat().st_size
    before = study(checkpoint).needs("convert", "m")
    for name in ("consolidated.safetensors", "model-00001-of-00001.safetensors"):
        shutil.copyfile(whole, checkpoint / name)
    assert study(checkpoint).needs("convert", "m") == before
    assert study(checkpoint)._weight_bytes("m", None) == size
    assert study(checkpoint).checkpoint_weights("m") == [str(whole)]
    whole.unlink()
    weight_map = {"lm_head.weight": "model-00001-of-00001.safetensors", "absent": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert study(checkpoint)._weight_bytes("m", None) == size
    assert study(checkpoint).checkpoint_weights("m") == [str(checkpoint / "model-00001-of-00001.safetensors")]


def test_a_link_gives_the_name(plain, tmp_path, monkeypatch):
    """A user's link into a cache whose folders are named by commits."""
    shutil.copytree(plain, tmp_path / "snapshots" / "abc123")
    (tmp_path / "My-Llama").symlink_to(tmp_path / "snapshots" / "abc123")
    assert convert(tmp_path / "My-Llama", tmp_path / "m", Conversion()).source == "My-Llama"
    monkeypatch.chdir(tmp_path / "snapshots")
    link, model = tmp_path / "snapshots" / "here", tmp_path / "m"
    link.symlink_to("abc123")
    names = {"abc123": "abc123", "here": "here", "here/": "here", "../My-Llama": "My-Llama"}
    for given, expected in names.items():
        assert convert(type(tmp_path)(given), model, Conversion()).source == expected
    monkeypatch.chdir(tmp_path / "snapshots" / "abc123")
    (tmp_path / "snapshots" / "abc123" / "sub").mkdir()
    for given in (".", "../abc123", "sub/.."):
        assert convert(type(tmp_path)(given), model, Conversion()).source == "abc123"
