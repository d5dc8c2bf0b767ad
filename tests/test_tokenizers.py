"""Token ids of a converted model: those of transformers' AutoTokenizer for the same folder."""

import json
import random
import shutil

import pytest

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Conversion
from sparsetrace.model.convert import convert
from sparsetrace.model.read_tokenizer import begin_token, read_tokenizer
from sparsetrace.model.runtime import open_model
from sparsetrace.model.sentencepiece_file import read_pieces

transformers = pytest.importorskip("transformers")
# by which transformers reads a SentencePiece model
pytest.importorskip("google.protobuf")

CORPUS = "the cat sat on the mat and the dog ran off with a hat. " * 60 + "once upon a time in a small house. " * 40
TEXTS = [
    "the cat sat on a hat",
    " the cat",
    "  two  blanks\n\n\tand a tab ",
    "def f(x):\n    return x**2  # 12345",
    "日本語 🙂 👩‍👩‍👧 naïve",
    "a<s>the</s> cat <unk> b",
    "hi <|im_start|>user\n[PAD] x<|im_start|>",
    " ",
    "",
]
VOCABULARY, PADDED = 300, 320


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders with byte-level pieces as Llama 3's, SentencePiece's file, and its pieces as Llama 2's tokenizer.json."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("bytes", "pieces", "json"):
        (folder / name).mkdir()
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.post_processor = begin
    tokenizer.save(str(folder / "bytes" / "tokenizer.json"))
    (folder / "text.txt").write_text(CORPUS.replace(". ", ".\n"))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "pieces" / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["hat."],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "pieces" / "tokenizer.vocab").unlink()
    processor = SentencePieceProcessor(model_file=str(folder / "pieces" / "tokenizer.model"))
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = begin
    tokenizer.save(str(folder / "json" / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def weights(tiny):
    return {
        model_type: tiny.weights(tiny.rng("tokenizers"), tiny.config | changes)
        for model_type, changes in {
            "llama": {"vocab_size": PADDED},
            "mistral": {"vocab_size": PADDED},
            "qwen3": {"vocab_size": PADDED} | tiny.qwen3,
        }.items()
    }


@pytest.fixture
def checkpoint(trained, weights, tiny, tmp_path):
    def make(kind, settings=None, model_type="llama", **files):
        architecture = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}[model_type]
        config = tiny.config | {"model_type": model_type, "architectures": [f"{architecture}ForCausalLM"]}
        folder = tiny.write(tmp_path / "c", config | {"vocab_size": PADDED}, weights[model_type])
        (folder / "tokenizer.json").unlink()
        shutil.copytree(trained / kind, folder, dirs_exist_ok=True)
        if settings is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return make


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
PAD = {"content": "[PAD]", "special": False, "normalized": True, "lstrip": True, "rstrip": True, "single_word": False}
LISTED = {"added_tokens_decoder": {"300": {"content": "<|im_start|>"} | FLAGS, "301": PAD}, "pad_token": "[PAD]"}
SETTINGS = {
    "plain": {},
    "begin": {"add_bos_token": True},
    "no-begin": {"add_bos_token": False},
    "legacy": {"legacy": True, "add_bos_token": True},
    "no-prefix": {"add_prefix_space": False},
    "added": LISTED | {"add_bos_token": True},
    "extra": {"additional_special_tokens": ["<|im_start|>"], "pad_token": "[PAD]"},
}


def assert_transformers_ids(folder, out):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = convert(folder, out, Conversion())
    tokenizer = open_model(model.folder).tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text, "test") == theirs(text)["input_ids"], text
    return tokenizer


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("named", [None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "json"])
def test_ids_are_transformers(checkpoint, tmp_path, kind, named, settings):
    folder = checkpoint(kind, NAMES | settings | ({"tokenizer_class": named} if named else {}))
    assert_transformers_ids(folder, tmp_path / "m")


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "json"])
def test_ids_of_other_families_are_transformers(checkpoint, tmp_path, kind, model_type):
    folder = checkpoint(kind, NAMES | LISTED | {"tokenizer_class": "LlamaTokenizer"}, model_type)
    assert_transformers_ids(folder, tmp_path / "m")


def test_ids_without_settings_are_transformers(checkpoint, tmp_path):
    for kind in ("bytes", "pieces", "json"):
        assert_transformers_ids(checkpoint(kind), tmp_path / "m")
        shutil.rmtree(tmp_path / "c")


def test_a_tokenizer_that_adds_no_begin_token_gets_none(checkpoint, trained, tmp_path):
    """bos_token_id of config.json is 1 all the same."""
    folder = checkpoint("bytes", NAMES | {"tokenizer_class": "GPT2Tokenizer"})
    content = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = assert_transformers_ids(folder, tmp_path / "m")
    assert tokenizer.bos is None
    # what is applied as it is stays as it is
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_added_tokens_of_older_files(checkpoint, tmp_path):
    added = {"<|im_start|>": 300, "[PAD]": 301}
    settings = NAMES | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    special = {"pad_token": {"content": "[PAD]"} | FLAGS, "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = assert_transformers_ids(checkpoint("pieces", settings, added_tokens=added), tmp_path / "m")
    assert 300 in tokenizer.encode("hi <|im_start|>user", "test")
    shutil.rmtree(tmp_path / "c")
    folder = checkpoint("pieces", settings, added_tokens=added, special_tokens_map=special)
    assert_transformers_ids(folder, tmp_path / "m")


@pytest.mark.parametrize("kind", ["bytes", "pieces", "json"])
def test_ids_of_a_padded_vocabulary_have_no_text(checkpoint, tmp_path, kind):
    folder = checkpoint(kind, NAMES | LISTED | {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = convert(folder, tmp_path / "m", Conversion()).tokenizer()
    assert tokenizer.piece(PADDED - 1) == ""
    assert tokenizer.piece(300) == "<|im_start|>"
    ids = tokenizer.encode("the cat", "test")[tokenizer.bos is not None :]
    assert tokenizer.decode([*ids, PADDED - 1, 300]) == "the cat<|im_start|>"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BAD_FILES = {
    "pointer": POINTER,
    "empty": b"",
    "list": b"[]",
    "object": b"{}",
    "no-model": b'{"version": "1.0", "added_tokens": [], "model": null}',
    "model-text": b'{"model": "BPE"}',
    "latin": b'{"model": "\xe9"}',
    "surrogate": b'{"model": {"type": "BPE", "vocab": {"\\ud83d": 0}, "merges": []}}',
    "merges": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    "vocab-list": b'{"model": {"type": "BPE", "vocab": [["a", 0]], "merges": []}}',
}


def refused(folder, out, message="tokenizer: "):
    with pytest.raises(InputError, match=message) as error:
        convert(folder, out, Conversion())
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not out.exists()


@pytest.mark.parametrize("named", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("content", BAD_FILES.values(), ids=list(BAD_FILES))
def test_refuses_a_tokenizer_json_that_is_none(checkpoint, tmp_path, content, named):
    folder = checkpoint("bytes", NAMES | {"tokenizer_class": named})
    (folder / "tokenizer.json").write_bytes(content)
    refused(folder, tmp_path / "m")


def test_refuses_a_tokenizer_model_that_is_none(checkpoint, trained, tmp_path):
    folder = checkpoint("pieces")
    data = (folder / "tokenizer.model").read_bytes()
    for content in (b"", b"not a model", POINTER, data[:-1], data[: len(data) // 2], data[1:], b"\x80" * 40):
        (folder / "tokenizer.model").write_bytes(content)
        refused(folder, tmp_path / "m", "tokenizer.model must hold a readable tokenizer")


def test_a_damaged_tokenizer_model_is_read_or_refused(trained, tmp_path):
    data, draw = (trained / "pieces" / "tokenizer.model").read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "tokenizer.model").write_bytes(changed)
        try:
            read_tokenizer(tmp_path, "llama")
        except InputError as error:
            assert str(error).startswith("tokenizer: ") and "\n" not in str(error)


def test_pieces_are_sentencepieces(trained):
    from sentencepiece import SentencePieceProcessor

    path = trained / "pieces" / "tokenizer.model"
    processor, pieces = SentencePieceProcessor(model_file=str(path)), read_pieces(path)
    assert list(pieces.vocabulary) == [processor.id_to_piece(i) for i in range(VOCABULARY)]
    assert pieces.byte_fallback and pieces.unknown == "<unk>" and not pieces.charsmap
    assert pieces.added == {"<s>": True, "</s>": True, "hat.": False}


BAD_SETTINGS = [
    # id, settings, message
    (
        "another-id",
        {"added_tokens_decoder": {"310": {"content": "<|im_start|>"}}},
        "must have the id 310 that .* got",
    ),
    (
        "a-piece-elsewhere",
        {"added_tokens_decoder": {"7": {"content": "<s>"}}},
        "'<s>' must have the id 7 that",
    ),
    ("no-object", {"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object, got list"),
    ("no-id", {"added_tokens_decoder": {"x": {"content": "y"}}}, "ids of added tokens must be integers, got 'x'"),
    ("no-text", {"added_tokens_decoder": {"300": {"content": 7}}}, "added tokens must have text, got"),
    ("named-number", {"bos_token": 1}, "added tokens must have text, got 1"),
    ("extra-number", {"extra_special_tokens": [1]}, "added tokens must have text, got 1"),
    ("extra-one", {"extra_special_tokens": 1}, "extra_special_tokens must be a list or an object, got 1"),
    (
        "end-token",
        {"add_bos_token": True, "add_eos_token": True},
        "must put one begin token before a text or none",
    ),
    (
        "no-such-begin",
        {"add_bos_token": True, "bos_token": "<bos>"},
        "bos_token must be one of its pieces, got '<b",
    ),
    (
        "begin-list",
        {"add_bos_token": True, "bos_token": ["<s>"]},
        r"must be one of its pieces, got \['<s>'\]",
    ),
]


@pytest.mark.parametrize(("settings", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD_SETTINGS])
def test_refuses_settings_that_disagree_with_the_tokenizer(checkpoint, tmp_path, settings, message):
    refused(checkpoint("pieces", NAMES | settings), tmp_path / "m", message)


def test_refuses_a_begin_token_of_another_type(checkpoint, tiny, tmp_path):
    folder = checkpoint("bytes")
    for value in ([1], "<s>", True, -1):
        config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": value}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="convert: .*bos_token_id must be an integer, got"):
            convert(folder, tmp_path / "m", Conversion())


def test_refuses_a_template_that_adds_more_than_a_begin_token(checkpoint, tmp_path):
    folder = checkpoint("bytes")
    content = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    content["post_processor"]["single"].append(end)
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(folder, tmp_path / "m", "must put one begin token before a text or none, got .* remove the rest from post_")
    assert begin_token(read_tokenizer(checkpoint("json"), "llama"), folder) == 1
