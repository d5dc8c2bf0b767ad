"""A text as windows of token ids of one length, and the forward passes that a model reads them in."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Calibration
from sparsetrace.core.text import read_text
from sparsetrace.model.tokenizer import Tokenizer

# Shape suffixes: W windows, B windows of one pass, T tokens of a window.

# Tokens of one forward pass; bounds the memory of a step.
PASS_TOKENS = 4096


def calibration_windows(tokenizer: Tokenizer, text: Path, calibration: Calibration, context: int) -> np.ndarray:
    """Cut a text into sequences of one length, each after a begin token; without padding.

    Where the text holds more than asked, `seed` draws which sequences are taken; they stay in the order of the text.

    Args:
        tokenizer: of the model.
        text: `.txt`, `.json` or `.jsonl`, or gzipped.
        calibration: how much of it, in sequences of which length.
        context: positions of the model.

    Returns:
        [W, T] int64 token ids.

    Raises:
        InputError: the text is too short, or a sequence longer than the context.
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


def windows_per_pass(length: int) -> int:
    """How many windows of `length` tokens one forward pass reads."""
    return max(1, PASS_TOKENS // length)


def passes(windows_WT: np.ndarray, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and positions of each forward pass, both int64 [B, T] on the device."""
    length = windows_WT.shape[1]
    for tokens_BT in torch.from_numpy(windows_WT).split(windows_per_pass(length)):
        yield tokens_BT.to(device), torch.arange(length, device=device).expand_as(tokens_BT)
