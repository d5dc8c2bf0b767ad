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
import pyarrow.parquet as pq
import torch

from sparsetrace import __version__
from sparsetrace.capture import Recorder, captured_matrices
from sparsetrace.dump import group_name
from sparsetrace.engine import Engine, GroupResult
from sparsetrace.files import InputError, read_json, sha256_json, write_beside, write_json
from sparsetrace.patch import install
from sparsetrace.prompts import Sequence, read_shard
from sparsetrace.runtime import RuntimeModel, source_weight, use
from sparsetrace.schema import DUMP_VERSION, MATRICES, SEQUENCES, SITE_OF, SITES, TOKENS
from sparsetrace.settings import Batching, Capture, Decoding, Machine
from sparsetrace.thresholds import Thresholds, read_thresholds
from sparsetrace.tokenizer import Tokenizer


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
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    key = sha256_json(identity)
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    _discard_other_runs(folder, key)

    tokenizer = model.tokenizer()
    engine: Engine | None = None
    captured = 0
    for done, group in enumerate(groups):
        seal = folder / f"{group_name(group[0].group)}.json"
        if not seal.is_file():
            if engine is None:
                decoder = model.load(device)
                patch = install(decoder, thresholds.method, thresholds.rules)
                engine = Engine(decoder, patch, decoding, batching, model.eos)
            out_masks = thresholds.method.out_masks
            recorder = Recorder(folder, group[0].group, model.config, engine.block_rows, device, out_masks, capture)
            result = engine.run(group, recorder)
            _seal(seal, key, group, result, recorder, tokenizer)
        captured += read_json(seal, "generate")["rows"]
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
        "rows": captured,
    }
    write_json(out, manifest)
    return manifest


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
    seal: Path, key: str, group: list[Sequence], result: GroupResult, recorder: Recorder, tokenizer: Tokenizer
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
    write_json(seal, {"key": key, "blocks": recorder.blocks, "rows": recorder.rows})


def repeated_share(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams of a continuation that occurred in it before; 0 for one of fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
