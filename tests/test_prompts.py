"""Reading prompt sets, tokenizing, and the split, against brute-force numbering."""

import gzip
import json

import pyarrow.parquet as pq
import pytest

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, PromptSet
from sparsetrace.core.text import read_documents, read_text
from sparsetrace.formats.tables import PROMPTS
from sparsetrace.generation.prompts import Sequence, read_shard, split, write_split
from sparsetrace.model.read_tokenizer import build, read_tokenizer
from sparsetrace.model.tokenizer import Tokenizer

TEXTS = ["plain", 'quote " and \\', "two\nlines", "café ☃ 𝄞", "next\x85line\u2028sep\x0cfeed"]
DOCUMENTS = [
    # id, file name, content, field, texts
    ("jsonl", "a.jsonl", "\n".join(json.dumps({"prompt": t}) for t in TEXTS), None, TEXTS),
    # U+2028 and its like are no ends of line in JSON, where they may stand unescaped
    ("jsonl-raw", "a.jsonl", "\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in TEXTS), None, TEXTS),
    ("jsonl-crlf", "a.jsonl", "".join(json.dumps({"text": t}) + "\r\n" for t in TEXTS) + "\r\n", None, TEXTS),
    ("jsonl-field", "a.jsonl", json.dumps({"prompt": "no", "mine": "yes"}), "mine", ["yes"]),
    ("jsonl-strings", "a.jsonl", '"one"\n"two"\n', None, ["one", "two"]),
    ("first-known", "a.jsonl", json.dumps({"content": "c", "question": "q", "text": "t"}), None, ["q"]),
    ("turns", "a.jsonl", json.dumps({"turns": ["first", "second"]}), None, ["first"]),
    ("json-list", "a.json", json.dumps([{"instruction": t} for t in TEXTS]), None, TEXTS),
    ("json-object", "a.json", json.dumps({"version": 1, "data": [{"input": "x"}]}), None, ["x"]),
    ("json-strings", "a.json", json.dumps(TEXTS), None, TEXTS),
    ("txt", "a.txt", "one\n\n  \ntwo \r\nthree", None, ["one", "two ", "three"]),
    ("txt-feed", "a.txt", "page\x0cbreak\nlast\u2028", None, ["page\x0cbreak", "last\u2028"]),
    ("mark", "a.txt", "\ufeffone\ntwo", None, ["one", "two"]),
]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "content", "field", "texts"), [pytest.param(*case[1:], id=case[0]) for case in DOCUMENTS]
)
def test_reads_documents(tmp_path, name, content, field, texts, zipped):
    path = tmp_path / (name + ".gz" if zipped else name)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_documents(path, field, "test") == texts


REFUSED = [
    # id, file name, content, field, message
    ("ending", "a.csv", b"x", None, "must end in .jsonl, .json, .txt or one of these with .gz"),
    ("gz-only", "a.gz", gzip.compress(b"x"), None, "must end in .jsonl"),
    ("not-gz", "a.txt.gz", b"plain", None, "must be readable UTF-8 text"),
    ("cut-gz", "a.txt.gz", gzip.compress(b"text" * 100)[:-12], None, "must be readable UTF-8 text"),
    ("latin", "a.txt", "café".encode("latin-1"), None, "must be readable UTF-8 text"),
    ("blank", "a.txt", b" \n\n", None, "must hold at least one document, got none"),
    ("empty-list", "a.json", b"[]", None, "must hold at least one document, got none"),
    ("txt-field", "a.txt", b"x", "prompt", "field must not be given for a .txt file, got 'prompt'"),
    ("not-json", "a.jsonl", b'{"prompt": "x"}\n{"prompt"', None, "a.jsonl:2 must be JSON"),
    (
        "no-field",
        "a.jsonl",
        b'{"alpha": "x", "beta": 1}',
        None,
        "record 0 must have the field one of prompt.*alpha, beta",
    ),
    ("wrong-field", "a.jsonl", b'{"prompt": "x"}', "mine", "record 0 must have the field mine, got prompt"),
    ("number", "a.jsonl", b'{"prompt": 3}', None, "record 0: prompt must be text or a list of texts, got int"),
    ("no-turns", "a.jsonl", b'{"turns": []}', None, "turns must be text or a list of texts, got list"),
    ("nested", "a.json", b"[[1]]", None, "record 0 must be an object with a text field, got list"),
    ("two-lists", "a.json", b'{"a": [], "b": []}', None, "must be a list, or an object with one list, got 2 lists"),
    ("scalar", "a.json", b"3", None, "must be a list, or an object with one list, got 0 lists"),
]


@pytest.mark.parametrize(
    ("name", "data", "field", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED]
)
def test_refuses_documents(tmp_path, name, data, field, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_documents(tmp_path / name, field, "test")
    assert str(error.value).startswith("test: ")


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="a.txt must be a file, got nothing there"):
        read_documents(tmp_path / "a.txt", None, "test")


def test_running_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    assert read_text(tmp_path / "a.txt", None, "test") == "one\n\n two\n"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.jsonl", None, "test") == "one\n\ntwo"


@pytest.fixture
def tokenizer(tiny, tmp_path):
    return Tokenizer(build(tiny.tokenizer(tmp_path / "tokenizer") / "tokenizer.json"), tiny.vocabulary, 1)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 20])
def test_numbers_are_those_of_a_sorted_list(tokenizer, tiny, tmp_path, rng, batch_size):
    """Sorted by (length, ids); base is the sum of what came before; groups are consecutive sequences."""
    lengths = rng.integers(1, 9, 11).tolist()
    path = tiny.prompts(tmp_path / "p.jsonl", rng, lengths)
    groups, skipped = split(path, tokenizer, 100, PromptSet(), Batching(max_new_tokens=7, batch_size=batch_size))
    texts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    ids = [[1, *(int(word[1:]) for word in text.split())] for text in texts]
    order = sorted(range(11), key=lambda i: (len(ids[i]), ids[i], i))
    base, expected = 0, []
    for number, i in enumerate(order):
        expected.append(
            Sequence(number, base, number // batch_size, number % batch_size, "p.jsonl", i, texts[i], ids[i])
        )
        base += len(ids[i]) + 7
    assert [sequence for group in groups for sequence in group] == expected
    assert [len(group) for group in groups[:-1]] == [batch_size] * (len(groups) - 1)
    assert all(len({sequence.group for sequence in group}) == 1 for group in groups)
    assert skipped == 0
    named, _ = split(path, tokenizer, 100, PromptSet(), Batching(max_new_tokens=7, batch_size=batch_size), "mine")
    assert {sequence.source for group in named for sequence in group} == {"mine"}


def test_limit_takes_the_first_of_the_file(tokenizer, tiny, tmp_path, rng):
    path = tiny.prompts(tmp_path / "p.jsonl", rng, [5, 4, 3, 2])
    groups, _ = split(path, tokenizer, 100, PromptSet(limit=2), Batching(batch_size=4))
    assert sorted(sequence.source_index for group in groups for sequence in group) == [0, 1]


def test_prompts_longer_than_the_context(tokenizer, tiny, tmp_path, rng):
    """Exactly what fits, fits: prompt, begin token and new tokens."""
    path = tiny.prompts(tmp_path / "p.jsonl", rng, [9, 10, 11, 3])
    batching = Batching(max_new_tokens=5, batch_size=2)
    groups, skipped = split(path, tokenizer, 16, PromptSet(longer="skip"), batching)
    assert sorted(len(s.prompt_ids) for group in groups for s in group) == [4, 10, 11]
    assert skipped == 1
    with pytest.raises(InputError, match="prompt 2 must fit the context of 16 with 5 new tokens, got 12 tokens"):
        split(path, tokenizer, 16, PromptSet(), batching)
    with pytest.raises(InputError, match="must hold a prompt of at most 3 tokens, got none of 4"):
        split(path, tokenizer, 8, PromptSet(longer="skip"), batching)


def test_texts_need_no_room_for_new_tokens(tokenizer, tiny, tmp_path, rng):
    """A text of exactly the context's length is taken; token numbers have no gaps."""
    path = tiny.prompts(tmp_path / "p.jsonl", rng, [9, 15, 2])
    batching = Batching(max_new_tokens=50, batch_size=2)
    groups, skipped = split(path, tokenizer, 16, PromptSet(), batching, texts=True)
    sequences = [sequence for group in groups for sequence in group]
    assert [(s.base, len(s.prompt_ids)) for s in sequences] == [(0, 3), (3, 10), (13, 16)] and skipped == 0
    with pytest.raises(InputError, match="with 0 new tokens, got 16 tokens: shorten it, or set `longer: skip`"):
        split(path, tokenizer, 15, PromptSet(), batching, texts=True)


def test_an_empty_prompt_is_its_begin_token_or_refused(tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n')
    backend = build(tiny.tokenizer(tmp_path / "tokenizer") / "tokenizer.json")
    groups, _ = split(tmp_path / "p.jsonl", Tokenizer(backend, 96, 1), 90, PromptSet(), Batching(batch_size=1))
    assert groups[0][0].prompt_ids == [1]
    with pytest.raises(InputError, match="prompt 0 must hold at least one token, got an empty text"):
        split(tmp_path / "p.jsonl", Tokenizer(backend, 96, None), 90, PromptSet(), Batching(batch_size=1))


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_are_contiguous_and_even(tokenizer, tiny, tmp_path, rng, shards):
    path = tiny.prompts(tmp_path / "p.jsonl", rng, [3] * 14)
    groups, _ = split(path, tokenizer, 100, PromptSet(), Batching(batch_size=3, shards=shards))
    write_split(groups, shards, tmp_path / "split.parquet")
    found = [read_shard(tmp_path / "split.parquet", shard) for shard in range(shards)]
    assert [group for shard in found for group in shard] == groups
    sizes = [len(shard) for shard in found]
    assert max(sizes) - min(sizes) <= 1
    assert pq.read_schema(tmp_path / "split.parquet").equals(PROMPTS)
    with pytest.raises(InputError, match=f"shard must be below {shards} .* got {shards}"):
        read_shard(tmp_path / "split.parquet", shards)


def test_more_shards_than_groups_are_refused(tokenizer, tiny, tmp_path, rng):
    path = tiny.prompts(tmp_path / "p.jsonl", rng, [3] * 5)
    with pytest.raises(InputError, match=r"shards must be at most the number of groups, 2 \(5 prompts .* got 3"):
        split(path, tokenizer, 100, PromptSet(), Batching(batch_size=3, shards=3))


def test_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    tokenizer = Tokenizer(build(tiny.tokenizer(tmp_path) / "tokenizer.json"), 50, None)
    assert tokenizer.encode("w49 w3", "here") == [49, 3]
    with pytest.raises(InputError, match="here: token ids must be below the model's vocabulary of 50, got 50"):
        tokenizer.encode("w50", "here")


def test_padding_and_truncation_in_the_file_are_ignored(tiny, tmp_path):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tiny.tokenizer(tmp_path) / "tokenizer.json"))
    backend.enable_padding(length=10)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(build(tmp_path / "tokenizer.json"), 96, None).encode("w9 w8 w7", "test") == [9, 8, 7]


def test_sentencepiece(tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = "the quick brown fox jumps over the lazy dog and does it again\n" * 20
    (tmp_path / "text.txt").write_text(text)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    # without it, transformers puts no space before a text
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = Tokenizer(read_tokenizer(tmp_path, "llama"), 60, 1)
    processor = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = tokenizer.encode("the lazy fox", "test")
    assert ids == [1, *processor.encode("the lazy fox")]
    assert tokenizer.decode(ids[1:]) == "the lazy fox"
    assert tokenizer.piece(ids[1]) == processor.decode([ids[1]])
