"""Commands beside the pipeline: check-config, estimate, reproduce, doctor, unlock, tune, bench."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sparsetrace.cli.gpu import claimed_gpu, own_gpu
from sparsetrace.cli.options import gathered, path_argument, settings
from sparsetrace.cli.terminal import fail, progress
from sparsetrace.core.settings import Machine

if TYPE_CHECKING:
    import torch

    from sparsetrace.model.runtime import RuntimeModel


@click.command("check-config")
@path_argument("config")
def check_config(config: Path) -> None:
    """Check a study file, what it names, and this machine, and list the workloads that it makes.

    Takes seconds: the descriptions of checkpoints, the texts and the prompts are read, but no weights.
    """
    from sparsetrace.study.study import load_study

    study = load_study(config)
    from sparsetrace.tools.preflight import preflight

    if faults := preflight(study):
        fail("\n".join(f"{config}: {fault}" for fault in faults))
    for model, run, label in study.workloads():
        click.echo(f"{study.results}/{model}/{run}/{label}/workload")


@click.command()
@path_argument("config")
@settings(Machine)
def estimate(config: Path, machine: Machine) -> None:
    """Print the rows, bytes and time that a study file asks for, before it is run.

    \b
    Example:
      sparsetrace estimate config.yaml
    """
    from sparsetrace.study.study import load_study
    from sparsetrace.tools.estimate import estimate as run
    from sparsetrace.tools.estimate import too_small

    study = load_study(config)
    # names of settings differ at their ends, so they are wrapped, not cut
    name = Column("workload", overflow="fold")
    table = Table(name, "tokens", "rows", "dump", "workload on disk", "time", title=str(config))
    estimates = run(study, machine)
    for one in estimates:
        sizes = (f"{size / 1e9:.3g} GB" for size in (one.sizes.dump_bytes, one.sizes.workload_bytes))
        table.add_row(one.name, f"{one.sizes.tokens:,}", f"{one.sizes.rows:,}", *sizes, f"{one.seconds / 60:.3g} min")
        for note in one.notes:
            click.echo(f"{one.name}: {note}", err=True)
    # a dump is removed once it is packed, so only the data sets add up
    largest_dump = max(one.sizes.dump_bytes for one in estimates)
    workloads = sum(one.sizes.workload_bytes for one in estimates)
    if warning := too_small(Path(study.results), largest_dump + workloads):
        click.echo(f"all {len(estimates)} workloads, with the largest dump beside them: {warning}", err=True)
    if len(estimates) > 1:
        tokens, rows = sum(one.sizes.tokens for one in estimates), sum(one.sizes.rows for one in estimates)
        minutes = sum(one.seconds for one in estimates) / 60
        table.add_row("all", f"{tokens:,}", f"{rows:,}", "", f"{workloads / 1e9:.3g} GB", f"{minutes:.3g} min")
    Console().print(table)


@click.command()
@path_argument("workload")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="keep everything in this folder; removed if not given"
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    default=Path(),
    help="folder that the study was run in; the current folder if not given",
)
@click.option("--outside", is_flag=True, help="let the study read files that do not lie in --base")
def reproduce(workload: Path, out: Path | None, base: Path, outside: bool) -> None:
    """Make WORKLOAD again from its manifest alone and compare every file; exit status 1 if one differs.

    The checkpoint, the texts and the prompts must still be where they were; their hashes are compared too. The study is
    shown before it runs.

    \b
    Example:
      sparsetrace reproduce results/demo/default/teal-0.5/workload
    """
    from tempfile import TemporaryDirectory

    from sparsetrace.tools.reproduce import reproduce as run

    with TemporaryDirectory(prefix=".reproduce-", dir=".") as temporary:
        result = run(workload, out or Path(temporary), base, lambda line: click.echo(line, err=True), outside=outside)
    for note in result.notes:
        click.echo(note)
    total = len(result.equal) + len(result.different)
    click.echo(f"{workload}: {len(result.equal)} of {total} files have the same bytes")
    if result.different:
        fail("\n".join(f"reproduce: {path} must have the bytes it had, got others" for path in result.different))


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="results folder of a study",
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


@click.command()
def unlock() -> None:
    """Clear this folder's Snakemake lock if the run that held it is dead.

    A run counts as alive while a process of snakemake or sparsetrace works in this folder. Runs on other machines that
    share the folder are not seen.
    """
    from sparsetrace.tools.unlock import unlock as run

    if run(Path.cwd()):
        click.echo("cleared the lock of a run that was killed", err=True)


@click.command()
@path_argument("models", nargs=-1)
@click.option("--shape", "shapes", multiple=True, metavar="KxN", help="inputs x outputs of a multiply; repeatable")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    default=None,
    help="number format; that of MODELS, or float16, if not given",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="table file; if not given, one named after the GPU in the user's configuration folder",
)
def tune(models: tuple[Path, ...], shapes: tuple[str, ...], dtype: str | None, out: Path | None) -> None:
    """Measure which configurations of the engine's sparse kernel are fastest on this GPU for the shapes of MODELS.

    Takes minutes per shape. A table that the environment variable SPARSETRACE_TUNING names is used in place of the one
    that comes with the package, and the manifest of each data set records its hash. It changes the order in which sums
    are added up, and nothing else in the results.

    \b
    Examples:
      sparsetrace tune results/llama/model
      sparsetrace tune --shape 4096x12288 --shape 4096x4096 --out my-gpu.json
    """
    with claimed_gpu("cuda"):
        from sparsetrace.model.runtime import open_model
        from sparsetrace.tools.tuning import choose_dtype, gpu_name, parse_shape, site_shapes
        from sparsetrace.tools.tuning import tune as run

        opened = [open_model(folder) for folder in models]
        wanted = [shape for model in opened for shape in site_shapes(model.config).values()]
        wanted += map(parse_shape, shapes)
        folder = Path(click.get_app_dir("sparsetrace", force_posix=False))
        click.echo(f"tuning for {gpu_name('tune')}", err=True)
        with progress("tuning", "steps") as report:
            path, entries = run(wanted, choose_dtype(opened, dtype), out, folder, report)
    click.echo(f"{path}: {entries} entries\nto use it: export SPARSETRACE_TUNING={path.absolute()}")


@dataclass(frozen=True, slots=True)
class Load:
    """What decoding is timed on."""

    sparsity: float
    batches: tuple[int, ...]
    new: int
    groups: int


@click.command()
@path_argument("model")
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="share of the inputs dropped",
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
@click.option("--new", type=click.IntRange(min=2), default=128, show_default=True, help="new tokens per sequence")
@click.option(
    "--groups", type=click.IntRange(min=1), default=2, show_default=True, help="groups timed, after one for warm-up"
)
@click.option("--kernels/--no-kernels", default=True, show_default=True, help="print the table of the kernels")
@click.option("--decoding/--no-decoding", default=True, show_default=True, help="print the table of decoding")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=Path(),
    help="folder for the temporary dump; the current folder if not given",
)
@gathered(Load, "load")
def bench(model: Path, load: Load, kernels: bool, decoding: bool, scratch: Path) -> None:
    """Time the kernels and decoding on this GPU, for the shapes of MODEL.

    Weights are MODEL's, prompts are random, and thresholds come from the activations on random tokens. The floor is the
    time of one launch that reads the needed bytes and does nothing else.

    \b
    Example:
      sparsetrace bench results/llama/model --sparsity 0.5 --batch 1 --batch 64
    """
    with own_gpu(Machine()):
        from sparsetrace.model.runtime import open_model
        from sparsetrace.tools.tuning import gpu_name

        opened, gpu = open_model(model), gpu_name("bench")
        if kernels:
            Console().print(_kernel_table(opened, gpu, load.sparsity))
        if decoding:
            Console().print(_decoding_table(opened, gpu, load, scratch))


def _kernel_table(model: "RuntimeModel", gpu: str, sparsity: float) -> Table:
    from sparsetrace.tools.bench import kernel_rows

    table = Table("site", "inputs x outputs", "kernel", "us", "of the floor", "configured by")
    table.title = f"{gpu}: multiplies of one layer of {model.source}, {sparsity:.0%} of the inputs dropped"
    for row in kernel_rows(model.config, sparsity, _current_gpu()):
        chosen = f"{row.chosen_by} {row.config}".strip() or "-"
        table.add_row(row.site, f"{row.K} x {row.N}", row.impl, f"{row.us:.1f}", f"{row.floor_share:.0%}", chosen)
    return table


def _decoding_table(model: "RuntimeModel", gpu: str, load: Load, scratch: Path) -> Table:
    from tempfile import TemporaryDirectory

    from sparsetrace.tools.bench import decode_rows

    table = Table("batch", "method", "operands", "tokens/s", "bytes a token", title=f"{gpu}: decoding {model.source}")
    with TemporaryDirectory(prefix=".bench-", dir=scratch) as folder:
        timed = (load.sparsity, load.batches, load.new, load.groups)
        for row in decode_rows(model, *timed, Path(folder), _current_gpu()):
            size = f"{row.bytes_per_token:,.0f}" if row.bytes_per_token else "-"
            table.add_row(str(row.batch), row.method, row.sink, f"{row.tokens_per_s:,.1f}", size)
    return table


def _current_gpu() -> "torch.device":
    import torch

    return torch.device("cuda", torch.cuda.current_device())
