"""The Snakemake workflow: lint, dry run, and real runs on a tiny checkpoint, judged by what they write and re-run."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sparsetrace
from sparsetrace.cli.main import cli
from sparsetrace.core.settings import Capture
from sparsetrace.tools.reproduce import reproduce

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


def test_layers_reach_the_command_line(tmp_path):
    """Shell words of a dry run -> click's own parser -> the layers of the study file, 0 among them."""
    layers = {"first": [1], "zeroth": [0], "both": [0, 1], "all": []}
    model = {"checkpoint": "embedded", "calibration_text": "embedded"}
    run = {"prompts": "embedded", "methods": [{"name": "dense"}]}
    runs = {name: run | {"capture": {"layers": numbers}} for name, numbers in layers.items()}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"models": {"demo": model}, "runs": runs}))
    words = ["--dry-run", "--printshellcmds", "--cores", "1", "--configfile", "my.yaml"]
    commands = re.findall(
        r"^Shell command: sparsetrace generate (.+) > (\S+)", snakemake(tmp_path, *words).stdout, re.MULTILINE
    )
    found = {}
    for command, log in commands:
        values = cli.commands["generate"].make_context("generate", shlex.split(command)).params
        found[Path(log).parts[4]] = list(Capture(layers=values["layers"]).layers)
    assert found == layers


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


REPLAYS = {
    "own": {"methods": [{"name": "dense"}]},
    "forced": {
        "decoding": {"ignore_eos": True, "tokens_from": "dense"},
        "methods": [{"name": "teal", "sparsity": [0.3, 0.6]}],
    },
    "steps": {
        "decoding": {"ignore_eos": True, "tokens_from": "dense", "replay": "steps"},
        "methods": [{"name": "teal", "sparsity": 0}],
    },
    "text": {"decoding": {"tokens_from": "text", "prefill": "all"}},
}


def write_replays(folder: Path, **forced) -> None:
    """`my.yaml` with a run for each way that tokens come, `forced` changed."""
    model = STUDY["models"]["tiny"] | {"checkpoint": "checkpoint", "calibration_text": "text.txt"}
    runs = {name: STUDY["runs"]["first"] | {"prompts": "prompts.jsonl"} | run for name, run in REPLAYS.items()}
    for name in REPLAYS.keys() - {"forced"}:
        # one job each, where shards say nothing new
        runs[name]["batching"] = runs[name]["batching"] | {"shards": 1}
    runs["forced"] |= forced
    (folder / "my.yaml").write_text(yaml.safe_dump(STUDY | {"results": "out", "models": {"tiny": model}, "runs": runs}))


@pytest.fixture(scope="module")
def replays(study, tmp_path_factory):
    """A folder in which the workflow has run with tokens of each kind."""
    folder = tmp_path_factory.mktemp("replays")
    for name in ("checkpoint", "text.txt", "prompts.jsonl"):
        (folder / name).symlink_to(study / name)
    write_replays(folder)
    snakemake(folder, "--cores", "2", "--configfile", "my.yaml")
    return folder


def fed(folder: Path, run: str, label: str) -> tuple[list[int], list[int], set[str]]:
    """Token numbers, ids and phases of a workload."""
    table = sparsetrace.open(folder / "out/tiny" / run / label / "workload").token_table
    return table["token"].to_pylist(), table["token_id"].to_pylist(), set(table["phase"].to_pylist())


def test_several_sparsities_see_the_tokens_of_the_dense_model(replays):
    own = fed(replays, "own", "dense")
    assert own[2] == {"prefill", "decode"}
    for run, label, phase in (
        ("forced", "teal-0.3", "forced"),
        ("forced", "teal-0.6", "forced"),
        ("steps", "teal-0", "decode"),
    ):
        assert fed(replays, run, label) == (*own[:2], {"prefill", phase})
    # the text of the tokens stays, for settings that are added later
    assert len(list((replays / "out/tiny/forced/dense_tokens").rglob("group-*.sequences.parquet"))) == 2
    assert not (replays / "out/tiny/own/dense_tokens").exists()
    assert planned(replays) == {}


def test_steps_at_sparsity_0_are_the_dense_models_own_run(replays):
    own, steps = (
        sparsetrace.open(replays / "out/tiny" / place / "workload") for place in ("own/dense", "steps/teal-0")
    )
    for leaf in own.leaves:
        assert (own.matrix(*leaf).dense().view("uint32") == steps.matrix(*leaf).dense().view("uint32")).all()


def test_a_text_is_captured_and_nothing_behind_it(replays):
    token, _, phases = fed(replays, "text", "teal-0.5")
    ds = sparsetrace.open(replays / "out/tiny/text/teal-0.5/workload")
    lengths = [len(ids) for ids in ds.sequence_table["prompt_ids"].to_pylist()]
    # a begin token comes on top of each
    assert sorted(lengths) == [4, 6, 8, 10]
    assert token == list(range(sum(lengths))) == ds.tokens.tolist() and phases == {"forced"}


def test_a_replay_is_reproduced(replays, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"]))
    # the study's checkpoint is a link that leads out of its folder
    again = reproduce(replays / "out/tiny/forced/teal-0.6/workload", tmp_path, replays, outside=True)
    assert again.different == [] and again.notes == [] and again.equal


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        pytest.param({"methods": [{"name": "teal", "sparsity": [0.3, 0.6, 0.9]}]}, {"thresholds": 1}, id="sparsity"),
        pytest.param({"decoding": {**REPLAYS["forced"]["decoding"], "prefill": "half"}}, {}, id="prefill"),
        pytest.param({"decoding": {**REPLAYS["forced"]["decoding"], "seed": 1}}, {"dense_tokens": 2}, id="seed"),
    ],
)
def test_only_what_changes_their_choice_makes_dense_tokens_again(replays, change, jobs):
    write_replays(replays, **change)
    try:
        settings = 1 if "methods" in change else 2
        rest = {"generate": 2 * settings, "pack": 2 * settings, "index": settings, "all": 1}
        assert planned(replays) == jobs | rest
    finally:
        write_replays(replays)


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
