"""Commands that make a runtime model: demo-checkpoint, convert."""

from pathlib import Path

import click

from sparsetrace.cli.options import path_argument, path_option, settings
from sparsetrace.cli.terminal import progress
from sparsetrace.core.settings import Conversion


@click.command("demo-checkpoint")
@path_option("--out", "folder of the checkpoint; appears when it is complete")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="seed of initial weights and batches"
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads")
def demo_checkpoint(out: Path, seed: int, threads: int) -> None:
    """Train the embedded demonstration model.

    A small Llama, trained on the English text in every Python install and written as an ordinary Hugging Face
    checkpoint, with a calibration text and prompts that are held out of the training. Takes about a minute on two
    cores.
    """
    from sparsetrace.model.demo.checkpoint import make_checkpoint
    from sparsetrace.model.demo.training import Training

    with progress("training", "steps") as report:
        result = make_checkpoint(out, Training(seed=seed, threads=threads), report)
    click.echo(
        f"{out}: {result.parameters / 1e6:.2f} M parameters, {result.steps} steps in {result.seconds:.0f} s\n"
        f"validation loss {result.validation_loss:.3f} nats a token, unigram model {result.unigram_loss:.3f}: "
        f"{result.nats_below_unigram:.3f} below"
    )


@click.command()
@path_argument("checkpoint")
@path_option("--out", "folder of the runtime model; appears when it is complete")
@click.option(
    "--name", default=None, help="name of the model in data sets; name of the checkpoint's folder if not given"
)
@settings(Conversion)
def convert(checkpoint: Path, out: Path, name: str | None, conversion: Conversion) -> None:
    """Convert CHECKPOINT, a Hugging Face folder of a Llama, Mistral or Qwen3 model.

    \b
    Example:
      sparsetrace convert ~/Llama-2-7b-hf --out results/llama/model --dtype float16
    """
    from sparsetrace.model.convert import convert as run
    from sparsetrace.model.runtime import describe

    with progress("converting", "tensors") as report:
        model = run(checkpoint, out, conversion, report, name)
    click.echo(f"{describe(model)}\nmodel hash {model.model_hash}")
