"""What the screen says of a step that fails: the reason from its log, at once and as the last lines of the run."""

import logging
import re

import pytest
from study_testing import inputs, snakemake, write_study

from snakemake_logger_plugin_sparsetrace import LogHandler
from sparsetrace.tools.failures import description, reasons, without_reason

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nKeyError: 3\n'
LOGS = [
    pytest.param("converting: 1 of 2\nerror: a must be b, got c\n", ["error: a must be b, got c"], id="one-line"),
    pytest.param("error: one\nerror: two\n", ["error: one", "error: two"], id="several"),
    pytest.param("Usage: sparsetrace\n\nError: No such option: --x\n", ["Error: No such option: --x"], id="usage"),
    pytest.param(TRACEBACK, ["error: KeyError: 3"], id="traceback"),
    pytest.param("".join(f"error: {i}\n" for i in range(7)), 5, id="many"),
]


@pytest.mark.parametrize(("content", "expected"), LOGS)
def test_reasons(tmp_path, content, expected):
    log = tmp_path / "step.log"
    log.write_text("x" * 70000 + "\n" + content)
    found = reasons(log)
    if isinstance(expected, int):
        assert found == [f"error: {i}" for i in range(expected)] + ["error: 2 more are in the log"]
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("content", "end"), [("", "empty or not there"), ("1 of 8 groups\n", "ends with: 1 of 8 groups")]
)
def test_a_log_that_does_not_say_why(tmp_path, content, end):
    log = tmp_path / "step.log"
    assert without_reason("pack", [str(log)]).endswith(f"  log: {log}, empty or not there")
    log.write_text(content)
    assert description("pack", [str(log)]) is None
    assert "killed for lack of memory" in without_reason("pack", [str(log)])
    assert without_reason("pack", [str(log)]).endswith(end)


class Settings:
    stdout, nocolor = False, True


def records(log, indent=False):
    """A step's failure and its later success, as Snakemake reports them."""
    error = {"event": "job_error", "rule_name": "pack", "log": [str(log)], "jobid": 7, "indent": indent}
    for fields in (error, {"event": "job_finished", "job_id": 7}):
        yield logging.makeLogRecord({"msg": "said by Snakemake", "levelno": logging.INFO} | fields)


def test_a_step_that_succeeds_at_its_second_attempt_has_not_failed(tmp_path, capsys):
    (tmp_path / "log").write_text("error: no room\n")
    for repeated in (True, False):
        handler = LogHandler(Settings(), None)
        failure, success = records(tmp_path / "log")
        handler.emit(failure)
        assert "pack failed:\n  error: no room" in capsys.readouterr().err
        if repeated:
            handler.emit(success)
        handler.close()
        assert ("Why the run failed" in capsys.readouterr().err) != repeated


def test_steps_of_a_group_that_have_not_failed_are_not_named(tmp_path, capsys):
    handler = LogHandler(Settings(), None)
    handler.emit(next(records(tmp_path / "none", indent=True)))
    handler.close()
    assert capsys.readouterr().err == "said by Snakemake\n"


@pytest.fixture(scope="module")
def failed(tmp_path_factory, tiny):
    """A run in another folder than the workflow's, whose prompts do not fit: its screen, and its folder."""
    folder = tmp_path_factory.mktemp("failed")
    inputs(folder, tiny, "failures", prompts=(3, 200))
    write_study(folder)
    return snakemake(folder, "--cores", "1", status=1).stderr, folder


def test_the_reason_stands_on_the_screen_at_once_and_at_the_end(failed):
    screen, folder = failed
    line = re.compile(r"^  error: .*prompt 1 must fit the context of .*longer: skip.*$", re.MULTILINE)
    log = f"  log: {folder / 'out/logs/split/tiny/first.log'}"
    assert len(line.findall(screen)) == screen.count(log) == 2
    *_, why, step, reason_line, log_line = screen.rstrip().splitlines()
    assert (why, step, log_line) == ("Why the run failed:", "split failed:", log) and line.match(reason_line)


def test_no_step_is_started_that_cannot_matter_any_more(failed):
    """The prompts are read before anything is calibrated, and nothing is started after the failure."""
    _, folder = failed
    assert sorted(path.name for path in (folder / "out/logs").iterdir()) == ["convert", "split"]
