"""`check-config` names in one line what a run of the same study stops at; the oracle for some cases is such a run."""

import json
import re
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from study_testing import inputs, snakemake, write_study

from sparsetrace.cli import main as cli
from sparsetrace.study.study import load_study
from sparsetrace.tools import estimate, preflight


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch):
    inputs(tmp_path, tiny, "preflight")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(folder) -> list[str]:
    return preflight.preflight(load_study(folder / "my.yaml"))


def edit(name, **changes):
    def change(folder):
        path = folder / "checkpoint" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


PROMPTS = "runs.first: prompts: prompts.jsonl"
NM = {"name": "nm", "pattern": "2:4"}
CASES = [
    # id, change of the folder, of the model, of the run, fault
    ("checkpoint", lambda f: shutil.rmtree(f / "checkpoint"), {}, {}, "models.tiny: convert: checkpoint/config.json"),
    ("weights", remove("checkpoint/model.safetensors"), {}, {}, "models.tiny: convert: checkpoint/model.safetensors"),
    ("field-unknown", edit("config.json", mystery=1), {}, {}, "models.tiny: convert: .*got mystery: if they do not"),
    ("tokenizer", remove("checkpoint/tokenizer.json"), {}, {}, "models.tiny: tokenizer: checkpoint must hold"),
    ("tensor", edit("config.json", num_hidden_layers=3), {}, {}, "models.tiny: convert: .*tensors must be complete"),
    ("text", remove("text.txt"), {}, {}, "models.tiny: calibrate: text.txt must be a file"),
    ("text-short", None, {"calibration": {"tokens": 9999}}, {}, "models.tiny: calibrate: "),
    (
        "greedy",
        None,
        {},
        {"methods": [{"name": "teal", "sparsity": 0.5, "allocation": "greedy"}]},
        "models.tiny: calib",
    ),
    ("quality", None, {"quality_text": "none.txt"}, {}, "models.tiny: quality: "),
    ("prune", None, {"prune": {"name": "magnitude", "pattern": "2:4"}}, {}, "models.tiny: .* multiple of 4"),
    ("prompts", remove("prompts.jsonl"), {}, {}, f"{PROMPTS} must be a file, got nothing there"),
    ("field", None, {}, {"prompt_set": {"field": "query"}}, f"{PROMPTS}: record 0 must have the field query, got "),
    ("length", None, {}, {"batching": {"max_new_tokens": 122}}, f"{PROMPTS}: prompt 1 must fit the context of 128"),
    ("shards", None, {}, {"batching": {"shards": 9}}, "runs.first: prompts: shards must be at most"),
    ("layers", None, {}, {"capture": {"layers": [7]}}, "runs.first: capture: layers must be 0 to 1, got 7"),
    ("matrices", None, {}, {"capture": {"matrices": ["w1"]}}, "runs.first: capture: matrices must be among .* got w1"),
    ("method", None, {}, {"methods": [NM]}, r"runs.first.nm-2-4, model tiny: method nm: .* multiple of 4 for 2:4"),
    (
        "per-layer",
        None,
        {},
        {"methods": [{"name": "teal", "allocation": {"per_layer": [0.5]}}]},
        "runs.first.teal-per_layer, model tiny: thresholds: per_layer must have a target for each of the model's 2",
    ),
    (
        "threshold-file",
        None,
        {},
        {"methods": [{"name": "teal", "allocation": {"file": "t.csv"}}]},
        "runs.first.teal-file, model tiny: thresholds: t.csv",
    ),
]


@pytest.mark.parametrize(("change", "model", "run", "fault"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_one_line_for_one_fault(folder, change, model, run, fault):
    write_study(folder, model, run)
    if change is not None:
        change(folder)
    lines = found(folder)
    assert len(lines) == 1
    assert re.match(fault, lines[0]), lines


def test_a_study_without_a_fault_has_none(folder):
    write_study(folder)
    assert found(folder) == []
    done = CliRunner().invoke(cli.cli, ["check-config", "my.yaml"])
    assert (done.exit_code, done.output) == (0, "out/tiny/first/teal-0.5/workload\n")


def test_machine(folder, monkeypatch):
    """The engine, the disk and the memory of a GPU."""
    content = write_study(folder)
    (folder / "my.yaml").write_text(yaml.safe_dump(content | {"machine": {"device": "cpu", "engine": "triton"}}))
    assert found(folder) == [
        "runs.first.teal-0.5, model tiny: machine: engine must be torch or auto without a GPU, got triton"
    ]
    write_study(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (line,) = found(folder)
    assert line.startswith("results: out needs ") and line.endswith("free: free some space, or capture less")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(preflight, "set_up_torch", lambda machine: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10))
    (folder / "my.yaml").write_text(yaml.safe_dump(content | {"machine": {"engine": "torch"}}))
    (line,) = found(folder)
    assert line.startswith("machine: model tiny must fit the memory of one GPU of 1e-08 GB, got ")


def test_every_fault_is_named_at_once_and_the_run_stops_at_one_of_them(folder):
    write_study(folder, run={"capture": {"layers": [7]}, "batching": {"max_new_tokens": 122}})
    done = CliRunner().invoke(cli.cli, ["check-config", "my.yaml"], catch_exceptions=False)
    lines = done.stderr.splitlines()
    assert done.exit_code == 1 and len(lines) == 2
    assert all(line.startswith("error: my.yaml: runs.first: ") for line in lines)
    screen = snakemake(folder, "--cores", "1", "--until", "split", status=1).stderr
    assert lines[0].removeprefix("error: my.yaml: runs.first: ") in screen
