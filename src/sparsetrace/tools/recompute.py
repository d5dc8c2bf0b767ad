"""Run sequences of a workload again, from the model, and compare every bit: `sparsetrace verify --recompute`.

The bits of a sequence depend on those that it was multiplied with, so whole groups are run.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine
from sparsetrace.formats.dump import Block, array_prefix
from sparsetrace.formats.schema import leaf
from sparsetrace.formats.sites import Leaf, by_leaf, layer_sites
from sparsetrace.generation.backend import BackendName, EngineSetup
from sparsetrace.generation.engine import GroupResult
from sparsetrace.generation.prompts import Sequence
from sparsetrace.generation.runner import FinishedGroup, Runner
from sparsetrace.generation.selection import holders
from sparsetrace.methods import METHODS, MatrixRule
from sparsetrace.model.patch import install
from sparsetrace.model.runtime import open_model, set_up_torch
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.verify_faults import Fault


def recompute(
    folder: Path, model: Path, sequences: int, machine: Machine, report: Callable[[int, int], None] | None = None
) -> list[Fault]:
    """Run the first sequences of a workload again.

    Args:
        folder: of the workload.
        model: the runtime model that it was made with.
        sequences: number of sequences; the groups that hold them are run whole.
        machine: where the model runs; the same bits are promised only on the kind that made the workload.
        report: called with (groups done, in all).

    Raises:
        InputError: another model, or a workload that lacks the thresholds of some matrices.
    """
    workload = Workload(folder)
    manifest = workload.manifest
    opened = open_model(model)
    if opened.model_hash != manifest["model_hash"]:
        raise InputError(
            f"verify: {model} must be the workload's model ({manifest['model_hash'][:12]}), "
            f"got {opened.model_hash[:12]}"
        )
    device = set_up_torch(machine)
    method = METHODS[manifest["method"]](**manifest["parameters"])
    rules = [
        MatrixRule(row["layer"], row["matrix"], row["threshold_bits"], expected=row["target_sparsity"])
        for row in workload.matrix_table.to_pylist()
        if row["layer"] is not None
    ]
    capture = Capture(**manifest["capture"])
    if set(by_leaf(layer_sites(opened.sites))) - set(workload.leaves):
        raise InputError(
            "verify: the workload must hold every layer and matrix to be recomputed, got a sample: "
            "the thresholds of the others are not in it"
        )
    decoder = opened.load(device)
    patch = install(decoder, method, rules)
    table = workload.sequence_table.sort_by("sequence")
    decoding, batching = Decoding(**manifest["decoding"]), Batching(**manifest["batching"])
    teacher_forced = None
    if decoding.tokens_from == "dense":
        teacher_forced = dict(zip(table["sequence"].to_pylist(), table["output_ids"].to_pylist(), strict=True))
    backend: BackendName = manifest["engine"] if device.type == "cuda" else "torch"
    positions = max(map(len, table["prompt_ids"].to_pylist())) + batching.max_new_tokens
    runner = Runner(EngineSetup(decoder, patch, decoding, batching, opened.eos, backend, positions), capture)
    # the matrix under whose name a block holds the operand of each; outside layers every matrix has its own
    held = {key: key[1] for key in workload.leaves} | holders(workload.leaves, patch.parts)
    groups = list(dict.fromkeys(table["group"].to_pylist()[:sequences]))
    faults: list[Fault] = []
    again: list[tuple[GroupResult, list[str]]] = []

    def keep(finished: FinishedGroup) -> None:
        again.append((finished.result, finished.blocks))

    for done, group in enumerate(groups, start=1):
        rows = table.filter(pc.field("group") == group).to_pylist()
        names = Sequence.__dataclass_fields__
        batch = [Sequence(**{name: row[name] for name in names}) for row in rows]
        scratch = Path(tempfile.mkdtemp(prefix="sparsetrace-"))
        try:
            size = manifest.get("smaller_batches", {}).get(str(group))
            runner.run(batch, scratch, keep, teacher_forced, size)
            runner.wait()
            result, blocks = again.pop()
            for sequence, row, ids in zip(batch, rows, result.output_ids, strict=True):
                if ids != row["output_ids"]:
                    what = f"output of sequence {sequence.sequence} must be the same when run again, got another"
                    faults.append(Fault("sequences.parquet", what + _versions(manifest, device)))
            for name in blocks:
                faults += _differences(workload, Block(scratch / name), held, device)
        finally:
            shutil.rmtree(scratch)
        if report is not None:
            report(done, len(groups))
    return faults


def _differences(workload: Workload, block: Block, held: dict[Leaf, str], device: torch.device) -> Iterator[Fault]:
    """Rows of a block that was made again, against those stored: at most one fault of each layer and matrix.

    Args:
        workload: what is checked.
        block: made again.
        held: for each layer and matrix, the matrix under whose name the block holds its operand.
        device: that the block was made on.
    """
    captured = block["rows.token"]
    known = np.isin(captured, workload.tokens)
    if not known.all():
        yield Fault("tokens.parquet", f"must name token {captured[~known][0]}, which is captured when run again")
        return
    for layer, matrix in workload.leaves:
        where, name = f"data/{leaf(layer, matrix)}", array_prefix(layer, held[layer, matrix])
        tokens = captured[block[f"{name}.rows"]] if f"{name}.rows" in block else captured
        stored = captured[np.isin(captured, workload.tokens_of(layer, matrix))]
        if not np.array_equal(stored, tokens):
            token = np.setxor1d(stored, tokens)[0]
            yield Fault(
                where, f"must hold a row of token {token} only if it is captured when run again, got the contrary"
            )
            continue
        if workload.level == "stats":
            statistics = workload.select(token=tokens).figures(layer, matrix)
            back = np.argsort(np.argsort(tokens))
            pairs = [(statistics[kind].to_numpy()[back], block[f"{name}.{kind}"]) for kind in ("nnz", "absmax", "l2")]
        else:
            rows = workload.matrix(layer, matrix, tokens)
            pairs = [(rows.mask, block[f"{name}.mask"])]
            if rows.out_mask is not None:
                pairs += [(rows.out_mask, block[f"{array_prefix(layer, matrix)}.out_mask"])]
            if rows.bits is not None:
                # with equal masks, values lie at equal places
                whole = np.array_equal(*pairs[0])
                pairs += [(rows.bits, block[f"{name}.values"])] if whole else []
        for kept, again in pairs:
            if np.array_equal(kept, again):
                continue
            differ = np.flatnonzero((kept != again).reshape(len(kept), -1).any(axis=1))
            row = differ[0]
            if workload.level != "stats" and kept is rows.bits:
                row = np.searchsorted(rows.offsets, differ[0], side="right") - 1
            what = f"token {tokens[row]} must be the same when run again, got another"
            yield Fault(where, what + _versions(workload.manifest, device))
            break


def _versions(manifest: dict[str, Any], device: torch.device) -> str:
    """What differs from the run that made the workload, in words; empty if nothing known does."""
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made = manifest["versions"].get("torch")
    differ = [f"device {manifest['device']} then, {here} now"] if manifest["device"] != here else []
    differ += [f"torch {made} then, {torch.__version__} now"] if made != torch.__version__ else []
    return f" ({'; '.join(differ)})" if differ else ""
