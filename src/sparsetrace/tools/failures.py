"""Why a step of the workflow failed, read from its log."""

from pathlib import Path

# Lines of a log that are looked at, from its end, and lines of a reason that are shown.
TAIL_BYTES = 65536
SHOWN_LINES = 5


def reason(log: Path) -> list[str]:
    """The lines of a failed step's log that say why it failed.

    Args:
        log: of the step: its standard output and standard error.

    Returns:
        Every `error:` line of the log; of a traceback, its last line; otherwise that the log does not say, with the
        last line that it holds.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            content = file.read().decode(errors="replace")
    except OSError as error:
        return [f"error: no reason is known, since its log cannot be read: {error.strerror}"]
    lines = [line.rstrip() for line in content.splitlines() if line.strip()]
    if errors := [line for line in lines if line.lower().startswith("error: ")]:
        hidden = len(errors) - SHOWN_LINES
        return errors[:SHOWN_LINES] + ([f"error: {hidden} more are in the log"] if hidden > 0 else [])
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return [f"error: {lines[-1]}"]
    last = f"; the last line of its log: {lines[-1]}" if lines else "; its log is empty"
    return [f"error: the step ended without saying why, as one does that is killed for lack of memory{last}"]


def description(rule: str, logs: list[str]) -> str:
    """A failed step as text for the screen: its rule, the reason, and where its log is."""
    lines = [f"{rule} failed:"]
    for log in logs:
        lines += [f"  {line}" for line in reason(Path(log))]
        lines.append(f"  log: {Path(log).absolute()}")
    return "\n".join(lines)
