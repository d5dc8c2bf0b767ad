"""N:M patterns: of each M neighbours, N are kept."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import layer_sites

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparsetrace.formats.sites import Site


def parse_pattern(value: Any) -> str:
    """Check a pattern as it stands in config.

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
    """Refuse a model with a site whose width is no multiple of M.

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
