"""Training the embedded model from scratch, and measuring what came of it."""

# Shape suffixes: B batch, T tokens, V vocabulary.

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.demo.muon import Muon
from sparsetrace.model.demo.shape import CONFIG

# Many short windows teach faster than few long ones (by 0.07 nats a token at 128 and 256); the last steps then teach
# the whole context.
SHORT_WINDOW, LONG_WINDOW = 128, CONFIG.max_position_embeddings
SHORT_SHARE = 0.75
# Share of the steps in which the learning rate rises.
WARMUP = 0.05
INIT_STD, EMBEDDING_STD = 0.02, 0.2
# Needed for quality, not for stability: otherwise equal runs without it ended 0.6 nats a token worse.
MAX_GRADIENT_NORM = 1.0
ADAM_LEARNING_RATE = 8e-3
ADAM_BETAS = (0.9, 0.95)
MUON_LEARNING_RATE = 0.02


@dataclass(frozen=True, slots=True)
class Training:
    """How a model is trained.

    Args:
        seed: of the initial weights and of the order of the text.
        steps: optimiser steps.
        threads: torch's threads meanwhile; sums depend on their number.
        config: shape of the model; vocabulary and context must be the embedded model's.
        step_tokens: tokens per step.
        device: `cpu`, or `cuda`, which multiplies in bfloat16 and need not repeat itself bit for bit.
    """

    seed: int = 0
    steps: int = 400
    threads: int = 2
    config: ModelConfig = CONFIG
    step_tokens: int = 1024
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "threads"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"demo: {name} must be at least 1, got {value}")


def train(
    documents: list[Tensor], training: Training, report: Callable[[int, int, float], None] | None = None
) -> Decoder:
    """Train from scratch: Muon for the matrices, AdamW for embedding and norms, warm-up and cosine decay for both.

    On this text and in equal time, AdamW alone ended 0.4 nats a token worse.

    Args:
        documents: token ids of each.
        training: how.
        report: called after each step with the step, the number of steps and the step's training loss.
    """
    steps, device = training.steps, torch.device(training.device)
    generator = torch.Generator().manual_seed(training.seed)
    model = Decoder(training.config)
    # drawn on the host, so that every device starts from the same weights
    initialise(model, generator)
    model.to(device)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [model.embedding, *(p for p in model.parameters() if p.ndim == 1)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0, fused=True)
    warmup = max(1, round(WARMUP * steps))
    for step, ids_BT in enumerate(_batches(documents, steps, generator, training.step_tokens), start=1):
        decay = max(0, step - 1 - warmup) / max(1, steps - warmup)
        factor = min(1.0, step / warmup) * (1 + math.cos(math.pi * decay)) / 2
        ids_BT = ids_BT.to(device)
        B, T = ids_BT[:, :-1].shape
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits_BTV = model.logits(model(ids_BT[:, :-1], torch.arange(T, device=device).expand(B, -1)))
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for group in adam.param_groups:
            group["lr"] = ADAM_LEARNING_RATE * factor
        adam.step()
        muon.step(MUON_LEARNING_RATE * factor)
        if report is not None:
            report(step, steps, loss.item())
    return model


@torch.no_grad()
def initialise(model: Decoder, generator: torch.Generator) -> None:
    """Draw matrices from normal distributions; those that write to the residual stream are scaled down by its depth."""
    model.embedding.normal_(0.0, EMBEDDING_STD, generator=generator)
    residual = math.sqrt(2 * len(model.layers))
    for name, parameter in model.layers.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("attn_out.weight", "mlp_mid.weight"))
            parameter.normal_(0.0, INIT_STD / residual if writes else INIT_STD, generator=generator)


def _batches(documents: list[Tensor], steps: int, generator: torch.Generator, step_tokens: int) -> Iterator[Tensor]:
    """The text cut into windows, [B, T + 1] for each step; each pass over the documents shuffles them anew."""
    ids = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        T = SHORT_WINDOW if step < SHORT_SHARE * steps else LONG_WINDOW
        B = step_tokens // T
        while len(ids) < B * (T + 1):
            order = torch.randperm(len(documents), generator=generator).tolist()
            ids = torch.cat([ids, *(documents[i] for i in order)])
        yield ids[: B * (T + 1)].view(B, T + 1)
        ids = ids[B * (T + 1) :]


@torch.no_grad()
def evaluate(model: Decoder, ids_T: Tensor) -> float:
    """Mean loss over all tokens of a text but the first, in windows of the whole context; nats."""
    total = 0.0
    for start in range(0, len(ids_T) - 1, LONG_WINDOW):
        ids = ids_T[start : start + LONG_WINDOW + 1]
        logits_TV = model.logits(model(ids[None, :-1], torch.arange(len(ids) - 1, device=ids.device)[None]))[0]
        total += functional.cross_entropy(logits_TV, ids[1:], reduction="sum").item()
    return total / (len(ids_T) - 1)


def unigram_loss(train_ids: Tensor, target_ids: Tensor) -> float:
    """Mean loss of predicting by the training text's token frequencies, with add-one smoothing; nats."""
    counts_V = torch.bincount(train_ids, minlength=CONFIG.vocab_size).double() + 1
    return -(counts_V / counts_V.sum()).log()[target_ids].mean().item()
