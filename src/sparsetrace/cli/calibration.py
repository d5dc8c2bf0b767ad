"""Commands of calibration: prune, calibrate, allocate, thresholds, quality-dense, quality, import-teal."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from sparsetrace.cli.gpu import on_gpu, own_gpu
from sparsetrace.cli.options import gathered, path_argument, path_option, settings
from sparsetrace.cli.terminal import progress
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Calibration, Greedy, Machine, Quality
from sparsetrace.methods import METHODS, WEIGHT_METHODS, ThresholdMethod


@click.command()
@path_argument("model")
@click.option("--method", type=click.Choice([*WEIGHT_METHODS]), required=True, help="how weights are scored")
@click.option("--set", "parameters", multiple=True, metavar="NAME=VALUE", help="sparsity or pattern")
@click.option("--text", type=click.Path(path_type=Path), help="calibration text, for wanda")
@path_option("--out", "folder of the pruned model; appears when it is complete")
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
    """Mask the weights of MODEL, unstructured or N:M.

    The result is a runtime model with a table of its masks.

    \b
    Example:
      sparsetrace prune results/llama/model --method wanda --set 'pattern="2:4"' --text wiki.txt --out pruned
    """
    from sparsetrace.calibration.weight_masks import PruneJob
    from sparsetrace.calibration.weight_masks import prune as run
    from sparsetrace.model.runtime import open_model
    from sparsetrace.study.options import parse_weight_method

    weights = parse_weight_method(method, parameters)
    with progress("pruning", "layers") as report:
        pruned = run(PruneJob(open_model(model), text, out, weights, calibration, machine), report)
    click.echo(f"{out}: model hash {pruned.model_hash}")


@dataclass(frozen=True, slots=True)
class CountJob:
    """What is counted: one shard of a text, and the scores of some methods besides the inputs of the sites."""

    text: Path | None
    shard: int
    scores: tuple[str, ...]


@click.command()
@path_argument("paths", nargs=-1, required=True)
@click.option("--merge", is_flag=True, help="add up PATHS, histogram files of one model, instead of counting")
@click.option("--text", type=click.Path(path_type=Path), help="calibration text: .txt, .json, .jsonl, or gzipped")
@click.option(
    "--shard", type=click.IntRange(min=0), default=0, show_default=True, help="part of the text that is counted"
)
@click.option("--score", "scores", multiple=True, help="method whose scores are counted too (cats, wina); repeatable")
@path_option("--out", "histogram file (safetensors)")
@settings(Calibration, Machine)
@gathered(CountJob, "job")
def calibrate(
    paths: tuple[Path, ...], merge: bool, job: CountJob, out: Path, calibration: Calibration, machine: Machine
) -> None:
    """Count the exact distribution of what enters each matrix of a model, over a text.

    PATHS is the model. The same command resumes an interrupted run.

    \b
    Examples:
      sparsetrace calibrate results/llama/model --text wiki.txt --out results/llama/histograms.safetensors
      sparsetrace calibrate --merge one.safetensors two.safetensors --out both.safetensors
    """

    known = [name for name, kind in METHODS.items() if kind.score in ("scaled", "gate")]
    if unknown := [name for name in job.scores if name not in known]:
        raise InputError(f"--score must be a method with scores of its own, such as cats or wina, got {unknown[0]}")
    if merge:
        from sparsetrace.calibration.merge import merge as add_up

        merged = add_up(paths, out)
        click.echo(f"{out}: {merged.tokens:,} tokens")
        return
    if len(paths) != 1 or job.text is None:
        raise InputError(f"calibrate: one model and --text must be given unless --merge is, got {len(paths)} paths")
    with own_gpu(machine), progress("calibrating", "tokens") as report:
        from sparsetrace.calibration.calibrate import CalibrationJob
        from sparsetrace.calibration.calibrate import calibrate as run
        from sparsetrace.model.runtime import open_model

        model = open_model(paths[0])
        histograms = run(CalibrationJob(model, job.text, out, calibration, machine, job.shard, job.scores), report)
    click.echo(f"{out}: {len(histograms.counts)} histograms")


@dataclass(frozen=True, slots=True)
class LayerSearch:
    """Which layer is searched, for which method and on what."""

    histograms: Path
    text: Path
    layer: int
    method: str


@click.command()
@path_argument("model")
@path_option("--histograms", "histograms of the model (safetensors)")
@path_option("--text", "calibration text")
@click.option("--layer", type=click.IntRange(min=0), required=True, help="layer to search")
@click.option(
    "--method", default="teal", show_default=True, help="method whose masks are searched; must have thresholds"
)
@path_option("--out", "search table of the layer (Parquet)")
@settings(Greedy, Machine)
@on_gpu
@gathered(LayerSearch, "search")
def allocate(model: Path, search: LayerSearch, out: Path, greedy: Greedy, machine: Machine) -> None:
    """Search how to spread sparsity over the matrices of one layer of MODEL, for `allocation: greedy`.

    TEAL's rule: each step goes to the matrix where it raises the error of the layer's output least. Targets up to 0.9
    are looked up in the resulting table. The same command resumes an interrupted search.
    """
    from sparsetrace.calibration.greedy import SearchJob
    from sparsetrace.calibration.greedy import allocate as run
    from sparsetrace.calibration.search_table import read_search_table
    from sparsetrace.model.runtime import open_model

    known: dict[str, type[ThresholdMethod]] = {n: m for n, m in METHODS.items() if issubclass(m, ThresholdMethod)}
    if search.method not in known:
        raise InputError(
            f"--method must be one of {', '.join(known)}, which have thresholds per matrix, got {search.method}"
        )
    method = known[search.method]
    with progress(f"layer {search.layer}", "% sparsity") as report:
        job = SearchJob(open_model(model), search.histograms, search.text, search.layer, out, method, greedy, machine)
        run(job, lambda reached, of: report(int(100 * reached), int(100 * of)))
    _, table = read_search_table(out)
    click.echo(f"{out}: {len(table.error)} rows, {len(table.worse_than_uniform())} of them worse than uniform")


@click.command()
@path_argument("source")
@click.option("--method", required=True, help="name of the method, such as teal")
@click.option("--set", "parameters", multiple=True, metavar="NAME=VALUE", help="parameter of the method; repeatable")
@click.option("--label", default=None, help="folder name of the setting; the method's own if not given")
@click.option(
    "--table", "tables", multiple=True, type=click.Path(path_type=Path), help="search table of a layer; repeatable"
)
@path_option("--out", "threshold table (Parquet)")
def thresholds(
    source: Path,
    method: str,
    parameters: tuple[str, ...],
    label: str | None,
    tables: tuple[Path, ...],
    out: Path,
) -> None:
    """Derive a method's thresholds from SOURCE, and print target and achieved sparsity.

    SOURCE is the model's histograms; for a method that needs no thresholds, the model itself will do.

    \b
    Examples:
      sparsetrace thresholds histograms.safetensors --method teal --set sparsity=0.5 --out thresholds.parquet
      sparsetrace thresholds results/llama/model --method topk --set sparsity=0.5 --out thresholds.parquet
    """
    from sparsetrace.calibration.derive import derive_thresholds
    from sparsetrace.study.options import parse_method

    setting = parse_method(method, parameters, label)
    result = derive_thresholds(setting.label, setting.method, source, out, tables)
    for note in result.notes:
        click.echo(note)
    target, achieved = result.overall()
    if not setting.method.needs_thresholds:
        click.echo(f"{setting.label}: no thresholds needed")
        return
    title = f"{setting.label}: share of the counted activations dropped"
    Console().print(_table_of_shares(title, result.rows, "calibrated_sparsity"))
    if target is not None and achieved is not None:
        click.echo(f"target {target:.4f}, achieved {achieved:.4f} over all matrices, weighted by their inputs")


@click.command()
@path_argument("model")
@click.option(
    "--thresholds", "tables", required=True, multiple=True, type=click.Path(path_type=Path), help="table; repeatable"
)
@path_option("--text", "held-out text: .txt, .json, .jsonl, or gzipped")
@click.option(
    "--dense", type=click.Path(path_type=Path), help="file that quality-dense made; the dense model is run if not given"
)
@path_option("--out", "table of the measurement (Parquet)")
@settings(Quality, Machine)
@on_gpu
def quality(
    model: Path,
    tables: tuple[Path, ...],
    text: Path,
    dense: Path | None,
    out: Path,
    quality: Quality,
    machine: Machine,
) -> None:
    """Measure the quality of MODEL under each method setting, and of the dense model, on held-out text.

    Perplexity, KL divergence of the next token from the dense model's, and share of predictions that agree on the
    likeliest token, over windows as in TEAL's evaluation.
    """
    from sparsetrace.calibration.quality import QualityJob, measure
    from sparsetrace.model.runtime import open_model

    with progress("measuring quality", "windows") as report:
        rows = measure(QualityJob(open_model(model), text, tables, out, quality, machine, dense), report).to_pylist()
    shown = Table("setting", "target", "achieved", "perplexity", "KL (nats)", "top-1 agreement")
    for row in rows:
        target = "-" if row["target_sparsity"] is None else f"{row['target_sparsity']:.4f}"
        numbers = [f"{row[name]:.4f}" for name in ("perplexity", "kl_divergence", "top1_agreement")]
        shown.add_row(row["label"], target, f"{row['achieved_sparsity']:.4f}", *numbers)
    Console().print(shown)
    click.echo(f"{rows[0]['tokens']:,} tokens, context {quality.context}, prefill {quality.prefill}")


@click.command("quality-dense")
@path_argument("model")
@path_option("--text", "held-out text: .txt, .json, .jsonl, or gzipped")
@path_option("--out", "hidden states of the dense model (safetensors)")
@settings(Quality, Machine)
@on_gpu
def quality_dense(model: Path, text: Path, out: Path, quality: Quality, machine: Machine) -> None:
    """Run the dense MODEL over held-out text once, for `quality --dense` of every setting.

    \b
    Example:
      sparsetrace quality-dense results/llama/model --text held-out.txt --out quality_dense.safetensors
    """
    from sparsetrace.calibration.dense_states import DenseJob, write_dense_states
    from sparsetrace.model.runtime import open_model

    with progress("running the dense model", "windows") as report:
        tokens = write_dense_states(DenseJob(open_model(model), text, out, quality, machine), report)
    click.echo(f"{out}: states of {tokens:,} scored tokens")


@click.command("import-teal")
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
    help="teal: the signed quantile at 0.5 + s/2, as in TEAL's code; magnitude: the quantile of |x|, same histogram",
)
@click.option(
    "--lookup", type=click.Path(path_type=Path), help="folder of TEAL's search tables, for greedy targets; else uniform"
)
@click.option(
    "--lost",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="activations that may be missing from a histogram",
)
@path_option("--out", "threshold file (Parquet), for `allocation: {file: ...}`")
def import_teal(
    histograms: Path, config: Path, sparsity: float, rule: str, lookup: Path | None, lost: int, out: Path
) -> None:
    """Read thresholds out of TEAL's published HISTOGRAMS, a folder of layer-N/{self_attn,mlp}/histograms.pt.

    Files that cannot belong to the model of --config are refused: every site must have counted a whole number of
    vectors of its width, the same number at every site.

    \b
    Example:
      sparsetrace import-teal TEAL/models/Llama-2-7B/histograms --config Llama-2-7b-hf/config.json --sparsity 0.5 \
        --out teal-0.5.parquet
    """
    from sparsetrace.calibration.teal_files import import_teal as run
    from sparsetrace.calibration.teal_files import read_lookup

    rows = run(histograms, config, sparsity, out, rule, lookup, lost).to_pylist()  # type: ignore[arg-type]
    title = "share of the published histogram that each threshold drops"
    table = _table_of_shares(title, rows, "implied_sparsity")
    Console().print(table)
    if lookup is not None:
        tables = read_lookup(lookup, table.row_count)
        worse = {layer: len(found.worse_than_uniform()) for layer, found in tables.items()}
        layers = [layer for layer, count in worse.items() if count]
        click.echo(f"the published search loses to uniform in {sum(worse.values())} rows; layers: {layers}")
    click.echo(f"{out}: {len(rows)} thresholds")


def _table_of_shares(title: str, rows: Iterable[Mapping[str, Any]], column: str) -> Table:
    """A line for each layer and a column for each matrix, in the order of the rows."""
    shares: dict[int | None, dict[str, float | None]] = {}
    for row in rows:
        shares.setdefault(row["layer"], {})[row["matrix"]] = row[column]
    matrices = list(dict.fromkeys(matrix for by_matrix in shares.values() for matrix in by_matrix))
    table = Table("layer", *matrices, title=title)
    for layer, by_matrix in shares.items():
        found = (by_matrix.get(matrix) for matrix in matrices)
        table.add_row(
            "-" if layer is None else str(layer), *("-" if share is None else f"{share:.4f}" for share in found)
        )
    return table
