"""What a method costs in quality, on held-out text: `quality.parquet`, beside the workload.

| column | unit | what |
|---|---|---|
| `label`, `method`, `parameters` | | the setting; the first row is the dense model |
| `target_sparsity` | fraction | of the matrices that have one, weighted by their inputs; null where none has |
| `achieved_sparsity` | fraction | zeros among what all seven matrices of all layers read at the sparsified positions |
| `tokens` | | predictions scored |
| `perplexity` | | exp of the mean negative log-likelihood |
| `kl_divergence` | nats | mean of KL(dense, method) of the next-token distribution |
| `top1_agreement` | fraction | of predictions whose likeliest token is that of the dense model |
| `context`, `stride`, `prefill` | tokens | how it was measured |

Windows as in TEAL's utils/eval_ppl.py: each holds `context` tokens and the `stride` tokens that are scored, and begins
`stride` tokens after the last; a window is one pass, of which the last half (`prefill: half`, TEAL's evaluation) or
everything is sparsified. The begin token stands once, before the text. Source: github.com/FasterDecoding/TEAL 5baaec8.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sparsetrace.calibration.calibrate import PASS_TOKENS
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.files import InputError, write_beside
from sparsetrace.core.settings import Machine, Quality
from sparsetrace.core.text import read_text
from sparsetrace.methods import Dense
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.patch import Patch, install
from sparsetrace.model.runtime import RuntimeModel, set_up_torch
from sparsetrace.model.tokenizer import Tokenizer

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


class _Sums:
    """What one setting has added up."""

    def __init__(self) -> None:
        self.nll = self.kl = 0.0
        self.agree = self.tokens = self.zeros = self.inputs = 0

    def add(self, logits_NV: Tensor, dense_NV: Tensor, ids_N: Tensor) -> None:
        """Scores of N predictions; the distributions in float64."""
        log_p_NV, dense_log_p_NV = (logits.double().log_softmax(-1) for logits in (logits_NV, dense_NV))
        self.nll -= float(log_p_NV.gather(-1, ids_N[:, None]).sum())
        self.kl += float((dense_log_p_NV.exp() * (dense_log_p_NV - log_p_NV)).sum())
        self.agree += int((logits_NV.argmax(-1) == dense_NV.argmax(-1)).sum())
        self.tokens += len(ids_N)


def measure(
    model: RuntimeModel,
    text: Path,
    thresholds: Sequence[Path],
    out: Path,
    quality: Quality,
    machine: Machine,
    report: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Compare settings with the dense model on a text.

    Args:
        model: converted.
        text: held out; `.txt`, `.json` or `.jsonl`, or gzipped.
        thresholds: tables of the settings.
        out: the table.
        quality: windows and policy.
        machine: where the model runs.
        report: called with (windows done, windows in all).

    Returns:
        `QUALITY`, the dense model first.

    Raises:
        InputError: the text is shorter than a window, the window longer than the context, or a logit is not finite.
    """
    settings = [read_thresholds(path, model) for path in thresholds]
    for setting in settings:
        if setting.method.needs_dense_prefill and quality.prefill == "all":
            raise InputError(f"quality: prefill must be half with method {setting.method.name}, got all")
    device = set_up_torch(machine)
    windows_WT = quality_windows(model.tokenizer(), text, quality, model.config.max_position_embeddings)
    decoder = model.load(device)
    patches = []
    for setting in settings:
        patches.append(install(decoder, setting.method, setting.rules))
        patches[-1].put(decoder, sparse=False)
    sums = [_Sums() for _ in (None, *settings)]
    batch = max(1, PASS_TOKENS // windows_WT.shape[1])
    for start in range(0, len(windows_WT), batch):
        tokens_BT = torch.from_numpy(windows_WT[start : start + batch]).to(device)
        ids_N = tokens_BT[:, -quality.stride :].flatten()
        dense_NV = _logits(decoder, tokens_BT, quality, None, sums[0])
        sums[0].add(dense_NV, dense_NV, ids_N)
        for setting, patch, total in zip(settings, patches, sums[1:], strict=True):
            patch.put(decoder)
            logits_NV = _logits(decoder, tokens_BT, quality, patch, total)
            patch.put(decoder, sparse=False)
            if not bool(logits_NV.isfinite().all()):
                raise InputError(
                    f"quality: logits must be finite, got Inf or NaN under {setting.label} in window {start} or the "
                    f"{len(tokens_BT) - 1} after it"
                )
            total.add(logits_NV, dense_NV, ids_N)
        if report is not None:
            report(min(start + batch, len(windows_WT)), len(windows_WT))
    named = [("dense", Dense(), None), *((s.label, s.method, s.overall()[0]) for s in settings)]
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "method": method.name,
            "parameters": json.dumps(method.model_dump(mode="json"), sort_keys=True),
            "target_sparsity": target,
            "achieved_sparsity": total.zeros / max(total.inputs, 1),
            "tokens": total.tokens,
            "perplexity": math.exp(total.nll / total.tokens),
            # rounding may leave it below zero
            "kl_divergence": max(total.kl / total.tokens, 0.0),
            "top1_agreement": total.agree / total.tokens,
            **quality.model_dump(include={"context", "stride", "prefill"}),
        }
        for (label, method, target), total in zip(named, sums, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=QUALITY)
    with write_beside(out) as partial:
        pq.write_table(table, partial)
    return table


def quality_windows(tokenizer: Tokenizer, text: Path, quality: Quality, context: int) -> np.ndarray:
    """[W, T] int64 token ids; each window begins `stride` tokens after the last."""
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
def _logits(decoder: Decoder, tokens_BT: Tensor, quality: Quality, patch: Patch | None, sums: _Sums) -> Tensor:
    """[B S, V] float32: what predicts the last `stride` tokens of each window."""
    B, T = tokens_BT.shape
    if patch is not None:
        first = T - T // 2 if quality.prefill == "half" else 0
        sparsified_BT = (torch.arange(T, device=tokens_BT.device) >= first).expand(B, T)
        patch.begin()
        patch.sparsified_BT = sparsified_BT if first else True
        patch.dense_BT = ~sparsified_BT if first else None

        def see(layer: int, matrix: str, operand_BTK: Tensor) -> None:
            read = operand_BTK[:, first:]
            sums.zeros += read.numel() - int(read.count_nonzero())
            sums.inputs += read.numel()

        patch.record = see
    positions_BT = torch.arange(T, device=tokens_BT.device).expand(B, T)
    hidden_BTC = decoder(tokens_BT, positions_BT)
    # position t predicts token t + 1
    return decoder.logits(hidden_BTC[:, -quality.stride - 1 : -1]).flatten(0, 1)
