"""What a study will take before it runs: rows, bytes and time of each workload.

Rows follow from the configuration and the prompts. Bytes are those of the format at the target sparsity, with the
measured overhead over the entropy limit. Time is that of one pass of each kind through one layer's weights, measured
here in the model's own shapes, times the passes and layers; attention and sampling are not counted.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine, Packing
from sparsetrace.core.text import read_documents
from sparsetrace.formats.architecture import sites_of
from sparsetrace.formats.schema import FORMATS, MATRICES, SITE_OF, SITES, mask_bytes
from sparsetrace.formats.sites import Site, by_leaf, layer_sites
from sparsetrace.generation.prompts import read_shard
from sparsetrace.model.runtime import RuntimeModel, set_up_torch
from sparsetrace.study.study import EMBEDDED, Run, Study

# Measured in benchmarks/results/pack.csv: bytes a kept value in its planes, and the index columns of a row.
VALUE_BYTES = {"float16": 1.62, "bfloat16": 1.35, "float32": 3.6}
ROW_BYTES = 12
# Dense bytes packed per second by one core, same place.
PACK_BYTES_PER_SECOND = 0.3e9
# An index of the open encoding, same place: differences of neighbours, compressed.
INDEX_BYTES = 0.65
# Kept unless a method says otherwise: a dense run, or a method without a target.
UNKNOWN_SPARSITY = 0.0
CHARACTERS_PER_TOKEN = 3
# Tokens of a prompt of the embedded model, whose prompts do not exist before it is trained.
EMBEDDED_PROMPTS, EMBEDDED_PROMPT_TOKENS = 32, 40
MEASURED_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Shape:
    """What an estimate needs to know of a model.

    Args:
        layers: number of layers.
        inputs, outputs: of each matrix.
        dtype: of the operands.
    """

    layers: int
    inputs: dict[str, int]
    outputs: dict[str, int]
    dtype: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """What some prompts make: captured tokens, rows, and bytes of the operands, of the dump and of the data files."""

    tokens: int
    rows: int
    dense_bytes: int
    dump_bytes: int
    workload_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """One workload: sizes if no sequence ends early, time in seconds, and what was assumed or warned of."""

    name: str
    sizes: Sizes
    seconds: float
    notes: list[str]


def estimate(study: Study, machine: Machine) -> list[Estimate]:
    """Estimate every workload of a study.

    Raises:
        InputError: a checkpoint or a prompt set that cannot be read.
    """
    found = []
    dense_tokens: set[tuple[str, str]] = set()
    for model, run, label in study.workloads():
        checkpoint = study.models[model].checkpoint
        shape = read_shape(checkpoint, study.models[model].conversion.dtype)
        lengths, notes = prompt_lengths(study.runs[run], checkpoint)
        one, method = study.runs[run], study.setting(run, label).method
        new = one.batching.max_new_tokens
        made = sizes(shape, lengths, new, one.decoding, one.capture, one.packing, method.target)
        warning = too_small(Path(study.results), made.dump_bytes + made.workload_bytes)
        notes = notes if warning is None else [*notes, warning]
        ways = [one.decoding]
        if one.decoding.tokens_from == "dense" and (model, run) not in dense_tokens:
            dense_tokens.add((model, run))
            ways.append(Decoding())
            notes = [*notes, "time includes the dense model's own run, whose tokens every setting is given"]
        seconds = _model_seconds(shape, lengths, one.batching, ways, machine)
        seconds += made.dense_bytes / PACK_BYTES_PER_SECOND
        found.append(Estimate(f"{model}/{run}/{label}", made, seconds, notes))
    return found


def read_shape(checkpoint: str, dtype: str) -> Shape:
    """A model's shape from its checkpoint's config.json."""
    if checkpoint == EMBEDDED:
        from sparsetrace.model.demo.shape import CONFIG

        return Shape(CONFIG.num_hidden_layers, *_widths(sites_of(CONFIG)), "bfloat16" if dtype == "auto" else dtype)
    path = Path(checkpoint) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"estimate: {path} must be the config.json of a checkpoint, got {error!r}") from None
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    inputs = dict.fromkeys(MATRICES, hidden) | {"o": heads * head, "down": inner}
    outputs = {"q": heads * head, "k": keys, "v": keys, "o": hidden, "gate": inner, "up": inner, "down": hidden}
    stored = config.get("torch_dtype") or config.get("dtype") or "float32"
    return Shape(layers, inputs, outputs, stored if dtype == "auto" else dtype)


def _widths(sites: Sequence[Site]) -> tuple[dict[str, int], dict[str, int]]:
    """Inputs and outputs of each matrix of a layer."""
    leaves = {matrix: site for (_, matrix), site in by_leaf(layer_sites(sites)).items()}
    return (
        {matrix: site.in_features for matrix, site in leaves.items()},
        {matrix: site.outputs(matrix) for matrix, site in leaves.items()},
    )


def prompt_lengths(run: Run, checkpoint: str) -> tuple[list[int], list[str]]:
    """Tokens of each prompt, by the model's tokenizer where there is one; with notes on what was assumed."""
    if run.prompts == EMBEDDED:
        count = min(EMBEDDED_PROMPTS, run.prompt_set.limit or EMBEDDED_PROMPTS)
        note = f"prompts of the embedded model taken as {count} of {EMBEDDED_PROMPT_TOKENS} tokens"
        return [EMBEDDED_PROMPT_TOKENS] * count, [note]
    texts = read_documents(Path(run.prompts), run.prompt_set.field, "estimate")[: run.prompt_set.limit]
    lengths = [max(1, len(text) // CHARACTERS_PER_TOKEN) for text in texts]
    return lengths, [f"prompt tokens taken as one for every {CHARACTERS_PER_TOKEN} characters"]


def captured_positions(length: int, new: int, decoding: Decoding, capture: Capture) -> int:
    """Positions captured of one sequence that does not end early."""
    first = {"none": length, "half": length - length // 2, "all": 0}[decoding.prefill]
    last = length if decoding.tokens_from == "text" else length + new - 1
    return len(range(-(-first // capture.every) * capture.every, last, capture.every))


def sizes(
    shape: Shape,
    lengths: list[int],
    new: int,
    decoding: Decoding,
    capture: Capture,
    packing: Packing,
    target: Callable[[int, str], float | None],
) -> Sizes:
    """Sizes of a run in which no sequence ends early.

    Args:
        shape: of the model.
        lengths: tokens of each prompt.
        new: tokens generated for each.
        decoding, capture, packing: of the run.
        target: sparsity of a layer and matrix, None where it is not known beforehand.
    """
    tokens = sum(captured_positions(length, new, decoding, capture) for length in lengths)
    item = FORMATS[shape.dtype].bits.itemsize
    rows = 0
    dump = packed = dense = 0.0
    for layer, matrix in ((layer, matrix) for layer in range(shape.layers) for matrix in MATRICES):
        if (capture.layers and layer not in capture.layers) or (capture.matrices and matrix not in capture.matrices):
            continue
        rows += tokens
        width, wanted = shape.inputs[matrix], target(layer, matrix)
        nnz = width * (1 - (UNKNOWN_SPARSITY if wanted is None else wanted))
        mask = mask_bytes(width)
        dump += {"full": nnz * item + mask + 8, "masks": mask + 8, "stats": 12}[capture.level]
        earlier = SITES[SITE_OF[matrix]][: SITES[SITE_OF[matrix]].index(matrix)]
        if packing.share_inputs and any(not capture.matrices or other in capture.matrices for other in earlier):
            continue
        dense += width * item
        where = mask if packing.encoding == "split" else nnz * INDEX_BYTES
        values = nnz * VALUE_BYTES[shape.dtype]
        packed += ROW_BYTES + {"full": where + values, "masks": where, "stats": 0}[capture.level]
    return Sizes(tokens, rows, int(tokens * dense), int(tokens * dump), int(tokens * packed))


def too_small(folder: Path, need: int) -> str | None:
    """A warning where the disk that holds a folder, or will, has less room than is needed."""
    where = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(where).free
    return f"needs {need / 1e9:.3g} GB, but {where} has {free / 1e9:.3g} GB free" if need > free else None


def shard_warning(
    model: RuntimeModel,
    thresholds: Path,
    prompts: Path,
    shard: int,
    out: Path,
    decoding: Decoding,
    batching: Batching,
    capture: Capture,
) -> str | None:
    """A warning where the dump of one shard will not fit; the arguments are those of `generate`."""
    config = model.config
    shape = Shape(config.num_hidden_layers, *_widths(model.sites), config.dtype)
    targets = {(row["layer"], row["matrix"]): row["target_sparsity"] for row in read_thresholds(thresholds, model).rows}
    lengths = [len(sequence.prompt_ids) for group in read_shard(prompts, shard) for sequence in group]
    need = sizes(shape, lengths, batching.max_new_tokens, decoding, capture, Packing(), lambda *leaf: targets.get(leaf))
    return too_small(out, need.dump_bytes)


def _model_seconds(
    shape: Shape, lengths: list[int], batching: Batching, ways: list[Decoding], machine: Machine
) -> float:
    """Time in the weights: the passes of every group, in each of the ways that it is run."""
    size = batching.batch_size
    ordered = sorted(lengths)
    longest = [ordered[min(at + size, len(ordered)) - 1] for at in range(0, len(ordered), size)]
    passes = [_passes(length, batching.max_new_tokens, way) for way in ways for length in longest]
    step = _layer_seconds(shape, size, machine)
    at_once = {n: _layer_seconds(shape, size * n, machine) for n in {_round(n) for n, _ in passes if n}}
    return shape.layers * sum((at_once[_round(n)] if n else 0) + steps * step for n, steps in passes)


def _passes(length: int, new: int, decoding: Decoding) -> tuple[int, int]:
    """Positions that a sequence is fed at once, and one by one."""
    if decoding.tokens_from == "text":
        one_by_one = {"none": 0, "half": length // 2, "all": length}[decoding.prefill]
    else:
        one_by_one, length = new - 1, length + new - 1
    if decoding.tokens_from != "own" and decoding.replay == "forced":
        one_by_one = 0
    return length - one_by_one, one_by_one


def _round(length: int) -> int:
    """Up to a power of two, so that few lengths are timed."""
    return 1 << math.ceil(math.log2(max(length, 1)))


def _layer_seconds(shape: Shape, rows: int, machine: Machine) -> float:
    """Median time of one layer's multiplies for some rows; many rows are timed in part and scaled."""
    device = set_up_torch(machine)
    timed = min(rows, 256)
    dtype = getattr(torch, shape.dtype)
    weights = [
        torch.zeros(shape.inputs[matrix], shape.outputs[matrix], dtype=dtype, device=device) for matrix in MATRICES
    ]
    inputs = [torch.zeros(timed, weight.shape[0], dtype=dtype, device=device) for weight in weights]
    times: list[float] = []
    while len(times) < 3 or sum(times) < MEASURED_SECONDS:
        began = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2] * rows / timed
