"""Step 2: exact histograms of what enters every site, over a text.

The output is described in `sparsetrace.calibration.histogram`; `sparsetrace.calibration.thresholds` derives
thresholds from it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.calibration.histogram import ActivationCounter, Histograms, Provenance
from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.settings import Calibration, Machine
from sparsetrace.core.text import read_text
from sparsetrace.methods import METHODS
from sparsetrace.model.decoder import ACTIVATIONS, Decoder
from sparsetrace.model.patch import observe, projections
from sparsetrace.model.runtime import RuntimeModel, set_up_torch
from sparsetrace.model.tokenizer import Tokenizer

# Tokens of one forward pass; bounds the memory of the step.
PASS_TOKENS = 4096
# Longest time that an interruption costs; on a 7B model the counts are 67 MB.
SAVE_SECONDS = 60


def calibrate(
    model: RuntimeModel,
    text: Path,
    out: Path,
    calibration: Calibration,
    machine: Machine,
    report: Callable[[int, int], None] | None = None,
    *,
    shard: int = 0,
    scores: Sequence[str] = (),
) -> Histograms:
    """Stream a text through the dense model and count what enters each site.

    An interrupted run leaves its counts beside `out`; the same call goes on from there.

    Args:
        model: converted.
        text: `.txt`, `.json` or `.jsonl`, or gzipped.
        out: the histogram file.
        calibration: how much of it, in sequences of which length.
        machine: where the model runs.
        report: called with (tokens done, tokens in all).
        shard: which of `calibration.shards` parts of the sequences is counted.
        scores: names of methods whose scores are counted too.

    Raises:
        InputError: the text is too short, or an activation is not finite (layer, site and token are named).
    """
    if shard >= calibration.shards:
        raise InputError(f"calibrate: shard must be below the number of shards, {calibration.shards}, got {shard}")
    device = set_up_torch(machine)
    windows_WT = calibration_windows(model.tokenizer(), text, calibration, model.config.max_position_embeddings)
    T = windows_WT.shape[1]
    batch = max(1, PASS_TOKENS // T)
    passes = -(-len(windows_WT) // batch)
    if passes < calibration.shards:
        raise InputError(
            f"calibrate: shards must be at most the passes of {batch} sequences, {passes}, got {calibration.shards}"
        )
    # whole passes: what is computed together does not depend on the number of shards
    first, last = (batch * (passes * edge // calibration.shards) for edge in (shard, shard + 1))
    windows_WT = windows_WT[first:last]
    text_hash = sha256_json([sha256_file(text), calibration.model_dump(exclude={"shards"})])
    scores = tuple(sorted(set(scores)))
    key = sha256_json([model.model_hash, text_hash, shard, calibration.shards, scores, batch])
    progress = out.with_name(f".{out.name}.progress")

    decoder = model.load(device)
    counter = ActivationCounter(model.sites, model.config.dtype, device, scores)
    see, see_output = _counters(decoder, counter)
    done, saved = counter.resume(progress, key), time.monotonic()
    with torch.inference_mode():
        positions_T = torch.arange(T, device=device)
        for start in range(done, len(windows_WT), batch):
            tokens_BT = torch.from_numpy(windows_WT[start : start + batch]).to(device)
            positions_BT = positions_T.expand_as(tokens_BT)
            with observe(decoder, see, see_output):
                decoder(tokens_BT, positions_BT)
            if counter.not_finite():
                _name_not_finite(decoder, tokens_BT, positions_BT, (first + start) * T)
            stop = min(start + batch, len(windows_WT))
            if stop < len(windows_WT) and time.monotonic() - saved > SAVE_SECONDS:
                counter.histograms().save_progress(progress, key, stop)
                saved = time.monotonic()
            if report is not None:
                report(stop * T, windows_WT.size)
    parts = ((text_hash, shard, calibration.shards),) if calibration.shards > 1 else ()
    provenance = Provenance(
        model_hash=model.model_hash,
        text_hash=text_hash,
        dtype=model.config.dtype,
        tokens=int(windows_WT.size),
        layers=model.config.num_hidden_layers,
        sites=model.sites,
        scores=scores,
        parts=parts,
    )
    histograms = counter.histograms()
    histograms.save(out, provenance)
    progress.unlink(missing_ok=True)
    return histograms


def _counters(
    decoder: Decoder, counter: ActivationCounter
) -> tuple[Callable[[int, str, Tensor], None], Callable[[int, str, Tensor], None] | None]:
    """What is done with each vector that enters, and each that leaves, a projection."""
    gated = [name for name in counter.scores if METHODS[name].score == "gate"]
    scaled = [name for name in counter.scores if METHODS[name].score == "scaled"]
    scales = {
        (name, layer, matrix): METHODS[name].scale(projection.matrix(matrix))
        for layer, _, projection in projections(decoder)
        for matrix in projection.columns
        for name in scaled
    }
    sites = {site.key: site for site in decoder.sites}

    def see(layer: int, site: str, x_BTK: Tensor) -> None:
        counter.count(layer, site, x_BTK)
        for name in scaled:
            for matrix in sites[layer, site].matrices:
                scale = scales[name, layer, matrix]
                assert scale is not None
                counter.count(layer, f"{name}.{matrix}", x_BTK.float().abs() * scale)

    def see_output(layer: int, site: str, y_BTN: Tensor) -> None:
        columns = sites[layer, site].columns
        if "gate" in columns:
            gate_BTN = y_BTN[..., columns["gate"]]
            active_BTN = ACTIVATIONS[decoder.config.hidden_act](gate_BTN)
            for name in gated:
                counter.count(layer, name, active_BTN)

    return see, see_output if gated else None


def calibration_windows(tokenizer: Tokenizer, text: Path, calibration: Calibration, context: int) -> np.ndarray:
    """[W, T] int64 token ids: the text cut into sequences of one length, each after a begin token; no padding.

    Where the text holds more than asked, `seed` draws which sequences are used; they stay in the order of the text.
    """
    T = calibration.sequence_length
    if context < T:
        raise InputError(f"calibrate: sequence_length must be at most the context of {context}, got {T}")
    ids = tokenizer.encode(read_text(text, calibration.field, "calibrate"), f"calibrate: {text}")
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    body = T - len(begin)
    ids = ids[len(begin) :]
    available = len(ids) // body
    wanted = -(-calibration.tokens // T)
    if wanted > available:
        raise InputError(
            f"calibrate: tokens must be at most {available * T} with {text}, got {calibration.tokens}: "
            "lower it or give a longer text"
        )
    bodies_WT = np.array(ids[: available * body], dtype=np.int64).reshape(available, body)
    drawn = np.sort(np.random.Generator(np.random.Philox(key=calibration.seed)).permutation(available)[:wanted])
    return np.concatenate([np.tile(np.array(begin, dtype=np.int64), (wanted, 1)), bodies_WT[drawn]], axis=1)


def _name_not_finite(decoder: Decoder, tokens_BT: Tensor, positions_BT: Tensor, first_token: int) -> None:
    def see(layer: int, site: str, x_BTK: Tensor) -> None:
        bad_BT = ~x_BTK.isfinite().all(-1)
        if bad_BT.any():
            token = first_token + int(bad_BT.flatten().int().argmax())
            raise InputError(
                f"calibrate: activations must be finite, got Inf or NaN in layer {layer}, site {site}, token {token} "
                "of the calibration text: the checkpoint may need a dtype of wider range"
            )

    with observe(decoder, see):
        decoder(tokens_BT, positions_BT)
