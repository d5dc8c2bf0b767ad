"""What a study will take before it runs: rows, bytes and time of each workload.

Rows follow from the configuration and the prompts. Bytes are those of the format at the target sparsity, with the
measured overhead over the entropy limit. Time is that of one pass of each kind through one layer's weights, measured
here in the model's own shapes, times the passes and layers; attention and sampling are not counted.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.files import read_json
from sparsetrace.core.settings import Batching, Capture, Conversion, Decoding, Machine, Packing
from sparsetrace.core.text import read_documents
from sparsetrace.formats.architecture import sites_of
from sparsetrace.formats.numbers import FORMATS, mask_bytes
from sparsetrace.formats.sites import Leaf, Site, by_leaf, layer_leaves, layer_sites
from sparsetrace.generation.job import Job
from sparsetrace.generation.plan import Feed, feed_of, new_tokens
from sparsetrace.generation.prompts import read_shard
from sparsetrace.generation.selection import captured_matrices, holders
from sparsetrace.methods import MatrixRule, Method, operand_parts
from sparsetrace.model.read_config import read_config
from sparsetrace.model.runtime import set_up_torch
from sparsetrace.study.sections import EMBEDDED, Run
from sparsetrace.study.study import Study

# Measured in benchmarks/results/pack.csv: bytes a kept value in its planes, and the index columns of a row.
VALUE_BYTES = {"float16": 1.62, "bfloat16": 1.35, "float32": 3.6}
ROW_BYTES = 12
# Dense bytes packed per second by one core, same place.
PACK_BYTES_PER_SECOND = 0.3e9
# An index of the open encoding, same place: differences of neighbours, compressed.
INDEX_BYTES = 0.65
# Assumed unless a method says otherwise: a dense run, or a method without a target.
UNKNOWN_SPARSITY = 0.0
CHARACTERS_PER_TOKEN = 3
# Tokens of a prompt of the embedded model, whose prompts do not exist before it is trained.
EMBEDDED_PROMPTS, EMBEDDED_PROMPT_TOKENS = 32, 40
MEASURED_SECONDS = 0.2
# Bytes of a row in the dump besides values and mask: its offset, or its statistics and what the index takes.
OFFSET_BYTES, STATISTICS_BYTES, LABEL_BYTES = 8, 12, 16


@dataclass(frozen=True, slots=True)
class Shape:
    """What an estimate needs to know of a model.

    Args:
        sites: in the order of execution.
        dtype: of the operands.
    """

    sites: tuple[Site, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """What some prompts make.

    Args:
        tokens: captured positions.
        rows: of all matrices.
        dense_bytes: of the operands that are packed, as they would be without sparsity.
        dump_bytes, workload_bytes: on the disk.
    """

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


@dataclass(frozen=True, slots=True)
class Operands:
    """What is captured of a run, and how it is written.

    Args:
        method: which tells the matrices that read one operand, and targets.
        targets: sparsity of each matrix; None where it is not known beforehand.
        capture, packing: of the run.
        thresholds: pattern of each matrix where they are known, since matrices with equal ones share an operand.
    """

    method: Method
    targets: Callable[[Leaf], float | None]
    capture: Capture
    packing: Packing
    thresholds: dict[Leaf, int | None] | None = None

    def parts(self, sites: Sequence[Site]) -> dict[tuple[int | None, str], list[list[str]]]:
        """The matrices of each site that read one operand: those of equal thresholds, or else of equal targets."""
        rules = []
        for layer, matrix in layer_leaves(sites):
            if self.thresholds is not None:
                bits = self.thresholds.get((layer, matrix))
            else:
                # stands for the threshold that will be looked up: of one distribution, for one target
                target = self.targets((layer, matrix))
                bits = None if target is None else round(target * 1e9)
            rules.append(MatrixRule(layer, matrix, bits))
        return operand_parts(self.method, sites, rules)


def estimate(study: Study, machine: Machine) -> list[Estimate]:
    """Estimate every workload of a study.

    Raises:
        InputError: a checkpoint or a prompt set that cannot be read.
    """
    found = []
    dense_tokens: set[tuple[str, str]] = set()
    for run, one in study.runs.items():
        for model in study.models_of(run):
            checkpoint = study.models[model].checkpoint
            shape = read_shape(checkpoint, study.models[model].conversion)
            lengths, assumed = prompt_lengths(one)
            for setting in one.methods:
                operands = Operands(setting.method, leaf_targets(setting.method), one.capture, one.packing)
                made = sizes(shape, feeds(lengths, one.decoding, one.batching), operands)
                warning = too_small(Path(study.results), made.dump_bytes + made.workload_bytes)
                notes = assumed if warning is None else [*assumed, warning]
                ways = [one.decoding]
                if one.decoding.tokens_from == "dense" and (model, run) not in dense_tokens:
                    dense_tokens.add((model, run))
                    ways.append(Decoding())
                    notes = [*notes, "time includes the dense model's own run, whose tokens every setting is given"]
                seconds = _model_seconds(shape, lengths, one.batching, ways, machine)
                seconds += made.dense_bytes / PACK_BYTES_PER_SECOND
                found.append(Estimate(f"{model}/{run}/{setting.label}", made, seconds, notes))
    return found


def leaf_targets(method: Method) -> Callable[[Leaf], float | None]:
    """The target of each matrix under a method; None where it is not known beforehand."""
    return lambda leaf: None if leaf[0] is None else method.target(leaf[0], leaf[1])


def read_shape(checkpoint: str, conversion: Conversion) -> Shape:
    """A model's shape from its checkpoint's config.json, read as `convert` reads it.

    Raises:
        InputError: there is no such file, or `convert` would refuse it.
    """
    if checkpoint == EMBEDDED:
        from sparsetrace.model.demo.shape import CONFIG

        return Shape(sites_of(CONFIG), "bfloat16" if conversion.dtype == "auto" else conversion.dtype)
    folder = Path(checkpoint)
    _, config = read_config(read_json(folder / "config.json", "estimate"), conversion, folder)
    return Shape(sites_of(config), config.dtype)


def prompt_lengths(run: Run) -> tuple[list[int], list[str]]:
    """Tokens of each prompt, with notes on what was assumed."""
    if run.prompts == EMBEDDED:
        count = min(EMBEDDED_PROMPTS, run.prompt_set.limit or EMBEDDED_PROMPTS)
        note = f"prompts of the embedded model taken as {count} of {EMBEDDED_PROMPT_TOKENS} tokens"
        return [EMBEDDED_PROMPT_TOKENS] * count, [note]
    texts = read_documents(Path(run.prompts), run.prompt_set.field, "estimate")[: run.prompt_set.limit]
    lengths = [max(1, len(text) // CHARACTERS_PER_TOKEN) for text in texts]
    return lengths, [f"prompt tokens taken as one for every {CHARACTERS_PER_TOKEN} characters"]


def feeds(lengths: Sequence[int], decoding: Decoding, batching: Batching) -> list[Feed]:
    """How prompts of some lengths are fed if no sequence ends early."""
    return [feed_of(length, new_tokens(decoding, batching), decoding) for length in lengths]


def sizes(shape: Shape, fed: Sequence[Feed], operands: Operands) -> Sizes:
    """Sizes of a run in which no sequence ends early.

    Args:
        shape: of the model.
        fed: how each sequence is fed.
        operands: what is captured of it.
    """
    capture, packing = operands.capture, operands.packing
    tokens = sum(feed.captured(capture.every) for feed in fed)
    with_logits = sum(feed.captured_logits(capture.every) for feed in fed)
    item = FORMATS[shape.dtype].bits.itemsize
    sites = by_leaf(shape.sites)
    chosen = captured_matrices(shape.sites, capture)
    held = holders(chosen, operands.parts(shape.sites))
    rows = 0
    dump, packed, dense = float(tokens * LABEL_BYTES), 0.0, 0.0
    for layer, matrix in chosen:
        site = sites[layer, matrix]
        own_rows = tokens if layer is not None else with_logits
        rows += own_rows
        target = operands.targets((layer, matrix))
        nnz = site.in_features * (1 - (UNKNOWN_SPARSITY if target is None else target))
        mask = mask_bytes(site.in_features)
        # what several matrices read is in the dump once, and in the workload once if it is shared
        if held[layer, matrix] == matrix:
            dump += own_rows * _dump_row_bytes(capture.level, nnz * item, mask)
        elif packing.share_inputs and not {matrix, held[layer, matrix]} & set(operands.method.out_masks):
            continue
        dense += own_rows * site.in_features * item
        where = mask if packing.encoding == "split" else nnz * INDEX_BYTES
        values = nnz * VALUE_BYTES[shape.dtype]
        packed += own_rows * (ROW_BYTES + {"full": where + values, "masks": where, "stats": 0}[capture.level])
        if matrix in operands.method.out_masks and capture.level != "stats":
            dump += own_rows * mask_bytes(site.outputs(matrix))
            packed += own_rows * mask_bytes(site.outputs(matrix))
    return Sizes(tokens, rows, int(dense), int(dump), int(packed))


def _dump_row_bytes(level: str, values: float, mask: int) -> float:
    """Of one operand, by capture level."""
    return {
        "full": OFFSET_BYTES + values + mask,
        "masks": STATISTICS_BYTES - 4 + mask,
        "stats": STATISTICS_BYTES,
    }[level]


def too_small(folder: Path, need: int) -> str | None:
    """A warning where the disk that holds a folder, or will, has less room than is needed."""
    where = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(where).free
    return f"needs {need / 1e9:.3g} GB, but {where} has {free / 1e9:.3g} GB free" if need > free else None


def shard_warning(job: Job) -> str | None:
    """A warning where the dump of a shard will not fit its disk; None where it will, or where nothing is captured."""
    if job.thresholds is None or job.capture is None:
        return None
    table = read_thresholds(job.thresholds, job.model)
    targets = {(row["layer"], row["matrix"]): row["target_sparsity"] for row in table.rows}
    bits: dict[Leaf, int | None] = {(rule.layer, rule.matrix): rule.threshold_bits for rule in table.rules}
    operands = Operands(table.method, targets.get, job.capture, Packing(), bits)
    lengths = [len(sequence.prompt_ids) for group in read_shard(job.prompts, job.shard) for sequence in group]
    fed = feeds(lengths, job.decoding, job.batching)
    return too_small(job.out, sizes(Shape(job.model.sites, job.model.config.dtype), fed, operands).dump_bytes)


def _model_seconds(
    shape: Shape, lengths: list[int], batching: Batching, ways: list[Decoding], machine: Machine
) -> float:
    """Time in the weights: the passes of every group, in each of the ways that it is run."""
    size = batching.batch_size
    ordered = sorted(lengths)
    longest = [ordered[min(at + size, len(ordered)) - 1] for at in range(0, len(ordered), size)]
    passes = [feed for way in ways for feed in feeds(longest, way, batching)]
    step = _model_pass_seconds(shape, size, machine)
    known = {
        n: _model_pass_seconds(shape, size * n, machine) for n in {_round(feed.known) for feed in passes if feed.known}
    }
    return sum((known[_round(feed.known)] if feed.known else 0) + feed.steps * step for feed in passes)


def _round(length: int) -> int:
    """Up to a power of two, so that few lengths are timed."""
    return 1 << math.ceil(math.log2(max(length, 1)))


# settings of one study run the same shapes
@cache
def _model_pass_seconds(shape: Shape, rows: int, machine: Machine) -> float:
    """Median time of all layers' multiplies for some rows: one layer is timed, and many rows in part, and scaled."""
    layers = len({site.layer for site in layer_sites(shape.sites)})
    device = set_up_torch(machine)
    timed = min(rows, 256)
    dtype = getattr(torch, shape.dtype)
    first = [site for site in layer_sites(shape.sites) if site.layer == 0]
    weights = [torch.zeros(site.in_features, site.width, dtype=dtype, device=device) for site in first]
    inputs = [torch.zeros(timed, weight.shape[0], dtype=dtype, device=device) for weight in weights]
    times: list[float] = []
    while len(times) < 3 or sum(times) < MEASURED_SECONDS:
        began = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return layers * sorted(times)[len(times) // 2] * rows / timed
