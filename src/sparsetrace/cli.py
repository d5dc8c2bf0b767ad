"""The `sparsetrace` command: one subcommand per step of the pipeline.

Options that carry settings are made from the sections of `sparsetrace.config`, so that the command line, config.yaml
and their checks cannot differ. Results go to standard output, progress and errors to standard error.
"""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sparsetrace import __version__
from sparsetrace.config import (
    Batching,
    Calibration,
    Conversion,
    Decoding,
    Machine,
    Packing,
    PromptSet,
    load_study,
    parse_method,
)
from sparsetrace.files import InputError

Command = TypeVar("Command", bound=Callable[..., None])
SectionType = TypeVar("SectionType", bound=BaseModel)
INTERRUPTED = 130


def main() -> None:
    """Run the command line; what a user can mend ends as one line, without a traceback."""
    # Read when torch loads OpenMP. Its idle threads spin by default: where jobs share cores, training the embedded
    # model took 88 instead of 51 CPU seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted: nothing half-written is left; the same command goes on where it can", INTERRUPTED)
    except InputError as error:
        fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        remedy = {
            errno.ENOSPC: ": free some space, then run the same command again",
            errno.EROFS: ": choose another folder",
            errno.EACCES: ": choose another folder or change its permissions",
        }.get(error.errno, "")
        fail(f"{error.filename or 'output'}: {error.strerror}{remedy}")


def fail(message: str, status: int = 1) -> None:
    """Print each line of a message as an error and leave."""
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    sys.exit(status)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line for each tenth in a log file; yields report(done, total, note)."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")
        told = 0

        def report(done: int, total: int, note: object = "") -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, note=str(note))
            if not console.is_terminal and done * 10 // max(total, 1) > told:
                told = done * 10 // max(total, 1)
                click.echo(f"{what}: {done:,} of {total:,} {unit} {note}".rstrip(), err=True)

        yield report


def settings(*sections: type[BaseModel]) -> Callable[[Command], Command]:
    """Give a command one option for each field of the sections; it receives the checked sections, by name."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            for section in sections:
                own = {name: values.pop(name) for name in section.model_fields}
                values[_snake(section.__name__)] = checked(section, own)
            command(**values)

        for section in reversed(sections):
            for name, field in reversed(section.model_fields.items()):
                run = _option(name, field)(run)
        return run  # type: ignore[return-value]

    return decorate


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _option(name: str, field: Any) -> Callable[[Any], Any]:
    flag = "--" + name.replace("_", "-")
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    annotation = kinds[0] if get_origin(field.annotation) is UnionType else field.annotation
    extra: dict[str, Any] = {"help": field.description, "default": field.default, "show_default": True}
    if annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **extra)
    if get_origin(annotation) is Literal:
        return click.option(flag, name, type=click.Choice(list(get_args(annotation))), **extra)
    if get_origin(annotation) is tuple:
        return click.option(flag, name, multiple=True, help=field.description)
    return click.option(flag, name, type=annotation, **extra)


def checked(section: type[SectionType], values: dict[str, Any]) -> SectionType:
    """A section from option values, each fault on its own line."""
    try:
        return section(**values)
    except ValidationError as error:
        lines = [
            f"--{str(item['loc'][0]).replace('_', '-')} must be valid, got {item['input']!r}: {item['msg']}"
            for item in error.errors()
        ]
        raise InputError("\n".join(lines)) from None


def path_option(name: str, text: str) -> Callable[[Command], Command]:
    """A required path."""
    return click.option(name, required=True, type=click.Path(path_type=Path), help=text)


def path_argument(name: str, **extra: Any) -> Callable[[Command], Command]:
    """A positional path."""
    return click.argument(name, type=click.Path(path_type=Path), **extra)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="sparsetrace")
def cli() -> None:
    """Real sparse workloads of language models.

    Turns a checkpoint, a sparsity method and a prompt set into a data set of the exact operand of every matrix
    multiply, for every layer, matrix and token, in Parquet.

    The steps below are what `snakemake --cores all` runs, in this order; each may be run by hand:

    \b
      demo-checkpoint   train the embedded model (only where config says `embedded`)
      convert           Hugging Face checkpoint  ->  runtime model
      calibrate         model, text              ->  exact activation histograms
      thresholds        histograms, a method     ->  threshold table
      split             prompt set               ->  shards of groups of sequences
      generate          model, thresholds, shard ->  dump of every operand
      pack              dump                     ->  Parquet parts
      index             parts                    ->  workload
      show              workload                 ->  summary
    """


@cli.command("demo-checkpoint")
@path_option("--out", "folder of the checkpoint; written beside and renamed")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of initial weights and batches")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads")
def demo_checkpoint(out: Path, seed: int, threads: int) -> None:
    """Train the embedded demonstration model.

    A small Llama on the English that every Python install carries, written as an ordinary Hugging Face checkpoint
    with its calibration text and prompts, which are held out of the training. Takes about a minute on two cores.
    """
    from sparsetrace.demo import make_checkpoint

    with progress("training", "steps") as report:
        result = make_checkpoint(out, seed=seed, threads=threads, report=report)
    click.echo(
        f"{out}: {result.parameters / 1e6:.2f} M parameters, {result.steps} steps in {result.seconds:.0f} s\n"
        f"validation loss {result.validation_loss:.3f} nats a token, unigram model {result.unigram_loss:.3f}: "
        f"{result.nats_below_unigram:.3f} below"
    )


@cli.command()
@path_argument("checkpoint")
@path_option("--out", "folder of the runtime model; written beside and renamed")
@click.option("--name", default=None, help="what data sets call the model; the checkpoint's folder name if not given")
@settings(Conversion)
def convert(checkpoint: Path, out: Path, name: str | None, conversion: Conversion) -> None:
    """Convert CHECKPOINT, a Hugging Face folder of a Llama or Mistral model.

    \b
    Example:
      sparsetrace convert ~/Llama-2-7b-hf --out results/llama/model --dtype float16
    """
    from sparsetrace.convert import convert as run
    from sparsetrace.runtime import describe

    with progress("converting", "tensors") as report:
        model = run(checkpoint, out, conversion, report, name)
    click.echo(f"{describe(model)}\nmodel hash {model.model_hash}")


@cli.command()
@path_argument("model")
@path_option("--text", "calibration text: .txt, .json, .jsonl, or gzipped")
@path_option("--out", "histogram file (safetensors)")
@settings(Calibration, Machine)
def calibrate(model: Path, text: Path, out: Path, calibration: Calibration, machine: Machine) -> None:
    """Count the exact distribution of what enters each matrix of MODEL, over a text.

    \b
    Example:
      sparsetrace calibrate results/llama/model --text wiki.txt --out results/llama/histograms.safetensors
    """
    from sparsetrace.calibrate import calibrate as run
    from sparsetrace.runtime import open_model

    with progress("calibrating", "tokens") as report:
        histograms = run(open_model(model), text, out, calibration, machine, report)
    click.echo(f"{out}: {len(histograms.counts)} histograms")


@cli.command()
@path_argument("histograms")
@click.option("--method", required=True, help="name of the method, such as teal")
@click.option("--set", "parameters", multiple=True, metavar="NAME=VALUE", help="parameter of the method, repeatable")
@click.option("--label", default=None, help="folder name of the setting; the method's own if not given")
@path_option("--out", "threshold table (Parquet)")
def thresholds(histograms: Path, method: str, parameters: tuple[str, ...], label: str | None, out: Path) -> None:
    """Look a method's target sparsity up in HISTOGRAMS and print target against achieved.

    \b
    Example:
      sparsetrace thresholds histograms.safetensors --method teal --set sparsity=0.5 --out thresholds.parquet
    """
    from sparsetrace.schema import MATRICES
    from sparsetrace.thresholds import derive_thresholds

    setting = parse_method(method, parameters, label)
    result = derive_thresholds(setting.label, setting.method, histograms, out)
    target, achieved = result.overall()
    if target is None or achieved is None:
        click.echo(f"{setting.label}: no thresholds needed")
        return
    table = Table("layer", *MATRICES, title=f"{setting.label}: share of the counted activations dropped")
    for layer in sorted({row["layer"] for row in result.rows}):
        dropped = {r["matrix"]: f"{r['calibrated_sparsity']:.4f}" for r in result.rows if r["layer"] == layer}
        table.add_row(str(layer), *(dropped[matrix] for matrix in MATRICES))
    Console().print(table)
    click.echo(f"target {target:.4f}, achieved {achieved:.4f} over all matrices, weighted by their inputs")


@cli.command()
@path_argument("model")
@path_option("--prompts", "prompt set: .jsonl, .json, .txt, or gzipped")
@path_option("--out", "the split prompt set (Parquet)")
@settings(PromptSet, Batching)
def split(model: Path, prompts: Path, out: Path, prompt_set: PromptSet, batching: Batching) -> None:
    """Number a prompt set for MODEL and split it into groups and shards."""
    from sparsetrace.prompts import split as run
    from sparsetrace.prompts import write_split
    from sparsetrace.runtime import open_model

    opened = open_model(model)
    groups, skipped = run(prompts, opened.tokenizer(), opened.config.max_position_embeddings, prompt_set, batching)
    write_split(groups, batching.shards, out)
    sequences = sum(len(group) for group in groups)
    click.echo(f"{prompts}: {sequences} sequences in {len(groups)} groups and {batching.shards} shards")
    if skipped:
        click.echo(f"skipped {skipped} prompts longer than the context")


@cli.command()
@path_argument("model")
@path_option("--thresholds", "threshold table of the method setting")
@path_option("--prompts", "the split prompt set")
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="which part of it")
@path_option("--out", "manifest.json of the dump; the blocks are written beside it")
@settings(Decoding, Batching, Machine)
def generate(
    model: Path,
    thresholds: Path,
    prompts: Path,
    shard: int,
    out: Path,
    decoding: Decoding,
    batching: Batching,
    machine: Machine,
) -> None:
    """Decode one shard with MODEL under a method and dump the operand of every multiply.

    A group of sequences is sealed when it is done; the same command after an interruption starts at the first that is
    not sealed.
    """
    from sparsetrace.generate import generate as run
    from sparsetrace.runtime import open_model

    with progress("generating", "groups") as report:
        manifest = run(
            open_model(model),
            thresholds,
            prompts,
            shard,
            out,
            decoding,
            batching,
            machine,
            lambda done, total, rows: report(done, total, f"{rows:,} tokens captured"),
        )
    rows = manifest["rows"] * len(manifest["matrices"])
    click.echo(
        f"{out.parent}: {manifest['rows']:,} tokens captured, {rows:,} rows, in {len(manifest['groups'])} groups"
    )


@cli.command()
@path_argument("dump")
@path_option("--workload", "folder of the data set")
@path_option("--out", "manifest of the packed shard, named by its number: 00000.json")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="files written at a time")
@settings(Packing)
def pack(dump: Path, workload: Path, out: Path, threads: int, packing: Packing) -> None:
    """Pack DUMP, the manifest of one shard's dump, into Parquet, and remove its blocks.

    An interrupted pack goes on after its last finished file; a finished one is left alone.
    """
    from sparsetrace.pack import pack as run

    if not re.fullmatch(r"\d+\.json", out.name):
        raise InputError(f"pack: --out must be named by the shard's number, such as 00000.json, got {out.name}")
    with progress("packing", "files") as report:
        packed = run(dump, workload, out, report, threads=threads, **packing.model_dump())
    size = sum(file["bytes"] for file in packed["files"])
    nnz = sum(file["nnz"] for file in packed["files"])
    click.echo(
        f"{workload}: {len(packed['files'])} files, {size / 1e6:.1f} MB, {size / max(nnz, 1):.3f} bytes a nonzero"
    )


@cli.command()
@path_argument("parts", nargs=-1, required=True)
@path_option("--workload", "folder of the data set")
def index(parts: tuple[Path, ...], workload: Path) -> None:
    """Merge PARTS, the manifests of all packed shards, into a finished data set."""
    from sparsetrace.pack import index as run

    run(list(parts), workload)
    click.echo(summary(workload))


@cli.command()
@path_argument("workloads", nargs=-1, required=True)
def show(workloads: tuple[Path, ...]) -> None:
    """Print a summary of WORKLOADS."""
    click.echo("\n\n".join(summary(workload) for workload in workloads))


@cli.command("check-config")
@path_argument("config")
def check_config(config: Path) -> None:
    """Check a study file and list the workloads that it makes."""
    study = load_study(config)
    for model, run, label in study.workloads():
        click.echo(f"{study.results}/{model}/{run}/{label}/workload")


def summary(workload: Path) -> str:
    """What `print(sparsetrace.open(path))` says."""
    from sparsetrace.reader import open as open_workload

    return str(open_workload(workload))


@cli.command()
def unlock() -> None:
    """Clear this folder's Snakemake lock if the run that held it is dead.

    A run is alive as long as a process of snakemake or sparsetrace works in this folder; runs on other machines that
    share the folder are not seen.
    """
    import psutil

    locks = list(Path(".snakemake/locks").glob("*.lock"))
    if not locks:
        return
    family = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    for process in psutil.process_iter(["pid", "cwd", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        ours = "snakemake" in command or "sparsetrace" in command
        if process.pid not in family and ours and process.info["cwd"] == str(Path.cwd()):
            raise InputError(
                f"unlock: the run that locked this folder must be over, got process {process.pid} ({command[:60]}): "
                "wait for it or stop it"
            )
    for lock in locks:
        lock.unlink()
    click.echo("cleared the lock of a run that was killed", err=True)
