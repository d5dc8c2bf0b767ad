"""What a method costs in quality, on held-out text: `quality.parquet`, beside the workload.

| column | unit | what |
|---|---|---|
| `label`, `method`, `parameters` | | the setting; the first row is the dense model |
| `target_sparsity` | fraction | of the matrices that have one, weighted by their inputs; null where none has |
| `achieved_sparsity` | fraction | zeros among the inputs of all matrices within layers at the sparsified positions |
| `tokens` | | predictions scored |
| `perplexity` | | exp of the mean negative log-likelihood |
| `kl_divergence` | nats | mean of KL(dense, method) of the next-token distribution |
| `top1_agreement` | fraction | of predictions whose likeliest token is that of the dense model |
| `context`, `stride`, `prefill` | tokens | how it was measured |

Windows as in TEAL's utils/eval_ppl.py: each holds `context` tokens and the `stride` tokens that are scored, and begins
`stride` tokens after the one before it. Of each window, the last half (`prefill: half`, TEAL's evaluation) or all of it
is sparsified. The begin token stands once, before the text. Source: github.com/FasterDecoding/TEAL 5baaec8.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sparsetrace.calibration.dense_states import quality_windows, read_dense_states, scored_states
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.calibration.windows import passes
from sparsetrace.core.files import InputError, write_beside
from sparsetrace.core.settings import Machine, Quality
from sparsetrace.methods import Dense, Method
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.patch import Patch, install
from sparsetrace.model.runtime import RuntimeModel, set_up_torch

# Shape suffixes: W windows, B windows of one pass, T tokens of a window, S scored tokens, V vocabulary.

QUALITY = pa.schema(
    [
        pa.field("label", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("parameters", pa.string(), nullable=False),
        pa.field("target_sparsity", pa.float64()),
        pa.field("achieved_sparsity", pa.float64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("perplexity", pa.float64(), nullable=False),
        pa.field("kl_divergence", pa.float64(), nullable=False),
        pa.field("top1_agreement", pa.float64(), nullable=False),
        pa.field("context", pa.int32(), nullable=False),
        pa.field("stride", pa.int32(), nullable=False),
        pa.field("prefill", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class QualityJob:
    """What is compared.

    Args:
        model: converted.
        text: held out; `.txt`, `.json` or `.jsonl`, or gzipped.
        thresholds: tables of the settings that are compared with the dense model.
        out: the table.
        quality: windows, and which part of them is sparsified.
        machine: where the model runs.
        dense: what the dense model made of the text (`sparsetrace.calibration.dense_states`); None runs it here.
    """

    model: RuntimeModel
    text: Path
    thresholds: Sequence[Path]
    out: Path
    quality: Quality
    machine: Machine
    dense: Path | None = None


class _Sums:
    """What is added up for one setting."""

    def __init__(self) -> None:
        self.nll = self.kl = 0.0
        self.agree = self.tokens = self.zeros = self.inputs = 0

    def add(self, logits_NV: Tensor, dense_NV: Tensor, ids_N: Tensor) -> None:
        """Add the scores of N predictions; the distributions in float64."""
        log_p_NV, dense_log_p_NV = (logits.double().log_softmax(-1) for logits in (logits_NV, dense_NV))
        self.nll -= float(log_p_NV.gather(-1, ids_N[:, None]).sum())
        self.kl += float((dense_log_p_NV.exp() * (dense_log_p_NV - log_p_NV)).sum())
        self.agree += int((logits_NV.argmax(-1) == dense_NV.argmax(-1)).sum())
        self.tokens += len(ids_N)

    def columns(self) -> dict[str, float]:
        """The measured columns of the table."""
        return {
            "achieved_sparsity": self.zeros / max(self.inputs, 1),
            "tokens": self.tokens,
            "perplexity": math.exp(self.nll / self.tokens),
            # rounding may leave it below zero
            "kl_divergence": max(self.kl / self.tokens, 0.0),
            "top1_agreement": self.agree / self.tokens,
        }


def measure(job: QualityJob, report: Callable[[int, int], None] | None = None) -> pa.Table:
    """Compare settings with the dense model on a text.

    Args:
        job: what is compared.
        report: called with (windows done, windows in all).

    Returns:
        `QUALITY`, the dense model first.

    Raises:
        InputError: the text is shorter than a window, the window longer than the context, a logit is not finite, or
            `dense` is of another model or text.
    """
    model, quality = job.model, job.quality
    settings = [read_thresholds(path, model) for path in job.thresholds]
    for setting in settings:
        if setting.method.needs_dense_prefill and quality.prefill == "all":
            raise InputError(f"quality: prefill must be half with method {setting.method.name}, got all")
    device = set_up_torch(job.machine)
    windows_WT = quality_windows(model.tokenizer(), job.text, quality, model.config.max_position_embeddings)
    decoder = model.load(device)
    patches = []
    for setting in settings:
        patches.append(install(decoder, setting.method, setting.rules))
        patches[-1].put(decoder, sparse=False)
    dense_sums, sums = _Sums(), [_Sums() for _ in settings]
    stored = None if job.dense is None else read_dense_states(job.dense, model, windows_WT, quality, device)
    done = 0
    for tokens_BT, positions_BT in passes(windows_WT, device):
        ids_N = tokens_BT[:, -quality.stride :].flatten()
        if stored is None:
            dense_NV = _logits(decoder, scored_states(decoder, tokens_BT, positions_BT, quality.stride))
        else:
            dense_NV = _logits(decoder, next(stored))
        dense_sums.add(dense_NV, dense_NV, ids_N)
        for setting, patch, total in zip(settings, patches, sums, strict=True):
            patch.put(decoder)
            _sparsify(patch, positions_BT, quality, total)
            logits_NV = _logits(decoder, scored_states(decoder, tokens_BT, positions_BT, quality.stride))
            patch.put(decoder, sparse=False)
            if not bool(logits_NV.isfinite().all()):
                raise InputError(
                    f"quality: logits must be finite, got Inf or NaN under {setting.label} in window {done} or the "
                    f"{len(tokens_BT) - 1} after it"
                )
            total.add(logits_NV, dense_NV, ids_N)
        done += len(tokens_BT)
        if report is not None:
            report(done, len(windows_WT))
    rows = [_row("dense", Dense(), None, dense_sums, quality)]
    for setting, total in zip(settings, sums, strict=True):
        rows.append(_row(setting.label, setting.method, setting.overall()[0], total, quality))
    table = pa.Table.from_pylist(rows, schema=QUALITY)
    with write_beside(job.out) as partial:
        pq.write_table(table, partial)
    return table


def _row(label: str, method: Method, target: float | None, sums: _Sums, quality: Quality) -> dict[str, Any]:
    return {
        "label": label,
        "method": method.name,
        "parameters": json.dumps(method.model_dump(mode="json"), sort_keys=True),
        "target_sparsity": target,
        **sums.columns(),
        **quality.model_dump(include={"context", "stride", "prefill"}),
    }


def _sparsify(patch: Patch, positions_BT: Tensor, quality: Quality, sums: _Sums) -> None:
    """Set which positions of the coming pass are sparsified, and count what their matrices read."""
    T = positions_BT.shape[1]
    first = T - T // 2 if quality.prefill == "half" else 0
    sparsified_BT = positions_BT >= first
    patch.begin()
    patch.sparsified_BT = sparsified_BT if first else True
    patch.dense_BT = ~sparsified_BT if first else None

    def see(layer: int, matrix: str, operand_BTK: Tensor) -> None:
        read = operand_BTK[:, first:]
        sums.zeros += read.numel() - int(read.count_nonzero())
        sums.inputs += read.numel()

    patch.record = see


@torch.inference_mode()
def _logits(decoder: Decoder, states_BSC: Tensor) -> Tensor:
    """[B S, V] float32: the predictions of the scored tokens of each window."""
    return decoder.logits(states_BSC).flatten(0, 1)
