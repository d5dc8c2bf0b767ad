"""A GPU for one command alone, claimed before torch is imported."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from sparsetrace.core.devices import claimed
from sparsetrace.core.settings import Machine

Command = TypeVar("Command", bound=Callable[..., None])


@contextmanager
def claimed_gpu(device: str) -> Iterator[None]:
    """Keep a GPU to this process, and say so where it has to wait for one."""
    with claimed(device, lambda line: click.echo(line, err=True)):
        yield


@contextmanager
def own_gpu(machine: Machine) -> Iterator[None]:
    """Keep a GPU to this process for a model to run on, with the user's own table of kernel configurations checked."""
    with claimed_gpu(machine.device):
        if os.environ.get("SPARSETRACE_TUNING") and machine.device != "cpu":
            from sparsetrace.tools.tuning import refuse_own_table

            refuse_own_table()
        yield


def on_gpu(command: Command) -> Command:
    """Run a whole command, which takes the section `machine`, on a GPU of its own."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        with own_gpu(values["machine"]):
            command(**values)

    return run  # type: ignore[return-value]
