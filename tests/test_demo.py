"""The embedded default model: its folder against Hugging Face transformers, its text against itself.

A few steps of training stand for all of them; what the whole training reaches is checked where the pipeline runs.
"""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.quality import QualityJob, measure
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Calibration, Conversion, Machine, Quality
from sparsetrace.core.text import read_documents
from sparsetrace.methods import Teal
from sparsetrace.model.convert import convert
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.demo import checkpoint, corpus, shape, tokens
from sparsetrace.model.demo.training import Training, train
from sparsetrace.model.read_tokenizer import begin_token, read_tokenizer
from sparsetrace.model.tokenizer import Tokenizer

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES = [
    "calibration.txt",
    "quality.txt",
    "config.json",
    "generation_config.json",
    *SHARDS,
    "model.safetensors.index.json",
    "prompts.jsonl",
    "tokenizer.model",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def divided():
    return corpus.divide(corpus.gather(Path(sysconfig.get_path("stdlib"))))


@pytest.fixture(scope="module")
def made(tmp_path_factory, divided):
    """Two checkpoints made alike, with their reports."""
    folders = [tmp_path_factory.mktemp("demo") / name for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        # gathering is repeatable by `test_text_is_repeatable`, and half of the time here
        patch.setattr(checkpoint, "divide", lambda documents: divided)
        patch.setattr(checkpoint, "gather", lambda stdlib: [])
        return [(folder, checkpoint.make_checkpoint(folder, Training(seed=3, steps=3))) for folder in folders]


@pytest.fixture(scope="module")
def folder(made):
    return made[0][0]


@pytest.fixture(scope="module")
def tokenizer(folder):
    backend = read_tokenizer(folder, "llama")
    return Tokenizer(backend, shape.CONFIG.vocab_size, begin_token(backend, folder))


def test_two_runs_write_the_same_bytes(made):
    (one, _), (two, _) = made
    assert sorted(path.name for path in one.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_text_is_repeatable(divided):
    assert corpus.divide(corpus.gather(Path(sysconfig.get_path("stdlib")))) == divided


def test_report(made):
    report = made[0][1]
    assert report.steps == 3
    assert report.tokens == 3 * Training().step_tokens
    assert 1.5e6 < report.parameters < 2.5e6
    assert report.seconds > 0
    assert 4 < report.unigram_loss < 7
    assert report.nats_below_unigram == report.unigram_loss - report.validation_loss


def test_training_lowers_the_loss_and_reports_each_step(divided):
    proto = tokens.train_tokenizer(divided.train)
    encode, _ = tokens.tokenizer_functions(proto)
    documents = [tokens.document_ids(encode, document) for document in divided.train[:200]]
    seen = []
    train(documents, Training(steps=12), lambda *step: seen.append(step))
    assert [(step, steps) for step, steps, _ in seen] == [(step, 12) for step in range(1, 13)]
    assert seen[-1][2] < seen[0][2] - 0.5


def test_thread_count_is_restored(tmp_path, monkeypatch):
    before = torch.get_num_threads()

    def stop(*_):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    documents = [corpus.Document("d", ("a b c d",))] * 2
    monkeypatch.setattr(checkpoint, "gather", lambda stdlib: [])
    monkeypatch.setattr(checkpoint, "divide", lambda _: corpus.Corpus(documents, [], [], []))
    for name, value in {"train_tokenizer": b"", "cut_prompts": []}.items():
        monkeypatch.setattr(checkpoint, name, lambda *_, value=value: value)
    monkeypatch.setattr(checkpoint, "tokenizer_functions", lambda proto: (None, None))
    monkeypatch.setattr(checkpoint, "document_ids", lambda encode, document: torch.tensor([shape.BOS, shape.EOS]))
    monkeypatch.setattr(checkpoint, "train", stop)
    monkeypatch.setattr(checkpoint.torch, "cat", lambda tensors: torch.tensor([shape.BOS]))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.make_checkpoint(tmp_path / "out", Training(threads=1))
    assert torch.get_num_threads() == before
    assert list(tmp_path.iterdir()) == []


def test_index_and_shards_agree(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {}
    for name in SHARDS:
        with safe_open(folder / name, "pt") as shard:
            held |= dict.fromkeys(shard.keys(), name)
    assert index["weight_map"] == held
    tensors = [tensor for name in SHARDS for tensor in load_file(folder / name).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    sizes = [(folder / name).stat().st_size for name in SHARDS]
    assert max(sizes) < 1.5 * min(sizes)


def test_logits_equal_transformers(folder):
    """Oracle: transformers' LlamaForCausalLM of the folder, against a Decoder filled from the same files by hand."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert oracle.config.eos_token_id == shape.EOS
    assert oracle.generation_config.eos_token_id == shape.EOS

    stored = {name: tensor.float() for shard in SHARDS for name, tensor in load_file(folder / shard).items()}
    model = Decoder(shape.CONFIG)
    with torch.no_grad():
        model.embedding.copy_(stored.pop("model.embed_tokens.weight"))
        model.norm.weight.copy_(stored.pop("model.norm.weight"))
        for number, layer in enumerate(model.layers):
            layer.attn_norm.weight.copy_(stored.pop(f"model.layers.{number}.input_layernorm.weight"))
            layer.mlp_norm.weight.copy_(stored.pop(f"model.layers.{number}.post_attention_layernorm.weight"))
            for module, names in (
                (layer.attn_in, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
                (layer.attn_out, ["self_attn.o_proj"]),
                (layer.mlp_in, ["mlp.gate_proj", "mlp.up_proj"]),
                (layer.mlp_mid, ["mlp.down_proj"]),
            ):
                matrices = [stored.pop(f"model.layers.{number}.{name}.weight").T for name in names]
                module.weight.copy_(torch.cat(matrices, dim=-1))
    assert not stored

    ids_BT = torch.randint(shape.CONFIG.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BTV = oracle(ids_BT).logits
        logits_BTV = model.logits(model(ids_BT, torch.arange(37).expand(2, -1)))
    assert (logits_BTV - expected_BTV).abs().max() <= 1e-5 * expected_BTV.abs().max()


@pytest.mark.parametrize(
    "text",
    ["Return the number of items.", "two  spaces, 1234\nand a line\t", "naïve ☃ \U0001f600", "\n leading", ""],
    ids=["english", "spaces", "bytes", "leading", "empty"],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, "test")
    assert ids[0] == shape.BOS
    assert shape.UNK not in ids
    assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_equals_transformers(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    # by which transformers reads a SentencePiece model
    pytest.importorskip("google.protobuf")
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    # of spaces before a text, one is the space that it would be given
    for text in (" leading", "  leading", " ", *read_documents(folder / "calibration.txt", None, "test")[:50]):
        assert oracle(text).input_ids == tokenizer.encode(text, "test")


def test_parts_share_no_document_paragraph_or_phrase(divided):
    held_out = [divided.validation, divided.calibration, divided.prompts]
    names = [document.name for part in (divided.train, *held_out) for document in part]
    assert len(set(names)) == len(names)
    paragraphs = [p.casefold() for part in (divided.train, *held_out) for document in part for p in document.paragraphs]
    assert len(set(paragraphs)) == len(paragraphs)
    phrases = {phrase for document in divided.train for p in document.paragraphs for phrase in corpus._phrases(p)}
    for part in held_out:
        assert all(phrases.isdisjoint(corpus._phrases(p)) for document in part for p in document.paragraphs)


def test_calibration_is_held_out_and_long_enough(folder, divided, tokenizer):
    documents = (folder / "calibration.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    assert documents == [document.text for document in divided.calibration]
    assert sum(len(tokenizer.encode(document, "test")) for document in documents) >= 40_000
    training = {paragraph for document in divided.train for paragraph in document.paragraphs}
    assert training.isdisjoint(paragraph for document in documents for paragraph in document.split("\n"))


def test_prompts_are_held_out_and_of_the_lengths_asked(folder, divided, tokenizer):
    prompts = read_documents(folder / "prompts.jsonl", "prompt", "test")
    assert len(set(prompts)) == tokens.NUM_PROMPTS
    lengths = [len(tokenizer.encode(prompt, "test")) - 1 for prompt in prompts]
    assert tokens.PROMPT_TOKENS[0] <= min(lengths) < 28
    assert 56 < max(lengths) <= tokens.PROMPT_TOKENS[1] + 1
    training = "\n".join(document.text for document in divided.train)
    assert not [prompt for prompt in prompts if prompt in training]
    starts = [paragraph for document in divided.prompts for paragraph in document.paragraphs]
    assert all(any(paragraph.startswith(prompt + " ") for paragraph in starts) for prompt in prompts)


def test_docstrings_are_read_without_importing(tmp_path):
    (tmp_path / "json.py").write_text(
        '"""First line\n    goes on here."""\nraise SystemExit\nclass A:\n    """What the class is for."""\n'
        '    def f(self):\n        """What the method is for.\n\n        >>> A().f() and so on\n        """\n'
        'def g():\n    """First line goes  on HERE!"""\n',
        encoding="utf-8",
    )
    (tmp_path / "wave.py").write_text("print 'not this Python'\n", encoding="utf-8")
    (tmp_path / "not_a_stdlib_module.py").write_text('"""This one is not part of it."""\n', encoding="utf-8")
    (tmp_path / "email" / "test").mkdir(parents=True)
    (tmp_path / "email" / "test" / "t.py").write_text('"""This one is a test only."""\n', encoding="utf-8")
    assert corpus.gather(tmp_path) == [
        corpus.Document("json.py", ("First line goes on here.",)),
        corpus.Document("json.py:A", ("What the class is for.", "What the method is for.")),
    ]


def test_refuses_a_library_without_text(tmp_path):
    with pytest.raises(InputError, match=r"^demo: the standard library's sources must hold at least 500000 characters"):
        corpus.divide(corpus.gather(tmp_path))


@pytest.mark.parametrize("name", ["steps", "threads"])
def test_refuses_less_than_one(tmp_path, name):
    with pytest.raises(InputError, match=f"^demo: {name} must be at least 1, got 0$"):
        checkpoint.make_checkpoint(tmp_path / "out", Training(**{name: 0}))


def test_refuses_to_replace_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="must be new or hold an earlier result, since it is replaced, got thesis.tex"):
        checkpoint.make_checkpoint(tmp_path, Training(steps=1))
    with pytest.raises(InputError, match="must be a folder, got a file"):
        checkpoint.make_checkpoint(tmp_path / "thesis.tex", Training(steps=1))
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_quality_of_the_demo_model_falls_with_sparsity(tmp_path, divided, monkeypatch):
    """The embedded model after a short training: every figure is finite and worse at every step."""
    monkeypatch.setattr(checkpoint, "divide", lambda documents: divided)
    monkeypatch.setattr(checkpoint, "gather", lambda stdlib: [])
    folder, cpu = tmp_path, Machine(device="cpu")
    checkpoint.make_checkpoint(folder / "checkpoint", Training(steps=25, threads=1))
    model = convert(folder / "checkpoint", folder / "model", Conversion())
    settings = Calibration(tokens=1024, sequence_length=128)
    calibrate(CalibrationJob(model, folder / "checkpoint" / "calibration.txt", folder / "h", settings, cpu))
    paths = [folder / f"teal-{sparsity}" for sparsity in (0, 0.25, 0.5, 0.65, 0.9)]
    for path in paths:
        sparsity = float(path.name.removeprefix("teal-"))
        derive_thresholds(path.name, Teal(sparsity=sparsity), folder / "h", path)
    quality = Quality(context=96, stride=32, windows=20)
    job = QualityJob(model, folder / "checkpoint" / "quality.txt", paths, folder / "q", quality, cpu)
    rows = measure(job).to_pylist()
    perplexity, kl, agreement = (
        [row[name] for row in rows[1:]] for name in ("perplexity", "kl_divergence", "top1_agreement")
    )
    assert np.isfinite(perplexity + kl).all()
    assert rows[0]["perplexity"] == perplexity[0]
    assert perplexity[0] < perplexity[2] < perplexity[3] < perplexity[4]
    assert kl == sorted(kl)
    assert (kl[0], agreement[0]) == (0, 1)
    assert agreement == sorted(agreement, reverse=True)
