"""What would stop a study after minutes or hours, found in seconds: its files, its model, its prompts, this machine.

Each check is the one that the step itself makes, before it reads a weight or runs the model. What the embedded model
brings does not exist before it is trained, and is not checked.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparsetrace.calibration.dense_states import quality_windows
from sparsetrace.calibration.threshold_file import read_threshold_file
from sparsetrace.calibration.windows import calibration_windows
from sparsetrace.core.files import InputError
from sparsetrace.core.text import read_documents
from sparsetrace.formats.architecture import ModelConfig, sites_of
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Site, layer_leaves
from sparsetrace.generation.backends import choose_backend
from sparsetrace.generation.prompts import split
from sparsetrace.generation.selection import captured_matrices, refuse_head_without_logits
from sparsetrace.methods import FromFile, MatrixRule, PerLayer, allocation_of
from sparsetrace.model.convert import open_checkpoint
from sparsetrace.model.demo.shape import CONFIG
from sparsetrace.model.runtime import set_up_torch
from sparsetrace.model.tokenizer import Tokenizer
from sparsetrace.study.sections import EMBEDDED, Setting
from sparsetrace.study.study import Study
from sparsetrace.tools.estimate import Operands, Shape, feeds, leaf_targets, sizes, too_small


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of a model before it is converted; the embedded one has no tokenizer yet."""

    config: ModelConfig
    sites: tuple[Site, ...]
    tokenizer: Tokenizer | None
    weight_bytes: int


@dataclass(slots=True)
class _Faults:
    """Faults by line, each once: several models may share a prompt set."""

    lines: dict[str, None] = field(default_factory=dict)

    @contextmanager
    def of(self, place: str) -> Iterator[None]:
        """Take a refusal of the block as a fault of a place in the study."""
        try:
            yield
        except InputError as error:
            self.lines |= dict.fromkeys(f"{place}: {line}" for line in str(error).splitlines())


def preflight(study: Study) -> list[str]:
    """Every fault that can be known before the study runs, a line each; none if nothing was found."""
    faults = _Faults()
    models: dict[str, _Model] = {}
    for name in study.models:
        with faults.of(f"models.{name}"):
            models[name] = _open(study, name)
        if name in models:
            _check_model(study, name, models[name], faults)
    dump, workloads = 0, 0
    for run in study.runs:
        for name in study.models_of(run):
            if name in models:
                for made in _check_run(study, run, name, models[name], faults):
                    dump, workloads = max(dump, made[0]), workloads + made[1]
            elif study.runs[run].prompts != EMBEDDED:
                with faults.of(f"runs.{run}"):
                    read_documents(Path(study.runs[run].prompts), study.runs[run].prompt_set.field, "prompts")
    # a dump is removed once it is packed, so only the workloads add up
    if warning := too_small(Path(study.results), dump + workloads):
        faults.lines[f"results: {study.results} {warning}: free some space, or capture less"] = None
    return list(faults.lines)


def _open(study: Study, name: str) -> _Model:
    model = study.models[name]
    if model.checkpoint == EMBEDDED:
        return _Model(CONFIG, tuple(sites_of(CONFIG)), None, 0)
    opened = open_checkpoint(Path(model.checkpoint), model.conversion)
    weights = sum(math.prod(tensor.shape) for tensor in opened.tensors)
    return _Model(opened.config, opened.sites, opened.tokenizer, weights * FORMATS[opened.config.dtype].bits.itemsize)


def _check_model(study: Study, name: str, model: _Model, faults: _Faults) -> None:
    """Texts, weight masks, and the memory of the GPU."""
    section, place = study.models[name], f"models.{name}"
    context = model.config.max_position_embeddings
    calibrations = [section.calibration]
    settings = [setting for run in study.runs_of(name) for setting in study.runs[run].methods]
    if any(allocation_of(setting.method) == "greedy" for setting in settings):
        calibrations.append(section.greedy.calibration)
    text, held_out = section.calibration_text, section.quality_text
    if model.tokenizer is not None and text is not None and study.users_of_calibration(name):
        for calibration in calibrations:
            with faults.of(place):
                calibration_windows(model.tokenizer, Path(text), calibration, context)
    if model.tokenizer is not None and held_out is not None:
        with faults.of(place):
            quality_windows(model.tokenizer, Path(held_out), section.quality, context)
    if section.prune is not None:
        with faults.of(place):
            section.prune.method.refuse_model(model.sites)
    with faults.of("machine"):
        device = set_up_torch(study.machine)
        if device.type == "cuda":
            import torch

            _, total = torch.cuda.mem_get_info(device)
            if model.weight_bytes > total:
                raise InputError(
                    f"model {name} must fit the memory of one GPU of {total / 1e9:.3g} GB, got "
                    f"{model.weight_bytes / 1e9:.3g} GB of weights: use a larger GPU, or `device: cpu`"
                )


def _check_run(study: Study, name: str, model_name: str, model: _Model, faults: _Faults) -> Iterator[tuple[int, int]]:
    """Prompts, capture and settings of a run; yields the bytes of dump and workload of each setting."""
    run, place = study.runs[name], f"runs.{name}"
    lengths: list[int] = []
    if model.tokenizer is not None:
        with faults.of(place):
            path, texts = Path(run.prompts), run.decoding.tokens_from == "text"
            context = model.config.max_position_embeddings
            groups, _ = split(path, model.tokenizer, context, run.prompt_set, run.batching, texts=texts)
            lengths = [len(sequence.prompt_ids) for group in groups for sequence in group]
    captured = False
    with faults.of(place):
        refuse_head_without_logits(run.capture, run.decoding)
        captured_matrices(model.sites, run.capture)
        captured = True
    fed = feeds(lengths, run.decoding, run.batching)
    for setting in run.methods:
        fits = False
        with faults.of(f"{place}.{setting.label}, model {model_name}"):
            _refuse_setting(study, setting, model)
            fits = True
        if captured and fits:
            made = sizes(
                Shape(model.sites, model.config.dtype),
                fed,
                Operands(setting.method, leaf_targets(setting.method), run.capture, run.packing),
            )
            yield made.dump_bytes, made.workload_bytes


def _refuse_setting(study: Study, setting: Setting, model: _Model) -> None:
    """Refuse a setting that does not fit the model, or that the engine asked for cannot run."""
    method = setting.method
    method.refuse_model(model.config, model.sites)
    allocation = allocation_of(method)
    if isinstance(allocation, PerLayer):
        allocation.refuse_model(model.sites)
    if isinstance(allocation, FromFile):
        read_threshold_file(Path(allocation.file), model.sites)
    # what a threshold is does not matter here, only whether there is one
    rules = [
        MatrixRule(layer, matrix, 0 if method.needs_threshold(matrix) else None)
        for layer, matrix in layer_leaves(model.sites)
    ]
    choose_backend(study.machine.engine, set_up_torch(study.machine), model.config, method, rules)
