"""Base class of the methods with a threshold for every matrix, and the allocations that set its targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import Site, layer_leaves
from sparsetrace.methods.base import MatrixRule, Method, Sparsity


class PerLayer(BaseModel):
    """Targets given in config."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    per_layer: tuple[Sparsity | dict[str, Sparsity], ...] = Field(
        min_length=1, description="one target per layer, or one for each of its matrices"
    )

    def target(self, layer: int, matrix: str) -> float:
        """Target of a matrix.

        Raises:
            InputError: none is given.
        """
        if layer >= len(self.per_layer):
            raise InputError(
                f"thresholds: per_layer must have a target for every layer of the model, got {len(self.per_layer)}"
            )
        given = self.per_layer[layer]
        if not isinstance(given, dict):
            return given
        if matrix not in given:
            raise InputError(
                f"thresholds: per_layer must give a target for every matrix of layer {layer}, got none for {matrix}"
            )
        return given[matrix]

    def refuse_model(self, sites: Iterable[Site]) -> None:
        """Refuse a model of another number of layers, or with a layer that lacks a matrix named for it.

        Raises:
            InputError: names the layer and the matrix.
        """
        matrices: dict[int, list[str]] = {}
        for layer, matrix in layer_leaves(sites):
            matrices.setdefault(layer, []).append(matrix)
        if len(self.per_layer) != len(matrices):
            raise InputError(
                f"thresholds: per_layer must have a target for each of the model's {len(matrices)} layers, "
                f"got {len(self.per_layer)}"
            )
        for (layer, known), given in zip(matrices.items(), self.per_layer, strict=True):
            if unknown := [name for name in given if name not in known] if isinstance(given, dict) else []:
                raise InputError(
                    f"thresholds: per_layer must name matrices of layer {layer}, which are {', '.join(known)}, "
                    f"got {', '.join(unknown)}"
                )


class FromFile(BaseModel):
    """Thresholds of the user's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(min_length=1, description="Parquet or CSV with the columns layer, matrix, threshold")


def _kind(value: Any) -> str:
    """Which form of an allocation a value has; faults are then reported of this form alone."""
    if isinstance(value, str):
        return "word"
    return "file" if isinstance(value, FromFile) or (isinstance(value, dict) and "file" in value) else "per_layer"


Allocation = Annotated[
    Annotated[Literal["uniform", "greedy"], Tag("word")]
    | Annotated[PerLayer, Tag("per_layer")]
    | Annotated[FromFile, Tag("file")],
    Discriminator(_kind),
]


class ThresholdMethod(Method):
    """A method that keeps what scores above a threshold of each matrix."""

    sparsity: Sparsity | None = Field(
        None, validate_default=True, description="target fraction of inputs dropped, 0 <= s < 1"
    )
    allocation: Allocation = Field(
        "uniform",
        description="how the target is spread over the matrices: uniform, greedy, {per_layer: [...]} or {file: PATH}",
    )

    @field_validator("allocation", mode="before")
    @classmethod
    def _has_a_form(cls, value: Any) -> Any:
        own = isinstance(value, PerLayer | FromFile)
        mapping = isinstance(value, dict) and ("per_layer" in value) != ("file" in value)
        if not own and not mapping and value not in ("uniform", "greedy"):
            raise ValueError(f"must be uniform, greedy, {{per_layer: [...]}} or {{file: PATH}}, got {value!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sparsity_belongs_to_the_allocation(cls, values: Any) -> Any:
        if isinstance(values, dict):
            own = not isinstance(values.get("allocation", "uniform"), str)
            if own and values.get("sparsity") is not None:
                raise ValueError(
                    f"sparsity must not be given with allocation per_layer or file, got {values['sparsity']!r}"
                )
            if not own and values.get("sparsity") is None:
                raise ValueError("sparsity must be given with allocation uniform or greedy")
        return values

    @classmethod
    def with_thresholds(cls, sparsity: float) -> Self:
        """The setting that has a threshold for every matrix, and otherwise the defaults."""
        return cls(sparsity=sparsity)

    @property
    def label(self) -> str:
        match self.allocation:
            case PerLayer():
                return f"{self.name}-per_layer"
            case FromFile():
                return f"{self.name}-file"
            case "greedy":
                return f"{self.name}-greedy-{self.sparsity:g}"
            case _:
                return f"{self.name}-{self.sparsity:g}"

    def target(self, layer: int, matrix: str) -> float | None:
        if isinstance(self.allocation, PerLayer):
            return self.allocation.target(layer, matrix)
        return self.sparsity if self.allocation == "uniform" else None

    def same_mask(self, one: MatrixRule, other: MatrixRule) -> bool:
        return one.threshold_bits == other.threshold_bits


def allocation_of(method: Method) -> Allocation:
    """How a method's target is spread; one without thresholds of matrices has the same target everywhere."""
    return method.allocation if isinstance(method, ThresholdMethod) else "uniform"
