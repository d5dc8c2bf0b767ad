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

from sparsetrace.core.files import InputError, read_json, refuse_outside_name
from sparsetrace.study.sections import EMBEDDED
from sparsetrace.study.study import Study, parse_study
from sparsetrace.tools.supervised import supervised

RESULTS = "results"
SNAKEFILE = Path(__file__).parents[3] / "workflow" / "Snakefile"


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Result of a reproduction.

    Args:
        workload: the new data set.
        equal: paths of files with the same bytes in both.
        different: paths of files with different bytes, or in one of the two only.
        notes: what has changed since the data set was made.
    """

    workload: Path
    equal: list[str]
    different: list[str]
    notes: list[str]


def reproduce(
    workload: Path, folder: Path, base: Path, on_line: Callable[[str], None] | None = None, *, outside: bool = False
) -> Reproduction:
    """Run the study that a manifest carries, and compare the result with the data set.

    Args:
        workload: a data set.
        folder: working folder of the run; everything is written below it.
        base: folder that the study's relative paths start from.
        on_line: called with each line of the study before it runs, and with each that Snakemake prints.
        outside: whether the study may read files that do not lie in `base`.

    Raises:
        InputError: the manifest is not one that can be made again, a source is missing or lies outside, or the run
            fails.
    """
    manifest = read_json(workload / "manifest.json", "reproduce")
    where = f"reproduce: {workload / 'manifest.json'}"
    for key, kind in {"files": list, "versions": dict}.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(f"{where}: {key} must be {kind.__name__}, got {manifest.get(key)!r}")
    for file in manifest["files"]:
        if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
            raise InputError(f"{where}: files must have a path and a sha256 each, got {file!r}")
        refuse_outside_name(file.get("path"), where)
    if not manifest.get("study"):
        raise InputError(
            f"reproduce: {workload / 'manifest.json'} must carry its study, got none: it was made by hand, not by the "
            "workflow"
        )
    if not SNAKEFILE.is_file():
        raise InputError(f"reproduce: {SNAKEFILE} must be there, got nothing: run it from a clone of the repository")
    folder.mkdir(parents=True, exist_ok=True)
    # checked before paths are taken from it
    parsed = _parsed(manifest["study"], where)
    ((model, run, label),) = parsed.workloads()
    models = manifest["study"]["models"]
    if not parsed.users_of_calibration(model):
        # it may be gone, as nothing reads it
        models = {model: models[model] | {"calibration_text": None}}
    study = relocated(manifest["study"] | {"models": models}, base, folder, outside=outside)
    text = yaml.safe_dump(study, sort_keys=False)
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    if on_line is not None:
        for line in text.splitlines():
            on_line(line)
    made = Path(RESULTS, model, run, label, "workload")
    _snakemake(folder, made / "manifest.json", on_line)

    new = read_json(folder / made / "manifest.json", "reproduce")
    hashes = {file["path"]: file["sha256"] for file in new["files"]}
    expected = {file["path"]: file["sha256"] for file in manifest["files"]}
    paths = sorted({*hashes, *expected})
    equal = [path for path in paths if hashes.get(path) == expected.get(path)]
    return Reproduction(folder / made, equal, [path for path in paths if path not in equal], changes(manifest, new))


def _parsed(study: Any, where: str) -> Study:
    """The study of one workload."""
    if not isinstance(study, dict):
        raise InputError(f"{where}: study must be an object, got {study!r}")
    parsed = parse_study(study, where)
    if (count := len(parsed.workloads())) != 1:
        raise InputError(f"{where}: study must make one workload, got {count}")
    return parsed


def relocated(study: dict[str, Any], base: Path, folder: Path, *, outside: bool = False) -> dict[str, Any]:
    """The study with its inputs reachable from `folder`, and its results below it.

    Relative paths are kept and become links: the path of a threshold file is part of what is compared.

    Raises:
        InputError: a file or folder that the study names is missing, or lies outside `base` and `outside` is not set:
            a manifest may come from anybody.
    """
    root = Path(os.path.realpath(base))

    def find(section: dict[str, Any], name: str) -> dict[str, Any]:
        if section[name] in (EMBEDDED, None):
            return section
        path = base / section[name]
        if not path.exists():
            raise InputError(
                f"reproduce: {name} must be there, got nothing at {path.absolute()}: put it there, or name with --base "
                "the folder that the study was run in"
            )
        if not outside and not Path(os.path.realpath(path)).is_relative_to(root):
            raise InputError(
                f"reproduce: {name} must lie in {base.absolute()}, got {path.absolute()}: name with --base a folder "
                "that holds it, or allow it with --outside"
            )
        if Path(section[name]).is_absolute() or ".." in path.parts:
            return section | {name: str(path.absolute())}
        link = folder / section[name]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.absolute())
        return section

    def method(entry: dict[str, Any]) -> dict[str, Any]:
        allocation = entry.get("allocation")
        if isinstance(allocation, dict) and "file" in allocation:
            return entry | {"allocation": find(allocation, "file")}
        return entry

    def run(section: dict[str, Any]) -> dict[str, Any]:
        return find(section, "prompts") | {"methods": [method(entry) for entry in section["methods"]]}

    # quality is measured beside the data set, not in it
    models = {
        name: find(find(model, "checkpoint"), "calibration_text") | {"quality_text": None}
        for name, model in study["models"].items()
    }
    runs = {name: run(section) for name, section in study["runs"].items()}
    return study | {"results": RESULTS, "models": models, "runs": runs}


def changes(manifest: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two manifests in sources, versions, device and code, one line each."""
    sources, machine = ("source_hash", "model_hash", "given"), ("device", "engine", "threads", "tuning")
    names = (*sources, *machine, "commits", "smaller_batches")
    pairs = [(name, manifest.get(name), new.get(name)) for name in names]
    pairs += [(name, was, new["versions"].get(name)) for name, was in manifest["versions"].items()]
    return [f"{name} was {was}, is {now}" for name, was, now in pairs if was != now]


def _snakemake(folder: Path, target: Path, on_line: Callable[[str], None] | None) -> None:
    words = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--cores", "all"]
    words += ["--rerun-incomplete", "--configfile", "study.yaml", "--", target]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    options = {"cwd": folder, "env": os.environ | {"PATH": path}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with supervised([str(word) for word in words], **options, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if on_line is not None:
                on_line(line.rstrip())
    if process.returncode:
        raise InputError(f"reproduce: the run in {folder} must succeed, got status {process.returncode}: see its logs")
