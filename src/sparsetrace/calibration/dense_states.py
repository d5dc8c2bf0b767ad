"""What the dense model makes of a held-out text, once for all settings: `quality_dense.safetensors`.

| tensor | dims | dtype | what |
|---|---|---|---|
| `hidden` | W windows, S scored positions, C | the model's | last hidden states, from which the scored tokens follow |

Logits are made from them again with the same multiply, so they have the same bits; they would take the vocabulary in
the place of the hidden size, some tens of times the bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsetrace.calibration.windows import passes
from sparsetrace.core.files import InputError, write_beside
from sparsetrace.core.settings import Machine, Quality
from sparsetrace.core.text import read_text
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.runtime import RuntimeModel, set_up_torch
from sparsetrace.model.tokenizer import Tokenizer

# Shape suffixes: W windows, B windows of one pass, T tokens of a window, S scored tokens, C hidden size.

METADATA = "sparsetrace_dense_states"


@dataclass(frozen=True, slots=True)
class DenseJob:
    """What is run.

    Args:
        model: converted.
        text: held out; `.txt`, `.json` or `.jsonl`, or gzipped.
        out: the file.
        quality: windows.
        machine: where the model runs.
    """

    model: RuntimeModel
    text: Path
    out: Path
    quality: Quality
    machine: Machine


def write_dense_states(job: DenseJob, report: Callable[[int, int], None] | None = None) -> int:
    """Run the dense model over a text and write its states; returns the number of scored tokens.

    Args:
        job: what is run.
        report: called with (windows done, windows in all).

    Raises:
        InputError: the text is shorter than a window, or the window longer than the context.
    """
    windows_WT = quality_windows(job.model.tokenizer(), job.text, job.quality, job.model.config.max_position_embeddings)
    device = set_up_torch(job.machine)
    decoder = job.model.load(device)
    states: list[Tensor] = []
    for tokens_BT, positions_BT in passes(windows_WT, device):
        states.append(scored_states(decoder, tokens_BT, positions_BT, job.quality.stride).cpu())
        if report is not None:
            report(sum(map(len, states)), len(windows_WT))
    identity = {METADATA: json.dumps(_identity(job.model, windows_WT, job.quality))}
    with write_beside(job.out) as partial:
        save_file({"hidden": torch.cat(states)}, partial, identity)
    return len(windows_WT) * job.quality.stride


def read_dense_states(
    path: Path, model: RuntimeModel, windows_WT: np.ndarray, quality: Quality, device: torch.device
) -> Iterator[Tensor]:
    """The states of each forward pass, [B, S, C] on the device, in the order of `passes`.

    Raises:
        InputError: the file is unreadable, or of another model, text or windows.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            wanted = _identity(model, windows_WT, quality)
            if other := [name for name, value in wanted.items() if found.get(name) != value]:
                raise InputError(
                    f"quality: {path} must be of this model, text and windows, got another {', '.join(other)}: run "
                    "`sparsetrace quality-dense` again"
                )
            hidden, begin = file.get_slice("hidden"), 0
            for tokens_BT, _ in passes(windows_WT, torch.device("cpu")):
                states_BSC = hidden[begin : begin + len(tokens_BT)]
                begin += len(tokens_BT)
                # strided as `scored_states` returns them: the order of a product's sums may depend on the strides
                whole_BTC = torch.zeros(*tokens_BT.shape, states_BSC.shape[-1], dtype=states_BSC.dtype, device=device)
                yield _scored(whole_BTC, quality.stride).copy_(states_BSC)
    except (SafetensorError, OSError) as error:
        raise InputError(f"quality: {path} must be a readable file of dense states, got {error}") from None


def _identity(model: RuntimeModel, windows_WT: np.ndarray, quality: Quality) -> dict[str, object]:
    windows_hash = hashlib.sha256(windows_WT.tobytes()).hexdigest()
    return {"model_hash": model.model_hash, "windows_hash": windows_hash, "stride": quality.stride}


def quality_windows(tokenizer: Tokenizer, text: Path, quality: Quality, context: int) -> np.ndarray:
    """[W, T] int64 token ids; each window begins `stride` tokens after the one before it."""
    T = quality.context + quality.stride
    if context < T:
        raise InputError(
            f"quality: context and stride together must be at most the model's {context} positions, got {T}: lower them"
        )
    ids = tokenizer.encode(read_text(text, quality.field, "quality"), f"quality: {text}")
    starts = range(0, len(ids) - T + 1, quality.stride)[: quality.windows]
    if not starts:
        raise InputError(f"quality: {text} must hold at least one window of {T} tokens, got {len(ids)}")
    return np.array([ids[start : start + T] for start in starts], dtype=np.int64)


@torch.inference_mode()
def scored_states(decoder: Decoder, tokens_BT: Tensor, positions_BT: Tensor, stride: int) -> Tensor:
    """[B, S, C] hidden states that the last `stride` tokens of each window are predicted from."""
    return _scored(decoder(tokens_BT, positions_BT), stride)


def _scored(hidden_BTC: Tensor, stride: int) -> Tensor:
    # position t predicts token t + 1
    return hidden_BTC[:, -stride - 1 : -1]
