"""Why a step of the workflow failed, read from its log."""

from collections.abc import Sequence
from pathlib import Path

# Bytes at the end of a log that are looked at, and error lines of it that are shown.
TAIL_BYTES = 65536
SHOWN_LINES = 5


def reasons(log: Path) -> list[str]:
    """The lines of a failed step's log that say why it failed: its `error:` lines, or the last line of a traceback.

    Args:
        log: of the step: its standard output and standard error.
    """
    lines = _last_lines(log)
    if errors := [line for line in lines if line.lower().startswith("error: ")]:
        hidden = len(errors) - SHOWN_LINES
        return errors[:SHOWN_LINES] + ([f"error: {hidden} more are in the log"] if hidden > 0 else [])
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return [f"error: {lines[-1]}"]
    return []


def description(rule: str, logs: Sequence[str]) -> str | None:
    """A failed step as text for the screen: its rule, the reasons, and where the logs are that give them.

    Args:
        rule: of the step.
        logs: of the step, and of the job that ran it on a cluster, which mostly repeats the former.

    Returns:
        None where no log gives a reason.
    """
    lines = []
    for log in map(Path, logs):
        if found := reasons(log):
            lines += [*(f"  {line}" for line in found), f"  log: {log.absolute()}"]
    return "\n".join([f"{rule} failed:", *lines]) if lines else None


def without_reason(rule: str, logs: Sequence[str]) -> str:
    """A failed step none of whose logs says why, as text for the screen: with the last line of each log."""
    lines = [
        f"{rule} failed:",
        "  error: the step ended without saying why, as one does that is killed for lack of memory",
    ]
    for log in map(Path, logs):
        last = _last_lines(log)
        lines.append(f"  log: {log.absolute()}, " + (f"which ends with: {last[-1]}" if last else "empty or not there"))
    return "\n".join(lines)


def _last_lines(log: Path) -> list[str]:
    """Lines at the end of a log that are not blank; none if there is no such file."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        content = file.read().decode(errors="replace")
    return [line.rstrip() for line in content.splitlines() if line.strip()]
