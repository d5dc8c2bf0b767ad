"""Sections of the study file that the workflow reads, and no step by itself: models, runs and their methods."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_serializer, model_validator

from sparsetrace.core.devices import auto_shards
from sparsetrace.core.settings import (
    Batching,
    Calibration,
    Capture,
    Conversion,
    Decoding,
    Greedy,
    Packing,
    PromptSet,
    Quality,
    Section,
)
from sparsetrace.methods import METHODS, WEIGHT_METHODS, Method, WeightMethod

# The word that names the built-in demonstration model, its texts and its prompts.
EMBEDDED = "embedded"

# Environment variable: what `shards: auto` stood for where Snakemake was started.
AUTO_SHARDS = "SPARSETRACE_AUTO_SHARDS"

# Files and folders that lie beside the settings of a run.
RESERVED_LABELS = ("prompts.parquet", "dense_tokens")

# Settings that the lists of one entry under `methods` may stand for.
MOST_SETTINGS = 1000


def _as_path(text: str) -> str:
    """Refuse what Snakemake would take for a pattern, and what no file system takes."""
    if not text or set(text) & set("{}") or not text.isprintable():
        raise ValueError(f"must be a path without braces and control characters, got {text!r}")
    return text


FilePath = Annotated[str, AfterValidator(_as_path)]
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
        # compared, not hashed: the file may hold a list here
        if name not in [*WEIGHT_METHODS]:
            raise ValueError(f"name must be one of {', '.join(WEIGHT_METHODS)}, got {name!r}")
        parameters = {key: value for key, value in entry.items() if key != "name"}
        known = WEIGHT_METHODS[name].model_fields
        if unknown := sorted(str(key) for key in set(parameters) - set(known)):
            raise ValueError(f"{name}: keys must be among {', '.join(('name', *known))}, got {', '.join(unknown)}")
        return {"name": name, "method": WEIGHT_METHODS[name](**parameters)}

    @model_serializer
    def _as_entry(self) -> dict[str, Any]:
        return {"name": self.name} | self.method.model_dump(mode="json", exclude_none=True)


class Model(Section):
    """One checkpoint."""

    checkpoint: FilePath = Field(description="folder in Hugging Face form, or `embedded` for the demonstration model")
    conversion: Conversion = Field(Conversion(), description="how the checkpoint becomes a runtime model")
    prune: Pruning | None = Field(
        None, description="weight-side method, {name: magnitude | wanda, sparsity: s} or {name: ..., pattern: N:M}"
    )
    calibration_text: FilePath | None = Field(
        None,
        description="file of text, or `embedded` with the demonstration model; needed where a method takes thresholds "
        "from it, or `prune` reads activations",
    )
    calibration: Calibration = Field(Calibration(), description="which activations are counted")
    greedy: Greedy = Field(Greedy(), description="search behind `allocation: greedy`")
    quality_text: FilePath | None = Field(
        None, description="file of held-out text, or `embedded` with the demonstration model; null measures no quality"
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
    """One prompt set, run under several method settings."""

    models: tuple[Name, ...] | None = Field(None, description="models that the run uses; all if not given")
    prompts: FilePath = Field(description="file of prompts, or `embedded` with the demonstration model")
    prompt_set: PromptSet = Field(PromptSet(), description="which prompts are read")
    batching: Batching = Field(Batching(), description="how sequences are batched")
    decoding: Decoding = Field(Decoding(), description="how tokens are produced")
    capture: Capture = Field(Capture(), description="which operands are kept, and what of them")
    packing: Packing = Field(Packing(), description="how operands are stored")
    methods: tuple[Setting, ...] = Field(
        min_length=1, description="methods; a parameter may be one value or a list of values"
    )

    @field_validator("batching", mode="before")
    @classmethod
    def _shards_of_this_machine(cls, batching: Any) -> Any:
        if isinstance(batching, Mapping) and batching.get("shards") == "auto":
            # jobs of a cluster inherit the variable from the machine that submits them
            count = os.environ.setdefault(AUTO_SHARDS, str(auto_shards()))
            return {**batching, "shards": int(count)}
        return batching

    @field_validator("methods", mode="before")
    @classmethod
    def _expand(cls, entries: Any) -> Any:
        if not isinstance(entries, list | tuple):
            raise ValueError("must be a list of methods such as {name: teal, sparsity: [0.25, 0.5]}")
        return tuple(setting for entry in entries for setting in method_settings(entry))

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


def method_settings(entry: Any) -> Iterator[Setting]:
    """The settings of one entry under `methods`: one for each element of the product of its lists."""
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"a method must be a mapping with `name`, one of {', '.join(METHODS)}, got {entry!r}")
    name, own_label = entry["name"], entry.get("label")
    # compared, not hashed: the file may hold a list here
    if name not in [*METHODS]:
        raise ValueError(f"method name must be one of {', '.join(METHODS)}, got {name!r}")
    parameters = {key: value for key, value in entry.items() if key not in ("name", "label")}
    known = METHODS[name].model_fields
    if unknown := sorted(str(key) for key in set(parameters) - set(known)):
        raise ValueError(
            f"method {name}: keys must be among {', '.join(('name', 'label', *known))}, got {', '.join(unknown)}"
        )
    if empty := [key for key, value in parameters.items() if value == []]:
        raise ValueError(f"method {name}: {empty[0]} must have at least one value, got an empty list")
    # a list stands for several settings; a parameter that is itself a list is written as a list in a list
    axes = [[(key, v) for v in (value if isinstance(value, list) else [value])] for key, value in parameters.items()]
    if (settings := math.prod(map(len, axes))) > MOST_SETTINGS:
        raise ValueError(f"method {name}: its lists must stand for at most {MOST_SETTINGS} settings, got {settings}")
    methods = [METHODS[name](**dict(values)) for values in itertools.product(*axes)]
    for method in methods:
        label = method.label
        if own_label is not None:
            label = str(own_label) if len(methods) == 1 else method.label.replace(name, str(own_label), 1)
        yield Setting(label=label, method_name=name, method=method)
