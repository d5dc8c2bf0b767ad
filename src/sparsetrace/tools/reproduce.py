"""Make a data set again from its manifest alone, and compare the hash of every file."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsetrace.core.files import InputError, read_json
from sparsetrace.study.sections import EMBEDDED
from sparsetrace.study.study import parse_study

RESULTS = "results"
SNAKEFILE = Path(__file__).parents[3] / "workflow" / "Snakefile"


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What became of it.

    Args:
        workload: the data set made again.
        equal: paths of files with the same bytes.
        different: paths of files with other bytes, or of none.
        notes: what is not as it was when the data set was made.
    """

    workload: Path
    equal: list[str]
    different: list[str]
    notes: list[str]


def reproduce(workload: Path, folder: Path, base: Path, tell: Callable[[str], None] | None = None) -> Reproduction:
    """Run the study that a manifest carries, and compare.

    Args:
        workload: a data set.
        folder: everything is made below it.
        base: folder that the study's relative paths start from.
        tell: called with each line that Snakemake prints.

    Raises:
        InputError: the manifest carries no study, a source is not there any more, or the run fails.
    """
    manifest = read_json(workload / "manifest.json", "reproduce")
    if not manifest.get("study"):
        raise InputError(
            f"reproduce: {workload / 'manifest.json'} must carry its study, got none: it was made by hand, not by the "
            "workflow"
        )
    if not SNAKEFILE.is_file():
        raise InputError(f"reproduce: {SNAKEFILE} must be there, got nothing: run it from a clone of the repository")
    folder.mkdir(parents=True, exist_ok=True)
    study = located(manifest["study"], base, folder)
    ((model, run, label),) = parse_study(study, f"reproduce: {workload / 'manifest.json'}").workloads()
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    made = Path(RESULTS, model, run, label, "workload")
    _snakemake(folder, made / "manifest.json", tell)

    again = read_json(folder / made / "manifest.json", "reproduce")
    hashes = {file["path"]: file["sha256"] for file in again["files"]}
    expected = {file["path"]: file["sha256"] for file in manifest["files"]}
    paths = sorted({*hashes, *expected})
    equal = [path for path in paths if hashes.get(path) == expected.get(path)]
    return Reproduction(folder / made, equal, [path for path in paths if path not in equal], changes(manifest, again))


def located(study: dict[str, Any], base: Path, folder: Path) -> dict[str, Any]:
    """The study with its files and folders in reach of `folder`, its results below it.

    Relative paths stay as they are, by links: a threshold file's path is part of what is compared.

    Raises:
        InputError: a file or folder that it names is not there.
    """

    def find(section: dict[str, Any], name: str) -> dict[str, Any]:
        if section[name] == EMBEDDED:
            return section
        path = base / section[name]
        if not path.exists():
            raise InputError(
                f"reproduce: {name} must be there, got nothing at {path.absolute()}: put it there, or name with --base "
                "the folder that the study was run in"
            )
        if Path(section[name]).is_absolute() or ".." in path.parts:
            return section | {name: str(path.absolute())}
        link = folder / section[name]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.absolute())
        return section

    def method(entry: dict[str, Any]) -> dict[str, Any]:
        own = entry.get("allocation")
        return entry | {"allocation": find(own, "file")} if isinstance(own, dict) and "file" in own else entry

    def run(one: dict[str, Any]) -> dict[str, Any]:
        return find(one, "prompts") | {"methods": [method(entry) for entry in one["methods"]]}

    # quality is measured beside the data set, not in it
    models = {
        name: find(find(model, "checkpoint"), "calibration_text") | {"quality_text": None}
        for name, model in study["models"].items()
    }
    return study | {"results": RESULTS, "models": models, "runs": {n: run(one) for n, one in study["runs"].items()}}


def changes(manifest: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """What is not as it was: sources, versions, device, code."""
    sources, machine = ("source_hash", "model_hash", "given"), ("device", "engine", "threads", "tuning")
    names = (*sources, *machine, "commits", "smaller_batches")
    pairs = [(name, manifest.get(name), again.get(name)) for name in names]
    pairs += [(name, was, again["versions"].get(name)) for name, was in manifest["versions"].items()]
    return [f"{name} was {was}, is {now}" for name, was, now in pairs if was != now]


def _snakemake(folder: Path, target: Path, tell: Callable[[str], None] | None) -> None:
    words = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--cores", "all"]
    words += ["--rerun-incomplete", "--configfile", "study.yaml", "--", target]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    with subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if tell is not None:
                tell(line.rstrip())
    if process.returncode:
        raise InputError(f"reproduce: the run in {folder} must end well, got status {process.returncode}: see its logs")
