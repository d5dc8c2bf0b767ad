"""N:M along the input: of each M neighbouring inputs, the N of largest magnitude.

What sparse tensor cores read (2:4), applied to activations. Choice: equal magnitudes are kept from the lower index on;
inputs whose number is no multiple of M are refused rather than padded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import layer_sites
from sparsetrace.methods.base import MatrixRule, Method

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparsetrace.formats.architecture import ModelConfig
    from sparsetrace.formats.sites import Site


def parse_pattern(value: Any) -> str:
    """Check an N:M pattern.

    Raises:
        ValueError: it is not N:M with 1 <= N <= M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if found is None:
        # YAML 1.1 reads an unquoted 2:4 as the number 124, in base 60
        raise ValueError(f'pattern must be N:M in quotes, such as "2:4", got {value!r}')
    if not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"pattern must be N:M with 1 <= N <= M, got {value}")
    return str(value)


def pattern_numbers(pattern: str) -> tuple[int, int]:
    """N and M."""
    n, m = pattern.split(":")
    return int(n), int(m)


def refuse_indivisible(method: str, pattern: str, sites: Iterable[Site]) -> None:
    """Refuse a model with a site whose width M does not divide.

    Raises:
        InputError: names the first such site.
    """
    _, m = pattern_numbers(pattern)
    for site in layer_sites(sites):
        if site.in_features % m:
            raise InputError(
                f"method {method}: inputs of every matrix must be a multiple of {m} for {pattern}, got "
                f"{site.in_features} at {site.name}"
            )


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
