"""Snakemake's logger plugin `sparsetrace`: what Snakemake prints, and for each failed step the reason from its log.

The reason is printed where the step fails, and the reasons of all failed steps once more as the last lines of the run.
The default profile turns it on; `snakemake --logger sparsetrace` does so without the profile.
"""

import sys
from logging import ERROR, LogRecord

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from sparsetrace.tools.failures import description, without_reason

RED, RESET = "\033[31m", "\033[0m"


class LogHandler(LogHandlerBase):
    """Writes to the screen, in the place of Snakemake's own handler."""

    writes_to_stream = True
    writes_to_file = False
    # Snakemake's own filter and formatter are used
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self._failures: dict[int, str] = {}
        self._stream = sys.stdout if self.common_settings.stdout else sys.stderr

    def emit(self, record: LogRecord) -> None:
        """Print a record as Snakemake does, and the reason of a failure behind it."""
        text = self.format(record)
        # the formatter has nothing to say of some events
        if text and text != "None":
            self._print(text, record.levelno >= ERROR)
        fields = vars(record)
        if fields.get("event") == LogEvent.JOB_ERROR:
            rule, logs = fields["rule_name"], fields["log"] or ()
            failure = description(rule, logs)
            # of a group, all steps are reported where one has failed
            if failure is None and not fields["indent"]:
                failure = without_reason(rule, logs)
            if failure is not None:
                self._failures[fields["jobid"]] = failure
                self._print(failure, True)
        elif fields.get("event") == LogEvent.JOB_FINISHED:
            # the attempt that follows a failure may succeed
            self._failures.pop(fields["job_id"], None)

    def close(self) -> None:
        """Print the reasons once more: Snakemake closes its handlers when everything else is said."""
        if self._failures:
            self._print("\nWhy the run failed:\n" + "\n".join(self._failures.values()), True)
            self._failures = {}
        super().close()

    def _print(self, text: str, is_error: bool) -> None:
        coloured = is_error and not self.common_settings.nocolor and self._stream.isatty()
        self._stream.write(f"{RED}{text}{RESET}\n" if coloured else f"{text}\n")
        self._stream.flush()
