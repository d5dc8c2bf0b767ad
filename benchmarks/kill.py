"""Kill every step of a workflow at seeded moments, run it again, and compare every byte with an undisturbed run's.

    python benchmarks/kill.py --trials 2000 --csv benchmarks/results/kill.csv

The commands are those that Snakemake prints for a tiny study. Each runs in a fork of this process, which has imported
everything and computed nothing, so that a trial takes a fraction of a second. A trial starts from the files before a
step, or from those after it, which it then replaces; it kills the step up to three times, may delete the declared
outputs as Snakemake does, and runs it again. After each kill a file under a final name must be what it was or what it
becomes. In the end all files must equal those after the undisturbed step, and groups that were sealed must not have
been written again.

| mode | where the signal comes |
|---|---|
| `event` | at the k-th time that the step opens a file for writing, makes, renames, removes or flushes one |
| `torn` | at the k-th flush, the file cut off at a random length: between writing and renaming |
| `timer` | at a random time of the step's duration: anywhere, also inside native code |
| `interrupt` | Ctrl-C at the k-th event: status 130, at once, and nothing half-written left |
"""

import argparse
import contextlib
import csv
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
MODES = ("event", "torn", "timer", "interrupt")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
INTERRUPTED = 130
# A step that was interrupted must be gone by then, on a machine with other work.
INTERRUPT_SECONDS = 5


@dataclass(frozen=True)
class Step:
    """One command of the workflow.

    Args:
        name: of the subcommand.
        arguments: of the command line.
        outputs: that Snakemake declares, and deletes after a kill.
    """

    name: str
    arguments: list[str]
    outputs: list[str]


def write_study(folder: Path, prompts: int = 8, max_new_tokens: int = 4, device: str = "cpu") -> None:
    """A random checkpoint, a text, prompts and `my.yaml`, made as the tests make them.

    Args:
        folder: new.
        prompts: how many; two make a group.
        max_new_tokens: tokens generated for each.
        device: of the study's machine.
    """
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    tiny, rng = conftest.Tiny(), conftest.seeded("kill")
    folder.mkdir(parents=True)
    tiny.checkpoint(folder / "checkpoint", rng)
    (folder / "text.txt").write_text(tiny.words(rng, 400))
    tiny.prompts(folder / "prompts.jsonl", rng, [2 + number % 8 for number in range(prompts)])
    study = {
        "results": "out",
        "machine": {"device": device, "threads": 1},
        "models": {
            "tiny": {
                "checkpoint": "checkpoint",
                "calibration_text": "text.txt",
                "calibration": {"tokens": 200, "sequence_length": 20},
            }
        },
        "runs": {
            "first": {
                "prompts": "prompts.jsonl",
                "batching": {"max_new_tokens": max_new_tokens, "batch_size": 2, "shards": 2},
                "decoding": {"ignore_eos": True, "temperature": 0.7},
                "methods": [{"name": "teal", "sparsity": 0.5}],
            }
        },
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(study))


def environment() -> dict[str, str]:
    """Of a command that uses this checkout's package."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"])}


def commands(folder: Path) -> list[Step]:
    """What Snakemake would run, in an order that respects the dependencies."""
    words = ["--snakefile", ROOT / "workflow" / "Snakefile", "--cores", "1", "--configfile", "my.yaml", "-np"]
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    shutil.rmtree(folder / ".snakemake")
    found = re.findall(r"^Reason: Missing output files: ([^;\n]+).*\nShell command: (.+)$", run.stdout, re.MULTILINE)
    steps = []
    for outputs, command in found:
        words = shlex.split(command.split(" > ")[0])
        assert words[0] == "sparsetrace", command
        steps.append(Step(words[1], words[1:], outputs.split(", ")))
    assert {"convert", "calibrate", "thresholds", "split", "generate", "pack", "index"} <= {step.name for step in steps}
    return steps


def fork(folder: Path, step: Step, prepare: Callable[[], None]) -> int:
    """Start a step in a fork of this process; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.chdir(folder)
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["sparsetrace", *step.arguments]
        from sparsetrace.cli.main import main

        prepare()
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(pid: int) -> int:
    """Exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watch(folder: Path, on_event: Callable[[str, int | None], None]) -> None:
    """Call back before each thing that this process does to files below a folder.

    The callback gets the event's name and, at a flush, the file descriptor.
    """
    inside = str(folder) + os.sep
    plain_fsync = os.fsync

    def ours(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        # not `resolve`, which follows links
        return os.path.abspath(os.fsdecode(path)).startswith(inside)  # noqa: PTH100

    def audit(name: str, arguments: tuple) -> None:
        if name == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and ours(path):
                on_event(name, None)
        elif name in EVENTS and ours(arguments[0]):
            on_event(name, None)

    def fsync(descriptor: int) -> None:
        on_event("fsync", descriptor)
        plain_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)


def count_events(folder: Path, into: int) -> None:
    """Note each event in a pipe."""
    watch(folder, lambda name, _: os.write(into, b"f" if name == "fsync" else b"e"))


def kill_at(folder: Path, mode: str, k: int, share: float) -> None:
    """Send this process the signal at the k-th event of its mode."""
    seen = 0

    def on_event(name: str, descriptor: int | None) -> None:
        nonlocal seen
        if mode == "torn" and (descriptor is None or not stat.S_ISREG(os.fstat(descriptor).st_mode)):
            return
        seen += 1
        if seen != k + 1:
            return
        if mode == "torn":
            path = f"/proc/self/fd/{descriptor}"
            with open(path, "r+b") as file:  # noqa: PTH123
                file.truncate(int(share * os.fstat(file.fileno()).st_size))
        if mode == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, on_event)


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file, but for logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def hidden(path: str) -> bool:
    """Whether a file's name, or its folder's, says that it is not final."""
    return any(part.startswith(".") for part in Path(path).parts)


def sealed_groups(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of every sealed group, with what changes when it is written again."""
    found = {}
    for seal in folder.rglob("dump/*/group-*.json"):
        for path in seal.parent.glob(f"{seal.stem}.*"):
            found[str(path.relative_to(folder))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def written_again(earlier: dict[str, tuple[int, int]], folder: Path) -> list[str]:
    """Files of sealed groups that are no longer what they were; packing removes them."""
    again = sealed_groups(folder)
    return [f"wrote {path} again" for path, was in earlier.items() if again.get(path, was) != was]


@dataclass(frozen=True)
class Stage:
    """A step with the files before it and after it, and what it does when nothing disturbs it."""

    step: Step
    before: Path
    done: Path
    after: dict[str, str]
    events: int
    flushes: int
    seconds: float


def undisturbed(folder: Path, prompts: int, max_new_tokens: int, device: str) -> None:
    """Make a study and run all its commands."""
    write_study(folder, prompts, max_new_tokens, device)
    for step in commands(folder):
        assert finish(fork(folder, step, lambda: None)) == 0, step


def stages(folder: Path) -> list[Stage]:
    """Run the workflow undisturbed, keeping the files before each step."""
    work = folder / "work"
    write_study(work)
    found = []
    for number, step in enumerate(commands(work)):
        before, done = folder / f"before-{number:02d}", folder / f"done-{number:02d}"
        shutil.copytree(work, before)
        out, into = os.pipe()
        started = time.monotonic()
        pid = fork(work, step, lambda into=into: count_events(work, into))
        os.close(into)
        with open(out, "rb") as pipe:  # noqa: PTH123
            events = pipe.read()
        status = finish(pid)
        seconds = time.monotonic() - started
        assert status == 0, (folder / "work.log").read_text()
        if step.name == "index":
            shutil.rmtree(work / "out" / "tiny" / "first" / "teal-0.5" / "dump", ignore_errors=True)
        shutil.copytree(work, done)
        found.append(Stage(step, before, done, tree(work), len(events), events.count(b"f"), seconds))
    return found


def trial(stage: Stage, folder: Path, rng: random.Random) -> tuple[str, int, list[str]]:
    """Kill a step and run it again.

    Returns:
        The mode, how many signals met the step alive, and what was found wrong.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stage.done if rng.random() < 0.2 else stage.before, folder)
    faults, kills = [], 0
    whole = [tree(folder), stage.after]
    modes = [mode for mode in MODES if mode != "torn" or stage.flushes]
    mode = rng.choice(modes)
    for _ in range(rng.choice((1, 1, 2, 3))):
        k, share = rng.randrange(stage.flushes if mode == "torn" else stage.events), rng.random()
        earlier = sealed_groups(folder)
        started = time.monotonic()
        if mode == "timer":
            pid = fork(folder, stage.step, lambda: None)
            time.sleep(rng.random() * stage.seconds)
            # it may just have ended, and is not waited for before this
            os.kill(pid, signal.SIGKILL)
        else:
            pid = fork(folder, stage.step, lambda k=k, share=share: kill_at(folder, mode, k, share))
        status = finish(pid)
        kills += status != 0
        # a step that was already done, or resumed, may end before it comes to its k-th event
        if status not in (0, INTERRUPTED if mode == "interrupt" else -signal.SIGKILL):
            faults.append(f"ended with status {status} when it was killed")
        if mode == "interrupt":
            if time.monotonic() - started > stage.seconds + INTERRUPT_SECONDS:
                faults.append("did not leave at once")
            faults.extend(f"left {path.relative_to(folder)}" for path in folder.rglob(".*.partial"))
        faults.extend(written_again(earlier, folder))
        found = {path: sha256 for path, sha256 in tree(folder).items() if not hidden(path)}
        faults.extend(f"left half of {path}" for path in found if found[path] not in [one.get(path) for one in whole])
        if rng.random() < 0.5:
            for output in stage.step.outputs:
                with contextlib.suppress(FileNotFoundError):
                    (folder / output).unlink()
    earlier = sealed_groups(folder)
    status = finish(fork(folder, stage.step, lambda: None))
    if status:
        log = (folder.parent / f"{folder.name}.log").read_text().splitlines()
        return mode, kills, [*faults, f"did not finish: status {status}: {log[-1] if log else ''}"]
    faults.extend(written_again(earlier, folder))
    if stage.step.name == "index":
        shutil.rmtree(folder / "out" / "tiny" / "first" / "teal-0.5" / "dump", ignore_errors=True)
    found = tree(folder)
    for path in sorted({*found, *stage.after}):
        if found.get(path) != stage.after.get(path):
            what = "left" if path not in stage.after else "lost" if path not in found else "changed"
            faults.append(f"{what} {path}")
    return mode, kills, faults


def imported() -> None:
    """Import what the steps import, so that forks start at once; nothing may compute before they do."""

    # what torch and pyarrow import when they are first used
    for name in ("sympy", "pandas", "pyarrow.dataset", "pyarrow.pandas_compat"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # else each fork copies what the collector touches
    gc.freeze()


def run(trials: int, seed: int, folder: Path) -> Iterator[tuple[str, str, int, list[str]]]:
    """(step, mode, kills, faults) of each trial."""
    found = stages(folder)
    rng = random.Random(seed)
    # each step in turn, so that few trials see all of them
    for number in range(trials):
        stage = found[number % len(found)]
        mode, kills, faults = trial(stage, folder / "trial", rng)
        yield stage.step.name, mode, kills, faults
        (folder / "trial.log").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after this")
    parser.add_argument("--csv", type=Path, help="table of trials and faults by step and mode")
    parser.add_argument("--undisturbed", type=Path, help="only make a study in this folder, and run it")
    parser.add_argument("--prompts", type=int, default=8, help="of that study")
    parser.add_argument("--max-new-tokens", type=int, default=4, help="of that study")
    parser.add_argument("--device", default="cpu", help="of that study")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    sys.path[:0] = [f"{ROOT}/src", f"{ROOT}/kernels"]
    imported()
    if arguments.undisturbed is not None:
        undisturbed(arguments.undisturbed, arguments.prompts, arguments.max_new_tokens, arguments.device)
        return
    started = time.monotonic()
    trials: Counter[tuple[str, str]] = Counter()
    killed: Counter[tuple[str, str]] = Counter()
    faulty: Counter[tuple[str, str]] = Counter()
    # a disk's flushes would take most of the time
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for step, mode, kills, faults in run(arguments.trials, seed, Path(folder).resolve()):
            trials[step, mode] += 1
            killed[step, mode] += kills
            faulty[step, mode] += bool(faults)
            if faults:
                print(f"{step} {mode}: {'; '.join(faults[:4])}", flush=True)
            if time.monotonic() - started > arguments.seconds:
                break
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["step", "mode", "trials", "kills", "faults", "seed", "seconds_of_all"])
            seconds = round(time.monotonic() - started)
            for key in sorted(trials):
                table.writerow([*key, trials[key], killed[key], faulty[key], seed, seconds])
    steps = Counter(step for step, _ in trials.elements())
    sums = {"trials": trials.total(), "kills": killed.total(), "faults": faulty.total()}
    summary = {"seed": seed, **sums, "steps": dict(steps)}
    print(json.dumps(summary), flush=True)
    sys.exit(1 if any(faulty.values()) else 0)


if __name__ == "__main__":
    main()
