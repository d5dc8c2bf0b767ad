"""A small study in a folder of its own, and Snakemake started there as a user does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
ENV = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"]),
}


def snakemake(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess:
    """Run the repository's workflow on `my.yaml` of a folder, which is the working directory."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--configfile", "my.yaml", *words]
    run = subprocess.run(command, cwd=folder, env=os.environ | ENV, capture_output=True, text=True)
    assert run.returncode == status, run.stdout + run.stderr
    return run


def planned(folder: Path, *words: str) -> dict[str, int]:
    """Jobs that a dry run lists, by rule."""
    output = snakemake(folder, "--dry-run", "--cores", "1", *words).stdout
    table = re.search(r"^job +count\n[- ]+\n(.*?)^total", output, re.MULTILINE | re.DOTALL)
    return {} if table is None else {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)", table[1], re.MULTILINE)}


def inputs(folder: Path, tiny, name: str, prompts=(3, 9, 5, 7)) -> None:
    """A checkpoint, a text and prompts, the same for one name and seed."""
    rng = tiny.rng(name)
    tiny.checkpoint(folder / "checkpoint", rng)
    (folder / "text.txt").write_text(tiny.words(rng, 400))
    tiny.prompts(folder / "prompts.jsonl", rng, list(prompts))


def write_study(folder: Path, model: dict | None = None, run: dict | None = None, **study) -> dict:
    """Write `my.yaml`: one model and one run with some of their keys changed, None for a key that is left out."""
    model = {
        "checkpoint": "checkpoint",
        "calibration_text": "text.txt",
        "calibration": {"tokens": 200, "sequence_length": 20},
    } | (model or {})
    run = {
        "prompts": "prompts.jsonl",
        "batching": {"max_new_tokens": 4, "batch_size": 2},
        "decoding": {"ignore_eos": True},
        "methods": [{"name": "teal", "sparsity": 0.5}],
    } | (run or {})
    content = {
        "results": "out",
        "machine": {"device": "cpu", "threads": 1},
        "models": {"tiny": {key: value for key, value in model.items() if value is not None}},
        "runs": {"first": {key: value for key, value in run.items() if value is not None}},
    } | study
    (folder / "my.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return content
