"""Commands that read a data set: show, verify, stats, export."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from sparsetrace.cli.gpu import own_gpu
from sparsetrace.cli.options import HEXADECIMAL, Selection, path_argument, path_option, selection_options, settings
from sparsetrace.cli.terminal import fail, progress
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Machine


@click.command()
@path_argument("workloads", nargs=-1, required=True)
def show(workloads: tuple[Path, ...]) -> None:
    """Print a summary of WORKLOADS."""
    from sparsetrace.workload.reader import open as open_workload

    click.echo("\n\n".join(str(open_workload(workload)) for workload in workloads))


@click.command()
@path_argument("workloads", nargs=-1, required=True)
@click.option(
    "--recompute", type=click.IntRange(min=1), default=None, help="number of sequences of each to run again and compare"
)
@click.option(
    "--model", type=click.Path(path_type=Path), default=None, help="folder of the runtime model, for --recompute"
)
@settings(Machine)
def verify(workloads: tuple[Path, ...], recompute: int | None, model: Path | None, machine: Machine) -> None:
    """Check WORKLOADS: hashes, schema, completeness, counts, values, thresholds; exit status 1 if a fault is found.

    \b
    Example:
      sparsetrace verify results/demo/default/*/workload
      sparsetrace verify results/demo/default/teal-0.5/workload --recompute 4 --model results/demo/model
    """
    if recompute is not None and model is None:
        raise InputError("verify: --model must be given with --recompute, got none: name the runtime model")
    faults = []
    for workload in workloads:
        found = _faults(workload, recompute, model, machine)
        if not found:
            click.echo(f"{workload}: no fault found")
        # the name is needed only where there are several
        faults += found if len(workloads) == 1 else [f"{workload}: {fault}" for fault in found]
    if faults:
        fail("\n".join(faults))


def _faults(workload: Path, recompute: int | None, model: Path | None, machine: Machine) -> list[str]:
    """What is wrong with a workload, a line each; one that cannot be read is one fault, so that others are checked."""
    from sparsetrace.workload.verify import verify as run

    try:
        with progress("verifying", "files") as report:
            faults = [str(fault) for fault in run(workload, report)]
        if recompute is None or model is None or faults:
            return faults
        with own_gpu(machine), progress("recomputing", "groups") as report:
            from sparsetrace.tools.recompute import recompute as run_again

            return [str(fault) for fault in run_again(workload, model, recompute, machine, report)]
    except InputError as error:
        return str(error).splitlines()


@click.command()
@path_argument("workload")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="folder of the tables; WORKLOAD/stats if not given"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="seed of the i.i.d. twin")
@click.option("--tile", "tiles", type=click.IntRange(min=1), multiple=True, help="tile width for load imbalance")
@selection_options
def stats(workload: Path, out: Path | None, seed: int, tiles: tuple[int, ...], selection: Selection) -> None:
    """Statistics of the masks of WORKLOAD, each beside its i.i.d. twin's, as Parquet tables.

    \b
    Example:
      sparsetrace stats results/demo/default/teal-0.5/workload --phase decode
    """
    from sparsetrace.workload.stats import statistics, summary
    from sparsetrace.workload.stats_tables import TILES

    ds = selection.open(workload)
    folder = workload / "stats" if out is None else out
    with progress("counting", "matrices") as report:
        tables = statistics(ds, folder, seed, tiles or TILES, report)
    table = Table("figure", "real", "i.i.d. twin", title=f"{folder}: mean over layers and matrices")
    for name, real, twin in summary(tables):
        table.add_row(name, f"{real:.4f}", f"{twin:.4f}")
    Console().print(table)


@click.command()
@path_argument("workload")
@click.option(
    "--format",
    "form",
    required=True,
    help="mtx, smtx, npz, safetensors, npy, bitmask, density, ramulator, dramsim3 or libcachesim; see docs/export.md",
)
@path_option("--out", "folder of the files, each named LNN.matrix.suffix")
@click.option("--twin", type=click.IntRange(min=0), default=None, help="export the i.i.d. twin with this seed instead")
@click.option("--base", type=HEXADECIMAL, default="0", help="traces: address of the first weight row")
@click.option("--stride", type=click.IntRange(min=1), default=None, help="traces: bytes between weight rows")
@click.option("--line", type=click.IntRange(min=1), default=64, show_default=True, help="traces: bytes per access")
@click.option(
    "--bundle", type=click.IntRange(min=1), default=1, show_default=True, help="traces: rows fetched together"
)
@click.option(
    "--cycles", type=click.IntRange(min=0), default=1, show_default=True, help="traces: cycles between two accesses"
)
@click.option("--tile", type=click.IntRange(min=1), default=64, show_default=True, help="density: inputs per tile")
@selection_options
def export(
    workload: Path,
    form: str,
    out: Path,
    twin: int | None,
    tile: int,
    selection: Selection,
    **layout: Any,
) -> None:
    """Write a slice of WORKLOAD in the format of another tool, one file for each layer and matrix.

    \b
    Example:
      sparsetrace export results/demo/default/teal-0.5/workload --format smtx --layer 0 --matrix down --out smtx
    """
    from sparsetrace.workload.export import FORMS, file_name
    from sparsetrace.workload.export import export as run
    from sparsetrace.workload.export_operands import Layout

    if form not in FORMS:
        raise InputError(f"export: --format must be one of {', '.join(FORMS)}, got {form}")
    ds = selection.open(workload)
    if not ds.leaves:
        raise InputError(f"export: the selection must hold a layer and matrix that {workload} captured, got none")
    ds = ds if twin is None else ds.twin(twin)
    # --base, --stride, --line, --bundle and --cycles
    traced = Layout(**layout)
    for layer, matrix in ds.leaves:
        path = out / file_name(layer, matrix, form)
        run(ds, layer, matrix, form, path, traced, tile)
        click.echo(path)
