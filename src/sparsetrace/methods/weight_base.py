"""Base class of the weight-side methods: parameters that config checks, and a function from a matrix to a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparsetrace.methods.base import Sparsity, kept_count
from sparsetrace.methods.pattern import parse_pattern, pattern_numbers, refuse_indivisible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparsetrace.formats.sites import Site

# Outputs whose masks are decided at a time; bounds the memory of the ranking.
OUTPUTS = 512


class WeightMethod(BaseModel):
    """Parameters of one weight-side setting; a subclass says how weights are scored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    # Whether `score` reads the norms of the inputs over a calibration text.
    needs_norms: ClassVar[bool] = False
    # Whether unstructured weights are ranked within each output, or within the whole matrix.
    per_output: ClassVar[bool]

    sparsity: Sparsity | None = Field(None, description="fraction of weights dropped, unstructured, 0 <= s < 1")
    pattern: str | None = Field(None, description='weights kept of each M neighbouring inputs of an output, "N:M"')

    @field_validator("pattern", mode="before")
    @classmethod
    def _is_n_of_m(cls, value: Any) -> str | None:
        return None if value is None else parse_pattern(value)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(f"{self.name}: either sparsity or pattern must be given, got {self.model_dump()}")
        return self

    def refuse_model(self, sites: Iterable[Site]) -> None:
        """Refuse a model with a width that is no multiple of the pattern's M."""
        if self.pattern is not None:
            refuse_indivisible(self.name, self.pattern, sites)

    def score(self, weight_KN: Tensor, norms_K: Tensor | None) -> Tensor:
        """What weights are ranked by, as integers that are ordered as the scores are.

        Args:
            weight_KN: one matrix, input-major, in the model's dtype.
            norms_K: float64 Euclidean norms of the inputs over the calibration text, where the method needs them.

        Returns:
            [K, N] bit patterns, see `sparsetrace_kernels.torch_ops.magnitude_bits`.
        """
        raise NotImplementedError

    def keep(self, weight_KN: Tensor, norms_K: Tensor | None) -> Tensor:
        """Which weights stay, bool [K, N]; equal scores are kept from the lower index on."""
        from sparsetrace.methods.select import keep_in_columns, keep_largest, keep_n_of_m

        K, N = weight_KN.shape
        if self.pattern is None and not self.per_output:
            assert self.sparsity is not None
            scores = self.score(weight_KN, norms_K).flatten()
            return keep_largest(scores, kept_count(K * N, self.sparsity)).unflatten(0, (K, N))

        def keep(weight_Kn: Tensor) -> Tensor:
            scores_nK = self.score(weight_Kn, norms_K).T.contiguous()
            if self.pattern is not None:
                return keep_n_of_m(scores_nK, *pattern_numbers(self.pattern))
            assert self.sparsity is not None
            return keep_largest(scores_nK, kept_count(K, self.sparsity))

        return keep_in_columns(keep, weight_KN, OUTPUTS)
