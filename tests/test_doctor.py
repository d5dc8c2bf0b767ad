"""Provenance, `reproduce`, `doctor`, and what jobs ask of a scheduler.

`reproduce` is judged by a whole run through Snakemake, and by one whose prompts were changed.
"""

import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sparsetrace.core import devices
from sparsetrace.core.files import InputError
from sparsetrace.core.provenance import commit, merged
from sparsetrace.methods import METHODS
from sparsetrace.study.resources import MINUTES, needs
from sparsetrace.study.study import parse_study
from sparsetrace.tools import doctor
from sparsetrace.tools.reproduce import relocated, reproduce

ROOT = Path(__file__).parents[1]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kill = load(ROOT / "benchmarks" / "kill.py")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that has run."""
    folder = tmp_path_factory.mktemp("provenance") / "study"
    size = ["--prompts", "6", "--max-new-tokens", "4"]
    subprocess.run([sys.executable, kill.__file__, "--undisturbed", folder, *size], env=kill.environment(), check=True)
    return folder


@pytest.fixture(scope="module")
def manifest(study):
    return json.loads((study / "out/tiny/first/teal-0.5/workload/manifest.json").read_text())


def test_manifest_says_where_it_comes_from(manifest):
    assert manifest["device"] == "cpu" and manifest["tuning"] is None and manifest["smaller_batches"] == {}
    assert {"python", "torch", "numpy", "pyarrow", "sparsetrace"} <= set(manifest["versions"])
    made = parse_study(manifest["study"], "manifest")
    assert made.workloads() == [("tiny", "first", "teal-0.5")]
    assert manifest["study"]["runs"]["first"]["decoding"]["seed"] == 0
    assert manifest["study"]["models"]["tiny"]["calibration"]["seed"] == 0
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert [name.removesuffix("-dirty") for name in manifest["commits"]] == [head.stdout.strip()]
        assert commit() in manifest["commits"]


def test_reproduce_makes_the_same_bytes_and_names_what_differs(study, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", kill.environment()["PYTHONPATH"])
    again = reproduce(study / "out/tiny/first/teal-0.5/workload", tmp_path / "again", study)
    assert again.different == [] and again.notes == [] and len(again.equal) == 2 * 7 * 2 + 4
    # a manifest of other bytes and another checkpoint; the files made above are compared with it
    files = [dict(file) for file in manifest["files"]]
    files[3]["sha256"] = "0" * 64
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps(manifest | {"files": files, "source_hash": "1"}))
    found = reproduce(other, tmp_path / "again", study)
    assert found.different == [files[3]["path"]] and len(found.equal) == len(files) - 1
    assert found.notes == [f"source_hash was 1, is {manifest['source_hash']}"]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda end: end.name)
def test_nothing_of_reproduce_outlives_it(study, tmp_path, end):
    """Ended while a step runs, by a signal to itself alone: Snakemake, the step and the temporary folder are gone."""
    workload = study / "out/tiny/first/teal-0.5/workload"
    words = [sys.executable, "-m", "sparsetrace", "reproduce", workload, "--base", study]

    def of_run() -> list[str]:
        found = []
        for process in psutil.process_iter(["cwd", "cmdline", "status"]):
            if process.info["status"] != psutil.STATUS_ZOMBIE and (process.info["cwd"] or "").startswith(str(tmp_path)):
                found.append(" ".join(process.info["cmdline"] or ()))
        return found

    with subprocess.Popen(words, cwd=tmp_path, env=kill.environment(), stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not any("sparsetrace convert" in line for line in of_run()) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(end)
        assert process.wait(25) in (-end, 128 + end)
    until = time.monotonic() + 25
    while of_run() and time.monotonic() < until:
        time.sleep(0.05)
    assert of_run() == []
    assert (list(tmp_path.iterdir()) == []) == (end != signal.SIGKILL)


def test_reproduce_names_a_source_that_is_gone(study, manifest, tmp_path):
    with pytest.raises(InputError, match=r"reproduce: checkpoint must be there, got nothing at .*--base"):
        relocated(manifest["study"], tmp_path / "none", tmp_path)
    copy = tmp_path / "workload"
    copy.mkdir()
    (copy / "manifest.json").write_text(json.dumps(manifest | {"study": None}))
    with pytest.raises(InputError, match="must carry its study, got none"):
        reproduce(copy, tmp_path / "again", study)


def test_reproduce_keeps_relative_paths_by_links(study, manifest, tmp_path):
    own = manifest["study"]["runs"]["first"]
    method = {"name": "teal", "label": "own", "sparsity": 0.5, "allocation": {"file": "text.txt"}}
    given = manifest["study"] | {
        "runs": {"first": own | {"prompts": str(study / "prompts.jsonl"), "methods": [method]}}
    }
    found = relocated(given, study, tmp_path)
    assert found["runs"]["first"] == given["runs"]["first"]
    assert (tmp_path / "text.txt").read_bytes() == (study / "text.txt").read_bytes()
    assert found["models"]["tiny"]["checkpoint"] == "checkpoint" and (tmp_path / "checkpoint").is_dir()
    method["allocation"]["file"] = "absent.parquet"
    with pytest.raises(InputError, match="file must be there"):
        relocated(given, study, tmp_path)


def test_an_excerpt_makes_the_same_setting():
    methods = [
        {"name": "teal", "sparsity": [0.25, 0.5]},
        {"name": "teal", "sparsity": 0.5, "allocation": "greedy", "label": "searched"},
        *({"name": name} for name in METHODS if METHODS[name].score is None and name != "dense"),
    ]
    needed = {"sparsity": 0.5, "pattern": "2:4"}
    methods = [
        entry | {k: v for k, v in needed.items() if k in METHODS[entry["name"]].model_fields and k not in entry}
        for entry in methods
    ]
    model = {"checkpoint": "embedded", "calibration_text": "embedded"}
    full = {"models": {"demo": model}, "runs": {"first": {"prompts": "embedded", "methods": methods}}}
    whole = parse_study(full, "x")
    for name, run, label in whole.workloads():
        part = parse_study(json.loads(whole.excerpt(name, run, label)), "y")
        assert part.workloads() == [(name, run, label)] and part.setting(run, label) == whole.setting(run, label)
        assert part.models[name] == whole.models[name]


def test_what_shards_differ_in_is_merged():
    dumps = [
        {"commit": "b", "smaller_batches": {"3": 4}},
        {"commit": "a", "smaller_batches": {}},
        {"commit": None, "smaller_batches": {"7": 2}},
        {},
    ]
    assert merged(dumps) == {"commits": ["a", "b"], "smaller_batches": {"3": 4, "7": 2}}


@pytest.mark.parametrize("step", MINUTES)
def test_jobs_ask_for_what_the_model_needs(step):
    small, large = needs(step, 500_000_000), needs(step, 14_000_000_000)
    # host memory of a step that runs the model: the weights, and room to read them
    assert step == "convert" or large.mem_mb >= 2 * 14_000
    assert small.mem_mb <= large.mem_mb and small.runtime < large.runtime
    # convert is bounded by its output files, whatever the model
    assert needs("convert", 140_000_000_000).mem_mb < 10_000
    again = needs(step, 14_000_000_000, attempt=2)
    assert again.mem_mb == 2 * large.mem_mb and again.runtime == 2 * large.runtime


def test_shards_auto_is_settled_where_snakemake_starts(monkeypatch, study):
    content = yaml.safe_load((study / "my.yaml").read_text())
    content["runs"]["first"]["batching"]["shards"] = "auto"
    monkeypatch.setattr("sparsetrace.study.sections.auto_shards", lambda: 4)
    monkeypatch.delenv("SPARSETRACE_AUTO_SHARDS", raising=False)
    assert len(parse_study(content, "x").shards("first")) == 4
    # a job on another machine inherits it
    monkeypatch.setattr("sparsetrace.study.sections.auto_shards", lambda: 1)
    assert len(parse_study(content, "x").shards("first")) == 4
    monkeypatch.delenv("SPARSETRACE_AUTO_SHARDS")


def test_doctor_says_what_is_missing(monkeypatch, tmp_path):
    found = {finding.what: finding for finding in doctor.examine(tmp_path / "not" / "there")}
    assert {"python", "driver", "torch", "triton", "disk", "scheduler"} <= set(found)
    assert found["torch"].found.startswith(importlib.metadata.version("torch"))
    assert found["torch"].missing is None and str(tmp_path) in found["disk"].found
    # a GPU, but a torch that does not see it
    monkeypatch.setattr(devices, "installed", lambda: ["GPU-aaaa"])
    monkeypatch.setattr(doctor, "PROBE", 'print(\'{"version": "2.13.0", "cuda": "13.0", "gpus": []}\')')
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1 << 62)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/sbatch" if name == "sbatch" else None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    worse = {finding.what: finding for finding in doctor.examine(tmp_path)}
    assert "sees no GPU: the driver may be too old" in worse["torch"].missing
    assert "free some space" in worse["disk"].missing and worse["disk"].needed
    assert "no NVIDIA driver" in worse["driver"].missing
    assert "pip install 'sparsetrace[cluster]'" in worse["scheduler"].missing
    assert "pip install triton" in worse["triton"].missing


def test_doctor_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "sparsetrace", "doctor"],
        env=kill.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "scheduler" in run.stdout, run.stdout + run.stderr
