"""Splitting a prompt set into sequences, groups and shards; the output is one Parquet file, `tables.PROMPTS`."""

from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sparsetrace.core.checked import read_checked_table, write_checked_table
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, PromptSet
from sparsetrace.core.text import read_documents
from sparsetrace.formats.tables import PROMPTS
from sparsetrace.model.tokenizer import Tokenizer


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
    write_checked_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)


def read_shard(path: Path, shard: int) -> list[list[Sequence]]:
    """The groups of one shard.

    Raises:
        InputError: the split has no such shard.
    """
    table = read_checked_table(path, "prompts", "a whole split prompt set", PROMPTS)
    if not len(table):
        raise InputError(f"prompts: {path} must hold at least one sequence, got none: split the prompt set again")
    rows = table.filter(pc.field("shard") == shard).drop_columns("shard").to_pylist()
    if not rows:
        raise InputError(f"prompts: shard must be below {1 + max(table['shard'].to_pylist())} in {path}, got {shard}")
    return [list(group) for _, group in groupby((Sequence(**row) for row in rows), key=lambda item: item.group)]
