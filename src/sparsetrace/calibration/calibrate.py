"""Step 2: exact histograms of what enters every site, over a text.

The output is described in `sparsetrace.calibration.histogram`; `sparsetrace.calibration.derive` takes thresholds from
it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsetrace.calibration.counter import ActivationCounter
from sparsetrace.calibration.histogram import Histograms, Provenance, TextShard
from sparsetrace.calibration.windows import calibration_windows, passes, windows_per_pass
from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.settings import Calibration, Machine
from sparsetrace.methods import METHODS
from sparsetrace.methods.gated import refuse_without_gate
from sparsetrace.model.decoder import ACTIVATIONS, Decoder
from sparsetrace.model.finite import not_finite
from sparsetrace.model.patch import observe, projections
from sparsetrace.model.runtime import RuntimeModel, set_up_torch

# Shape suffixes: W windows, B windows of one pass, T tokens of a window, K input features, N output features.

# An interruption costs at most this; on a 7B model the counts are 67 MB.
SAVE_SECONDS = 60

# Called with a layer, a site and a tensor [B, T, features].
See = Callable[[int, str, Tensor], None]


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """What is counted.

    Args:
        model: converted.
        text: `.txt`, `.json` or `.jsonl`, or gzipped.
        out: the histogram file.
        calibration: how much of the text, in sequences of which length, and in how many shards.
        machine: where the model runs.
        shard: which of the shards.
        scores: names of methods whose scores are counted besides what enters the sites.
    """

    model: RuntimeModel
    text: Path
    out: Path
    calibration: Calibration
    machine: Machine
    shard: int = 0
    scores: Sequence[str] = ()


def calibrate(job: CalibrationJob, report: Callable[[int, int], None] | None = None) -> Histograms:
    """Run a text through the dense model and count what enters each site.

    An interrupted run leaves its counts beside the file; the same call goes on from there.

    Args:
        job: what is counted.
        report: called with (tokens done, tokens in all).

    Raises:
        InputError: the text is too short, a score does not fit the model, or an activation is not finite (layer, site
            and token are named).
    """
    model, calibration, shards = job.model, job.calibration, job.calibration.shards
    if job.shard >= shards:
        raise InputError(f"calibrate: shard must be below the number of shards, {shards}, got {job.shard}")
    scores = tuple(sorted(set(job.scores)))
    for name in scores:
        if METHODS[name].score == "gate":
            refuse_without_gate(name, model.sites)
    device = set_up_torch(job.machine)
    windows_WT = calibration_windows(model.tokenizer(), job.text, calibration, model.config.max_position_embeddings)
    T = windows_WT.shape[1]
    first, last = _windows_of_shard(len(windows_WT), windows_per_pass(T), job)
    windows_WT = windows_WT[first:last]
    text_hash = sha256_json([sha256_file(job.text), calibration.model_dump(exclude={"shards"})])
    key = sha256_json([model.model_hash, text_hash, job.shard, shards, scores, windows_per_pass(T)])
    progress = job.out.with_name(f".{job.out.name}.progress")

    decoder = model.load(device)
    counter = ActivationCounter(model.sites, model.config.dtype, device, scores)
    see, see_output = counting_callbacks(decoder, counter)
    done, saved = counter.resume(progress, key), time.monotonic()
    with torch.inference_mode():
        for tokens_BT, positions_BT in passes(windows_WT[done:], device):
            with observe(decoder, see, see_output):
                decoder(tokens_BT, positions_BT)
            if counter.not_finite():
                _name_not_finite(decoder, tokens_BT, positions_BT, (first + done) * T)
            done += len(tokens_BT)
            if done < len(windows_WT) and time.monotonic() - saved > SAVE_SECONDS:
                counter.histograms().save_progress(progress, key, done)
                saved = time.monotonic()
            if report is not None:
                report(done * T, windows_WT.size)
    provenance = Provenance(
        model_hash=model.model_hash,
        text_hash=text_hash,
        dtype=model.config.dtype,
        tokens=int(windows_WT.size),
        layers=model.config.num_hidden_layers,
        sites=model.sites,
        scores=scores,
        shards=(TextShard(text_hash, job.shard, shards),) if shards > 1 else (),
    )
    histograms = counter.histograms()
    histograms.save(job.out, provenance)
    progress.unlink(missing_ok=True)
    return histograms


def _windows_of_shard(windows: int, per_pass: int, job: CalibrationJob) -> tuple[int, int]:
    """The first window of the shard, and the one after its last.

    A shard has whole passes, so that what is computed together does not depend on the number of shards.
    """
    shards, passes_in_all = job.calibration.shards, -(-windows // per_pass)
    if passes_in_all < shards:
        raise InputError(
            f"calibrate: shards must be at most the passes of {per_pass} sequences, {passes_in_all}, got {shards}"
        )
    first, last = (per_pass * (passes_in_all * edge // shards) for edge in (job.shard, job.shard + 1))
    return first, last


def counting_callbacks(decoder: Decoder, counter: ActivationCounter) -> tuple[See, See | None]:
    """Callbacks for `observe` that count what enters the projections, and what leaves them.

    Returns:
        The second is None where no method needs it.
    """
    gated = [name for name in counter.scores if METHODS[name].score == "gate"]
    scaled = [name for name in counter.scores if METHODS[name].score == "scaled"]
    scales = {
        (name, layer, matrix): METHODS[name].scale(projection.matrix(matrix))
        for layer, _, projection in projections(decoder)
        for matrix in projection.columns
        for name in scaled
    }
    columns = {site.key: site.columns for site in decoder.sites}
    activation = ACTIVATIONS[decoder.config.hidden_act]

    def see(layer: int, site: str, x_BTK: Tensor) -> None:
        counter.count(layer, site, x_BTK)
        for name in scaled:
            for matrix in columns[layer, site]:
                scale_K = scales[name, layer, matrix]
                assert scale_K is not None
                counter.count(layer, f"{name}.{matrix}", x_BTK.float().abs() * scale_K)

    def see_output(layer: int, site: str, y_BTN: Tensor) -> None:
        if "gate" in columns[layer, site]:
            active_BTN = activation(y_BTN[..., columns[layer, site]["gate"]])
            for name in gated:
                counter.count(layer, name, active_BTN)

    return see, see_output if gated else None


def _name_not_finite(decoder: Decoder, tokens_BT: Tensor, positions_BT: Tensor, first_token: int) -> None:
    """Run a pass again and stop at the first activation that is not finite."""

    def see(layer: int, site: str, x_BTK: Tensor) -> None:
        bad_BT = ~x_BTK.isfinite().all(-1)
        if bad_BT.any():
            token = first_token + int(bad_BT.flatten().int().argmax())
            raise not_finite("calibrate", f"layer {layer}, site {site}, token {token} of the calibration text")

    with observe(decoder, see):
        decoder(tokens_BT, positions_BT)
