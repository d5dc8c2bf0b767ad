"""What the screen says of a step that fails: the reason from its log, at once and as the last lines of the run."""

import re

import pytest
from study_testing import inputs, snakemake, write_study

from sparsetrace.tools.failures import reason

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nKeyError: 3\n'
LOGS = [
    pytest.param("converting: 1 of 2\nerror: a must be b, got c\n", ["error: a must be b, got c"], id="one-line"),
    pytest.param("error: one\nerror: two\n", ["error: one", "error: two"], id="several"),
    pytest.param("Usage: sparsetrace\n\nError: No such option: --x\n", ["Error: No such option: --x"], id="usage"),
    pytest.param(TRACEBACK, ["error: KeyError: 3"], id="traceback"),
    pytest.param("".join(f"error: {i}\n" for i in range(7)), 5, id="many"),
]


@pytest.mark.parametrize(("content", "expected"), LOGS)
def test_reason(tmp_path, content, expected):
    log = tmp_path / "step.log"
    log.write_text("x" * 70000 + "\n" + content)
    found = reason(log)
    if isinstance(expected, int):
        assert found == [f"error: {i}" for i in range(expected)] + ["error: 2 more are in the log"]
    else:
        assert found == expected


@pytest.mark.parametrize("content", ["", "generating: 1 of 8 groups\n"])
def test_a_log_that_does_not_say_why(tmp_path, content):
    log = tmp_path / "step.log"
    log.write_text(content)
    (line,) = reason(log)
    assert "killed for lack of memory" in line and line.endswith(content.strip() or "its log is empty")
    assert "cannot be read: No such file" in reason(tmp_path / "none.log")[0]


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
