"""Options and arguments of commands, and the checked objects that commands receive in their place.

Options that carry settings are made from the sections of the study file, so that the command line, config.yaml and
their checks cannot differ.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError

from sparsetrace.core.files import InputError

if TYPE_CHECKING:
    from sparsetrace.workload.reader import Workload

Command = TypeVar("Command", bound=Callable[..., None])
SectionType = TypeVar("SectionType", bound=BaseModel)


def settings(*sections: type[BaseModel]) -> Callable[[Command], Command]:
    """Give a command one option for each field of the sections; it receives the checked sections, by name."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            for section in sections:
                own = {name: values.pop(name) for name in section.model_fields}
                values[_snake_case(section.__name__)] = _checked(section, own)
            command(**values)

        for section in reversed(sections):
            for name, field in reversed(section.model_fields.items()):
                run = _option(name, field)(run)
        return run  # type: ignore[return-value]

    return decorate


def gathered(kind: type, name: str) -> Callable[[Command], Command]:
    """Hand those values of a command that are fields of a dataclass over as one object, under the given name."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            own = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
            command(**values, **{name: kind(**own)})

        return run  # type: ignore[return-value]

    return decorate


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _option(name: str, field: Any) -> Callable[[Any], Any]:
    """The option that carries a field of a section."""
    flag = "--" + name.replace("_", "-")
    annotation = field.annotation
    if get_origin(annotation) is UnionType:
        # optional: `X | None`
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    extra: dict[str, Any] = {"help": field.description, "default": field.default, "show_default": True}
    if annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **extra)
    if get_origin(annotation) is Literal:
        return click.option(flag, name, type=click.Choice(list(get_args(annotation))), **extra)
    if get_origin(annotation) is tuple:
        return click.option(flag, name, multiple=True, help=field.description)
    return click.option(flag, name, type=annotation, **extra)


def _checked(section: type[SectionType], values: dict[str, Any]) -> SectionType:
    """A section from option values, each fault on its own line."""
    try:
        return section(**values)
    except ValidationError as error:
        lines = [
            f"--{str(item['loc'][0]).replace('_', '-')} must be valid, got {item['input']!r}: {item['msg']}"
            if item["loc"]
            else f"{_snake_case(section.__name__)}: {item['ctx']['error']}"
            for item in error.errors()
        ]
        raise InputError("\n".join(lines)) from None


def path_option(name: str, text: str) -> Callable[[Command], Command]:
    """A required path."""
    return click.option(name, required=True, type=click.Path(path_type=Path), help=text)


def path_argument(name: str, **extra: Any) -> Callable[[Command], Command]:
    """A positional path."""
    return click.argument(name, type=click.Path(path_type=Path), **extra)


class _Hexadecimal(click.ParamType[int]):
    """A number, decimal or with 0x."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is not a number such as 4096 or 0x1000", param, ctx)


HEXADECIMAL = _Hexadecimal()


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Which part of a workload is read, as the options say it; see `selection_options`."""

    layer: str | None
    matrix: tuple[str, ...]
    token: str | None
    sequence: str | None
    position: str | None
    phase: tuple[str, ...]

    def open(self, workload: Path) -> "Workload":
        """The chosen part of a workload."""
        from sparsetrace.workload.reader import open as open_workload

        ranges = {name: _range(name, getattr(self, name)) for name in ("layer", "token", "sequence", "position")}
        return open_workload(workload).select(**ranges, matrix=self.matrix or None, phase=self.phase or None)


def _range(name: str, text: str | None) -> slice | int | None:
    """A number, or START:STOP with either end left out, as the reader takes it; None for all."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+|\d*:\d*", text):
        raise InputError(f"--{name} must be a number or START:STOP, got {text}")
    start, colon, stop = text.partition(":")
    return slice(int(start or 0), int(stop) if stop else None) if colon else int(start)


def selection_options(command: Command) -> Command:
    """Options that choose a part of a workload; the command receives a `Selection` as `selection`."""
    command = gathered(Selection, "selection")(command)
    for option in (
        click.option("--phase", multiple=True, help="prefill, decode or forced; repeatable"),
        click.option("--position", default=None, help="position, or positions START:STOP"),
        click.option("--sequence", default=None, help="sequence, or sequences START:STOP"),
        click.option("--token", default=None, help="token number, or numbers START:STOP"),
        click.option("--matrix", multiple=True, help="matrix, such as q or down; repeatable"),
        click.option("--layer", default=None, help="layer, or layers START:STOP"),
    ):
        command = option(command)
    return command
