"""Reading prompt sets and texts, and splitting prompts into sequences, groups and shards.

| file | one document is |
|---|---|
| `.jsonl` | one line's field |
| `.json` | one element's field, of a list or of the only list in an object |
| `.txt` | one line that is not blank; a prompt of several lines needs `.jsonl` |

Any of them may be gzipped (`.gz`). The output of the split is one Parquet file, `schema.PROMPTS`.
"""

import gzip
import json
import zlib
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsetrace.files import InputError, write_beside
from sparsetrace.schema import PROMPTS
from sparsetrace.settings import Batching, PromptSet
from sparsetrace.tokenizer import Tokenizer

# Names under which prompts are commonly published, the first that a set has is read.
FIELDS = ("prompt", "question", "instruction", "turns", "text", "input", "content")


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt, numbered; `token = base + position`."""

    sequence: int
    base: int
    group: int
    slot: int
    source: str
    source_index: int
    prompt: str
    prompt_ids: list[int]


def read_text(path: Path, field: str | None, where: str) -> str:
    """A file as one running text: a `.txt` as it is, the documents of any other with a blank line between."""
    if _kind(path) == ".txt" and field is None:
        return _content(path, where)
    return "\n\n".join(read_documents(path, field, where))


def read_documents(path: Path, field: str | None, where: str) -> list[str]:
    """Documents of a file, in file order.

    Args:
        path: `.jsonl`, `.json` or `.txt`, or gzipped.
        field: name of the field that holds the text; None takes the first of `FIELDS` that is there.
        where: for messages.
    """
    text = _content(path, where)
    match _kind(path):
        case ".txt":
            if field is not None:
                raise InputError(f"{where}: field must not be given for a .txt file, got {field!r}")
            documents = [line for line in _lines(text) if line.strip()]
        case ".jsonl":
            records = [_parse(line, f"{where}: {path}:{i + 1}") for i, line in enumerate(_lines(text)) if line.strip()]
            documents = [_text(record, field, f"{where}: {path}: record {i}") for i, record in enumerate(records)]
        case ".json":
            records = _only_list(_parse(text, f"{where}: {path}"), f"{where}: {path}")
            documents = [_text(record, field, f"{where}: {path}: record {i}") for i, record in enumerate(records)]
        case _:
            raise InputError(f"{where}: {path} must end in .jsonl, .json, .txt or one of these with .gz")
    if not documents:
        raise InputError(f"{where}: {path} must hold at least one document, got none")
    return documents


def split(
    path: Path,
    tokenizer: Tokenizer,
    context: int,
    prompt_set: PromptSet,
    batching: Batching,
    source: str | None = None,
    *,
    texts: bool = False,
) -> tuple[list[list[Sequence]], int]:
    """Number the prompts and form groups of equal batch size.

    Sequences are numbered by (length, ids), so that a group holds prompts of like length, token numbers ascend from
    group to group, and nothing depends on the order of the file; `source_index` leads back to it.

    Args:
        path: the prompt set.
        tokenizer: the model's.
        context: positions that the model has.
        prompt_set: what is read.
        batching: how it is grouped.
        source: what `Sequence.source` says; the file's name if not given.
        texts: the prompts are texts to be captured as they are, behind which no room for new tokens is needed.

    Returns:
        The groups, and the number of prompts skipped because they were longer than the context.
    """
    documents = read_documents(path, prompt_set.field, "prompts")[: prompt_set.limit]
    new_tokens = 0 if texts else batching.max_new_tokens
    room = context - new_tokens
    encoded = []
    skipped = 0
    for index, text in enumerate(documents):
        ids = tokenizer.encode(text, f"prompts: {path}: prompt {index}")
        if not ids:
            raise InputError(f"prompts: {path}: prompt {index} must hold at least one token, got an empty text")
        if len(ids) <= room:
            encoded.append((len(ids), ids, index, text))
        elif prompt_set.longer == "skip":
            skipped += 1
        else:
            raise InputError(
                f"prompts: {path}: prompt {index} must fit the context of {context} with {new_tokens} new tokens, got "
                f"{len(ids)} tokens: shorten it{', lower max_new_tokens' * (not texts)}, or set `longer: skip`"
            )
    if not encoded:
        raise InputError(f"prompts: {path} must hold a prompt of at most {room} tokens, got none of {len(documents)}")
    encoded.sort()
    groups: list[list[Sequence]] = []
    base = 0
    for number, (length, ids, index, text) in enumerate(encoded):
        group, slot = divmod(number, batching.batch_size)
        if slot == 0:
            groups.append([])
        groups[-1].append(Sequence(number, base, group, slot, source or path.name, index, text, ids))
        base += length + new_tokens
    if batching.shards > len(groups):
        raise InputError(
            f"prompts: shards must be at most the number of groups, {len(groups)} ({len(encoded)} prompts in batches "
            f"of {batching.batch_size}), got {batching.shards}"
        )
    return groups, skipped


def write_split(groups: list[list[Sequence]], shards: int, path: Path) -> None:
    """Write the groups as contiguous shards of nearly equal number of groups."""
    rows = [
        asdict(sequence) | {"shard": shard}
        for shard in range(shards)
        for group in groups[len(groups) * shard // shards : len(groups) * (shard + 1) // shards]
        for sequence in group
    ]
    with write_beside(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), partial)


def read_shard(path: Path, shard: int) -> list[list[Sequence]]:
    """The groups of one shard.

    Raises:
        InputError: the split has no such shard.
    """
    try:
        table = pq.read_table(path, schema=PROMPTS)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"prompts: {path} must be a whole split prompt set, got {error}") from None
    rows = table.filter(pc.field("shard") == shard).drop_columns("shard").to_pylist()
    if not rows:
        raise InputError(f"prompts: shard must be below {1 + max(table['shard'].to_pylist())} in {path}, got {shard}")
    return [list(group) for _, group in groupby((Sequence(**row) for row in rows), key=lambda item: item.group)]


def _kind(path: Path) -> str:
    """Suffix of a file, that of gzip aside."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def _content(path: Path, where: str) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{where}: {path} must be a file, got nothing there") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {path} must be readable UTF-8 text, got {error}") from None


def _lines(text: str) -> list[str]:
    # `str.splitlines` also cuts at form feeds and U+2028, which stand inside texts
    return text.replace("\r\n", "\n").split("\n")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} must be JSON, got {error}") from None


def _only_list(content: Any, where: str) -> list[Any]:
    if isinstance(content, list):
        return content
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if len(lists) != 1:
        raise InputError(f"{where} must be a list, or an object with one list, got {len(lists)} lists")
    return list(lists[0])


def _text(record: Any, field: str | None, where: str) -> str:
    if isinstance(record, str) and field is None:
        return record
    if not isinstance(record, dict):
        raise InputError(f"{where} must be an object with a text field, got {type(record).__name__}")
    name = field if field is not None else next((name for name in FIELDS if name in record), None)
    if name is None or name not in record:
        wanted = field or f"one of {', '.join(FIELDS)}"
        raise InputError(f"{where} must have the field {wanted}, got {', '.join(record)}: name it in `field`")
    value = record[name]
    # a conversation is entered by its first turn
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str):
        raise InputError(f"{where}: {name} must be text or a list of texts, got {type(first).__name__}")
    return first
