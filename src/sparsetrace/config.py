"""The study file (`config.yaml`): models, runs, methods; frozen, checked when read, imports no torch.

Each field's description is also the help of the command-line option that carries it (see `sparsetrace.cli`).
"""

import hashlib
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from sparsetrace.files import InputError, read_json, sha256_json
from sparsetrace.methods import METHODS, FromFile, Method, ThresholdMethod
from sparsetrace.settings import (
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

# The word that names the built-in demonstration model, its calibration text and its prompts.
EMBEDDED = "embedded"
# Layers of that model, known before it is trained.
EMBEDDED_LAYERS = 4

# Names of what lies beside the runs of a model and beside the models.
RESERVED_RUNS = ("checkpoint", "model", "histograms", "greedy")
RESERVED_MODELS = ("logs",)

# Labels and names become folders.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Model(Section):
    """One checkpoint."""

    checkpoint: str = Field(description="folder in Hugging Face form, or `embedded` for the demonstration model")
    conversion: Conversion = Field(Conversion(), description="how it becomes a runtime model")
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

    @field_validator("methods", mode="before")
    @classmethod
    def _expand(cls, entries: Any) -> Any:
        if not isinstance(entries, list | tuple):
            raise ValueError("must be a list of methods such as {name: teal, sparsity: [0.25, 0.5]}")
        return tuple(setting for entry in entries for setting in _settings(entry))

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [setting.label for setting in self.methods]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"labels must be unique, got {', '.join(twice)} twice: give one of them a `label`")
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

    def calibration_shards(self, model: str) -> list[str]:
        """Names of the parts that a model's calibration is counted in."""
        return [f"{shard:05d}" for shard in range(self.models[model].calibration.shards)]

    def scores(self, model: str) -> list[str]:
        """Methods whose scores a model's calibration must count besides what enters the sites."""
        methods = [setting.method for name in self.runs_of(model) for setting in self.runs[name].methods]
        return sorted({m.name for m in methods if m.thresholded and m.score in ("scaled", "gate")})

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

    def model_mb(self, model: str, converted: str) -> int:
        """Memory to ask for where a model runs: twice its weights and 4 GB for blocks and the interpreter.

        Args:
            model: name.
            converted: its runtime config.json; before that is there, the checkpoint's own weights are counted.
        """
        folders = (Path(converted).parent, Path(self.models[model].checkpoint))
        weights = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in folders]
        return 4000 + 2 * (weights[0] or weights[1]) // 1_000_000

    def workloads(self) -> list[tuple[str, str, str]]:
        """Every (model, run, label) of the study."""
        return [
            (model, run, setting.label)
            for run in self.runs
            for model in self.models_of(run)
            for setting in self.runs[run].methods
        ]


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
        named = {"models": Model, "runs": Run}.get(str(part)) if section is Study else None
        if named is not None:
            # the next part is the model's or the run's own name
            next(parts, None)
        section = named or annotation
    return list(section.model_fields)


def options(section: BaseModel) -> str:
    """A section as options of a shell command, in field order; what is None or empty is left to its default.

    `sparsetrace.cli` makes the options from the same fields, so the round trip is exact.
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


def method_options(setting: Setting) -> str:
    """A method setting as command-line options, which `parse_method` reads."""
    values = setting.method.model_dump(mode="json").items()
    # JSON is YAML that says what is text: an unquoted 2:4 is the number 124
    words = [f"--method {setting.method_name}", *(f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in values)]
    return " ".join([*words, f"--label {setting.label}"])


def parse_method(name: str, parameters: Sequence[str], label: str | None) -> Setting:
    """A method setting from command-line options.

    Args:
        name: of the method.
        parameters: `name=value` each; a value is read as YAML, as in the study file.
        label: None takes the method's own.
    """
    entry: dict[str, Any] = {"name": name} | ({} if label is None else {"label": label})
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            raise InputError(f"--set must be NAME=VALUE, got {parameter!r}")
        try:
            entry[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set: {key} must be a YAML value, got {value!r}") from None
    try:
        settings = list(_settings(entry))
    except ValidationError as error:
        raise InputError("\n".join(_lines(error, "--set"))) from None
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if len(settings) != 1:
        raise InputError(f"--set: a parameter must have one value, got {len(settings)} settings: run one after another")
    return settings[0]


def source_hash(*modules: str) -> str:
    """Hash of the package's source that the named modules use, through every import.

    Snakemake does not track package code; a rule puts this into its `params`, so that a change re-runs exactly the
    steps that import what changed.

    Args:
        modules: dotted names below `sparsetrace`, such as `generate`.
    """
    import ast

    roots = {"sparsetrace": Path(__file__).parent}
    kernels = Path(__file__).parents[2] / "kernels" / "sparsetrace_kernels"
    # installed as a wheel, the two packages lie side by side
    roots["sparsetrace_kernels"] = kernels if kernels.is_dir() else Path(__file__).parents[1] / "sparsetrace_kernels"

    def source(name: str) -> Path | None:
        top, *rest = name.split(".")
        if top not in roots or (not rest and top == "sparsetrace"):
            return None
        path = roots[top].joinpath(*rest)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return file if file.is_file() else None

    found: dict[str, Path] = {}
    queue = [f"sparsetrace.{module}" for module in modules]
    while queue:
        name = queue.pop()
        file = source(name)
        if name in found or file is None:
            continue
        found[name] = file
        # importing a module runs its packages first
        queue.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                queue.extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                queue.append(node.module)
                queue.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return sha256_json({name: hashlib.sha256(found[name].read_bytes()).hexdigest() for name in sorted(found)})[:16]
