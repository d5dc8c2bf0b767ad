"""Train a model of realistic width in the embedded model's way, for benchmarks of captured data.

    PYTHONPATH=src:kernels python benchmarks/trained_checkpoint.py /scratch/trained-1024

Text, tokenizer, training and files are those of `sparsetrace.model.demo`; the shape is a Llama's (heads of 64, half as
many of keys and values, an MLP of 11/4 of the hidden size), and the defaults take about a minute on one large GPU.
Without a GPU it trains on all cores, which suits small shapes.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.model.demo.checkpoint import make_checkpoint
from sparsetrace.model.demo.shape import CONFIG
from sparsetrace.model.demo.training import LONG_WINDOW, Training

HEAD = 64
# Steps between two lines of the log.
LOG_STEPS = 50


def shape(hidden: int, layers: int) -> ModelConfig:
    """A Llama of this hidden size and number of layers, with the embedded model's vocabulary and context."""
    heads = hidden // HEAD
    return replace(
        CONFIG,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD,
    )


def tell(step: int, steps: int, loss: float) -> None:
    """Log every `LOG_STEPS` steps."""
    if step % LOG_STEPS == 0:
        print(f"step {step} of {steps}: loss {loss:.3f}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=1024, help=f"a multiple of {2 * HEAD}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-tokens", type=int, default=16384, help="a multiple of the context")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.hidden < 2 * HEAD or arguments.hidden % (2 * HEAD):
        parser.error(f"--hidden must be a multiple of {2 * HEAD}, got {arguments.hidden}")
    if arguments.step_tokens < LONG_WINDOW or arguments.step_tokens % LONG_WINDOW:
        parser.error(f"--step-tokens must be a multiple of {LONG_WINDOW}, got {arguments.step_tokens}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    training = Training(
        seed=arguments.seed,
        steps=arguments.steps,
        threads=os.cpu_count() or 1,
        config=shape(arguments.hidden, arguments.layers),
        step_tokens=arguments.step_tokens,
        device=device,
    )
    made = make_checkpoint(arguments.out, training, tell)
    print(
        f"{arguments.out}: {made.parameters / 1e6:.1f} M parameters, {made.tokens / 1e6:.2f} M tokens on {device} in "
        f"{time.perf_counter() - began:.0f} s, validation loss {made.validation_loss:.3f} "
        f"({made.nats_below_unigram:.3f} nats below token frequencies)"
    )


if __name__ == "__main__":
    main()
