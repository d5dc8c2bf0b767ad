"""Step 3: sparse generation over one shard of the prompt set, every operand captured.

The output is the dump of `sparsetrace.formats.dump`. Groups are sealed one by one; a run that finds sealed groups of
the same key leaves them alone and starts at the first that is not.
"""

import dataclasses
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from sparsetrace import __version__
from sparsetrace.calibration.thresholds import Thresholds, dense_thresholds, read_thresholds
from sparsetrace.core.files import InputError, read_json, sha256_json, write_beside, write_json
from sparsetrace.core.provenance import commit, tuning_table
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine
from sparsetrace.formats.dump import group_name
from sparsetrace.formats.schema import DUMP_VERSION, SEQUENCES, TOKENS
from sparsetrace.formats.sites import Leaf, by_leaf, layer_sites
from sparsetrace.generation.capture import Recorder, captured_matrices, holders
from sparsetrace.generation.engine import Engine, GroupResult, Kind, choose_kind
from sparsetrace.generation.prompts import Sequence, read_shard
from sparsetrace.methods import Dense, MatrixRule, operand_parts
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.patch import Patch, install
from sparsetrace.model.runtime import RuntimeModel, set_up_torch
from sparsetrace.model.tokenizer import Tokenizer
from sparsetrace_kernels.configs import table_path


def generate(
    model: RuntimeModel,
    thresholds_path: Path | None,
    prompts: Path,
    shard: int,
    out: Path,
    decoding: Decoding,
    batching: Batching,
    machine: Machine,
    report: Callable[[int, int, int], None] | None = None,
    capture: Capture | None = None,
    tokens: Path | None = None,
    tokens_only: bool = False,
) -> dict[str, Any]:
    """Run one shard and write its dump.

    Args:
        model: converted.
        thresholds_path: the method setting, with what calibration settled; None runs the model as it is.
        prompts: the split prompt set.
        shard: which part of it.
        out: `manifest.json` of the dump; everything else is written beside it.
        decoding: where tokens come from.
        batching: how sequences are multiplied together.
        machine: where the model runs.
        report: called with (groups done, groups in all, tokens captured), from another thread too.
        capture: what is kept of the operands; None keeps all.
        tokens: with `tokens_from: dense`, the manifest of the dump that the dense model's tokens are in.
        tokens_only: capture nothing; the dump then holds the text alone, for another run's `tokens`.

    Returns:
        The manifest.
    """
    thresholds = dense_thresholds(model) if thresholds_path is None else read_thresholds(thresholds_path, model)
    groups = read_shard(prompts, shard)
    if any(len(group) > batching.batch_size for group in groups):
        raise InputError(f"generate: batch_size must be that of the split of {prompts}, got {batching.batch_size}")
    # a text is fed as it is
    new_tokens = 0 if decoding.tokens_from == "text" else batching.max_new_tokens
    _refuse_too_long(prompts, groups, new_tokens, model.config.max_position_embeddings)
    device = set_up_torch(machine)
    capture = capture or Capture()
    kind = choose_kind(machine.engine, device, model.config, thresholds.method, thresholds.rules)
    given = _given(tokens, decoding, model, groups, new_tokens)
    identity = {
        "version": DUMP_VERSION,
        "sparsetrace": __version__,
        "model_hash": model.model_hash,
        "eos": sorted(model.eos),
        "label": thresholds.label,
        "method": thresholds.method.name,
        "parameters": thresholds.method.model_dump(),
        "calibration": thresholds.calibration,
        "thresholds": [rule.threshold_bits for rule in thresholds.rules],
        "prompts": sha256_json([[dataclasses.asdict(sequence) for sequence in group] for group in groups]),
        "decoding": decoding.model_dump(),
        "given": sha256_json(sorted(given.items())) if given else None,
        "batching": batching.model_dump(exclude={"shards"}),
        "capture": None if tokens_only else capture.model_dump(mode="json"),
        "engine": kind,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": machine.threads,
        "tuning": tuning_table(table_path(torch.cuda.get_device_name(device))) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    key = sha256_json(identity)
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    _discard_other_runs(folder, key)

    tokenizer = model.tokenizer()
    sealed: list[dict[str, Any]] = []

    def told(seal: dict[str, Any]) -> None:
        sealed.append(seal)
        if report is not None:
            report(len(sealed), len(groups), sum(seal["rows"] for seal in sealed))

    def seal_group(group: list[Sequence], result: GroupResult, batch_size: int, blocks: list[str], rows: int) -> None:
        told(_seal(folder, key, group, result, blocks, rows, tokenizer, batch_size))

    runner: Runner | None = None
    try:
        for group in groups:
            seal = folder / f"{group_name(group[0].group)}.json"
            if seal.is_file():
                told(read_json(seal, "generate"))
                continue
            if runner is None:
                decoder = model.load(device)
                patch = install(decoder, thresholds.method, thresholds.rules)
                longest = max(len(sequence.prompt_ids) for sequences in groups for sequence in sequences)
                runner = Runner(
                    decoder, patch, decoding, batching, model.eos, None if tokens_only else capture, kind,
                    longest + new_tokens,
                )  # fmt: skip
            runner.run(group, folder, seal_group, given)
        if runner is not None:
            runner.wait()
    finally:
        if runner is not None:
            runner.shutdown()
    manifest = {
        **identity,
        "key": key,
        "dtype": model.config.dtype,
        "source": model.source,
        "source_hash": model.source_hash,
        "matrices": matrix_table(model, thresholds, capture),
        "groups": [group[0].group for group in groups],
        "smaller_batches": {
            str(seal["group"]): seal["batch_size"]
            for seal in sorted(sealed, key=lambda seal: seal["group"])
            if seal["batch_size"] < batching.batch_size
        },
        "rows": sum(seal["rows"] for seal in sealed),
        "commit": commit(),
    }
    write_json(out, manifest)
    return manifest


def _refuse_too_long(prompts: Path, groups: list[list[Sequence]], new_tokens: int, context: int) -> None:
    """Refuse a split that leaves less room behind a prompt than may be fed: token numbers would meet."""
    sequences = [sequence for group in groups for sequence in group]
    ends = [*(sequence.base for sequence in sequences[1:]), sequences[-1].base + context]
    for sequence, end in zip(sequences, ends, strict=True):
        room = min(end - sequence.base, context) - len(sequence.prompt_ids)
        if room < new_tokens:
            raise InputError(
                f"generate: {prompts} must leave room for {new_tokens} new tokens behind each prompt, got room for "
                f"{room} behind sequence {sequence.sequence}: split it with the same max_new_tokens and tokens_from"
            )


def _given(
    tokens: Path | None,
    decoding: Decoding,
    model: RuntimeModel,
    groups: list[list[Sequence]],
    new_tokens: int,
) -> dict[int, list[int]]:
    """What the dense model wrote after each prompt, by sequence; empty where tokens come from elsewhere."""
    if (tokens is not None) != (decoding.tokens_from == "dense"):
        rule = "given with tokens_from dense, and with it alone"
        raise InputError(f"generate: tokens must be {rule}, got {tokens or 'none'} with {decoding.tokens_from}")
    if tokens is None:
        return {}
    manifest = read_json(tokens, "generate")
    if manifest.get("method") != "dense" or manifest.get("model_hash") != model.model_hash:
        raise InputError(
            f"generate: tokens must be a dump of the same model under method dense, got {tokens} of "
            f"{manifest.get('source')} under {manifest.get('method')}"
        )
    columns = ["sequence", "prompt_ids", "output_ids"]
    rows: list[dict[str, Any]] = []
    for file in [tokens.parent / f"{group_name(group)}.sequences.parquet" for group in manifest["groups"]]:
        try:
            rows += pq.read_table(file, columns=columns).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"generate: tokens must be a whole dump, got {' '.join(str(error).split())}") from None
    found = {row["sequence"]: row for row in rows}
    for sequence in (sequence for group in groups for sequence in group):
        row = found.get(sequence.sequence)
        if row is None or row["prompt_ids"] != sequence.prompt_ids:
            raise InputError(
                f"generate: tokens must be those of the same split, got another prompt for sequence "
                f"{sequence.sequence} in {tokens}"
            )
        if not 1 <= len(row["output_ids"]) <= new_tokens:
            raise InputError(
                f"generate: tokens must be 1 to max_new_tokens ({new_tokens}) behind each prompt, got "
                f"{len(row['output_ids'])} behind sequence {sequence.sequence} in {tokens}"
            )
    return {sequence.sequence: found[sequence.sequence]["output_ids"] for group in groups for sequence in group}


# Called once a group is on disk, with the group, its result, the batch size, and its blocks and rows.
Sealing = Callable[[list[Sequence], GroupResult, int, list[str], int], None]


class Runner:
    """Runs groups, each whole at the configured batch size or at a smaller one, and writes while the next one runs.

    Args:
        decoder: with `patch` installed.
        patch: the method.
        decoding: where tokens come from.
        batching: how sequences are multiplied together.
        eos: ids that end a sequence.
        capture: what is kept; None captures nothing.
        kind: of engine.
        positions: that the longest sequence of all groups has.
    """

    def __init__(
        self,
        decoder: Decoder,
        patch: Patch,
        decoding: Decoding,
        batching: Batching,
        eos: frozenset[int],
        capture: Capture | None,
        kind: Kind = "torch",
        positions: int = 1,
    ) -> None:
        self._make = lambda size: Engine(
            decoder, patch, decoding, batching.model_copy(update={"batch_size": size}), eos, kind, positions
        )
        self._sites, self._dtype = layer_sites(decoder.sites), decoder.config.dtype
        self._parts, self._out_masks = patch.parts, patch.method.out_masks
        self._capture = capture
        self._batch_size = batching.batch_size
        self._engine: Engine | None = None
        self._recorder: Recorder | None = None

    def run(
        self,
        group: list[Sequence],
        folder: Path,
        seal: Sealing,
        given: dict[int, list[int]] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Run a group from its start, at half its batch each time that the GPU's memory does not hold it.

        Args:
            group: sequences.
            folder: of the blocks.
            seal: called in the background once all of the group is written; see `wait`.
            given: ids that follow each sequence's prompt, with `tokens_from: dense`.
            batch_size: to begin with; the configured one if None.
        """
        batch_size = batch_size or self._batch_size
        while True:
            try:
                result = self._attempt(group, batch_size, folder, given)
                break
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    raise InputError(
                        f"generate: group {group[0].group} must fit the GPU's memory, got too little for a batch of 1: "
                        f"lower max_new_tokens or use a larger GPU ({str(error).splitlines()[0]})"
                    ) from None
            # not in the handler, whose traceback keeps the tensors
            if self._recorder is not None:
                self._recorder.abandon()
            self._dismantle()
            torch.cuda.empty_cache()
            batch_size = -(-batch_size // 2)
        if self._recorder is None:
            seal(group, result, batch_size, [], 0)
        else:
            self._recorder.close(partial(seal, group, result, batch_size))

    def wait(self) -> None:
        """Wait until every group that was run is sealed; raises what writing or sealing raised."""
        if self._recorder is not None:
            self._recorder.wait()

    def shutdown(self) -> None:
        """Leave; what has not begun to be written is not."""
        if self._recorder is not None:
            self._recorder.shutdown()

    def _dismantle(self) -> None:
        """Let the engine and the recorder go, once all that they made is sealed."""
        self.wait()
        self.shutdown()
        self._engine = self._recorder = None

    def _attempt(
        self, group: list[Sequence], batch_size: int, folder: Path, given: dict[int, list[int]] | None
    ) -> GroupResult:
        if self._engine is None or self._engine.batching.batch_size != batch_size:
            # before the next takes as much again
            self._dismantle()
            self._engine = engine = self._make(batch_size)
            if self._capture is not None:
                self._recorder = Recorder(
                    self._sites,
                    self._dtype,
                    engine.block_rows,
                    engine.device,
                    self._parts,
                    self._out_masks,
                    self._capture,
                )
        if self._recorder is not None:
            self._recorder.open(folder, group[0].group)
        parts = []
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            more = [given[sequence.sequence] for sequence in part] if given else None
            parts.append(self._engine.run(part, self._recorder, more))
        return _joined(parts)


def _joined(parts: list[GroupResult]) -> GroupResult:
    """Results of a group's parts as one; their steps count on, since only rows of one step were multiplied together."""
    fed, steps = [], 0
    for part in parts:
        step = pc.add(part.fed["step"], pa.scalar(steps, pa.int32()))
        fed.append(part.fed.set_column(part.fed.column_names.index("step"), "step", step))
        steps = 1 + pc.max(step).as_py()
    return GroupResult(
        [ids for part in parts for ids in part.output_ids],
        [stopped for part in parts for stopped in part.stopped],
        pa.concat_tables(fed),
    )


def matrix_table(model: RuntimeModel, thresholds: Thresholds, capture: Capture | None = None) -> list[dict[str, Any]]:
    """What the workload's `matrices.parquet` says of each captured matrix before anything is counted.

    For packing, `held_by` names the matrix under whose name the dump holds the operand, and `same_input_as` an earlier
    one whose row of the data set is this one's whatever x is.
    """
    sites = by_leaf(model.sites)
    wanted = captured_matrices(model.sites, capture or Capture())
    rules: dict[Leaf, MatrixRule] = {(rule.layer, rule.matrix): rule for rule in thresholds.rules}
    rows = {(row["layer"], row["matrix"]): row for row in thresholds.rows}
    held = holders(wanted, operand_parts(thresholds.method, model.sites, thresholds.rules))
    table = []
    for layer, matrix in wanted:
        site = sites[layer, matrix]
        # a matrix in no layer is captured as it is
        method = Dense() if layer is None else thresholds.method
        row = rows.get((layer, matrix), {})
        same = (
            other
            for other in site.matrices[: site.matrices.index(matrix)]
            if (layer, other) in wanted
            and not {matrix, other} & set(method.out_masks)
            and method.same_mask(rules[layer, other], rules[layer, matrix])
        )
        weight = model.weight(site)
        table.append(
            {
                "layer": layer,
                "matrix": matrix,
                "site": site.name,
                "held_by": held[layer, matrix],
                "same_input_as": next(same, None),
                "in_features": site.in_features,
                "out_features": site.outputs(matrix),
                "dtype": model.config.dtype,
                "method": method.name,
                "parameters": json.dumps(method.model_dump(), sort_keys=True),
                **{
                    name: row.get(name)
                    for name in ("threshold", "threshold_bits", "target_sparsity", "calibrated_sparsity")
                },
                "weight": weight,
                "weight_column": site.columns[matrix].start,
                "weight_sha256": model.tensors[weight]["sha256"],
                "source_weight": model.source_weight((layer, matrix)),
            }
        )
    return table


def _discard_other_runs(folder: Path, key: str) -> None:
    """Remove what a run of another key left, and blocks of groups that were never sealed."""
    sealed = set()
    for seal in folder.glob("group-*.json"):
        if read_json(seal, "generate")["key"] == key:
            sealed.add(seal.stem)
    for file in folder.glob("group-*"):
        if file.name.split(".")[0] not in sealed:
            file.unlink()


def _seal(
    folder: Path,
    key: str,
    group: list[Sequence],
    result: GroupResult,
    blocks: list[str],
    rows: int,
    tokenizer: Tokenizer,
    batch_size: int,
) -> dict[str, Any]:
    """Write a group's tables, then the seal that says its blocks are whole; returns the seal."""
    stem = folder / group_name(group[0].group)
    bases = {sequence.sequence: sequence.base for sequence in group}
    fed = result.fed.to_pydict()
    fed["token"] = [bases[s] + p for s, p in zip(fed["sequence"], fed["position"], strict=True)]
    fed["text"] = [tokenizer.piece(token_id) for token_id in fed["token_id"]]
    tokens = pa.table({name: pa.array(fed[name], TOKENS.field(name).type) for name in TOKENS.names}, schema=TOKENS)
    with write_beside(stem.with_suffix(".tokens.parquet")) as partial:
        pq.write_table(tokens.sort_by("token"), partial)
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
    with write_beside(stem.with_suffix(".sequences.parquet")) as partial:
        pq.write_table(pa.Table.from_pylist(sequences, schema=SEQUENCES), partial)
    seal = {"key": key, "group": group[0].group, "blocks": blocks, "rows": rows, "batch_size": batch_size}
    write_json(stem.with_suffix(".json"), seal)
    return seal


def repeated_share(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams of a continuation that occurred in it before; 0 for one of fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
