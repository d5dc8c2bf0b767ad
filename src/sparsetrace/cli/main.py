"""The `sparsetrace` command: one subcommand per step of the pipeline.

Options that carry settings are made from the sections of `sparsetrace.study.study`, so that the command line,
config.yaml and their checks cannot differ. Results go to standard output, progress and errors to standard error.
"""

import errno
import functools
import json
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
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from sparsetrace import __version__
from sparsetrace.core.devices import claimed
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import (
    Batching,
    Calibration,
    Capture,
    Conversion,
    Decoding,
    Greedy,
    Machine,
    Packing,
    PromptSet,
    Quality,
    Sampling,
)
from sparsetrace.study.study import load_study, parse_method, parse_weight_method

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
            if item["loc"]
            else f"{_snake(section.__name__)}: {item['ctx']['error']}"
            for item in error.errors()
        ]
        raise InputError("\n".join(lines)) from None


@contextmanager
def own_gpu(machine: Machine) -> Iterator[None]:
    """Keep a GPU to this process; must be entered before torch is imported."""
    with claimed(machine.device, lambda told: click.echo(told, err=True)):
        if os.environ.get("SPARSETRACE_TUNING") and machine.device != "cpu":
            from sparsetrace.tools.tuning import refuse_own_table

            refuse_own_table()
        yield


def on_gpu(command: Command) -> Command:
    """A command that runs a model does so on a GPU of its own."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        with own_gpu(values["machine"]):
            command(**values)

    return run  # type: ignore[return-value]


def path_option(name: str, text: str) -> Callable[[Command], Command]:
    """A required path."""
    return click.option(name, required=True, type=click.Path(path_type=Path), help=text)


def path_argument(name: str, **extra: Any) -> Callable[[Command], Command]:
    """A positional path."""
    return click.argument(name, type=click.Path(path_type=Path), **extra)


class _Hexadecimal(click.ParamType[int]):
    """A number, decimal or 0x."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is not a number such as 4096 or 0x1000", param, ctx)


HEXADECIMAL = _Hexadecimal()


def selection_options(command: Command) -> Command:
    """Options that choose a part of a workload; `selected` reads them."""
    for option in (
        click.option("--phase", multiple=True, help="prefill, decode or forced; repeatable"),
        click.option("--position", default=None, help="positions START:STOP"),
        click.option("--sequence", default=None, help="sequences START:STOP"),
        click.option("--token", default=None, help="token numbers START:STOP"),
        click.option("--matrix", multiple=True, help="q, k, v, o, gate, up or down; repeatable"),
        click.option("--layer", default=None, help="layers START:STOP, or one"),
    ):
        command = option(command)
    return command


def selected(workload: Path, **chosen: Any) -> Any:
    """The part of a workload that the options choose."""
    from sparsetrace.workload.reader import open as open_workload

    for name in ("layer", "token", "sequence", "position"):
        text = chosen[name]
        if text is not None:
            if not re.fullmatch(r"\d+|\d*:\d*", text):
                raise InputError(f"--{name} must be a number or START:STOP, got {text}")
            start, colon, stop = text.partition(":")
            chosen[name] = slice(int(start or 0), int(stop) if stop else None) if colon else int(start)
    return open_workload(workload).select(**{name: value for name, value in chosen.items() if value not in (None, ())})


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
      prune             model                    ->  model with masked weights (only where config says `prune`)
      calibrate         model, text              ->  exact activation histograms
      allocate          model, histograms, text  ->  search table of one layer (only for `allocation: greedy`)
      thresholds        histograms, a method     ->  threshold table
      quality           model, thresholds, text  ->  perplexity beside the dense model's (where a text is named)
      split             prompt set               ->  shards of groups of sequences
      dense-tokens      model, shard             ->  what the dense model writes (only for `tokens_from: dense`)
      generate          model, thresholds, shard ->  dump of every operand
      pack              dump                     ->  Parquet parts
      index             parts                    ->  workload
      show              workload                 ->  summary

    \b
    Beside them:
      doctor            this machine             ->  what is missing
      tune              GPU, models or shapes    ->  table of the fastest kernel configurations
      bench             GPU, a model             ->  speed of its kernels and of decoding
      reproduce         workload                 ->  the same again from its manifest, compared
      estimate          study file               ->  rows, bytes and time, before anything runs
      verify            workload                 ->  every fault, named
      stats             workload                 ->  tables of mask statistics, beside an i.i.d. twin's
      export            workload                 ->  files of other tools
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
    from sparsetrace.model.demo import make_checkpoint

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
    from sparsetrace.model.convert import convert as run
    from sparsetrace.model.runtime import describe

    with progress("converting", "tensors") as report:
        model = run(checkpoint, out, conversion, report, name)
    click.echo(f"{describe(model)}\nmodel hash {model.model_hash}")


@cli.command()
@path_argument("model")
@click.option("--method", type=click.Choice(["magnitude", "wanda"]), required=True, help="how weights are scored")
@click.option("--set", "parameters", multiple=True, metavar="NAME=VALUE", help="sparsity or pattern")
@click.option("--text", type=click.Path(path_type=Path), help="calibration text, for wanda")
@path_option("--out", "folder of the pruned model; written beside and renamed")
@settings(Calibration, Machine)
@on_gpu
def prune(
    model: Path,
    method: str,
    parameters: tuple[str, ...],
    text: Path | None,
    out: Path,
    calibration: Calibration,
    machine: Machine,
) -> None:
    """Mask the weights of MODEL, unstructured or N:M; the result is a model like any other, with its table of masks.

    \b
    Example:
      sparsetrace prune results/llama/model --method wanda --set 'pattern="2:4"' --text wiki.txt --out pruned
    """
    from sparsetrace.calibration.weight_masks import PruneJob
    from sparsetrace.calibration.weight_masks import prune as run
    from sparsetrace.model.runtime import open_model

    weights = parse_weight_method(method, parameters)
    with progress("pruning", "layers") as report:
        pruned = run(PruneJob(open_model(model), text, out, weights, calibration, machine), report)
    click.echo(f"{out}: model hash {pruned.model_hash}")


@cli.command()
@path_argument("paths", nargs=-1, required=True)
@click.option("--merge", is_flag=True, help="add up PATHS, histogram files of one model, instead of counting")
@click.option("--text", type=click.Path(path_type=Path), help="calibration text: .txt, .json, .jsonl, or gzipped")
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="which part is counted")
@click.option("--score", "scores", multiple=True, help="method whose scores are counted too (cats, wina); repeatable")
@path_option("--out", "histogram file (safetensors)")
@settings(Calibration, Machine)
def calibrate(
    paths: tuple[Path, ...],
    merge: bool,
    text: Path | None,
    shard: int,
    scores: tuple[str, ...],
    out: Path,
    calibration: Calibration,
    machine: Machine,
) -> None:
    """Count the exact distribution of what enters each matrix of a model, over a text.

    PATHS is the model. An interrupted run goes on with the same command.

    \b
    Examples:
      sparsetrace calibrate results/llama/model --text wiki.txt --out results/llama/histograms.safetensors
      sparsetrace calibrate --merge one.safetensors two.safetensors --out both.safetensors
    """
    from sparsetrace.methods import METHODS

    if unknown := [name for name in scores if name not in METHODS or METHODS[name].score not in ("scaled", "gate")]:
        raise InputError(f"--score must be a method with scores of its own, such as cats or wina, got {unknown[0]}")
    if merge:
        from sparsetrace.calibration.merge import merge as add_up

        merged = add_up(paths, out)
        click.echo(f"{out}: {merged.tokens:,} tokens")
        return
    if len(paths) != 1 or text is None:
        raise InputError(f"calibrate: one model and --text must be given unless --merge is, got {len(paths)} paths")
    with own_gpu(machine), progress("calibrating", "tokens") as report:
        from sparsetrace.calibration.calibrate import CalibrationJob
        from sparsetrace.calibration.calibrate import calibrate as run
        from sparsetrace.model.runtime import open_model

        histograms = run(CalibrationJob(open_model(paths[0]), text, out, calibration, machine, shard, scores), report)
    click.echo(f"{out}: {len(histograms.counts)} histograms")


@cli.command()
@path_argument("model")
@path_option("--histograms", "of the model")
@path_option("--text", "calibration text")
@click.option("--layer", type=click.IntRange(min=0), required=True, help="which layer is searched")
@click.option("--method", default="teal", show_default=True, help="method with thresholds whose masks are searched for")
@path_option("--out", "search table of the layer (Parquet)")
@settings(Greedy, Machine)
@on_gpu
def allocate(
    model: Path, histograms: Path, text: Path, layer: int, method: str, out: Path, greedy: Greedy, machine: Machine
) -> None:
    """Search how one layer of MODEL is best sparsified, for `allocation: greedy`.

    TEAL's rule: the matrix whose next step raises the error of the layer's output least takes it. Every sparsity up to
    0.9 is looked up in the table afterwards. An interrupted search goes on with the same command.
    """
    from sparsetrace.calibration.greedy import SearchJob
    from sparsetrace.calibration.greedy import allocate as run
    from sparsetrace.calibration.search_table import read_search_table
    from sparsetrace.methods import METHODS, ThresholdMethod
    from sparsetrace.model.runtime import open_model

    kind = METHODS.get(method)
    if kind is None or not issubclass(kind, ThresholdMethod):
        known = [name for name, one in METHODS.items() if issubclass(one, ThresholdMethod)]
        raise InputError(f"--method must be one of {', '.join(known)}, which have thresholds per matrix, got {method}")
    with progress(f"layer {layer}", "% sparsity") as report:
        job = SearchJob(open_model(model), histograms, text, layer, out, kind, greedy, machine)
        run(job, lambda reached, of: report(int(100 * reached), int(100 * of)))
    _, table = read_search_table(out)
    click.echo(f"{out}: {len(table.error)} rows, {len(table.worse_than_uniform())} of them worse than uniform")


@cli.command()
@path_argument("histograms")
@click.option("--method", required=True, help="name of the method, such as teal")
@click.option("--set", "parameters", multiple=True, metavar="NAME=VALUE", help="parameter of the method, repeatable")
@click.option("--label", default=None, help="folder name of the setting; the method's own if not given")
@click.option(
    "--table", "tables", multiple=True, type=click.Path(path_type=Path), help="search table of a layer; repeatable"
)
@path_option("--out", "threshold table (Parquet)")
def thresholds(
    histograms: Path,
    method: str,
    parameters: tuple[str, ...],
    label: str | None,
    tables: tuple[Path, ...],
    out: Path,
) -> None:
    """Look a method's target sparsity up in HISTOGRAMS and print target against achieved.

    \b
    Example:
      sparsetrace thresholds histograms.safetensors --method teal --set sparsity=0.5 --out thresholds.parquet
    """
    from sparsetrace.calibration.derive import derive_thresholds
    from sparsetrace.formats.schema import MATRICES

    setting = parse_method(method, parameters, label)
    result = derive_thresholds(setting.label, setting.method, histograms, out, tables)
    for note in result.notes:
        click.echo(note)
    target, achieved = result.overall()
    if not setting.method.needs_thresholds:
        click.echo(f"{setting.label}: no thresholds needed")
        return
    table = Table("layer", *MATRICES, title=f"{setting.label}: share of the counted activations dropped")
    for layer in sorted({row["layer"] for row in result.rows}):
        dropped = {
            r["matrix"]: "-" if r["calibrated_sparsity"] is None else f"{r['calibrated_sparsity']:.4f}"
            for r in result.rows
            if r["layer"] == layer
        }
        table.add_row(str(layer), *(dropped[matrix] for matrix in MATRICES))
    Console().print(table)
    if target is not None and achieved is not None:
        click.echo(f"target {target:.4f}, achieved {achieved:.4f} over all matrices, weighted by their inputs")


@cli.command()
@path_argument("model")
@path_option("--prompts", "prompt set: .jsonl, .json, .txt, or gzipped")
@path_option("--out", "the split prompt set (Parquet)")
@click.option("--texts", is_flag=True, help="for tokens_from text: leave no room behind a prompt for new tokens")
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


@cli.command()
@path_argument("model")
@path_option("--thresholds", "threshold table of the method setting")
@path_option("--prompts", "the split prompt set")
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="which part of it")
@click.option(
    "--tokens", type=click.Path(path_type=Path), help="manifest.json of dense-tokens, with tokens_from dense alone"
)
@path_option("--out", "manifest.json of the dump; the blocks are written beside it")
@settings(Decoding, Batching, Capture, Machine)
@on_gpu
def generate(
    model: Path,
    thresholds: Path,
    prompts: Path,
    shard: int,
    tokens: Path | None,
    out: Path,
    decoding: Decoding,
    batching: Batching,
    capture: Capture,
    machine: Machine,
) -> None:
    """Decode one shard with MODEL under a method and dump the operand of every multiply.

    A group of sequences is sealed when it is done; the same command after an interruption starts at the first that is
    not sealed.
    """
    from sparsetrace.generation.generate import generate as run
    from sparsetrace.generation.job import Job
    from sparsetrace.model.runtime import open_model
    from sparsetrace.tools.estimate import shard_warning

    job = Job(
        model=open_model(model),
        prompts=prompts,
        shard=shard,
        out=out,
        decoding=decoding,
        batching=batching,
        machine=machine,
        thresholds=thresholds,
        capture=capture,
        dense_tokens=tokens,
    )
    if warning := shard_warning(job):
        click.echo(f"warning: the dump of shard {shard} {warning}", err=True)
    with progress("generating", "groups") as report:
        manifest = run(job, lambda done, total, rows: report(done, total, f"{rows:,} tokens captured"))
    rows = manifest["rows"] * len(manifest["matrices"])
    click.echo(
        f"{out.parent}: {manifest['rows']:,} tokens captured, {rows:,} rows, in {len(manifest['groups'])} groups"
    )


@cli.command("dense-tokens")
@path_argument("model")
@path_option("--prompts", "the split prompt set")
@click.option("--shard", type=click.IntRange(min=0), default=0, show_default=True, help="which part of it")
@path_option("--out", "manifest.json; the tokens are written beside it")
@settings(Sampling, Batching, Machine)
@on_gpu
def dense_tokens(
    model: Path, prompts: Path, shard: int, out: Path, sampling: Sampling, batching: Batching, machine: Machine
) -> None:
    """Let MODEL as it is continue one shard's prompts, for `generate --tokens` under several settings.

    Nothing is captured. The same command after an interruption starts at the first group that is not sealed.

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
    from sparsetrace.packing.pack import pack as run

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
@click.option("--weight-masks", type=click.Path(path_type=Path), help="table of the pruned model, if the run used one")
@click.option("--study", default=None, help="JSON of the part of the study file that made it, kept in the manifest")
def index(parts: tuple[Path, ...], workload: Path, weight_masks: Path | None, study: str | None) -> None:
    """Merge PARTS, the manifests of all packed shards, into a finished data set."""
    from sparsetrace.packing.pack import index as run

    try:
        content = None if study is None else json.loads(study)
    except json.JSONDecodeError as error:
        raise InputError(f"index: --study must be JSON, got {error}") from None
    run(list(parts), workload, weight_masks, study=content)
    click.echo(summary(workload))


@cli.command()
@path_argument("workloads", nargs=-1, required=True)
def show(workloads: tuple[Path, ...]) -> None:
    """Print a summary of WORKLOADS."""
    click.echo("\n\n".join(summary(workload) for workload in workloads))


@cli.command()
@path_argument("workload")
@click.option("--recompute", type=click.IntRange(min=1), default=None, help="sequences to run again and compare")
@click.option(
    "--model", type=click.Path(path_type=Path), default=None, help="folder of the runtime model, to recompute"
)
@settings(Machine)
def verify(workload: Path, recompute: int | None, model: Path | None, machine: Machine) -> None:
    """Check WORKLOAD: hashes, schema, completeness, counts, values, thresholds; exit status 1 if a fault is found.

    \b
    Example:
      sparsetrace verify results/demo/default/teal-0.5/workload
      sparsetrace verify results/demo/default/teal-0.5/workload --recompute 4 --model results/demo/model
    """
    from sparsetrace.workload.verify import verify as run

    if recompute is not None and model is None:
        raise InputError("verify: --model must be given with --recompute, got none: name the runtime model")
    with progress("verifying", "files") as report:
        faults = [str(fault) for fault in run(workload, report)]
    if recompute is not None and model is not None and not faults:
        with own_gpu(machine), progress("recomputing", "groups") as report:
            from sparsetrace.tools.recompute import recompute as run_again

            faults = [str(fault) for fault in run_again(workload, model, recompute, machine, report)]
    if faults:
        fail("\n".join(faults))
    click.echo(f"{workload}: no fault found")


@cli.command()
@path_argument("workload")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="folder of the tables; WORKLOAD/stats if none"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the i.i.d. twin")
@click.option("--tile", "tiles", type=click.IntRange(min=1), multiple=True, help="tile width for load imbalance")
@selection_options
def stats(workload: Path, out: Path | None, seed: int, tiles: tuple[int, ...], **chosen: Any) -> None:
    """Statistics of the masks of WORKLOAD, each beside its i.i.d. twin's, as Parquet tables.

    \b
    Example:
      sparsetrace stats results/demo/default/teal-0.5/workload --phase decode
    """
    from sparsetrace.workload.stats import TILES, statistics, summary

    ds = selected(workload, **chosen)
    folder = workload / "stats" if out is None else out
    with progress("counting", "matrices") as report:
        tables = statistics(ds, folder, seed, tiles or TILES, report)
    table = Table("figure", "real", "i.i.d. twin", title=f"{folder}: mean over layers and matrices")
    for name, real, twin in summary(tables):
        table.add_row(name, f"{real:.4f}", f"{twin:.4f}")
    Console().print(table)


@cli.command()
@path_argument("workload")
@click.option(
    "--format",
    "form",
    required=True,
    help="mtx, smtx, npz, safetensors, npy, bitmask, density, ramulator, dramsim3 or libcachesim; see docs/export.md",
)
@path_option("--out", "folder of the files, LNN.matrix.suffix each")
@click.option("--twin", type=click.IntRange(min=0), default=None, help="export the i.i.d. twin of this seed instead")
@click.option("--base", type=HEXADECIMAL, default="0", help="traces: address of the first weight row")
@click.option("--stride", type=click.IntRange(min=1), default=None, help="traces: bytes between weight rows")
@click.option("--line", type=click.IntRange(min=1), default=64, show_default=True, help="traces: bytes of an access")
@click.option(
    "--bundle", type=click.IntRange(min=1), default=1, show_default=True, help="traces: rows fetched together"
)
@click.option("--cycles", type=click.IntRange(min=0), default=1, show_default=True, help="traces: between two accesses")
@click.option("--tile", type=click.IntRange(min=1), default=64, show_default=True, help="density: inputs of a tile")
@selection_options
def export(
    workload: Path,
    form: str,
    out: Path,
    twin: int | None,
    base: int,
    stride: int | None,
    line: int,
    bundle: int,
    cycles: int,
    tile: int,
    **chosen: Any,
) -> None:
    """Write a slice of WORKLOAD in the format of another tool, one file for each layer and matrix.

    \b
    Example:
      sparsetrace export results/demo/default/teal-0.5/workload --format smtx --layer 0 --matrix down --out smtx
    """
    from sparsetrace.workload.export import FORMS, Layout
    from sparsetrace.workload.export import export as run

    if form not in FORMS:
        raise InputError(f"export: --format must be one of {', '.join(FORMS)}, got {form}")
    ds = selected(workload, **chosen)
    if not ds.leaves:
        raise InputError(f"export: the selection must hold a layer and matrix that {workload} captured, got none")
    ds = ds if twin is None else ds.twin(twin)
    layout = Layout(base, stride, line, bundle, cycles)
    for layer, matrix in ds.leaves:
        path = out / f"L{layer:02d}.{matrix}{FORMS[form].suffix}"
        run(ds, layer, matrix, form, path, layout, tile)
        click.echo(path)


@cli.command()
@path_argument("config")
@settings(Machine)
def estimate(config: Path, machine: Machine) -> None:
    """Print the rows, bytes and time that a study file asks for, before it is run.

    \b
    Example:
      sparsetrace estimate config.yaml
    """
    from sparsetrace.tools.estimate import estimate as run
    from sparsetrace.tools.estimate import too_small

    study = load_study(config)
    # a name that is cut short tells no two settings apart
    name = Column("workload", overflow="fold")
    table = Table(name, "tokens", "rows", "dump", "workload on disk", "time", title=str(config))
    rows = run(study, machine)
    for row in rows:
        sizes = (f"{size / 1e9:.3g} GB" for size in (row.sizes.dump_bytes, row.sizes.workload_bytes))
        table.add_row(row.name, f"{row.sizes.tokens:,}", f"{row.sizes.rows:,}", *sizes, f"{row.seconds / 60:.3g} min")
        for note in row.notes:
            click.echo(f"{row.name}: {note}", err=True)
    # a dump is removed as it is packed, so that the data sets alone add up
    largest, kept = max(row.sizes.dump_bytes for row in rows), sum(row.sizes.workload_bytes for row in rows)
    if warning := too_small(Path(study.results), largest + kept):
        click.echo(f"all {len(rows)} workloads, with the largest dump beside them: {warning}", err=True)
    if len(rows) > 1:
        total = sum(row.sizes.rows for row in rows)
        minutes = sum(row.seconds for row in rows) / 60
        sums = (f"{sum(row.sizes.tokens for row in rows):,}", f"{total:,}", "", f"{kept / 1e9:.3g} GB")
        table.add_row("all", *sums, f"{minutes:.3g} min")
    Console().print(table)


@cli.command()
@path_argument("model")
@click.option(
    "--thresholds", "tables", required=True, multiple=True, type=click.Path(path_type=Path), help="table; repeatable"
)
@path_option("--text", "held-out text: .txt, .json, .jsonl, or gzipped")
@path_option("--out", "table of the measurement (Parquet)")
@settings(Quality, Machine)
@on_gpu
def quality(model: Path, tables: tuple[Path, ...], text: Path, out: Path, quality: Quality, machine: Machine) -> None:
    """Measure what each method setting costs MODEL in quality, on held-out text, beside the dense model.

    Perplexity, KL divergence of the next token from the dense model's, and share of predictions that agree on the
    likeliest token; in windows as TEAL's evaluation takes them.
    """
    from sparsetrace.calibration.quality import QualityJob, measure
    from sparsetrace.model.runtime import open_model

    with progress("measuring quality", "windows") as report:
        rows = measure(QualityJob(open_model(model), text, tables, out, quality, machine), report).to_pylist()
    shown = Table("setting", "target", "achieved", "perplexity", "KL (nats)", "top-1 agreement")
    for row in rows:
        target = "-" if row["target_sparsity"] is None else f"{row['target_sparsity']:.4f}"
        numbers = [f"{row[name]:.4f}" for name in ("perplexity", "kl_divergence", "top1_agreement")]
        shown.add_row(row["label"], target, f"{row['achieved_sparsity']:.4f}", *numbers)
    Console().print(shown)
    click.echo(f"{rows[0]['tokens']:,} tokens, context {quality.context}, prefill {quality.prefill}")


@cli.command("import-teal")
@path_argument("histograms")
@click.option(
    "--config", required=True, type=click.Path(path_type=Path), help="config.json of the model, as on Hugging Face"
)
@click.option("--sparsity", required=True, type=float, help="target fraction of inputs dropped, 0 <= s < 1")
@click.option(
    "--rule",
    type=click.Choice(["teal", "magnitude"]),
    default="teal",
    show_default=True,
    help="teal: the signed quantile at 0.5 + s/2, as TEAL's code; magnitude: the quantile of |x|, same histogram",
)
@click.option(
    "--lookup", type=click.Path(path_type=Path), help="folder of TEAL's search tables, for greedy targets; else uniform"
)
@click.option(
    "--lost",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="activations that a histogram may lack of a whole number of vectors",
)
@path_option("--out", "threshold file (Parquet), for `allocation: {file: ...}`")
def import_teal(
    histograms: Path, config: Path, sparsity: float, rule: str, lookup: Path | None, lost: int, out: Path
) -> None:
    """Read thresholds out of TEAL's published HISTOGRAMS, a folder of layer-N/{self_attn,mlp}/histograms.pt.

    Files that cannot be of the model of CONFIG are refused: every site must have counted a whole number of vectors of
    its width, the same number everywhere.

    \b
    Example:
      sparsetrace import-teal TEAL/models/Llama-2-7B/histograms --config Llama-2-7b-hf/config.json --sparsity 0.5 \
        --out teal-0.5.parquet
    """
    from sparsetrace.calibration.teal_files import import_teal as run
    from sparsetrace.calibration.teal_files import read_lookup
    from sparsetrace.formats.schema import MATRICES

    table = run(histograms, config, sparsity, out, rule, lookup, lost).to_pylist()  # type: ignore[arg-type]
    shown = Table("layer", *MATRICES, title="share of the published histogram that each threshold drops")
    for layer in sorted({row["layer"] for row in table}):
        implied = {row["matrix"]: f"{row['implied_sparsity']:.4f}" for row in table if row["layer"] == layer}
        shown.add_row(str(layer), *(implied[matrix] for matrix in MATRICES))
    Console().print(shown)
    if lookup is not None:
        losses = {
            layer: len(found.worse_than_uniform())
            for layer, found in read_lookup(lookup, len(shown.rows)).items()
            if found.worse_than_uniform()
        }
        click.echo(f"the published search loses to uniform in {sum(losses.values())} rows; layers: {list(losses)}")
    click.echo(f"{out}: {len(table)} thresholds")


@cli.command("check-config")
@path_argument("config")
def check_config(config: Path) -> None:
    """Check a study file and list the workloads that it makes."""
    study = load_study(config)
    for model, run, label in study.workloads():
        click.echo(f"{study.results}/{model}/{run}/{label}/workload")


def summary(workload: Path) -> str:
    """What `print(sparsetrace.open(path))` says."""
    from sparsetrace.workload.reader import open as open_workload

    return str(open_workload(workload))


@cli.command()
@path_argument("workload")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="keep everything in this folder; removed if not given"
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    default=Path(),
    help="folder that the study was run in; here if not given",
)
def reproduce(workload: Path, out: Path | None, base: Path) -> None:
    """Make WORKLOAD again from its manifest alone and compare every file; exit status 1 if one differs.

    The checkpoint, the texts and the prompts must lie where they lay; their hashes are compared too.

    \b
    Example:
      sparsetrace reproduce results/demo/default/teal-0.5/workload
    """
    from tempfile import TemporaryDirectory

    from sparsetrace.tools.reproduce import reproduce as run

    with TemporaryDirectory(prefix=".reproduce-", dir=".") as temporary:
        result = run(workload, out or Path(temporary), base, lambda line: click.echo(line, err=True))
    for note in result.notes:
        click.echo(note)
    total = len(result.equal) + len(result.different)
    click.echo(f"{workload}: {len(result.equal)} of {total} files have the same bytes")
    if result.different:
        fail("\n".join(f"reproduce: {path} must have the bytes it had, got others" for path in result.different))


@cli.command()
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="of a study"
)
def doctor(results: Path) -> None:
    """Check this machine: driver, torch, triton, disk, scheduler; exit status 1 if nothing would work."""
    from sparsetrace.tools.doctor import examine

    table = Table("what", "found", "missing")
    findings = []
    for finding in examine(results):
        findings.append(finding)
        table.add_row(finding.what, escape(finding.found), escape(finding.missing or ""))
    Console().print(table)
    if wrong := [f"doctor: {f.what}: {f.missing}" for f in findings if f.missing and f.needed]:
        fail("\n".join(wrong))


@cli.command()
@path_argument("models", nargs=-1)
@click.option("--shape", "shapes", multiple=True, metavar="KxN", help="inputs x outputs of a multiply; repeatable")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16"]), default=None, help="the models', or float16, if not given"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="table file; one named after the GPU in this user's configuration folder if not given",
)
def tune(models: tuple[Path, ...], shapes: tuple[str, ...], dtype: str | None, out: Path | None) -> None:
    """Measure which configurations of the sparse kernels are fastest on this GPU for the shapes of MODELS.

    Takes minutes a shape. The table is used where the environment variable SPARSETRACE_TUNING names it, in place of
    the one that comes with the package, and its hash is in the manifest of what it helped to make; nothing else
    changes but the order in which sums are added up.

    \b
    Examples:
      sparsetrace tune results/llama/model
      sparsetrace tune --shape 4096x12288 --shape 4096x4096 --out my-gpu.json
    """
    with claimed("cuda", lambda told: click.echo(told, err=True)):
        from sparsetrace.model.runtime import open_model
        from sparsetrace.tools.tuning import choose_dtype, gpu_name, parse_shape, site_shapes
        from sparsetrace.tools.tuning import tune as run

        opened = [open_model(model) for model in models]
        wanted = [*(shape for one in opened for shape in site_shapes(one.config).values()), *map(parse_shape, shapes)]
        folder = Path(click.get_app_dir("sparsetrace", force_posix=False))
        click.echo(f"tuning for {gpu_name('tune')}", err=True)
        with progress("tuning", "steps") as report:
            path, entries = run(wanted, choose_dtype(opened, dtype), out, folder, report)
    click.echo(f"{path}: {entries} entries\nto use it: export SPARSETRACE_TUNING={path.absolute()}")


@cli.command()
@path_argument("model")
@click.option(
    "--sparsity", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True, help="inputs dropped"
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 64),
    show_default=True,
    help="sequences at a time; repeatable",
)
@click.option("--new", type=click.IntRange(min=2), default=128, show_default=True, help="tokens of each sequence")
@click.option("--groups", type=click.IntRange(min=1), default=2, show_default=True, help="timed, after one that is not")
@click.option("--kernels/--no-kernels", default=True, show_default=True, help="the table of the kernels")
@click.option("--decoding/--no-decoding", default=True, show_default=True, help="the table of decoding")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=Path(),
    help="takes the dump meanwhile; here if not given",
)
def bench(
    model: Path,
    sparsity: float,
    batches: tuple[int, ...],
    new: int,
    groups: int,
    kernels: bool,
    decoding: bool,
    scratch: Path,
) -> None:
    """Time the kernels and decoding on this GPU, for the shapes of MODEL.

    Weights are MODEL's, prompts are random, thresholds are taken from the activations on random tokens. The floor is
    one launch that reads the bytes needed and does nothing else.

    \b
    Example:
      sparsetrace bench results/llama/model --sparsity 0.5 --batch 1 --batch 64
    """
    from tempfile import TemporaryDirectory

    with own_gpu(Machine()):
        import torch

        from sparsetrace.model.runtime import open_model
        from sparsetrace.tools.bench import decode_rows, kernel_rows
        from sparsetrace.tools.tuning import gpu_name

        opened, gpu = open_model(model), gpu_name("bench")
        device = torch.device("cuda", torch.cuda.current_device())
        if kernels:
            table = Table("site", "inputs x outputs", "kernel", "us", "of the floor")
            table.title = f"{gpu}: multiplies of one layer of {opened.source}, {sparsity:.0%} of the inputs dropped"
            for row in kernel_rows(opened.config, sparsity, device):
                table.add_row(row.site, f"{row.K} x {row.N}", row.impl, f"{row.us:.1f}", f"{row.floor_share:.0%}")
            Console().print(table)
        if decoding:
            table = Table("batch", "method", "operands", "tokens/s", "bytes a token")
            table.title = f"{gpu}: decoding {opened.source}"
            with TemporaryDirectory(prefix=".bench-", dir=scratch) as folder:
                for one in decode_rows(opened, sparsity, batches, new, groups, Path(folder), device):
                    size = f"{one.bytes_per_token:,.0f}" if one.bytes_per_token else "-"
                    table.add_row(str(one.batch), one.method, one.sink, f"{one.tokens_per_s:,.1f}", size)
            Console().print(table)


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
