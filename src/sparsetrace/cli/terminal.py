"""What commands print beside their results: progress and errors, on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def fail(message: str, status: int = 1) -> NoReturn:
    """Print each line of a message as an error and leave."""
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    sys.exit(status)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, a line for each tenth in a log file; yields report(done, total, note)."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")
        tenths_logged = 0

        def report(done: int, total: int, note: object = "") -> None:
            nonlocal tenths_logged
            bar.update(task, completed=done, total=total, note=str(note))
            tenths = done * 10 // max(total, 1)
            if not console.is_terminal and tenths > tenths_logged:
                tenths_logged = tenths
                click.echo(f"{what}: {done:,} of {total:,} {unit} {note}".rstrip(), err=True)

        yield report
