"""Commands that run a model over prompts: split, dense-tokens, generate."""

from dataclasses import dataclass
from pathlib import Path

import click

from sparsetrace.cli.gpu import on_gpu
from sparsetrace.cli.options import gathered, path_argument, path_option, settings
from sparsetrace.cli.terminal import progress
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine, PromptSet, Sampling


@click.command()
@path_argument("model")
@path_option("--prompts", "prompt set: .jsonl, .json, .txt, or gzipped")
@path_option("--out", "the split prompt set (Parquet)")
@click.option("--texts", is_flag=True, help="for tokens_from text: leave no room for new tokens after a prompt")
@settings(PromptSet, Batching)
def split(model: Path, prompts: Path, out: Path, texts: bool, prompt_set: PromptSet, batching: Batching) -> None:
    """Number a prompt set for MODEL and split it into groups and shards."""
    from sparsetrace.generation.prompts import split as run
    from sparsetrace.generation.prompts import write_split
    from sparsetrace.model.runtime import open_model

    opened = open_model(model)
    context = opened.config.max_position_embeddings
    groups, skipped = run(prompts, opened.tokenizer(), context, prompt_set, batching, texts=texts)
    write_split(groups, batching.shards, out)
    sequences = sum(len(group) for group in groups)
    click.echo(f"{prompts}: {sequences} sequences in {len(groups)} groups and {batching.shards} shards")
    if skipped:
        click.echo(f"skipped {skipped} prompts longer than the context")


@click.command("dense-tokens")
@path_argument("model")
@path_option("--prompts", "the split prompt set")
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="which shard of it")
@path_option("--out", "manifest.json; the tokens are written beside it")
@settings(Sampling, Batching, Machine)
@on_gpu
def dense_tokens(
    model: Path, prompts: Path, shard: int, out: Path, sampling: Sampling, batching: Batching, machine: Machine
) -> None:
    """Continue one shard's prompts with the dense MODEL, for `generate --tokens`.

    Several settings can then be fed the same tokens. Nothing is captured. After an interruption the same command
    resumes at the first group that is not sealed.

    \b
    Example:
      sparsetrace dense-tokens results/llama/model --prompts split.parquet --out dense_tokens/00000/manifest.json
      sparsetrace generate results/llama/model --thresholds t.parquet --prompts split.parquet --tokens-from dense \
        --tokens dense_tokens/00000/manifest.json --out dump/00000/manifest.json
    """
    from sparsetrace.generation.generate import generate as run
    from sparsetrace.generation.job import Job
    from sparsetrace.model.runtime import open_model

    decoding = Decoding(**sampling.model_dump())
    job = Job(open_model(model), prompts, shard, out, decoding, batching, machine, capture=None)
    with progress("generating", "groups") as report:
        manifest = run(job, lambda done, total, _: report(done, total))
    click.echo(f"{out.parent}: tokens of {len(manifest['groups'])} groups")


@dataclass(frozen=True, slots=True)
class ShardPaths:
    """What one shard is generated from, and the manifest to write."""

    model: Path
    thresholds: Path
    prompts: Path
    shard: int
    tokens: Path | None
    out: Path


@click.command()
@path_argument("model")
@path_option("--thresholds", "threshold table of the method setting")
@path_option("--prompts", "the split prompt set")
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="which shard of it")
@click.option(
    "--tokens", type=click.Path(path_type=Path), help="manifest.json of dense-tokens; only with tokens_from dense"
)
@path_option("--out", "manifest.json of the dump; the blocks are written beside it")
@settings(Decoding, Batching, Capture, Machine)
@on_gpu
@gathered(ShardPaths, "paths")
def generate(paths: ShardPaths, decoding: Decoding, batching: Batching, capture: Capture, machine: Machine) -> None:
    """Decode one shard with MODEL under a method and dump the operand of every multiply.

    Each group of sequences is sealed when it is done. After an interruption the same command resumes at the first
    group that is not sealed.
    """
    from sparsetrace.generation.generate import generate as run
    from sparsetrace.generation.job import Job
    from sparsetrace.model.runtime import open_model
    from sparsetrace.tools.estimate import shard_warning

    job = Job(
        model=open_model(paths.model),
        prompts=paths.prompts,
        shard=paths.shard,
        out=paths.out,
        decoding=decoding,
        batching=batching,
        machine=machine,
        thresholds=paths.thresholds,
        capture=capture,
        dense_tokens=paths.tokens,
    )
    if warning := shard_warning(job):
        click.echo(f"warning: the dump of shard {job.shard} {warning}", err=True)
    with progress("generating", "groups") as report:
        manifest = run(job, lambda done, total, rows: report(done, total, f"{rows:,} tokens captured"))
    captured, matrices, groups = manifest["rows"], len(manifest["matrices"]), len(manifest["groups"])
    click.echo(f"{job.out.parent}: {captured:,} tokens captured of {matrices} matrices, in {groups} groups")
