"""The Snakemake workflow: lint, dry run, and real runs on a tiny checkpoint, judged by what they write and re-run."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sparsetrace

ROOT = Path(__file__).parents[1]
STUDY = {
    "machine": {"device": "cpu", "threads": 1},
    "models": {"tiny": {"calibration": {"tokens": 200, "sequence_length": 20}}},
    "runs": {
        "first": {
            "batching": {"max_new_tokens": 4, "batch_size": 2, "shards": 2},
            "decoding": {"ignore_eos": True},
            "methods": [{"name": "teal", "sparsity": 0.5}],
        }
    },
}


def snakemake(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run snakemake as a user does, with the repository's workflow and `folder` as the working directory."""
    scripts = Path(sys.executable).parent
    path = os.pathsep.join([str(scripts), os.environ["PATH"]])
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"])},
        capture_output=True,
        text=True,
    )
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    """A folder with a checkpoint, a text, prompts and `my.yaml`, in which the workflow has run once."""
    folder = tmp_path_factory.mktemp("study")
    rng = tiny.rng("workflow")
    tiny.checkpoint(folder / "checkpoint", rng)
    (folder / "text.txt").write_text(tiny.words(rng, 400))
    tiny.prompts(folder / "prompts.jsonl", rng, [3, 9, 5, 7])
    write_study(folder)
    snakemake(folder, "--cores", "2", "--configfile", "my.yaml")
    return folder


def write_study(folder: Path, sparsity=0.5, **decoding) -> None:
    model = STUDY["models"]["tiny"] | {"checkpoint": "checkpoint", "calibration_text": "text.txt"}
    run = STUDY["runs"]["first"] | {"prompts": "prompts.jsonl", "methods": [{"name": "teal", "sparsity": sparsity}]}
    run["decoding"] = run["decoding"] | decoding
    content = STUDY | {"results": "out", "models": {"tiny": model}, "runs": {"first": run}}
    (folder / "my.yaml").write_text(yaml.safe_dump(content))


def planned(folder: Path) -> dict[str, int]:
    """Jobs that a dry run lists, by rule."""
    output = snakemake(folder, "--dry-run", "--cores", "1", "--configfile", "my.yaml").stdout
    table = re.search(r"^job +count\n[- ]+\n(.*?)^total", output, re.MULTILINE | re.DOTALL)
    return {} if table is None else {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)", table[1], re.MULTILINE)}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / "out").rglob("*.parquet"))
    assert files
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_lint_finds_nothing():
    assert "good condition" in snakemake(ROOT, "--lint").stderr


def test_dry_run_of_the_default_study_lists_every_job(tmp_path):
    output = snakemake(tmp_path, "--dry-run", "--cores", "1").stdout
    counts = dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))
    assert counts["generate"] == counts["pack"] == "6" and counts["index"] == "3" and counts["demo_checkpoint"] == "1"


def test_run_writes_the_workload_and_removes_the_dump(study):
    ds = sparsetrace.open(study / "out/tiny/first/teal-0.5/workload")
    # the last sampled token is never fed: 4 sequences of 4 new tokens
    assert len(ds.tokens) == 4 * 3
    assert ds.manifest["rows"] == 2 * 7 * len(ds.tokens)
    assert ds.manifest["source"] == "tiny"
    assert ds[1, "down", int(ds.tokens[-1])].shape == (43,)
    assert not list((study / "out").rglob("*.safetensors.partial"))
    assert not [path for path in (study / "out/tiny/first/teal-0.5/dump").rglob("*") if path.is_file()]
    logs = {path.parts[-1 - depth] for depth in range(6) for path in (study / "out/logs").rglob("*.log")}
    assert {"convert", "calibrate", "thresholds", "split", "generate", "pack", "index"} <= logs


def test_second_run_has_nothing_to_do(study):
    assert planned(study) == {}


def test_run_elsewhere_gives_the_same_bytes(study, tmp_path):
    for name in ("checkpoint", "text.txt", "prompts.jsonl", "my.yaml"):
        (tmp_path / name).symlink_to(study / name)
    snakemake(tmp_path, "--cores", "1", "--configfile", "my.yaml")
    assert hashes(tmp_path) == hashes(study)


def test_a_new_sparsity_runs_only_its_own_jobs(study):
    write_study(study, sparsity=[0.5, 0.25])
    try:
        assert planned(study) == {"thresholds": 1, "generate": 2, "pack": 2, "index": 1, "all": 1}
    finally:
        write_study(study)


def test_a_decoding_change_runs_generation_and_what_follows(study):
    write_study(study, temperature=0.5)
    try:
        assert planned(study) == {"generate": 2, "pack": 2, "index": 1, "all": 1}
    finally:
        write_study(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("resalts=out", "resalts must be one of the known keys (results, machine, models, runs)"),
        ("models={}", "models"),
    ],
)
def test_a_wrong_key_is_refused_with_the_known_ones(tmp_path, change, message):
    run = snakemake(tmp_path, "--dry-run", "--cores", "1", "--config", change, check=False)
    assert run.returncode != 0 and message in run.stderr + run.stdout


def test_unlock_clears_a_dead_run_and_respects_a_live_one(tmp_path):
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.input.lock").write_text("x")
    command = [sys.executable, "-m", "sparsetrace", "unlock"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"])}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", "snakemake"]
    with subprocess.Popen(sleep, cwd=tmp_path) as alive:
        refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        alive.kill()
    assert refused.returncode == 1 and str(alive.pid) in refused.stderr and list(locks.iterdir())
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == 0
    assert not list(locks.iterdir())
