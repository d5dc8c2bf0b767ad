"""pyproject.toml, constraints.txt and envs/*.yaml name the same packages in versions that fit each other."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# conda's name of a package, where it is another than PyPI's
CONDA_NAMES = {"snakemake-minimal": "snakemake", "python-xxhash": "xxhash"}
# what each environment has to hold: the reader and these extras
ENVIRONMENTS = {"generate": ("cli", "generate"), "pack": ("cli",), "workflow": ("cli", "workflow", "cluster")}


def pins(lines) -> dict[str, str]:
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    found = (Requirement(line) for line in lines)
    return {canonicalize_name(r.name): r for r in found if r.name != "sparsetrace"}


def test_constraints_pin_every_requirement_within_its_range():
    for name, requirement in requirements(*PROJECT["optional-dependencies"]).items():
        assert name in CONSTRAINTS, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(CONSTRAINTS[name]), f"{name} {CONSTRAINTS[name]} is not {requirement}"


def test_constraints_hold_the_versions_that_belong_together():
    assert (CONSTRAINTS["torch"], CONSTRAINTS["triton"]) == ("2.13.0", "3.7.1")


@pytest.mark.parametrize(("name", "extras"), ENVIRONMENTS.items(), ids=list(ENVIRONMENTS))
def test_conda_environment_agrees(name, extras):
    content = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())
    lines = []
    for entry in content["dependencies"]:
        lines.extend(entry["pip"] if isinstance(entry, dict) else [entry])
    versions = {}
    for line in lines:
        package, _, version = line.replace("==", "=").partition("=")
        versions[canonicalize_name(CONDA_NAMES.get(package, package))] = version
    assert versions.pop("pip") == ""
    python = versions.pop("python")
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert versions == {package: CONSTRAINTS[package] for package in requirements(*extras)}


def test_every_environment_of_a_rule_exists():
    for rules in (ROOT / "rules").glob("*.smk"):
        for line in rules.read_text().splitlines():
            if "envs/" in line:
                name = Path(line.strip().strip('",')).stem
                assert name in ENVIRONMENTS and (ROOT / "envs" / f"{name}.post-deploy.sh").is_file()
