"""SIGKILL and Ctrl-C at seeded moments; the oracle is an undisturbed run's files, byte for byte.

The kills inside steps, and what they are judged by, are in benchmarks/kill.py, which also runs thousands of them.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "kill.py"
TRIALS = 60
# Ctrl-C until everything is gone, on a busy machine; a step of this study takes a few seconds more.
LEAVE_SECONDS = 10


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kill = load(SCRIPT)


def test_every_step_survives_kills_at_seeded_points(rng):
    words = ["--trials", str(TRIALS), "--seed", str(int(rng.integers(1 << 31)))]
    run = subprocess.run([sys.executable, SCRIPT, *words], env=kill.environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["trials"] == TRIALS and summary["kills"] >= 50 and summary["faults"] == 0
    assert {"convert", "calibrate", "thresholds", "split", "generate", "pack", "index"} <= set(summary["steps"])


def test_the_judge_sees_files_that_are_written_in_place():
    """Without writing beside and renaming, kills must be found to leave halves."""
    code = """
import contextlib, sys
import kill, sparsetrace.core.files
@contextlib.contextmanager
def in_place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    sparsetrace.core.files.sync(path)
sparsetrace.core.files.write_beside = in_place
sys.argv = ["kill.py", "--trials", "30", "--seed", "1"]
kill.main()
"""
    env = kill.environment()
    env["PYTHONPATH"] += os.pathsep + str(SCRIPT.parent)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    summary = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 1 and summary["faults"] > 0, run.stdout + run.stderr


def test_the_committed_result_is_of_thousands_without_a_fault():
    lines = (ROOT / "benchmarks" / "results" / "kill.csv").read_text().splitlines()
    columns = lines[0].split(",")
    table = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert sum(int(row["kills"]) for row in table) >= 1000
    assert sum(int(row["faults"]) for row in table) == 0
    assert {row["mode"] for row in table} == set(kill.MODES)


def alive(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_a_workflow_survives_ctrl_c_and_a_kill_of_everything(tmp_path, rng):
    plain, study = tmp_path / "plain", tmp_path / "study"
    size = ["--prompts", "40", "--max-new-tokens", "20"]
    subprocess.run([sys.executable, SCRIPT, "--undisturbed", plain, *size], env=kill.environment(), check=True)
    shutil.copytree(plain, study, ignore=shutil.ignore_patterns("out"))
    words = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
    words += ["--cores", "2", "--configfile", "my.yaml"]

    def run(end: signal.Signals | None, milestone: str = "") -> None:
        # as `make run` does
        subprocess.run([sys.executable, "-m", "sparsetrace", "unlock"], cwd=study, env=kill.environment(), check=True)
        env = kill.environment()
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(words, cwd=study, env=env, stdout=log, stderr=log, start_new_session=True)
            if end is not None:
                # a moment of the run, not of the clock: steps of a second or more are left on any machine
                while not list(study.glob(milestone)) and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(float(rng.uniform(0, 0.5)))
                os.killpg(process.pid, end)
                assert process.wait(LEAVE_SECONDS) != 0
                gone_by = time.monotonic() + LEAVE_SECONDS
                while alive(study) and time.monotonic() < gone_by:
                    time.sleep(0.1)
                assert not alive(study)
            else:
                assert process.wait() == 0, (tmp_path / "log").read_text()

    run(signal.SIGINT, str(rng.choice(["my.yaml", "out/tiny/model/config.json"])))
    assert not list(study.rglob(".*.partial"))
    later = [
        "out/tiny/histograms.safetensors",
        "out/tiny/first/prompts.parquet",
        "out/tiny/first/*/dump/*/group-*.json",
    ]
    run(signal.SIGKILL, str(rng.choice(later)))
    run(None)
    for part in ("model", "first/teal-0.5/parts", "first/teal-0.5/workload"):
        assert kill.tree(study / "out" / "tiny" / part) == kill.tree(plain / "out" / "tiny" / part)
