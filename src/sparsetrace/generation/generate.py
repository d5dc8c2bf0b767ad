"""Step 3: sparse generation over one shard of the prompt set, every operand captured.

The output is the dump of `sparsetrace.formats.dump`. Groups are sealed one by one; a run that finds sealed groups of
the same key leaves them alone and starts at the first that is not.
"""

import dataclasses
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparsetrace import __version__
from sparsetrace.calibration.thresholds import Thresholds, dense_thresholds, read_thresholds
from sparsetrace.core.files import InputError, sha256_json, write_sealed_json
from sparsetrace.core.provenance import commit, tuning_table
from sparsetrace.core.settings import Capture
from sparsetrace.formats.dump import group_name
from sparsetrace.formats.versions import DUMP_VERSION
from sparsetrace.generation.backend import BackendName, EngineSetup
from sparsetrace.generation.backends import choose_backend
from sparsetrace.generation.dense_tokens import read_dense_tokens
from sparsetrace.generation.job import Job
from sparsetrace.generation.matrix_table import matrix_table
from sparsetrace.generation.plan import new_tokens, refuse_crowded_split
from sparsetrace.generation.prompts import Sequence, read_shard
from sparsetrace.generation.runner import Runner
from sparsetrace.generation.seal import discard_other_runs, write_seal
from sparsetrace.model.patch import install
from sparsetrace.model.runtime import set_up_torch
from sparsetrace_kernels.configs import table_path

# Called with (groups done, groups in all, tokens captured), from another thread too.
Report = Callable[[int, int, int], None]


def generate(job: Job, report: Report | None = None) -> dict[str, Any]:
    """Run one shard and write its dump; returns the dump's manifest.

    Raises:
        InputError: the inputs do not belong together, or an activation or a logit is not finite.
    """
    thresholds = dense_thresholds(job.model) if job.thresholds is None else read_thresholds(job.thresholds, job.model)
    groups = _groups(job)
    given = _given(job, groups)
    device = set_up_torch(job.machine)
    backend = choose_backend(job.machine.engine, device, job.model.config, thresholds.method, thresholds.rules)
    identity = _identity(job, thresholds, groups, given, (backend, device))
    key = sha256_json(identity)
    folder = job.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    earlier = discard_other_runs(folder, key)

    tokenizer = job.model.tokenizer()
    sealed: list[dict[str, Any]] = []

    def note(seal: dict[str, Any]) -> None:
        sealed.append(seal)
        if report is not None:
            report(len(sealed), len(groups), sum(seal["rows"] for seal in sealed))

    runner: Runner | None = None
    try:
        for group in groups:
            if (seal := earlier.get(group_name(group[0].group))) is not None:
                note(seal)
                continue
            if runner is None:
                runner = _new_runner(job, thresholds, groups, backend, device)
            runner.run(group, folder, lambda finished: note(write_seal(folder, key, finished, tokenizer)), given)
        if runner is not None:
            runner.wait()
    finally:
        if runner is not None:
            runner.shutdown()
    manifest = {
        **identity,
        "key": key,
        "dtype": job.model.config.dtype,
        "source": job.model.source,
        "source_hash": job.model.source_hash,
        "matrices": matrix_table(job.model, thresholds, job.capture or Capture()),
        "groups": [group[0].group for group in groups],
        "smaller_batches": {
            str(seal["group"]): seal["batch_size"]
            for seal in sorted(sealed, key=lambda seal: seal["group"])
            if seal["batch_size"] < job.batching.batch_size
        },
        "rows": sum(seal["rows"] for seal in sealed),
        "commit": commit(),
    }
    return write_sealed_json(job.out, manifest)


def _groups(job: Job) -> list[list[Sequence]]:
    """The shard's groups, which must be those that the settings were split for."""
    groups = read_shard(job.prompts, job.shard)
    if any(len(group) > job.batching.batch_size for group in groups):
        raise InputError(
            f"generate: batch_size must be that of the split of {job.prompts}, got {job.batching.batch_size}"
        )
    context = job.model.config.max_position_embeddings
    refuse_crowded_split(str(job.prompts), groups, job.decoding, job.batching, context)
    return groups


def _given(job: Job, groups: list[list[Sequence]]) -> dict[int, list[int]]:
    """The ids that follow each sequence's prompt, where the dense model wrote them; empty otherwise."""
    if (job.dense_tokens is not None) != (job.decoding.tokens_from == "dense"):
        raise InputError(
            "generate: tokens must be given with tokens_from dense, and with it alone, got "
            f"{job.dense_tokens or 'none'} with {job.decoding.tokens_from}"
        )
    if job.dense_tokens is None:
        return {}
    return read_dense_tokens(job.dense_tokens, job.model, groups, new_tokens(job.decoding, job.batching))


def _identity(
    job: Job,
    thresholds: Thresholds,
    groups: list[list[Sequence]],
    given: dict[int, list[int]],
    place: tuple[BackendName, torch.device],
) -> dict[str, Any]:
    """Everything that decides the bytes of a dump, for the manifest; its hash is the key of the run.

    Args:
        job: what is asked for.
        thresholds: of its setting.
        groups: of its shard.
        given: ids that follow each sequence's prompt.
        place: backend and device.
    """
    backend, device = place
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "version": DUMP_VERSION,
        "sparsetrace": __version__,
        "model_hash": job.model.model_hash,
        "eos": sorted(job.model.eos),
        "label": thresholds.label,
        "method": thresholds.method.name,
        "parameters": thresholds.method.model_dump(),
        "calibration": thresholds.calibration if "tokens" in thresholds.calibration else {},
        "thresholds": [rule.threshold_bits for rule in thresholds.rules],
        "prompts": sha256_json([[dataclasses.asdict(sequence) for sequence in group] for group in groups]),
        "decoding": job.decoding.model_dump(),
        "given": sha256_json(sorted(given.items())) if given else None,
        "batching": job.batching.model_dump(exclude={"shards"}),
        "capture": None if job.capture is None else job.capture.model_dump(mode="json"),
        "engine": backend,
        "device": gpu or "cpu",
        "threads": job.machine.threads,
        "tuning": tuning_table(table_path(gpu)) if gpu else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def _new_runner(
    job: Job, thresholds: Thresholds, groups: list[list[Sequence]], backend: BackendName, device: torch.device
) -> Runner:
    """Load the model and install the method."""
    decoder = job.model.load(device)
    longest = max(len(sequence.prompt_ids) for group in groups for sequence in group)
    setup = EngineSetup(
        model=decoder,
        patch=install(decoder, thresholds.method, thresholds.rules),
        decoding=job.decoding,
        batching=job.batching,
        eos=job.model.eos,
        backend=backend,
        positions=longest + new_tokens(job.decoding, job.batching),
    )
    return Runner(setup, job.capture)
