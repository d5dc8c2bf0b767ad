"""Settings as options of a shell command, which is how rules hand them to a step, and back."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from sparsetrace.core.files import InputError
from sparsetrace.methods import WeightMethod
from sparsetrace.study.sections import Pruning, Setting, method_settings
from sparsetrace.study.study import error_lines
from sparsetrace.study.yaml_text import parse_yaml


def options(section: BaseModel) -> str:
    """A section as options of a shell command, in field order; a value that is None or empty is left to its default.

    `sparsetrace.cli.options` makes the options of the command from the same fields, so the round trip is exact.
    """
    words: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + name.replace("_", "-"))
        elif isinstance(value, tuple):
            words.extend(repeated(flag, [item]) for item in value)
        elif value is not None:
            words.append(repeated(flag, [value]))
    return " ".join(words)


def repeated(flag: str, values: Sequence[object]) -> str:
    """An option of a shell command, once for each value."""
    # made text first: `shlex.quote` turns 0, which is falsy, into ''
    return " ".join(f"{flag} {shlex.quote(str(value))}" for value in values)


def method_options(setting: Setting) -> str:
    """A method setting as command-line options, which `parse_method` reads."""
    parameters = setting.method.model_dump(mode="json")
    return " ".join([f"--method {setting.method_name}", *_parameter_options(parameters), f"--label {setting.label}"])


def weight_method_options(pruning: Pruning) -> str:
    """A weight-side method as command-line options, which `parse_weight_method` reads."""
    parameters = pruning.method.model_dump(mode="json", exclude_none=True)
    return " ".join([f"--method {pruning.name}", *_parameter_options(parameters)])


def parse_method(name: str, parameters: Sequence[str], label: str | None) -> Setting:
    """A method setting from command-line options.

    Args:
        name: name of the method.
        parameters: `name=value` each; a value is read as YAML, as in the study file.
        label: folder name of the setting; None takes the method's own.
    """
    entry = {"name": name} | ({} if label is None else {"label": label}) | _parameters(parameters)
    try:
        settings = list(method_settings(entry))
    except ValidationError as error:
        raise InputError("\n".join(error_lines(error, "--set"))) from None
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if len(settings) != 1:
        raise InputError(f"--set: a parameter must have one value, got {len(settings)} settings: run one after another")
    return settings[0]


def parse_weight_method(name: str, parameters: Sequence[str]) -> WeightMethod:
    """A weight-side method from command-line options."""
    try:
        return Pruning.model_validate({"name": name} | _parameters(parameters)).method
    except ValidationError as error:
        raise InputError("\n".join(error_lines(error, "--set"))) from None


def _parameter_options(parameters: Mapping[str, Any]) -> list[str]:
    # JSON is YAML that marks text as text: an unquoted 2:4 is the number 124
    return [repeated("--set", [f"{name}={json.dumps(value)}"]) for name, value in parameters.items()]


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--set must be NAME=VALUE, got {word!r}")
        try:
            values[name] = parse_yaml(value, name)
        except InputError:
            raise InputError(f"--set: {name} must be a YAML value, got {value!r}") from None
    return values
