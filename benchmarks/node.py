"""The whole pipeline on one node, from a random checkpoint to workloads, and the share of time of each step.

    PYTHONPATH=src:kernels python benchmarks/node.py /scratch/node

Writes a checkpoint of the 7B shape (13.5 GB), runs `snakemake --cores all` on a study of it with two runs, one at
batch 1 and one at batch 64, each under TEAL at 50 %, and appends Snakemake's own benchmark tables to a CSV:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| model, dtype | shape of the checkpoint, number format |
| step | rule; `snakemake` is the whole call, planning and starting jobs included |
| job | wildcards of the rule: model, run, label, shard |
| seconds | wall-clock time of the job |
| share | of the sum of all jobs' seconds; of `snakemake`, that sum over its seconds, above 1 where jobs overlap |
| max_rss_mb | largest resident memory of the job |

The folder must be new or hold an earlier run of this script, whose results are then removed; a checkpoint of the same
shape, type and seed is used again. At the 7B shape everything takes about 36 GB at most.
"""

import argparse
import csv
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
        random_checkpoint.write_checkpoint(out, shape, dtype, SEED, most)
    return out


def run_snakemake(folder: Path, arguments: list[str]) -> float:
    """Run the workflow in a folder with this interpreter's packages; returns seconds.

    Raises:
        subprocess.CalledProcessError: a job failed; what it said is in the log that Snakemake names.
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
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=record.environment() | {"PATH": path}, check=True)
    return time.perf_counter() - started


def collect(results: Path, wall: float) -> list[dict[str, Any]]:
    """Rows of Snakemake's benchmark tables below `<results>/logs`, longest first, then the whole call's."""
    logs = results / "logs"
    rows: list[dict[str, Any]] = []
    for path in sorted(logs.rglob("*.bench.tsv")):
        step, *job = path.relative_to(logs).with_name(path.name.removesuffix(".bench.tsv")).parts
        with path.open(newline="") as file:
            # one line, unless a rule asks for repetitions
            for line in csv.DictReader(file, delimiter="\t"):
                # `-` where the job ended before it was looked at
                rss = line["max_rss"] if line["max_rss"] not in ("-", "NA") else ""
                rows.append({"step": step, "job": "/".join(job), "seconds": float(line["s"]), "max_rss_mb": rss})
    total = sum(row["seconds"] for row in rows)
    rows.sort(key=lambda row: -row["seconds"])
    for row in rows:
        row |= {"share": f"{row['seconds'] / total:.4f}", "seconds": f"{row['seconds']:.2f}"}
    return [*rows, {"step": "snakemake", "seconds": f"{wall:.2f}", "share": f"{total / wall:.4f}"}]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(random_checkpoint.SHAPES), default="llama-2-7b")
    parser.add_argument("--dtype", choices=list(random_checkpoint.DTYPES), default="bfloat16")
    parser.add_argument("--cores", default="all")
    parser.add_argument("--csv", type=Path, default=CSV)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    checkpoint = checkpoint_in(folder, arguments.shape, arguments.dtype)
    print(f"checkpoint: {size_of(checkpoint) / 1e9:.2f} GB, {time.perf_counter() - started:.1f} s", flush=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study(checkpoint, arguments.shape == "small"), sort_keys=False))
    for name in ("results", ".snakemake"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # else jobs wait for each other's GPU, and their time counts the wait
    gpus = torch.cuda.device_count()
    resources = ["--resources", f"gpu={gpus}"] if gpus else []
    wall = run_snakemake(folder, ["--cores", arguments.cores, "--configfile", "study.yaml", *resources])
    where = record.where() | {"model": arguments.shape, "dtype": arguments.dtype}
    rows = collect(folder / "results", wall)
    record.append(arguments.csv, COLUMNS, (where | row for row in rows))
    for row in rows:
        print(f"{row['step']:12} {row.get('job', ''):32} {row['seconds']:>9} s {float(row['share']):7.1%}")
    for manifest in sorted((folder / "results").rglob("workload/manifest.json")):
        files = json.loads(manifest.read_text())["files"]
        num_rows = sum(file["rows"] for file in files if file["path"].startswith("data/"))
        print(f"{manifest.parent.relative_to(folder)}: {num_rows:,} rows, {size_of(manifest.parent) / 1e9:.3f} GB")
    print(f"{gpus} GPUs; {size_of(folder) / 1e9:.2f} GB in {folder}")


if __name__ == "__main__":
    main()
