"""Sealing a group: its tables, and the file that says that its blocks are whole."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsetrace.core.checked import write_checked_table
from sparsetrace.core.files import write_sealed_json
from sparsetrace.formats.dump import group_name, read_seal
from sparsetrace.formats.tables import SEQUENCES, TOKENS
from sparsetrace.generation.runner import FinishedGroup
from sparsetrace.model.tokenizer import Tokenizer


def discard_other_runs(folder: Path, key: str) -> dict[str, dict[str, Any]]:
    """Remove what a run of another key left, and blocks of groups that were never sealed.

    Returns:
        The seals that stay, by the names of their groups.
    """
    seals = {file.stem: read_seal(file, "generate") for file in folder.glob("group-*.json")}
    sealed = {name: seal for name, seal in seals.items() if seal["key"] == key}
    for file in folder.glob("group-*"):
        if file.name.split(".")[0] not in sealed:
            file.unlink()
    return sealed


def write_seal(folder: Path, key: str, finished: FinishedGroup, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a group's tables, then the seal that says its blocks are whole; returns the seal.

    Args:
        folder: of the dump.
        key: of the run.
        finished: the group.
        tokenizer: the model's.
    """
    group, result = finished.sequences, finished.result
    stem = folder / group_name(group[0].group)
    bases = {sequence.sequence: sequence.base for sequence in group}
    fed = result.fed.to_pydict()
    fed["token"] = [bases[s] + p for s, p in zip(fed["sequence"], fed["position"], strict=True)]
    fed["text"] = [tokenizer.piece(token_id) for token_id in fed["token_id"]]
    tokens = pa.table({name: pa.array(fed[name], TOKENS.field(name).type) for name in TOKENS.names}, schema=TOKENS)
    write_checked_table(tokens.sort_by("token"), stem.with_suffix(".tokens.parquet"))
    sequences = [
        dataclasses.asdict(sequence)
        | {
            "output": tokenizer.decode(ids),
            "output_ids": ids,
            "stopped": stopped,
            "repeated_4gram_share": repeated_share(ids),
        }
        for sequence, ids, stopped in zip(group, result.output_ids, result.stopped, strict=True)
    ]
    write_checked_table(pa.Table.from_pylist(sequences, schema=SEQUENCES), stem.with_suffix(".sequences.parquet"))
    seal = {
        "key": key,
        "group": group[0].group,
        "blocks": finished.blocks,
        "rows": finished.rows,
        "batch_size": finished.batch_size,
    }
    write_sealed_json(stem.with_suffix(".json"), seal)
    return seal


def repeated_share(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams of a continuation that occurred in it before; 0 for one of fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
