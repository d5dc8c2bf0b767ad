"""Commands that turn dumps into a data set: pack, index."""

import re
from pathlib import Path

import click

from sparsetrace.cli.options import path_argument, path_option, settings
from sparsetrace.cli.terminal import progress
from sparsetrace.core.files import InputError, parse_json
from sparsetrace.core.settings import Packing


@click.command()
@path_argument("dump")
@path_option("--workload", "folder of the data set")
@path_option("--out", "manifest of the packed shard, named after its number: 00000.json")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="files written at once")
@settings(Packing)
def pack(dump: Path, workload: Path, out: Path, threads: int, packing: Packing) -> None:
    """Pack DUMP, the manifest of one shard's dump, into Parquet, and remove its blocks.

    The same command resumes an interrupted pack after its last finished file, and leaves a finished one alone.
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


@click.command()
@path_argument("parts", nargs=-1, required=True)
@path_option("--workload", "folder of the data set")
@click.option(
    "--weight-masks", type=click.Path(path_type=Path), help="mask table of the pruned model, if the run used one"
)
@click.option(
    "--study", default=None, help="part of the study file that made the data set, as JSON; kept in the manifest"
)
def index(parts: tuple[Path, ...], workload: Path, weight_masks: Path | None, study: str | None) -> None:
    """Merge PARTS, the manifests of all packed shards, into a finished data set."""
    from sparsetrace.packing.index import index as run
    from sparsetrace.workload.reader import open as open_workload

    content = None if study is None else parse_json(study, "index: --study")
    run(list(parts), workload, weight_masks, study=content)
    click.echo(open_workload(workload))
