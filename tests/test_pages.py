"""The pages about the code against the code: modules, layers, files, tests and versions that they name are there."""

import importlib.util
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import sparsetrace

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {"sparsetrace": ROOT / "src/sparsetrace", "sparsetrace_kernels": ROOT / "kernels/sparsetrace_kernels"}
# Where a path in a page may begin.
BASES = (ROOT, PACKAGES["sparsetrace"], PACKAGES["sparsetrace_kernels"], ROOT / "tests" / "workload", ROOT / "docs")
# A path without a placeholder such as `<name>`, which stands for a file that is yet to be written.
PATH = re.compile(r"[\w./-]+(\.(py|smk|md|txt|toml|yaml|csv|cff)|/)")


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = len(title.split()[0])
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.M | re.S)
    assert found, f"no heading {title}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """Code spans in the first cell of each row of a text's tables."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def code_spans(text: str) -> list[str]:
    """Code spans outside blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def modules_of(name: str) -> set[str]:
    """Names of a package's files but for `__init__.py`, by the heading that the page gives it."""
    top = "sparsetrace_kernels" if name == "sparsetrace_kernels" else "sparsetrace"
    folder = PACKAGES[top] if name in PACKAGES else PACKAGES[top] / name
    return {path.name for path in folder.glob("*.py") if path.name != "__init__.py"}


def packages() -> set[str]:
    folders = {path.parent for path in PACKAGES["sparsetrace"].rglob("*.py")}
    inner = {folder.relative_to(PACKAGES["sparsetrace"]).as_posix() for folder in folders}
    return inner - {"."} | set(PACKAGES)


def test_every_module_has_a_line_and_every_line_a_module():
    text = section(ARCHITECTURE, "## Packages and modules")
    named = {name: first_cells(section(text, f"### {name}")) for name in re.findall(r"^### (\S+)$", text, re.M)}
    assert named.keys() == packages()
    for name, modules in named.items():
        assert len(modules) == len(set(modules)), name
        assert set(modules) == modules_of(name), name


def test_layers_are_those_that_import_linter_holds():
    (contract,) = (c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    held = [[name.strip().removeprefix("sparsetrace.") for name in line.split("|")] for line in contract["layers"]]
    (drawn,) = re.findall(r"^```\n(__main__\n.*?)^```", section(ARCHITECTURE, "## Layers"), re.M | re.S)
    assert [[name.strip() for name in line.split("|")] for line in drawn.splitlines()] == held
    flat = {name for line in held for name in line}
    assert flat == {name for name in packages() if "/" not in name} - {"sparsetrace"} | {"__main__"}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("vector", "silu_mul.py", "index.py"),
        ("threshold", "calibrate.py", "primitives.py"),
    ],
)
def test_a_path_passes_each_file_once(name, first, last):
    table = ARCHITECTURE.partition(f"<!-- path:{name} -->\n")[2].partition("\n\n")[0]
    files = first_cells(table)
    assert len(files) > 10 and len(files) == len(set(files))
    assert Path(files[0]).name == first and Path(files[-1]).name == last
    assert all((ROOT / file).is_file() for file in files)


def test_rules_are_those_of_the_workflow():
    rows = [re.findall(r"`([^`]+)`", row) for row in section(ARCHITECTURE, "## The flow of data").splitlines()]
    table = {(row[1], row[0]): row for row in rows if len(row) > 4 and row[1].startswith("rules/")}
    rules = {
        (f"rules/{path.name}", rule)
        for path in (ROOT / "rules").glob("*.smk")
        for rule in re.findall(r"^rule (\w+):", path.read_text(encoding="utf-8"), re.M)
    }
    assert table.keys() == rules
    for (file, rule), row in table.items():
        body = (ROOT / file).read_text(encoding="utf-8").partition(f"rule {rule}:")[2].partition("\nrule ")[0]
        command, module = row[2].split()[0], row[3].removesuffix(".py").replace("/", ".")
        assert f'"sparsetrace {command} ' in body, rule
        assert f'source_hash("{module}")' in body, rule


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "docs/release.md"])
def test_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {span for span in code_spans(text) if PATH.fullmatch(span)}
    assert len(named) > 5
    # by its own name alone, below one of the folders that a page speaks of
    inner = {path.name for base in BASES[1:4] for path in base.rglob("*.py")}
    # what steps write
    written = {"checkpoint/", "pruned/", "dist/", "data/model/lm_head/"}
    lost = [name for name in named - written if not any((base / name).exists() for base in BASES) and name not in inner]
    assert not lost


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "CONTRIBUTING.md", "docs/release.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_tests_that_the_page_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ARCHITECTURE)
    assert len(named) > 5
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_constants_that_the_page_names_are_there():
    text = section(ARCHITECTURE, "### Versions")
    versions = (ROOT / "src/sparsetrace/formats/versions.py").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([A-Z_]+): Final", versions, re.M))
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)`", text)) == defined | {"HISTOGRAMS_VERSION"}
    histogram = (ROOT / "src/sparsetrace/calibration/histogram.py").read_text(encoding="utf-8")
    assert re.search("^HISTOGRAMS_VERSION = ", histogram, re.M)


def test_no_page_outside_the_repository_is_cited():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    # spelled apart, so that this file does not cite it either
    word = "DES" + "IGN"
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".smk", ".toml", ".yaml", ".yml") and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert word not in text, name
            for heading in re.findall(r"docs/architecture\.md, (\w+)\)", text):
                assert re.search(rf"^#+ {heading}$", ARCHITECTURE, re.M), f"{name}: {heading}"


def test_the_picture_is_what_its_script_draws():
    script = ROOT / "docs" / "images" / "flow.py"
    spec = importlib.util.spec_from_file_location("flow", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = module.draw()
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == picture
    # readable where nothing can be loaded
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|@font-face|<image|<script", picture)
    words = " ".join(re.findall(r">([^<]+)</text>", picture)).split()
    folders = {word[:-1] for word in words if word.endswith("/")}
    assert {"model", "calibration", "generation", "packing", "workload"} <= folders <= packages()


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sparsetrace.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["project"]["license"]
    assert {"message", "title", "authors"} <= citation.keys() and citation["authors"]
    assert set(citation["keywords"]) == set(PROJECT["project"]["keywords"])


def test_workflow_runs_what_ci_runs_as_root_on_every_python():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    # YAML 1.1 reads the key `on` as a truth value
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow[True].keys() == {"push", "pull_request"}
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if step.get("run", "").endswith("/run")] == [".ci/run"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == named
    # whose user is root
    assert job["container"].startswith("python:${{ matrix.python }}-")


def test_templates_ask_for_what_a_fault_needs():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert forms.keys() == {"bug", "feature", "config"}
    for name in ("bug", "feature"):
        assert {"name", "description", "body"} <= forms[name].keys()
        ids = [field["id"] for field in forms[name]["body"]]
        assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in forms[name]["body"])
    labels = [field["attributes"]["label"] for field in forms["bug"]["body"]]
    assert "sparsetrace doctor" in labels and "manifest.json" in labels
    request = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    assert [title in request for title in ("## Cause", "## Evidence", "## Tests")] == [True] * 3
