"""N:M along the input: of each M neighbouring inputs, the N of largest magnitude.

The structure that sparse tensor cores read (2:4), applied to activations. Choices: equal magnitudes are kept from the
lower index on; a matrix whose inputs are no multiple of M is refused rather than padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from sparsetrace.methods.base import MatrixRule, Method
from sparsetrace.methods.pattern import parse_pattern, pattern_numbers, refuse_indivisible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparsetrace.formats.architecture import ModelConfig
    from sparsetrace.formats.sites import Site


class NM(Method):
    """The same pattern for every matrix."""

    name: ClassVar[str] = "nm"

    pattern: str = Field(description='inputs kept of each group of neighbours, "N:M" in quotes, 1 <= N <= M')

    @field_validator("pattern", mode="before")
    @classmethod
    def _is_n_of_m(cls, value: Any) -> str:
        return parse_pattern(value)

    @property
    def label(self) -> str:
        return f"{self.name}-{self.pattern.replace(':', '-')}"

    def target(self, layer: int, matrix: str) -> float | None:
        n, m = pattern_numbers(self.pattern)
        return 1 - n / m

    def refuse_model(self, config: ModelConfig, sites: Iterable[Site]) -> None:
        refuse_indivisible(self.name, self.pattern, sites)

    def most_of_neighbours(self) -> tuple[int, int] | None:
        return pattern_numbers(self.pattern)

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        from sparsetrace.methods.select import keep_n_of_m
        from sparsetrace_kernels.torch_ops import magnitude_bits

        n, m = pattern_numbers(self.pattern)
        return None if n == m else keep_n_of_m(magnitude_bits(x), n, m)
