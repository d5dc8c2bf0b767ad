"""Step 2: exact histograms of what enters every site, over a text.

The output is described in `sparsetrace.histogram`; `sparsetrace.thresholds` derives thresholds from it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.config import Calibration, Machine
from sparsetrace.files import InputError, sha256_file, sha256_json
from sparsetrace.histogram import Histograms, Provenance
from sparsetrace.model import Decoder
from sparsetrace.patch import observe
from sparsetrace.prompts import read_text
from sparsetrace.runtime import RuntimeModel, use
from sparsetrace.thresholds import derive_thresholds as derive_thresholds  # TEMPORARY
from sparsetrace.thresholds import read_thresholds as read_thresholds
from sparsetrace.tokenizer import Tokenizer

# Tokens of one forward pass; bounds the memory of the step.
PASS_TOKENS = 4096


def calibrate(
    model: RuntimeModel,
    text: Path,
    out: Path,
    calibration: Calibration,
    machine: Machine,
    report: Callable[[int, int], None] | None = None,
) -> Histograms:
    """Stream a text through the dense model and count what enters each site.

    Args:
        model: converted.
        text: `.txt`, `.json` or `.jsonl`, or gzipped.
        out: the histogram file.
        calibration: how much of it, in sequences of which length.
        machine: where the model runs.
        report: called with (tokens done, tokens in all).

    Raises:
        InputError: the text is too short, or an activation is not finite (layer, site and token are named).
    """
    device = use(machine)
    windows_WT = calibration_windows(model.tokenizer(), text, calibration, model.config.max_position_embeddings)
    decoder = model.load(device)
    histograms = Histograms(model.config.num_hidden_layers, model.config.dtype, device)
    T = windows_WT.shape[1]
    batch = max(1, PASS_TOKENS // T)
    with torch.inference_mode():
        positions_T = torch.arange(T, device=device)
        for start in range(0, len(windows_WT), batch):
            tokens_BT = torch.from_numpy(windows_WT[start : start + batch]).to(device)
            positions_BT = positions_T.expand_as(tokens_BT)
            with observe(decoder, histograms.count):
                decoder(tokens_BT, positions_BT)
            if histograms.not_finite():
                _name_not_finite(decoder, tokens_BT, positions_BT, start * T)
            if report is not None:
                report(min(start + batch, len(windows_WT)) * T, windows_WT.size)
    text_hash = sha256_json([sha256_file(text), calibration.model_dump()])
    provenance = Provenance(
        model.model_hash, text_hash, model.config.dtype, int(windows_WT.size), model.config.num_hidden_layers
    )
    histograms.save(out, provenance)
    return histograms


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
