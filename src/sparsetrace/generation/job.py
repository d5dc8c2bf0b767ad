"""What one generate job is asked to do: one shard of a prompt set under one method setting; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrace.core.settings import Batching, Capture, Decoding, Machine

if TYPE_CHECKING:
    from sparsetrace.model.runtime import RuntimeModel


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to generate.

    Args:
        model: converted.
        prompts: the split prompt set.
        shard: which part of it.
        out: `manifest.json` of the dump; everything else is written beside it.
        decoding: where tokens come from.
        batching: how sequences are multiplied together.
        machine: where the model runs.
        thresholds: the method setting, with what calibration settled; None runs the dense model.
        capture: what is kept of the operands; None captures nothing: the dump then holds the tokens alone, for other
            runs' `dense_tokens`.
        dense_tokens: with `tokens_from: dense`, the manifest of the dump that holds the dense model's tokens.
    """

    model: RuntimeModel
    prompts: Path
    shard: int
    out: Path
    decoding: Decoding
    batching: Batching
    machine: Machine
    thresholds: Path | None = None
    capture: Capture | None = field(default_factory=Capture)
    dense_tokens: Path | None = None
