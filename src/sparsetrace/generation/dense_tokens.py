"""The dense model's tokens that a run is given: read from the dump that holds them, and checked against the split."""

from pathlib import Path
from typing import Any

from sparsetrace.core.checked import read_checked_table
from sparsetrace.core.files import InputError
from sparsetrace.formats.dump import group_name, read_manifest
from sparsetrace.formats.tables import SEQUENCES
from sparsetrace.generation.prompts import Sequence
from sparsetrace.model.runtime import RuntimeModel


def read_dense_tokens(
    manifest_path: Path, model: RuntimeModel, groups: list[list[Sequence]], new_tokens: int
) -> dict[int, list[int]]:
    """What the dense model wrote after each prompt, by sequence.

    Args:
        manifest_path: of the dump that holds the tokens.
        model: that was run.
        groups: of the shard.
        new_tokens: that may follow a prompt.

    Raises:
        InputError: the dump is not whole, or of another model, method or split.
    """
    manifest = read_manifest(manifest_path, "generate")
    if manifest.get("method") != "dense" or manifest.get("model_hash") != model.model_hash:
        raise InputError(
            f"generate: tokens must be a dump of the same model under method dense, got {manifest_path} of "
            f"{manifest.get('source')} under {manifest.get('method')}"
        )
    columns = ["sequence", "prompt_ids", "output_ids"]
    rows: list[dict[str, Any]] = []
    for file in [manifest_path.parent / f"{group_name(group)}.sequences.parquet" for group in manifest["groups"]]:
        try:
            table = read_checked_table(file, "dump", "a group's whole table", SEQUENCES)
        except InputError as error:
            raise InputError(f"generate: tokens must be a whole dump, got {error}") from None
        rows += table.select(columns).to_pylist()
    found = {row["sequence"]: row for row in rows}
    for sequence in (sequence for group in groups for sequence in group):
        row = found.get(sequence.sequence)
        if row is None or row["prompt_ids"] != sequence.prompt_ids:
            raise InputError(
                f"generate: tokens must be those of the same split, got another prompt for sequence "
                f"{sequence.sequence} in {manifest_path}"
            )
        if not 1 <= len(row["output_ids"]) <= new_tokens:
            raise InputError(
                f"generate: tokens must be 1 to max_new_tokens ({new_tokens}) behind each prompt, got "
                f"{len(row['output_ids'])} behind sequence {sequence.sequence} in {manifest_path}"
            )
    return {sequence.sequence: found[sequence.sequence]["output_ids"] for group in groups for sequence in group}
