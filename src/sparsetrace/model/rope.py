"""The rotary embedding of a config.json: each value may stand in several places, which must agree; without torch."""

import dataclasses
from typing import Any

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import RopeScaling
from sparsetrace.model.families.base import positive_integer, positive_number

DEFAULT_THETA = 10_000.0
SCALING_FIELDS = [field.name for field in dataclasses.fields(RopeScaling)]
# `rope_scaling` is the older name of `rope_parameters`, and `type` of `rope_type`.
PLACES = ("rope_parameters", "rope_scaling")
TYPES = ("rope_type", "type")


def read_rope(raw: dict[str, Any], ignored: set[str], where: str) -> tuple[float, RopeScaling | None]:
    """Base of the frequencies, and how they are scaled.

    Raises:
        InputError: two places disagree, or hold what the decoder does not have.
    """
    found = {place: _settings(raw, place, ignored, where) for place in PLACES if raw.get(place)}
    thetas = {"rope_theta": positive_number(raw, "rope_theta", where)} if raw.get("rope_theta") is not None else {}
    for place, settings in found.items():
        if settings.get("rope_theta") is not None:
            thetas[f"{place}.rope_theta"] = positive_number(settings, "rope_theta", f"{where}: {place}")
    theta = _only("rope_theta", thetas, where)
    scalings = {place: _scaling(settings, f"{where}: {place}") for place, settings in found.items()}
    return DEFAULT_THETA if theta is None else theta, _only("RoPE scaling", scalings, where)


def _settings(raw: dict[str, Any], place: str, ignored: set[str], where: str) -> dict[str, Any]:
    settings = raw[place]
    if not isinstance(settings, dict):
        raise InputError(f"{where}: {place} must be an object, got {settings!r}")
    if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
        raise InputError(f"{where}: {place} must be the same for all layers, got one for {', '.join(nested)}")
    if unknown := sorted(set(settings) - {"rope_theta", *TYPES, *SCALING_FIELDS} - ignored):
        raise InputError(
            f"{where}: {place} must hold fields whose effect is known, got {', '.join(unknown)}: if they do not alter "
            "inference, list them in ignore_fields"
        )
    return settings


def _scaling(settings: dict[str, Any], where: str) -> RopeScaling | None:
    rope_type = _only("type", {name: settings[name] for name in TYPES if settings.get(name) is not None}, where)
    if rope_type in (None, "default"):
        return None
    if rope_type != "llama3":
        raise InputError(f"{where} type must be default or llama3, got {rope_type!r}")
    if missing := [name for name in SCALING_FIELDS if name not in settings]:
        raise InputError(f"{where} must hold {', '.join(SCALING_FIELDS)}, got none for {', '.join(missing)}")
    factor, low, high = (positive_number(settings, name, where) for name in SCALING_FIELDS[:3])
    if high <= low:
        raise InputError(f"{where}: high_freq_factor must be above low_freq_factor, got {high:g} and {low:g}")
    return RopeScaling(factor, low, high, positive_integer(settings, SCALING_FIELDS[3], where))


def _only(what: str, values: dict[str, Any], where: str) -> Any:
    """The value that every place gives; None where no place gives one."""
    first, *others = values.values() or (None,)
    if any(other != first for other in others):
        given = ", ".join(f"{value!r} in {place}" for place, value in values.items())
        raise InputError(f"{where}: {what} must be the same wherever it is given, got {given}")
    return first
