"""TEAL's block-wise greedy allocation: a search table for one layer, from which any target is looked up.

Starting from no sparsity, each step goes to the matrix that raises the error of the layer's output least. The length of
a matrix's step is inversely proportional to its parameters, so that every step adds about the same to the sparsity of
the layer. The table (`sparsetrace.calibration.search_table`) ends where the layer reaches `UP_TO`.

Source: github.com/FasterDecoding/TEAL teal/greedyopt.py. As there, the last half of each sequence is sparsified, the
error is taken on the last quarter, and is the mean over sequences and channels of the norm over positions. Different
here: the parameters are the model's own (its table gives Llama-2's k and v an eighth of q's), a matrix stops at
`MOST` instead of going beyond 1, thresholds come from the exact histograms, and differences are taken in float32.

Each layer is a job by itself: its input comes from the dense model, run up to there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from sparsetrace.calibration.block_trial import BlockTrial
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.journal import Row, journal
from sparsetrace.calibration.search_table import write_search_table
from sparsetrace.calibration.target import refuse_uncounted
from sparsetrace.calibration.windows import calibration_windows, passes
from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.settings import Greedy, Machine
from sparsetrace.methods import ThresholdMethod
from sparsetrace.model.runtime import RuntimeModel, set_up_torch

# Where a table ends, and the largest target of one matrix.
UP_TO = 0.9
MOST = 0.99


@dataclass(frozen=True, slots=True)
class SearchJob:
    """One layer to be searched.

    Args:
        model: converted.
        histograms: file of the model's histograms, which thresholds are looked up in.
        text: whose activations the error is taken on.
        layer: which.
        out: the search table.
        method: whose masks are searched for.
        greedy: step, and how much of the text.
        machine: where the model runs.
    """

    model: RuntimeModel
    histograms: Path
    text: Path
    layer: int
    out: Path
    method: type[ThresholdMethod]
    greedy: Greedy
    machine: Machine


def allocate(job: SearchJob, report: Callable[[float, float], None] | None = None) -> pa.Table:
    """Search one layer.

    An interrupted search leaves its rows beside the table; the same call goes on from there.

    Args:
        job: what is searched.
        report: called with (effective sparsity reached, `UP_TO`).

    Raises:
        InputError: the model has no such layer, or the histograms are of another model or lack what the method needs.
    """
    model = job.model
    layers = model.config.num_hidden_layers
    if job.layer not in range(layers):
        raise InputError(f"allocate: layer must be 0 to {layers - 1}, got {job.layer}")
    histograms, provenance = Histograms.load(job.histograms)
    if provenance.model_hash != model.model_hash:
        raise InputError(f"allocate: {job.histograms} must be of this model, got another's: calibrate again")
    # the search sets the targets, so this one does not matter
    setting = job.method.with_thresholds(sparsity=0.5)
    refuse_uncounted(setting, histograms, job.histograms)

    device = set_up_torch(job.machine)
    calibration = job.greedy.calibration
    windows_WT = calibration_windows(model.tokenizer(), job.text, calibration, model.config.max_position_embeddings)
    identity = {
        "model_hash": model.model_hash,
        "layer": job.layer,
        "method": job.method.name,
        "histograms": provenance.text_hash,
        "text": sha256_file(job.text),
        "greedy": job.greedy.model_dump(),
    }
    parameters = _parameters(model, job.layer)
    progress = job.out.with_name(f".{job.out.name}.progress")
    with torch.inference_mode(), journal(progress, sha256_json(identity)) as (rows, add):
        trial = BlockTrial(model.load(device), passes(windows_WT, device), job.layer, setting, histograms)
        for row in search(parameters, job.greedy.step, trial.error, rows):
            add(row)
            if report is not None:
                report(min(row["effective_sparsity"], UP_TO), UP_TO)
        return write_search_table(job.out, identity, list(parameters), rows)


def search(
    parameters: Mapping[str, int], step: float, error: Callable[[dict[str, float]], float], rows: Sequence[Row]
) -> Iterator[Row]:
    """The rows of a search table that follow those already there.

    Args:
        parameters: of each matrix of the layer, in order.
        step: sparsity added by a step of the first matrix, which is `q` where there is one.
        error: of the layer's output, for the sparsity of each matrix.
        rows: found before.
    """
    total = sum(parameters.values())
    first = next(iter(parameters.values()))
    steps = {matrix: step * first / count for matrix, count in parameters.items()}

    def effective(sparsities: dict[str, float]) -> float:
        return sum(sparsities[matrix] * count for matrix, count in parameters.items()) / total

    now = {matrix: rows[-1][matrix] if rows else 0.0 for matrix in parameters}
    while effective(now) < UP_TO:
        tried = {
            matrix: now | {matrix: min(round(now[matrix] + steps[matrix], 12), MOST)}
            for matrix in parameters
            if now[matrix] < MOST
        }
        errors = {matrix: error(sparsities) for matrix, sparsities in tried.items()}
        # the first of equals, in the order of the matrices
        best = min(errors, key=lambda matrix: errors[matrix])
        now = tried[best]
        reached = effective(now)
        uniform = error(dict.fromkeys(parameters, reached))
        yield {"effective_sparsity": reached, "error": errors[best], "uniform_error": uniform} | now


def _parameters(model: RuntimeModel, layer: int) -> dict[str, int]:
    """Number of parameters of each matrix of a layer."""
    own = (site for site in model.sites if site.layer == layer)
    return {matrix: site.in_features * site.outputs(matrix) for site in own for matrix in site.matrices}
