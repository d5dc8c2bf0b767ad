"""The study file (`config.yaml`): parsed, checked and frozen, with what the workflow's rules ask of it.

Imports no torch: every dry run loads it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from sparsetrace.core.files import InputError, read_json
from sparsetrace.core.settings import Machine, Section
from sparsetrace.methods import FromFile, allocation_of
from sparsetrace.model.weight_files import weight_files
from sparsetrace.study.resources import Need, needs
from sparsetrace.study.sections import EMBEDDED, FilePath, Model, Name, Run, Setting
from sparsetrace.study.yaml_text import read_yaml

# Layers of the embedded model: the workflow has to know them before the model is trained.
EMBEDDED_LAYERS = 4

# Layers for which jobs are planned before the checkpoint is read: `layer` has three digits in file names.
MOST_LAYERS = 1000

# Faults of a study file that are listed.
MOST_FAULTS = 20

# Files and folders that lie beside the runs of a model, and beside the models.
RESERVED_RUNS = ("checkpoint", "model", "pruned", "histograms", "greedy", "quality_dense.safetensors")
RESERVED_MODELS = ("logs",)


class Study(Section):
    """The whole file."""

    results: FilePath = Field("results", description="folder for everything that is written; may lie elsewhere")
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

    @model_validator(mode="after")
    def _texts_are_named_where_they_are_needed(self) -> Self:
        for name, model in self.models.items():
            if model.calibration_text is None and (users := self.users_of_calibration(name)):
                raise ValueError(f"models.{name}.calibration_text must be given, since {users[0]} needs it, got none")
        return self

    def users_of_calibration(self, model: str) -> list[str]:
        """What needs a model's calibration text, in words."""
        users = ["prune"] if self._pruning_reads_text(model) else []
        for run in self.runs_of(model):
            needing = (setting for setting in self.runs[run].methods if setting.method.needs_thresholds)
            users += [f"{setting.label} of run {run}" for setting in needing]
        return users

    def workloads(self) -> list[tuple[str, str, str]]:
        """(model, run, label) of every workload."""
        return [
            (model, run, setting.label)
            for run in self.runs
            for model in self.models_of(run)
            for setting in self.runs[run].methods
        ]

    def finished(self) -> list[str]:
        """Folders of the workloads that are complete."""
        folders = (Path(self.results, *names, "workload") for names in self.workloads())
        return [str(folder) for folder in folders if (folder / "manifest.json").is_file()]

    def models_of(self, run: str) -> tuple[str, ...]:
        """Names of the models that a run uses."""
        return self.runs[run].models or tuple(self.models)

    def runs_of(self, model: str) -> list[str]:
        """Names of the runs that use a model."""
        return [name for name in self.runs if model in self.models_of(name)]

    def setting(self, run: str, label: str) -> Setting:
        """The setting of a run that carries a label."""
        return next(setting for setting in self.runs[run].methods if setting.label == label)

    def checkpoint(self, model: str) -> str:
        """Folder of a model's checkpoint; the embedded one is made below the results."""
        folder = self.models[model].checkpoint
        return f"{self.results}/{model}/checkpoint" if folder == EMBEDDED else folder

    def checkpoint_weights(self, model: str) -> list[str]:
        """Weight files of a checkpoint; none of the embedded one, which is made whole with its config.json."""
        if self.models[model].checkpoint == EMBEDDED:
            return []
        # what is absent is left for `convert` to name
        files = weight_files(Path(self.models[model].checkpoint))[0]
        return [str(file) for file in files if file.is_file()]

    def calibration_text(self, model: str) -> str | None:
        """File of a model's calibration text; None where none is named, which nothing then needs."""
        text = self.models[model].calibration_text
        return f"{self.checkpoint(model)}/calibration.txt" if text == EMBEDDED else text

    def pruning_text(self, model: str) -> list[str]:
        """File of the text over which `prune` reads activations; none where it scores weights alone."""
        text = self.calibration_text(model)
        return [text] if self._pruning_reads_text(model) and text is not None else []

    def _pruning_reads_text(self, model: str) -> bool:
        pruning = self.models[model].prune
        return pruning is not None and pruning.method.needs_norms

    def threshold_source(self, model: str, run: str, label: str) -> str:
        """What the thresholds of a setting are made from: histograms, or the model alone where it has none."""
        if self.setting(run, label).method.needs_thresholds:
            return f"{self.results}/{model}/histograms.safetensors"
        return self.runtime_model(model)

    def quality_text(self, model: str) -> str | None:
        """File of a model's held-out text; None where no quality is measured."""
        text = self.models[model].quality_text
        return f"{self.checkpoint(model)}/quality.txt" if text == EMBEDDED else text

    def prompts(self, run: str, model: str) -> str:
        """File of a run's prompt set, for one of its models."""
        prompts = self.runs[run].prompts
        return f"{self.checkpoint(model)}/prompts.jsonl" if prompts == EMBEDDED else prompts

    def runtime_model(self, model: str) -> str:
        """config.json of the runtime model that a model's runs use: the pruned one, where there is one."""
        return f"{self.results}/{model}/{'pruned' if self.models[model].prune else 'model'}/config.json"

    def weight_masks(self, model: str) -> list[str]:
        """Table of a pruned model's masks; none for a dense model."""
        return [f"{self.results}/{model}/pruned/weight_masks.parquet"] if self.models[model].prune else []

    def threshold_file(self, run: str, label: str) -> list[str]:
        """The user's own threshold file of a setting, if it has one."""
        allocation = allocation_of(self.setting(run, label).method)
        return [allocation.file] if isinstance(allocation, FromFile) else []

    def calibration_shards(self, model: str) -> list[str]:
        """Names of the parts in which a model's calibration is counted."""
        return [f"{shard:05d}" for shard in range(self.models[model].calibration.shards)]

    def scores(self, model: str) -> list[str]:
        """Methods whose scores a model's calibration must count, besides the inputs of the sites."""
        methods = [setting.method for name in self.runs_of(model) for setting in self.runs[name].methods]
        return sorted({m.name for m in methods if m.needs_thresholds and m.score in ("scaled", "gate")})

    def greedy_layers(self, model: str, run: str, label: str) -> list[str]:
        """Names of the layers whose search tables a setting needs; none where its allocation is not greedy."""
        if allocation_of(self.setting(run, label).method) != "greedy":
            return []
        if self.models[model].checkpoint == EMBEDDED:
            layers = EMBEDDED_LAYERS
        else:
            config = Path(self.models[model].checkpoint) / "config.json"
            found = read_json(config, "config").get("num_hidden_layers")
            if type(found) is not int or not 1 <= found <= MOST_LAYERS:
                raise InputError(
                    f"config: {config}: num_hidden_layers must be a whole number from 1 to {MOST_LAYERS}, got {found!r}"
                )
            layers = found
        return [f"{layer:03d}" for layer in range(layers)]

    def shards(self, run: str) -> list[str]:
        """Names of a run's shards."""
        return [f"{shard:05d}" for shard in range(self.runs[run].batching.shards)]

    def dense_tokens(self, run: str, shard: str) -> list[str]:
        """Names of the shards whose dense tokens a shard of a run is fed: its own, or none."""
        return [shard] if self.runs[run].decoding.tokens_from == "dense" else []

    def texts(self, run: str) -> str:
        """The flag of `split` for a run whose prompts are texts, behind which nothing is generated."""
        return "--texts" if self.runs[run].decoding.tokens_from == "text" else ""

    def excerpt(self, model: str, run: str, label: str) -> str:
        """The part of the study that makes one workload, as the JSON of a study file of its own."""
        setting = self.setting(run, label)
        values = setting.method.model_dump(mode="json").items()
        # a list stands for several settings, so a parameter that is itself a list is written as a list in a list
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

    @property
    def gpus(self) -> int:
        """GPUs of a job that runs a model."""
        return 0 if self.machine.device == "cpu" else 1

    def needs(self, step: str, model: str, converted: str | None = None, attempt: int = 1) -> Need:
        """Memory and time of a step that handles a model.

        Args:
            step: name, as in `resources.MINUTES`.
            model: name.
            converted: config.json of the runtime model; None for a step that reads the checkpoint.
            attempt: 1, or more after a job ran out of either.
        """
        return needs(step, self._weight_bytes(model, converted), attempt)

    def _weight_bytes(self, model: str, converted: str | None) -> int:
        # before the runtime model is there, which is so in a dry run, the checkpoint's own weights are counted
        own = Path(converted).parent.glob("*.safetensors") if converted else ()
        files = list(own) or weight_files(Path(self.models[model].checkpoint))[0]
        return sum(file.stat().st_size for file in files if file.is_file())


def load_study(path: Path) -> Study:
    """Read and check a study file."""
    return parse_study(_read_yaml(path), str(path))


def study_of(config: Mapping[str, Any], default: Path, files: Iterable[str | Path] = ()) -> Study:
    """The study that Snakemake was given.

    Args:
        config: Snakemake's, from `--configfile` and `--config`.
        default: study file to read where `config` names no models; keys that `config` has, such as `results`, replace
            those of the file.
        files: that `config` was read from. Snakemake takes the last of two equal keys, so they are read once more.
    """
    for file in map(Path, files):
        if file.is_file():
            _ = read_json(file, "config") if file.suffix == ".json" else read_yaml(file, "config")
    if "models" in config:
        return parse_study(config, "config")
    return parse_study(_read_yaml(default) | dict(config), str(default))


def parse_study(content: Mapping[str, Any], where: str) -> Study:
    """Check the content of a study file.

    Raises:
        InputError: one line for each fault; an unknown key's line lists the known ones.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(error_lines(error, where))) from None


def error_lines(error: ValidationError, where: str) -> Iterator[str]:
    """A line for each fault that pydantic found, the first `MOST_FAULTS` of them."""
    faults = error.errors()
    for item in faults[:MOST_FAULTS]:
        place = ".".join(str(part) for part in item["loc"])
        match item["type"]:
            case "extra_forbidden":
                known = ", ".join(_known_keys(item["loc"][:-1]))
                rule = f"be one of the known keys ({known}), got an unknown one" if known else "not be given"
                yield f"{where}: {place} must {rule}"
            case "missing":
                yield f"{where}: {place} must be given"
            case "value_error":
                yield f"{where}: {place + ': ' if place else ''}{item['ctx']['error']}"
            case _:
                yield f"{where}: {place} must be valid, got {item['input']!r}: {item['msg']}"
    if len(faults) > MOST_FAULTS:
        yield f"{where}: {len(faults) - MOST_FAULTS} more faults"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys that a mapping at a place in the study file may have; none for one among a method's parameters."""
    section: Any = Study
    by_name: dict[str, type[Section]] = {"models": Model, "runs": Run}
    parts = iter(location)
    for part in parts:
        named = by_name.get(str(part)) if section is Study else None
        if named is not None:
            # the next part is the model's or the run's own name
            next(parts, None)
        field = getattr(section, "model_fields", {}).get(part)
        section = named or (field and field.annotation)
    return list(getattr(section, "model_fields", {}))


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "config")
    if not isinstance(content, dict):
        raise InputError(f"config: {path} must hold `models` and `runs`, got {content!r}")
    return content
