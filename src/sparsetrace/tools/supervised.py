"""Run a program so that neither it nor anything that it starts outlives this process, however this process ends.

The program runs in a session of its own under a supervisor (this file, run as a script), which holds one end of a pipe.
When the other end closes, be it on an error, a signal that is handled, or because this process was killed, the
supervisor interrupts the whole session as Ctrl-C does, and kills what is still there after a while.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# How long the session has to end after it was interrupted.
GRACE_SECONDS = 20.0
# Ends of this process that it can still act upon; SIGINT raises KeyboardInterrupt by itself.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def supervised(words: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a program, and end it, with all that it started, where the block is left before it has ended.

    SIGTERM and SIGHUP raise SystemExit within the block, so that the caller's own files are tidied up as well. Must be
    used in the main thread.

    Args:
        words: the program and its arguments.
        options: of `subprocess.Popen`; text is read and written.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        # as shells have it
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        command = [sys.executable, "-P", __file__, *words]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True, **options) as process:
            try:
                yield process
                process.wait()
            finally:
                assert process.stdin is not None
                process.stdin.close()
                process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(words: Sequence[str]) -> int:
    """Run a program in this process group until it ends or standard input does; returns its exit status."""
    # what this process sends to its group is not meant for itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=_take_interrupts) as child:
        threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
        return child.wait()


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with_input(child: "subprocess.Popen[bytes]") -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGINT)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
