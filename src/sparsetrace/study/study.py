"""The study file (`config.yaml`): models, runs, methods; frozen, checked when read, imports no torch.

Each field's description is also the help of the command-line option that carries it (see `sparsetrace.cli.main`).
"""

import ast
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_serializer, model_validator

from sparsetrace.core.devices import shards_here
from sparsetrace.core.files import InputError, read_json, sha256_json
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
    Section,
)
from sparsetrace.methods import METHODS, WEIGHT_METHODS, FromFile, Method, ThresholdMethod, WeightMethod

# The word that names the built-in demonstration model, its calibration text and its prompts.
EMBEDDED = "embedded"
# Layers of that model, known before it is trained.
EMBEDDED_LAYERS = 4

# What `shards: auto` stood for where Snakemake was started.
AUTO_SHARDS = "SPARSETRACE_AUTO_SHARDS"

# Names of what lies beside the runs of a model and beside the models.
RESERVED_RUNS = ("checkpoint", "model", "pruned", "histograms", "greedy")
RESERVED_MODELS = ("logs",)
# And beside the settings of a run.
RESERVED_LABELS = ("prompts.parquet", "dense_tokens")

# Labels and names become folders.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Pruning(Section):
    """A weight-side method with its parameters."""

    name: str
    method: WeightMethod

    @model_validator(mode="before")
    @classmethod
    def _of_entry(cls, entry: Any) -> Any:
        if isinstance(entry, Pruning):
            return entry
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if name not in WEIGHT_METHODS:
            raise ValueError(f"name must be one of {', '.join(WEIGHT_METHODS)}, got {name!r}")
        parameters = {key: value for key, value in entry.items() if key != "name"}
        known = WEIGHT_METHODS[name].model_fields
        if unknown := sorted(set(parameters) - set(known)):
            raise ValueError(f"{name}: keys must be among {', '.join(('name', *known))}, got {', '.join(unknown)}")
        return {"name": name, "method": WEIGHT_METHODS[name](**parameters)}

    @model_serializer
    def _as_entry(self) -> dict[str, Any]:
        return {"name": self.name} | self.method.model_dump(mode="json", exclude_none=True)


class Model(Section):
    """One checkpoint."""

    checkpoint: str = Field(description="folder in Hugging Face form, or `embedded` for the demonstration model")
    conversion: Conversion = Field(Conversion(), description="how it becomes a runtime model")
    prune: Pruning | None = Field(
        None, description="weight-side method, {name: magnitude | wanda, sparsity: s} or {name: ..., pattern: N:M}"
    )
    calibration_text: str = Field(description="file of text, or `embedded` with the demonstration model")
    calibration: Calibration = Field(Calibration(), description="what is counted")
    greedy: Greedy = Field(Greedy(), description="search behind `allocation: greedy`")
    quality_text: str | None = Field(
        None, description="file of held-out text, or `embedded` with the demonstration model; none measures no quality"
    )
    quality: Quality = Field(Quality(), description="how quality is measured")

    @model_validator(mode="after")
    def _embedded_text_needs_embedded_model(self) -> Self:
        for name in ("calibration_text", "quality_text"):
            if getattr(self, name) == EMBEDDED and self.checkpoint != EMBEDDED:
                raise ValueError(f"{name} must be a file unless checkpoint is `embedded`: name the text")
        return self


class Setting(Section):
    """One method setting of a run, under its label."""

    label: Name
    method_name: str
    method: Method


class Run(Section):
    """One prompt set under several methods."""

    models: tuple[Name, ...] | None = Field(None, description="models it is run on; all if not given")
    prompts: str = Field(description="file of prompts, or `embedded` with the demonstration model")
    prompt_set: PromptSet = Field(PromptSet(), description="what is read of it")
    batching: Batching = Field(Batching(), description="how sequences are multiplied together")
    decoding: Decoding = Field(Decoding(), description="how tokens are produced")
    capture: Capture = Field(Capture(), description="what is kept of the operands")
    packing: Packing = Field(Packing(), description="how operands are written")
    methods: tuple[Setting, ...] = Field(min_length=1, description="methods, each with a list of values or one")

    @field_validator("batching", mode="before")
    @classmethod
    def _shards_of_this_machine(cls, batching: Any) -> Any:
        if isinstance(batching, Mapping) and batching.get("shards") == "auto":
            # jobs of a cluster inherit it from the machine that submits them
            count = os.environ.setdefault(AUTO_SHARDS, str(shards_here()))
            return {**batching, "shards": int(count)}
        return batching

    @field_validator("methods", mode="before")
    @classmethod
    def _expand(cls, entries: Any) -> Any:
        if not isinstance(entries, list | tuple):
            raise ValueError("must be a list of methods such as {name: teal, sparsity: [0.25, 0.5]}")
        return tuple(setting for entry in entries for setting in _settings(entry))

    @model_validator(mode="after")
    def _labels_are_folders_of_their_own(self) -> Self:
        labels = [setting.label for setting in self.methods]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"labels must be unique, got {', '.join(twice)} twice: give one of them a `label`")
        if taken := sorted(set(labels) & set(RESERVED_LABELS)):
            raise ValueError(f"a label must not be one of {', '.join(RESERVED_LABELS)}, got {', '.join(taken)}")
        return self

    @model_validator(mode="after")
    def _something_is_captured(self) -> Self:
        if self.decoding.prefill == "none" and self.batching.max_new_tokens < 2:
            raise ValueError(
                "batching.max_new_tokens must be at least 2 with decoding.prefill `none`, got 1: "
                "the last sampled token is never fed, so nothing would be captured"
            )
        return self


def _settings(entry: Any) -> Iterator[Setting]:
    """One setting for each element of the product of an entry's lists."""
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"a method must be a mapping with `name`, one of {', '.join(METHODS)}, got {entry!r}")
    name, own_label = entry["name"], entry.get("label")
    if name not in METHODS:
        raise ValueError(f"method name must be one of {', '.join(METHODS)}, got {name!r}")
    parameters = {key: value for key, value in entry.items() if key not in ("name", "label")}
    known = METHODS[name].model_fields
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(
            f"method {name}: keys must be among {', '.join(('name', 'label', *known))}, got {', '.join(unknown)}"
        )
    # A list stands for several settings, save where the parameter is itself a list.
    axes = [[(key, v) for v in (value if isinstance(value, list) else [value])] for key, value in parameters.items()]
    settings = [METHODS[name](**dict(values)) for values in itertools.product(*axes)]
    for method in settings:
        label = method.label
        if own_label is not None:
            label = str(own_label) if len(settings) == 1 else method.label.replace(name, str(own_label), 1)
        yield Setting(label=label, method_name=name, method=method)


class Study(Section):
    """The whole file."""

    results: str = Field("results", description="folder for everything that is written; may lie elsewhere")
    machine: Machine = Field(Machine(), description="where the model runs")
    models: dict[Name, Model] = Field(min_length=1, description="checkpoints by name")
    runs: dict[Name, Run] = Field(min_length=1, description="runs by name")

    @model_validator(mode="after")
    def _runs_name_their_models(self) -> Self:
        if taken := sorted(set(self.models) & set(RESERVED_MODELS)):
            raise ValueError(f"models: a name must not be one of {', '.join(RESERVED_MODELS)}, got {', '.join(taken)}")
        for run_name, run in self.runs.items():
            if run_name in RESERVED_RUNS:
                raise ValueError(f"runs: a name must not be one of {', '.join(RESERVED_RUNS)}, got {run_name}")
            if unknown := sorted(set(run.models or ()) - set(self.models)):
                raise ValueError(
                    f"runs.{run_name}.models must be among {', '.join(self.models)}, got {', '.join(unknown)}"
                )
            for model_name in self.models_of(run_name):
                if run.prompts == EMBEDDED and self.models[model_name].checkpoint != EMBEDDED:
                    raise ValueError(
                        f"runs.{run_name}.prompts must be a file for model {model_name}, got `embedded`: name one"
                    )
        return self

    @property
    def gpus(self) -> int:
        """GPUs that a job which runs a model asks for."""
        return 0 if self.machine.device == "cpu" else 1

    def models_of(self, run: str) -> tuple[str, ...]:
        """Names of the models that a run uses."""
        return self.runs[run].models or tuple(self.models)

    def setting(self, run: str, label: str) -> Setting:
        """The setting of a run that carries a label."""
        return next(setting for setting in self.runs[run].methods if setting.label == label)

    def checkpoint(self, model: str) -> str:
        """Folder of a model's checkpoint; the embedded one is made below the results."""
        folder = self.models[model].checkpoint
        return f"{self.results}/{model}/checkpoint" if folder == EMBEDDED else folder

    def checkpoint_weights(self, model: str) -> list[str]:
        """Weight files of a checkpoint that is there already; those of the embedded one come with its config.json."""
        if self.models[model].checkpoint == EMBEDDED:
            return []
        return sorted(str(path) for path in Path(self.models[model].checkpoint).glob("*.safetensors"))

    def calibration_text(self, model: str) -> str:
        """File of a model's calibration text."""
        text = self.models[model].calibration_text
        return f"{self.checkpoint(model)}/calibration.txt" if text == EMBEDDED else text

    def quality_text(self, model: str) -> str | None:
        """File of a model's held-out text; None where no quality is measured."""
        text = self.models[model].quality_text
        return f"{self.checkpoint(model)}/quality.txt" if text == EMBEDDED else text

    def prompts(self, run: str, model: str) -> str:
        """File of a run's prompt set, for one of its models."""
        prompts = self.runs[run].prompts
        return f"{self.checkpoint(model)}/prompts.jsonl" if prompts == EMBEDDED else prompts

    def texts(self, run: str) -> str:
        """Option of the split where a run's prompts are texts, behind which nothing is generated."""
        return "--texts" if self.runs[run].decoding.tokens_from == "text" else ""

    def runtime_model(self, model: str) -> str:
        """Description of the runtime model that a model's runs use: the pruned one, where there is one."""
        return f"{self.results}/{model}/{'pruned' if self.models[model].prune else 'model'}/config.json"

    def weight_masks(self, model: str) -> list[str]:
        """Table of a pruned model's masks; none for a dense one."""
        return [f"{self.results}/{model}/pruned/weight_masks.parquet"] if self.models[model].prune else []

    def calibration_shards(self, model: str) -> list[str]:
        """Names of the parts that a model's calibration is counted in."""
        return [f"{shard:05d}" for shard in range(self.models[model].calibration.shards)]

    def scores(self, model: str) -> list[str]:
        """Methods whose scores a model's calibration must count besides what enters the sites."""
        methods = [setting.method for name in self.runs_of(model) for setting in self.runs[name].methods]
        return sorted({m.name for m in methods if m.needs_thresholds and m.score in ("scaled", "gate")})

    def runs_of(self, model: str) -> list[str]:
        """Names of the runs that use a model."""
        return [name for name in self.runs if model in self.models_of(name)]

    def greedy_layers(self, model: str, run: str, label: str) -> list[str]:
        """Names of the layers whose search tables a setting needs; none where it is allocated otherwise."""
        method = self.setting(run, label).method
        if not isinstance(method, ThresholdMethod) or method.allocation != "greedy":
            return []
        if self.models[model].checkpoint == EMBEDDED:
            layers = EMBEDDED_LAYERS
        else:
            config = Path(self.models[model].checkpoint) / "config.json"
            layers = read_json(config, "config").get("num_hidden_layers", 0)
        return [f"{layer:03d}" for layer in range(layers)]

    def threshold_file(self, run: str, label: str) -> list[str]:
        """The user's own threshold file of a setting, if it has one."""
        method = self.setting(run, label).method
        own = isinstance(method, ThresholdMethod) and isinstance(method.allocation, FromFile)
        return [method.allocation.file] if own else []  # type: ignore[attr-defined]

    def shards(self, run: str) -> list[str]:
        """Names of a run's shards."""
        return [f"{shard:05d}" for shard in range(self.runs[run].batching.shards)]

    def dense_tokens(self, run: str, shard: str) -> list[str]:
        """Names of the shards whose dense tokens a shard of a run is given: its own, or none."""
        return [shard] if self.runs[run].decoding.tokens_from == "dense" else []

    def weight_bytes(self, model: str, converted: str = "") -> int:
        """Size of a model.

        Args:
            model: name.
            converted: its runtime config.json; before that is there, the checkpoint's own weights are counted.
        """
        folders = (*([Path(converted).parent] if converted else []), Path(self.models[model].checkpoint))
        sizes = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders)
        return next((size for size in sizes if size), 0)

    def mem_mb(self, step: str, model: str, converted: str = "", attempt: int = 1) -> int:
        """Memory to ask for, in MB; `needs`."""
        return needs(step, self.weight_bytes(model, converted), attempt).mem_mb

    def runtime(self, step: str, model: str, converted: str = "", attempt: int = 1) -> int:
        """Time to ask for, in minutes; `needs`."""
        return needs(step, self.weight_bytes(model, converted), attempt).runtime

    def excerpt(self, model: str, run: str, label: str) -> str:
        """The part of the study that makes one workload, as the JSON of a study file of its own."""
        setting = self.setting(run, label)
        values = setting.method.model_dump(mode="json").items()
        # a list stands for several settings, so one that is a value lies in a list
        parameters = {name: [value] if isinstance(value, list) else value for name, value in values}
        method = {"name": setting.method_name, "label": label, **parameters}
        part = {"models": [model], "methods": [method]}
        return json.dumps(
            {
                "machine": self.machine.model_dump(mode="json"),
                "models": {model: self.models[model].model_dump(mode="json")},
                "runs": {run: self.runs[run].model_dump(mode="json") | part},
            }
        )

    def workloads(self) -> list[tuple[str, str, str]]:
        """Every (model, run, label) of the study."""
        return [
            (model, run, setting.label)
            for run in self.runs
            for model in self.models_of(run)
            for setting in self.runs[run].methods
        ]


class Need(NamedTuple):
    """What one job asks of a scheduler."""

    mem_mb: int
    runtime: int


# Minutes of a job apart from its model, and for each GB of the model, on a slow disk and an old GPU.
MINUTES = {
    "convert": (10, 2),
    "calibrate": (30, 6),
    "allocate": (60, 15),
    "prune": (60, 6),
    "quality": (30, 6),
    "generate": (120, 15),
}
# The interpreter with torch, and the blocks of a group.
STEP_MB = 4000
# Two blocks on their way from a GPU to the disk.
PINNED_MB = 3000
# `convert` holds the tensors that it is making, or the whole of a smaller model twice.
CONVERTED_MB = 4400


def needs(step: str, weight_bytes: int, attempt: int = 1) -> Need:
    """Memory and time of a step that handles a model.

    A step that runs the model holds the weights once on the host, and once more while they are read.

    Args:
        step: one of `MINUTES`.
        weight_bytes: of the model.
        attempt: 1, or more after a job ran out of memory or time; each asks for as much again.
    """
    twice_mb = 2 * weight_bytes // 1_000_000
    minutes, minutes_per_gb = MINUTES[step]
    mem_mb = STEP_MB + (min(twice_mb, CONVERTED_MB) if step == "convert" else twice_mb)
    mem_mb += PINNED_MB if step == "generate" else 0
    return Need(attempt * mem_mb, attempt * (minutes + minutes_per_gb * weight_bytes // 1_000_000_000))


def parse_study(content: Mapping[str, Any], where: str) -> Study:
    """Check a configuration.

    Raises:
        InputError: one line for each thing that is wrong, unknown keys with the known ones.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(_lines(error, where))) from None


def load_study(path: Path) -> Study:
    """Read and check a configuration file."""
    return parse_study(_read_yaml(path), str(path))


def study_of(config: Mapping[str, Any], default: Path) -> Study:
    """The study that Snakemake was given.

    Args:
        config: Snakemake's, from `--configfile` and `--config`.
        default: read where `config` names no models; what `config` does hold, such as `results`, replaces its keys.
    """
    if "models" in config:
        return parse_study(config, "config")
    return parse_study(_read_yaml(default) | dict(config), str(default))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config: {path} must be a file, got nothing there") from None
    except yaml.YAMLError as error:
        raise InputError(f"config: {path} must be YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"config: {path} must hold `models` and `runs`, got {content!r}")
    return content


def _lines(error: ValidationError, where: str) -> Iterator[str]:
    for item in error.errors():
        at = ".".join(str(part) for part in item["loc"])
        match item["type"]:
            case "extra_forbidden":
                known = ", ".join(_known_keys(item["loc"][:-1]))
                yield f"{where}: {at} must be one of the known keys ({known}), got an unknown one"
            case "missing":
                yield f"{where}: {at} must be given"
            case "value_error":
                yield f"{where}: {at + ': ' if at else ''}{item['ctx']['error']}"
            case _:
                yield f"{where}: {at} must be valid, got {item['input']!r}: {item['msg']}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys that a mapping at a place in the file may have."""
    section: Any = Study
    parts = iter(location)
    for part in parts:
        annotation = section.model_fields[part].annotation
        below: dict[str, type[Section]] = {"models": Model, "runs": Run}
        named = below.get(str(part)) if section is Study else None
        if named is not None:
            # the next part is the model's or the run's own name
            next(parts, None)
        section = named or annotation
    return list(section.model_fields)


def options(section: BaseModel) -> str:
    """A section as options of a shell command, in field order; what is None or empty is left to its default.

    `sparsetrace.cli.main` makes the options from the same fields, so the round trip is exact.
    """
    words: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + name.replace("_", "-"))
        elif isinstance(value, tuple):
            words.extend(f"{flag} {shlex.quote(item)}" for item in value)
        elif value is not None:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def repeated(flag: str, values: Sequence[str]) -> str:
    """An option of a shell command, once for each value."""
    return " ".join(f"{flag} {shlex.quote(str(value))}" for value in values)


def method_options(setting: Setting) -> str:
    """A method setting as command-line options, which `parse_method` reads."""
    values = setting.method.model_dump(mode="json").items()
    # JSON is YAML that says what is text: an unquoted 2:4 is the number 124
    words = [f"--method {setting.method_name}", *(f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in values)]
    return " ".join([*words, f"--label {setting.label}"])


def weight_method_options(pruning: Pruning) -> str:
    """A weight-side method as command-line options, which `parse_weight_method` reads."""
    values = pruning.method.model_dump(mode="json").items()
    words = [f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in values if v is not None]
    return " ".join([f"--method {pruning.name}", *words])


def parse_weight_method(name: str, parameters: Sequence[str]) -> WeightMethod:
    """A weight-side method from command-line options."""
    entry = {"name": name} | _values(parameters)
    try:
        return Pruning.model_validate(entry).method
    except ValidationError as error:
        raise InputError("\n".join(_lines(error, "--set"))) from None


def parse_method(name: str, parameters: Sequence[str], label: str | None) -> Setting:
    """A method setting from command-line options.

    Args:
        name: of the method.
        parameters: `name=value` each; a value is read as YAML, as in the study file.
        label: None takes the method's own.
    """
    entry = {"name": name} | ({} if label is None else {"label": label}) | _values(parameters)
    try:
        settings = list(_settings(entry))
    except ValidationError as error:
        raise InputError("\n".join(_lines(error, "--set"))) from None
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if len(settings) != 1:
        raise InputError(f"--set: a parameter must have one value, got {len(settings)} settings: run one after another")
    return settings[0]


def _values(parameters: Sequence[str]) -> dict[str, Any]:
    values = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            raise InputError(f"--set must be NAME=VALUE, got {parameter!r}")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set: {key} must be a YAML value, got {value!r}") from None
    return values


def source_hash(*modules: str) -> str:
    """Hash of the package's source that the named modules use, through every import.

    Snakemake does not track package code; a rule puts this into its `params`, so that a change re-runs exactly the
    steps that import what changed.

    Args:
        modules: dotted names below `sparsetrace`, such as `generation.generate`.
    """
    package = Path(__file__).parents[1]
    kernels = package.parents[1] / "kernels" / "sparsetrace_kernels"
    # installed as a wheel, the two packages lie side by side
    kernels = kernels if kernels.is_dir() else package.with_name("sparsetrace_kernels")
    roots = {"sparsetrace": package, "sparsetrace_kernels": kernels}

    def source(name: str) -> Path | None:
        top, *rest = name.split(".")
        if top not in roots or (not rest and top == "sparsetrace"):
            return None
        path = roots[top].joinpath(*rest)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return file if file.is_file() else None

    found: dict[str, str] = {}
    queue = [f"sparsetrace.{module}" for module in modules]
    while queue:
        name = queue.pop()
        file = source(name)
        if name in found or file is None:
            continue
        content = file.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        # importing a module runs its packages first
        queue.append(name.rpartition(".")[0])
        queue.extend(_imported(content))
    return sha256_json(found)[:16]


@cache
def _imported(source: bytes) -> list[str]:
    """Dotted names that a module's source may import, inside functions too; the steps share most of their modules."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
