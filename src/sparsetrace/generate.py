"""Step 3: sparse generation over one shard of the prompt set, every operand captured.

The output is the dump of `sparsetrace.dump`. Groups are sealed one by one; a run that finds sealed groups of the same
key leaves them alone and starts at the first that is not.
"""

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from sparsetrace import __version__
from sparsetrace.capture import Recorder, captured_matrices
from sparsetrace.dump import group_name
from sparsetrace.engine import Engine, GroupResult
from sparsetrace.files import InputError, read_json, sha256_json, write_beside, write_json
from sparsetrace.model import Decoder
from sparsetrace.patch import Patch, install
from sparsetrace.prompts import Sequence, read_shard
from sparsetrace.provenance import commit, tuning_table
from sparsetrace.runtime import RuntimeModel, source_weight, use
from sparsetrace.schema import DUMP_VERSION, MATRICES, SEQUENCES, SITE_OF, SITES, TOKENS
from sparsetrace.settings import Batching, Capture, Decoding, Machine
from sparsetrace.thresholds import Thresholds, read_thresholds
from sparsetrace.tokenizer import Tokenizer
from sparsetrace_kernels.configs import table_path


def generate(
    model: RuntimeModel,
    thresholds_path: Path,
    prompts: Path,
    shard: int,
    out: Path,
    decoding: Decoding,
    batching: Batching,
    machine: Machine,
    report: Callable[[int, int, int], None] | None = None,
    capture: Capture | None = None,
) -> dict[str, Any]:
    """Run one shard and write its dump.

    Args:
        model: converted.
        thresholds_path: the method setting, with what calibration settled.
        prompts: the split prompt set.
        shard: which part of it.
        out: `manifest.json` of the dump; everything else is written beside it.
        decoding: how tokens are produced.
        batching: how sequences are multiplied together.
        machine: where the model runs.
        report: called with (groups done, groups in all, tokens captured).
        capture: what is kept of the operands; None keeps all.

    Returns:
        The manifest.
    """
    thresholds = read_thresholds(thresholds_path, model)
    groups = read_shard(prompts, shard)
    if any(len(group) > batching.batch_size for group in groups):
        raise InputError(f"generate: batch_size must be that of the split of {prompts}, got {batching.batch_size}")
    device = use(machine)
    capture = capture or Capture()
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
        "batching": batching.model_dump(exclude={"shards"}),
        "capture": capture.model_dump(mode="json"),
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
    runner: Runner | None = None
    captured = 0
    smaller_batches = {}
    for done, group in enumerate(groups):
        seal = folder / f"{group_name(group[0].group)}.json"
        if not seal.is_file():
            if runner is None:
                decoder = model.load(device)
                patch = install(decoder, thresholds.method, thresholds.rules)
                runner = Runner(decoder, patch, decoding, batching, model.eos)
            result, recorder, batch_size = runner.run(group, folder, thresholds.method.out_masks, capture)
            _seal(seal, key, group, result, recorder, tokenizer, batch_size)
        sealed = read_json(seal, "generate")
        captured += sealed["rows"]
        if sealed["batch_size"] < batching.batch_size:
            smaller_batches[str(group[0].group)] = sealed["batch_size"]
        if report is not None:
            report(done + 1, len(groups), captured)
    manifest = {
        **identity,
        "key": key,
        "dtype": model.config.dtype,
        "source": model.source,
        "source_hash": model.source_hash,
        "matrices": matrix_table(model, thresholds, capture),
        "groups": [group[0].group for group in groups],
        "smaller_batches": smaller_batches,
        "rows": captured,
        "commit": commit(),
    }
    write_json(out, manifest)
    return manifest


class Runner:
    """Runs groups, each whole at the configured batch size or at a smaller one; the arguments are `Engine`'s."""

    def __init__(
        self, decoder: Decoder, patch: Patch, decoding: Decoding, batching: Batching, eos: frozenset[int]
    ) -> None:
        self._make = lambda size: Engine(
            decoder, patch, decoding, batching.model_copy(update={"batch_size": size}), eos
        )
        self._config = decoder.config
        self._batch_size = batching.batch_size
        self._engine: Engine | None = None

    def run(
        self,
        group: list[Sequence],
        folder: Path,
        out_masks: tuple[str, ...],
        capture: Capture,
        batch_size: int | None = None,
    ) -> tuple[GroupResult, Recorder, int]:
        """Run a group from its start, at half its batch each time that the GPU's memory does not hold it.

        Args:
            group: sequences.
            folder: of the blocks.
            out_masks: of the method.
            capture: what is kept.
            batch_size: to begin with; the configured one if None.

        Returns:
            The result, where the operands went, and the batch size.
        """
        batch_size = batch_size or self._batch_size
        while True:
            try:
                return *self._attempt(group, batch_size, folder, out_masks, capture), batch_size
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    raise InputError(
                        f"generate: group {group[0].group} must fit the GPU's memory, got too little for a batch of 1: "
                        f"lower max_new_tokens or use a larger GPU ({str(error).splitlines()[0]})"
                    ) from None
            # not in the handler, whose traceback keeps the tensors
            self._engine = None
            torch.cuda.empty_cache()
            batch_size = -(-batch_size // 2)

    def _attempt(
        self, group: list[Sequence], batch_size: int, folder: Path, out_masks: tuple[str, ...], capture: Capture
    ) -> tuple[GroupResult, Recorder]:
        if self._engine is None or self._engine.batching.batch_size != batch_size:
            self._engine = self._make(batch_size)
        engine = self._engine
        recorder = Recorder(folder, group[0].group, self._config, engine.block_rows, engine.device, out_masks, capture)
        starts = range(0, len(group), batch_size)
        return _joined([engine.run(group[start : start + batch_size], recorder) for start in starts]), recorder


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

    `same_input_as` names an earlier matrix whose masked input is this one's whatever x is, for packing.
    """
    config, method = model.config, thresholds.method
    wanted = captured_matrices(config, capture or Capture())
    rules = {(rule.layer, rule.matrix): rule for rule in thresholds.rules}
    table = []
    for row in thresholds.rows:
        layer, matrix = row["layer"], row["matrix"]
        if (layer, matrix) not in wanted:
            continue
        same = (
            other
            for other in SITES[SITE_OF[matrix]][: SITES[SITE_OF[matrix]].index(matrix)]
            if (layer, other) in wanted
            and not {matrix, other} & set(method.out_masks)
            and method.same_mask(rules[layer, other], rules[layer, matrix])
        )
        site = SITE_OF[matrix]
        weight = f"layers.{layer}.{site}.weight"
        table.append(
            {
                "layer": layer,
                "matrix": matrix,
                "site": site,
                "same_input_as": next(same, None),
                "in_features": config.in_features(site),
                "out_features": config.out_features(matrix),
                "dtype": config.dtype,
                "method": method.name,
                "parameters": json.dumps(method.model_dump(), sort_keys=True),
                **{
                    name: row[name]
                    for name in ("threshold", "threshold_bits", "target_sparsity", "calibrated_sparsity")
                },
                "weight": weight,
                "weight_column": config.columns(site)[matrix].start,
                "weight_sha256": model.tensors[weight]["sha256"],
                "source_weight": source_weight(layer, matrix),
            }
        )
    return sorted(table, key=lambda row: (row["layer"], MATRICES.index(row["matrix"])))


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
    seal: Path,
    key: str,
    group: list[Sequence],
    result: GroupResult,
    recorder: Recorder,
    tokenizer: Tokenizer,
    batch_size: int,
) -> None:
    """Write a group's tables, then the seal that says its blocks are whole."""
    stem = seal.with_suffix("")
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
    write_json(seal, {"key": key, "blocks": recorder.blocks, "rows": recorder.rows, "batch_size": batch_size})


def repeated_share(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams of a continuation that occurred in it before; 0 for one of fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
