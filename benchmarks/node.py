"""The whole pipeline on one node, from a random checkpoint to workloads, and the share of time of each step.

    PYTHONPATH=src:kernels python benchmarks/node.py /scratch/node

Writes a checkpoint of the 7B shape (13.5 GB), runs `snakemake --cores all` on a study of it with two runs, one at
batch 1 and one at batch 64, each under TEAL at 50 %, and appends Snakemake's own benchmark tables to a CSV:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| model, dtype | shape of the checkpoint, number format |
| step | rule; `snakemake` is the whole call, planning and starting jobs included; `cut off` stands for it where it \
was ended by SIGTERM or `--limit`: the rows are then those of the jobs that had finished |
| job | wildcards of the rule: model, run, label, shard |
| seconds | wall-clock time of the job |
| share | of the sum of all jobs' seconds; of `snakemake`, that sum over its seconds, above 1 where jobs overlap |
| max_rss_mb | largest resident memory of the job |

Prints what begins and what ends, each with the seconds since the start of the script; what Snakemake says itself is in
`snakemake.log` of the folder.

The folder must be new or hold an earlier run of this script, whose results are then removed; a checkpoint of the same
shape, type and seed is used again. At the 7B shape everything takes about 36 GB at most.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import random_checkpoint
import record
import torch
import yaml

CSV = Path(__file__).parent / "results" / "node.csv"
COLUMNS = (*record.WHERE, "model", "dtype", "step", "job", "seconds", "share", "max_rss_mb")
SEED = 0
# Prompts, new tokens, batch size, shards of each run; two shards, so that one is packed while the next is generated.
RUNS = {"single": (4, 64, 1, 1), "batched": (128, 32, 64, 2)}
SMALL_RUNS = {"single": (2, 6, 1, 1), "batched": (8, 4, 4, 2)}
# What the benchmark table of a job is named, beside its log.
TABLE = ".bench.tsv"
POLL_SECONDS = 0.1
# For Snakemake and its jobs to end by themselves.
GRACE_SECONDS = 10
# Of the log of a job that did not finish.
TOLD_LINES = 15
STARTED = time.perf_counter()


class CutOffError(Exception):
    """The time is up, or somebody asked to end."""


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:7.1f} s] {text}", flush=True)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `CutOffError` on SIGTERM, and once so many seconds have passed; 0 for no limit."""

    def end(number: int, _: object) -> NoReturn:
        # a second one must not disturb what the first set off
        for each in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(each, signal.SIG_IGN)
        raise CutOffError(signal.Signals(number).name if number == signal.SIGTERM else f"{seconds} s have passed")

    earlier = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGALRM)}
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        for each, handler in earlier.items():
            signal.signal(each, handler)


def study(checkpoint: Path, small: bool) -> dict[str, Any]:
    """The study file's content; paths are relative to the folder of the run."""
    runs = {
        name: {
            "prompts": str(checkpoint / "prompts.jsonl"),
            "prompt_set": {"limit": prompts},
            "batching": {"max_new_tokens": new, "batch_size": batch, "shards": shards},
            # so that every run makes the same number of rows
            "decoding": {"ignore_eos": True},
            "methods": [{"name": "teal", "sparsity": 0.5}],
        }
        for name, (prompts, new, batch, shards) in (SMALL_RUNS if small else RUNS).items()
    }
    model = {
        "checkpoint": str(checkpoint),
        "calibration_text": str(checkpoint / "calibration.txt"),
        "calibration": {"tokens": 2048, "sequence_length": 64} if small else {"tokens": 32768, "sequence_length": 512},
    }
    machine = {"device": "auto", "threads": min(8, os.cpu_count() or 1)}
    return {"results": "results", "machine": machine, "models": {"random": model}, "runs": runs}


def checkpoint_in(folder: Path, shape: str, dtype: str) -> Path:
    """The checkpoint, written unless it is there; its name says what it is."""
    out = folder / f"{shape}-{dtype}-{SEED}"
    # written whole or not at all
    if not out.is_dir():
        most = max(prompts for prompts, *_ in RUNS.values())
        random_checkpoint.write_checkpoint(out, shape, dtype, SEED, most, report=say)
    return out


def run_snakemake(folder: Path, arguments: list[str]) -> None:
    """Run the workflow in a folder with this interpreter's packages, and say which jobs start and finish.

    Raises:
        subprocess.CalledProcessError: a job failed; the end of its log has been printed.
        CutOffError: from `limited`; every process of the workflow has ended.
    """
    # rules call `sparsetrace` by name, which an environment that this was not installed into lacks
    scripts = folder / "bin"
    scripts.mkdir(exist_ok=True)
    script = scripts / "sparsetrace"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sparsetrace "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]])
    snakefile = record.ROOT / "workflow" / "Snakefile"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), *arguments]
    logs, log = folder / "results" / "logs", folder / "snakemake.log"
    told: set[Path] = set()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=record.environment() | {"PATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                tell_news(logs, told)
                time.sleep(POLL_SECONDS)
        finally:
            end_group(process)
    tell_news(logs, told)
    if process.returncode:
        for path in [*unfinished(logs), log]:
            say(f"{path}:")
            print("\n".join(path.read_text(errors="replace").splitlines()[-TOLD_LINES:]), flush=True)
        raise subprocess.CalledProcessError(process.returncode, command)


def end_group(process: subprocess.Popen[bytes], grace: float = GRACE_SECONDS) -> None:
    """End a process, if it still runs, and all that it started, after so many seconds by force."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        # whoever is left
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def job_of(path: Path, logs: Path) -> str:
    """Rule and wildcards of a job's log or benchmark table."""
    return " ".join(path.relative_to(logs).with_name(path.name.removesuffix(".log").removesuffix(TABLE)).parts)


def tell_news(logs: Path, told: set[Path]) -> None:
    """Say which jobs have started, whose log is then there, and which have finished, whose benchmark table is."""
    new = sorted(path for path in logs.rglob("*") if path.is_file() and path not in told)
    for path in new:
        # empty until it is written
        if path.name.endswith(TABLE) and (lines := read_table(path)):
            say(f"{job_of(path, logs)}: finished in {float(lines[0]['s']):.1f} s")
            told.add(path)
    for path in new:
        if path.name.endswith(".log"):
            say(f"{job_of(path, logs)}: started")
            told.add(path)


def unfinished(logs: Path) -> list[Path]:
    """Logs of jobs without a benchmark table."""
    return sorted(path for path in logs.rglob("*.log") if not path.with_suffix(TABLE).is_file())


def read_table(path: Path) -> list[dict[str, str]]:
    """One line, unless a rule asks for repetitions."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def collect(results: Path, wall: float, whole: str = "snakemake") -> list[dict[str, Any]]:
    """Rows of Snakemake's benchmark tables below `<results>/logs`, longest first, then the whole call's by its name."""
    logs = results / "logs"
    rows: list[dict[str, Any]] = []
    for path in sorted(logs.rglob(f"*{TABLE}")):
        step, *job = path.relative_to(logs).with_name(path.name.removesuffix(TABLE)).parts
        for line in read_table(path):
            # `-` where the job ended before it was looked at
            rss = line["max_rss"] if line["max_rss"] not in ("-", "NA") else ""
            rows.append({"step": step, "job": "/".join(job), "seconds": float(line["s"]), "max_rss_mb": rss})
    total = sum(row["seconds"] for row in rows)
    rows.sort(key=lambda row: -row["seconds"])
    for row in rows:
        row |= {"share": f"{row['seconds'] / total:.4f}", "seconds": f"{row['seconds']:.2f}"}
    return [*rows, {"step": whole, "seconds": f"{wall:.2f}", "share": f"{total / wall:.4f}"}]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(random_checkpoint.SHAPES), default="llama-2-7b")
    parser.add_argument("--dtype", choices=list(random_checkpoint.DTYPES), default="bfloat16")
    parser.add_argument("--cores", default="all")
    parser.add_argument("--limit", type=int, default=0, help="seconds after which the run is cut off; 0 for none")
    parser.add_argument("--csv", type=Path, default=CSV)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results", ".snakemake"):
        shutil.rmtree(folder / name, ignore_errors=True)
    gpus = torch.cuda.device_count()
    where = record.where() | {"model": arguments.shape, "dtype": arguments.dtype}
    say(f"{where['gpu']}, {os.cpu_count()} cores, torch {where['torch']}, commit {where['commit']}")
    began, whole = time.perf_counter(), "snakemake"
    try:
        with limited(arguments.limit):
            checkpoint = checkpoint_in(folder, arguments.shape, arguments.dtype)
            say(f"checkpoint: {size_of(checkpoint) / 1e9:.2f} GB")
            content = study(checkpoint, arguments.shape == "small")
            (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
            # else jobs wait for each other's GPU, and their time counts the wait
            resources = ["--resources", f"gpu={gpus}"] if gpus else []
            began = time.perf_counter()
            run_snakemake(folder, ["--cores", arguments.cores, "--configfile", "study.yaml", *resources])
    except CutOffError as reason:
        whole = "cut off"
        say(f"cut off: {reason}")
        for path in unfinished(folder / "results" / "logs"):
            last = path.read_text(errors="replace").splitlines()[-1:]
            print(f"{job_of(path, folder / 'results' / 'logs')}: not finished; {''.join(last)}")
    rows = collect(folder / "results", time.perf_counter() - began, whole)
    record.append(arguments.csv, COLUMNS, (where | row for row in rows))
    for row in rows:
        print(f"{row['step']:12} {row.get('job', ''):32} {row['seconds']:>9} s {float(row['share']):7.1%}")
    for manifest in sorted((folder / "results").rglob("workload/manifest.json")):
        files = json.loads(manifest.read_text())["files"]
        num_rows = sum(file["rows"] for file in files if file["path"].startswith("data/"))
        print(f"{manifest.parent.relative_to(folder)}: {num_rows:,} rows, {size_of(manifest.parent) / 1e9:.3f} GB")
    say(f"{gpus} GPUs; {size_of(folder) / 1e9:.2f} GB in {folder}")
    if whole != "snakemake":
        sys.exit("node: the run must end by itself, got cut off: give it more time")


if __name__ == "__main__":
    main()
