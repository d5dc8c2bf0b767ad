"""TEAL's block-wise greedy allocation: a search table for one layer, from which any target is looked up.

Starting from no sparsity, the matrix whose next step raises the error of the block's output least takes that step. A
step of a matrix is inversely proportional to its parameters, so that each adds about the same to the sparsity of the
layer. The table ends where the layer reaches `UP_TO`.

| column | unit | what |
|---|---|---|
| `effective_sparsity` | fraction | of the layer's parameters |
| `error`, `uniform_error` | norm | of the block's output: by the search, and with every matrix at the same sparsity |
| `q` .. `down` | fraction | target of each matrix |

Source: github.com/FasterDecoding/TEAL teal/greedyopt.py. As there, the last half of each sequence is sparsified, the
error is taken on the last quarter, and is the mean over sequences and channels of the norm over positions. Different
here: the parameters are the model's own (its table gives Llama-2's k and v an eighth of q's), a matrix stops at
`MOST` instead of going beyond 1, thresholds come from the exact histograms, and differences are taken in float32.

Each layer is a job by itself: its input comes from the dense model, run up to there.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sparsetrace.calibration.allocation import Choice, greedy_schema
from sparsetrace.calibration.calibrate import PASS_TOKENS, calibration_windows
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.thresholds import refuse_uncounted, threshold_row
from sparsetrace.core.files import InputError, sha256_file, sha256_json, write_beside
from sparsetrace.core.settings import Calibration, Greedy, Machine
from sparsetrace.methods import MatrixRule, ThresholdMethod
from sparsetrace.model.decoder import Block, Decoder
from sparsetrace.model.patch import Patch, install_block
from sparsetrace.model.runtime import RuntimeModel, set_up_torch

# Where a table ends, and the largest target of one matrix.
UP_TO = 0.9
MOST = 0.99
# Positions of a sequence that are sparsified, and those that the error is taken on; both from the end.
SPARSIFIED_SHARE, ERROR_SHARE = 0.5, 0.25

Row = dict[str, float]


def allocate(
    model: RuntimeModel,
    histograms_path: Path,
    text: Path,
    layer: int,
    out: Path,
    method: type[ThresholdMethod],
    greedy: Greedy,
    machine: Machine,
    report: Callable[[float, float], None] | None = None,
) -> pa.Table:
    """Search one layer.

    An interrupted search leaves its rows beside `out`; the same call goes on from there.

    Args:
        model: converted.
        histograms_path: of the model.
        text: whose activations the error is taken on.
        layer: which.
        out: the table.
        method: whose masks are searched for; its thresholds come from the histograms.
        greedy: step and text.
        machine: where the model runs.
        report: called with (effective sparsity reached, `UP_TO`).

    Raises:
        InputError: the model has no such layer, or the histograms are of another model or lack what the method needs.
    """
    layers = model.config.num_hidden_layers
    if layer not in range(layers):
        raise InputError(f"allocate: layer must be 0 to {layers - 1}, got {layer}")
    histograms, provenance = Histograms.load(histograms_path)
    if provenance.model_hash != model.model_hash:
        raise InputError(f"allocate: {histograms_path} must be of this model, got another's: calibrate again")
    setting = _threshold_form(method)
    refuse_uncounted(setting, histograms, histograms_path)

    device = set_up_torch(machine)
    calibration = Calibration(**greedy.model_dump(exclude={"step"}))
    windows_WT = calibration_windows(model.tokenizer(), text, calibration, model.config.max_position_embeddings)
    identity = {
        "model_hash": model.model_hash,
        "layer": layer,
        "method": method.name,
        "histograms": provenance.text_hash,
        "text": sha256_file(text),
        "greedy": greedy.model_dump(),
    }
    journal = out.with_name(f".{out.name}.progress")
    rows = _journalled(journal, sha256_json(identity))
    with torch.inference_mode():
        trial = _Trial(model.load(device), torch.from_numpy(windows_WT), layer, setting, histograms)
        with _open_journal(journal, sha256_json(identity), rows) as note:
            for row in search(_parameters(model, layer), greedy.step, trial.error, rows):
                note(row)
                rows.append(row)
                if report is not None:
                    report(min(row["effective_sparsity"], UP_TO), UP_TO)
    metadata = {"sparsetrace_greedy": json.dumps(identity)}
    schema = greedy_schema(list(_parameters(model, layer))).with_metadata(metadata)
    table = pa.Table.from_pylist(rows, schema=schema)
    with write_beside(out) as partial:
        pq.write_table(table, partial)
    journal.unlink(missing_ok=True)
    return table


def search(
    parameters: dict[str, int], step: float, error: Callable[[dict[str, float]], float], rows: list[Row]
) -> Iterator[Row]:
    """The rows that follow those already there.

    Args:
        parameters: of each matrix of the layer, in order.
        step: of a matrix with as many parameters as the first, which is `q` where there is one.
        error: of the block's output, for the sparsity of each matrix.
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


class _Trial:
    """One block with a method installed, the input that the dense model gives it, and its dense output."""

    def __init__(
        self, decoder: Decoder, windows_WT: Tensor, layer: int, method: ThresholdMethod, histograms: Histograms
    ) -> None:
        self.layer = layer
        self.method = method
        self.histograms = histograms
        self.inputs = list(_block_inputs(decoder, windows_WT, layer))
        block = decoder.layers[layer]
        assert isinstance(block, Block)
        self.block = block
        self.outputs = [block(*inputs)[:, self._tail(inputs[0], ERROR_SHARE)].float() for inputs in self.inputs]
        dense = {matrix: 0.0 for site in block.sites for matrix in site.matrices}
        self.patch: Patch = install_block(block, method, self._rules(dense))

    def error(self, sparsities: dict[str, float]) -> float:
        """Mean over sequences and channels of the output error's norm over positions."""
        self.patch.set_rules(self._rules(sparsities))
        total, count = 0.0, 0
        for inputs, dense_BTC in zip(self.inputs, self.outputs, strict=True):
            x_BTC = inputs[0]
            sparsified_T = torch.zeros(x_BTC.shape[1], dtype=torch.bool, device=x_BTC.device)
            sparsified_T[self._tail(x_BTC, SPARSIFIED_SHARE)] = True
            self.patch.sparsified_BT = sparsified_T.expand(x_BTC.shape[:2])
            y_BTC = self.block(*inputs)[:, self._tail(x_BTC, ERROR_SHARE)].float()
            norms_BC = (y_BTC - dense_BTC).norm(dim=1)
            total += float(norms_BC.double().sum())
            count += norms_BC.numel()
        return total / count

    def _tail(self, x_BTC: Tensor, share: float) -> slice:
        T = x_BTC.shape[1]
        return slice(T - int(T * share), T)

    def _rules(self, sparsities: dict[str, float]) -> list[MatrixRule]:
        rows = [
            threshold_row(self.histograms, self.method, self.layer, matrix, Choice(sparsity))
            for matrix, sparsity in sparsities.items()
        ]
        return [MatrixRule(row["layer"], row["matrix"], row["threshold_bits"]) for row in rows]


def _block_inputs(decoder: Decoder, windows_WT: Tensor, layer: int) -> Iterator[tuple[Any, ...]]:
    """Arguments of the block's forward, for each batch of windows."""
    later = decoder.layers
    decoder.layers = later[: layer + 1]
    seen: list[tuple[Any, ...]] = []
    hook = later[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    device = decoder.embedding.device
    for tokens_BT in windows_WT.split(max(1, PASS_TOKENS // windows_WT.shape[1])):
        positions_BT = torch.arange(tokens_BT.shape[1], device=device).expand_as(tokens_BT)
        decoder(tokens_BT.to(device), positions_BT)
        yield seen.pop()
    hook.remove()
    decoder.layers = later


def _threshold_form(method: type[ThresholdMethod]) -> ThresholdMethod:
    """The method with thresholds; how its target is spread does not matter here."""
    parameters: dict[str, Any] = {"sparsity": 0.5} | (
        {"select": "threshold"} if "select" in method.model_fields else {}
    )
    return method(**parameters)


def _parameters(model: RuntimeModel, layer: int) -> dict[str, int]:
    """Number of parameters of each matrix of a layer."""
    own = (site for site in model.sites if site.layer == layer)
    return {matrix: site.in_features * site.outputs(matrix) for site in own for matrix in site.matrices}


def _journalled(path: Path, key: str) -> list[Row]:
    """Rows that an interrupted search of the same key left."""
    if not path.is_file():
        return []
    # the last line may have been cut off
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    entries = [json.loads(line) for line in lines]
    return entries[1:] if entries and entries[0] == {"key": key} else []


@contextmanager
def _open_journal(path: Path, key: str, rows: list[Row]) -> Iterator[Callable[[Row], None]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:

        def note(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        note({"key": key})
        for row in rows:
            note(row)
        yield note
