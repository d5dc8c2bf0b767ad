"""The study file: what it refuses, what its methods expand to, and that options and hashes say exactly what it says."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sparsetrace.cli.options import settings
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import (
    Batching,
    Calibration,
    Capture,
    Conversion,
    Decoding,
    Greedy,
    Machine,
    Packing,
    PromptSet,
    Quality,
    Sampling,
)
from sparsetrace.methods import METHODS, Dense, Method, Teal
from sparsetrace.study.options import method_options, options, parse_method
from sparsetrace.study.study import Study, load_study, parse_study

ROOT = Path(__file__).parents[1]
MODEL = {"checkpoint": "/models/tiny", "calibration_text": "wiki.txt"}
RUN = {"prompts": "prompts.jsonl", "methods": [{"name": "teal", "sparsity": 0.5}]}


def study(**changes) -> dict:
    content = {"models": {"tiny": dict(MODEL)}, "runs": {"default": dict(RUN)}}
    return content | changes


def run(**changes) -> dict:
    return study(runs={"default": RUN | changes})


def methods(*entries) -> dict:
    return run(methods=list(entries))


def refusal(content) -> str:
    with pytest.raises(InputError) as error:
        parse_study(content, "config.yaml")
    assert all(line.startswith("config.yaml: ") for line in str(error.value).splitlines())
    return str(error.value)


UNKNOWN = [
    # id, study, place, known keys that the message lists
    ("top", study(resluts="x"), "resluts", ["results", "machine", "models", "runs"]),
    ("machine", study(machine={"gpu": 1}), "machine.gpu", ["device", "threads"]),
    (
        "model",
        study(models={"tiny": MODEL | {"chekpoint": "x"}}),
        "models.tiny.chekpoint",
        ["checkpoint", "calibration"],
    ),
    ("conversion", study(models={"tiny": MODEL | {"conversion": {"type": 1}}}), "conversion.type", ["dtype"]),
    (
        "calibration",
        study(models={"tiny": MODEL | {"calibration": {"token": 1}}}),
        "calibration.token",
        ["tokens", "seed"],
    ),
    ("run", run(prompt="x"), "runs.default.prompt ", ["prompts", "batching", "decoding", "methods"]),
    ("batching", run(batching={"batchsize": 1}), "runs.default.batching.batchsize", ["batch_size", "shards"]),
    ("decoding", run(decoding={"temp": 1}), "runs.default.decoding.temp ", ["temperature", "top_k", "ignore_eos"]),
    ("method", methods({"name": "teal", "sparcity": 0.5}), "sparcity", ["name", "label", "sparsity"]),
]


@pytest.mark.parametrize(("content", "place", "known"), [pytest.param(*case[1:], id=case[0]) for case in UNKNOWN])
def test_unknown_keys_fail_and_list_the_known_ones(content, place, known):
    message = refusal(content)
    assert place in message
    for key in known:
        assert key in message


WRONG = [
    # id, study, message
    ("no-models", {"runs": {"default": RUN}}, "models must be given"),
    ("empty-models", study(models={}), "models must be valid"),
    ("no-prompts", study(runs={"default": {"methods": RUN["methods"]}}), "runs.default.prompts must be given"),
    ("no-text", study(models={"tiny": {"checkpoint": "x"}}), "models.tiny.calibration_text must be given"),
    (
        "no-text-for-prune",
        study(
            models={"tiny": {"checkpoint": "x", "prune": {"name": "wanda", "sparsity": 0.5}}},
            runs={"default": RUN | {"methods": [{"name": "dense"}]}},
        ),
        "models.tiny.calibration_text must be given, since prune needs it, got none",
    ),
    ("no-methods", methods(), "methods must be valid"),
    ("sparsity-one", methods({"name": "teal", "sparsity": 1}), "sparsity must be valid, got 1: .* less than 1"),
    ("sparsity-below", methods({"name": "teal", "sparsity": [0.5, -0.1]}), "greater than or equal to 0"),
    ("sparsity-nan", methods({"name": "teal", "sparsity": float("nan")}), "finite"),
    ("no-sparsity", methods({"name": "teal"}), "sparsity must be given"),
    (
        "allocation-key",
        methods({"name": "teal", "allocation": {"file": "t.csv", "sheet": 1}}),
        r"runs.default.methods.allocation\..*sheet must not be given",
    ),
    (
        "allocation-value",
        methods({"name": "teal", "allocation": {"per_layer": [1.5]}}),
        "runs.default.methods.allocation.*per_layer.0.* must be valid, got 1.5: .* less than 1",
    ),
    ("no-name", methods({"sparsity": 0.5}), "a method must be a mapping with `name`, one of dense, teal"),
    ("no-mapping", methods("teal"), "a method must be a mapping with `name`"),
    ("unknown-method", methods({"name": "tael", "sparsity": 0.5}), "must be one of dense, teal.*, got 'tael'"),
    ("names", methods({"name": ["teal", "wina"]}), r"method name must be one of dense, teal.*, got \['teal', 'wina'\]"),
    (
        "no-values",
        methods({"name": "dense"}, {"name": "teal", "sparsity": []}),
        "teal: sparsity must have at least one",
    ),
    ("key-that-is-a-number", methods({"name": "teal", 0.5: "x"}), "method teal: keys must be among .*, got 0.5"),
    (
        "prune-names",
        study(models={"tiny": MODEL | {"prune": {"name": ["wanda"]}}}),
        r"models.tiny.prune: name must be one of magnitude, wanda, got \['wanda'\]",
    ),
    ("not-a-list", run(methods={"name": "teal"}), "must be a list of methods"),
    ("batch", run(batching={"batch_size": 0}), "runs.default.batching.batch_size must be valid, got 0"),
    (
        "prefill",
        run(decoding={"prefill": "some"}),
        "decoding.prefill must be valid, got 'some': .*'none', 'half' or 'all'",
    ),
    (
        "nothing-captured",
        run(batching={"max_new_tokens": 1}),
        "max_new_tokens must be at least 2 with decoding.prefill",
    ),
    (
        "nothing-captured-of-dense-tokens",
        run(batching={"max_new_tokens": 1}, decoding={"tokens_from": "dense"}),
        "max_new_tokens must be at least 2 with decoding.prefill",
    ),
    (
        "nothing-captured-of-text",
        run(decoding={"tokens_from": "text"}),
        "decoding: prefill must be half or all with tokens_from text, got none",
    ),
    ("tokens-from", run(decoding={"tokens_from": "file"}), "decoding.tokens_from must be valid, got 'file'"),
    (
        "matrix",
        run(capture={"matrices": ["q", "a/b"]}),
        r"runs.default.capture.matrices.1 must be valid, got 'a/b': .*\^\[A-Za-z0-9_\.\]\+\$",
    ),
    ("matrix-without-name", run(capture={"matrices": [""]}), "capture.matrices.0 must be valid, got ''"),
    ("replay", run(decoding={"replay": "batches"}), "decoding.replay must be valid, got 'batches'"),
    ("unknown-model", run(models=["tiny", "huge"]), "runs.default.models must be among tiny, got huge"),
    ("run-name", study(runs={"model": RUN}), "runs: a name must not be one of checkpoint, model, .*got model"),
    ("model-name", study(models={"logs": MODEL}), "models: a name must not be one of logs, got logs"),
    ("slash", study(models={"a/b": MODEL}), "models.a/b"),
    ("dots", study(runs={"..": RUN}), r"runs\.\.\."),
    ("device", study(machine={"device": "tpu"}), "machine.device must be valid, got 'tpu'"),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_refuses(content, message):
    assert re.search(message, refusal(content)), refusal(content)


def test_every_fault_has_its_line():
    message = refusal(study(resluts="x", machine={"threads": 0}, runs={"default": RUN | {"foo": 1}}))
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("matrices", [[], ["q", "down"], ["lm_head"], ["experts.3.up", "2"]], ids=str)
def test_matrices_are_named_freely(matrices):
    """Which ones there are is the model's to say."""
    found = parse_study(run(capture={"matrices": matrices}), "x").runs["default"]
    assert list(found.capture.matrices) == matrices


def test_a_single_token_is_enough_with_captured_prefill():
    parse_study(run(batching={"max_new_tokens": 1}, decoding={"prefill": "half"}), "x")
    # a text needs none
    parse_study(run(batching={"max_new_tokens": 1}, decoding={"prefill": "all", "tokens_from": "text"}), "x")


LABELS = [
    # id, methods, labels or the message of the refusal
    ("list", [{"name": "teal", "sparsity": [0.25, 0.5, 0.65]}], ["teal-0.25", "teal-0.5", "teal-0.65"]),
    ("two", [{"name": "dense"}, {"name": "teal", "sparsity": 0.5}], ["dense", "teal-0.5"]),
    ("own", [{"name": "teal", "sparsity": 0.5, "label": "mine"}], ["mine"]),
    ("own-list", [{"name": "teal", "sparsity": [0.1, 0.2], "label": "mine"}], ["mine-0.1", "mine-0.2"]),
    ("one-of-a-list", [{"name": "teal", "sparsity": [0.1], "label": "mine"}], ["mine"]),
    ("zero", [{"name": "teal", "sparsity": [0, 0.0001]}], ["teal-0", "teal-0.0001"]),
    ("twice", [{"name": "teal", "sparsity": [0.5, 0.5]}], "labels must be unique, got teal-0.5 twice"),
    ("same", [{"name": "dense"}, {"name": "dense"}], "labels must be unique, got dense twice"),
    ("rounded", [{"name": "teal", "sparsity": [0.1234567, 0.1234568]}], "labels must be unique"),
    ("shared", [{"name": "dense", "label": "a"}, {"name": "teal", "sparsity": 0.1, "label": "a"}], "got a twice"),
    ("folder", [{"name": "dense", "label": "a/b"}], "label"),
    (
        "taken",
        [{"name": "dense", "label": "dense_tokens"}],
        "runs.default: a label must not be one of prompts.parquet, dense_tokens, got dense_tokens",
    ),
    ("taken-file", [{"name": "dense", "label": "prompts.parquet"}], "got prompts.parquet"),
]


@pytest.mark.parametrize(("entries", "expected"), [pytest.param(*case[1:], id=case[0]) for case in LABELS])
def test_labels(entries, expected):
    if isinstance(expected, str):
        assert expected in refusal(methods(*entries))
    else:
        found = parse_study(methods(*entries), "x")
        assert [setting.label for setting in found.runs["default"].methods] == expected


def test_embedded_text_and_prompts_need_the_embedded_model():
    embedded = {"checkpoint": "embedded", "calibration_text": "embedded"}
    both = {"demo": embedded, "tiny": MODEL}
    parse_study(study(models={"demo": embedded}, runs={"r": RUN | {"prompts": "embedded"}}), "x")
    assert "name the text" in refusal(study(models={"tiny": MODEL | {"calibration_text": "embedded"}}))
    message = refusal(study(models=both, runs={"r": RUN | {"prompts": "embedded"}}))
    assert "runs.r.prompts must be a file for model tiny, got `embedded`" in message
    parse_study(study(models=both, runs={"r": RUN | {"prompts": "embedded", "models": ["demo"]}}), "x")
    parse_study(study(models={"demo": embedded | {"calibration_text": "own.txt"}}), "x")


def test_workloads_are_the_product():
    content = study(
        models={"a": MODEL, "b": MODEL},
        runs={
            "one": RUN | {"methods": [{"name": "teal", "sparsity": [0.25, 0.5]}, {"name": "dense"}]},
            "two": RUN | {"models": ["b"]},
        },
    )
    found = parse_study(content, "x")
    assert found.workloads() == [
        *(("a", "one", label) for label in ("teal-0.25", "teal-0.5", "dense")),
        *(("b", "one", label) for label in ("teal-0.25", "teal-0.5", "dense")),
        ("b", "two", "teal-0.5"),
    ]
    assert found.setting("one", "teal-0.25").method == Teal(sparsity=0.25)
    assert found.models_of("one") == ("a", "b")


def test_reads_a_file_or_says_why_not(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(study()))
    assert load_study(path) == parse_study(study(), "x")
    with pytest.raises(InputError, match="must be a file, got nothing there"):
        load_study(tmp_path / "absent.yaml")
    path.write_text("models: [")
    with pytest.raises(InputError, match="must be YAML") as error:
        load_study(path)
    assert "\n" not in str(error.value)
    path.write_text("just text")
    with pytest.raises(InputError, match="must hold `models` and `runs`"):
        load_study(path)


def test_the_file_that_comes_with_it_names_every_key():
    """config.yaml is the reference of the keys: none may be missing in it, with its range or choices beside it."""
    path = ROOT / "config.yaml"
    content = yaml.safe_load(path.read_text())
    found = load_study(path)
    model, chosen = found.models["demo"], found.runs["default"]
    for place, section, value in (
        ("", Study, content),
        ("machine", Machine, content["machine"]),
        ("models.demo", type(model), content["models"]["demo"]),
        ("runs.default", type(chosen), content["runs"]["default"]),
        *((f"models.demo.{k}", type(getattr(model, k)), v) for k, v in content["models"]["demo"].items()),
        *((f"runs.default.{k}", type(getattr(chosen, k)), v) for k, v in content["runs"]["default"].items()),
    ):
        if isinstance(value, dict):
            assert set(value) == set(section.model_fields), place


def test_sections_are_frozen_and_described():
    with pytest.raises(ValueError, match="frozen"):
        Decoding().seed = 3
    for section in (Study, Conversion, Calibration, PromptSet, Batching, Decoding, Packing, Machine):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
    for method in METHODS.values():
        assert issubclass(method, Method)
        assert all(field.description for field in method.model_fields.values())


FIELD_NAME = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=8)
MATRIX_NAME = st.sampled_from(["q", "down", "lm_head"]) | st.from_regex(r"[A-Za-z0-9_.]+", fullmatch=True)
SECTIONS = [
    st.builds(Conversion, dtype=st.sampled_from(["auto", "bfloat16"]), ignore_fields=st.lists(FIELD_NAME).map(tuple)),
    st.builds(
        Calibration,
        field=st.none() | FIELD_NAME,
        tokens=st.integers(1, 10**9),
        sequence_length=st.integers(2, 10**6),
        seed=st.integers(0, 2**40),
    ),
    st.builds(
        PromptSet,
        field=st.none() | FIELD_NAME,
        limit=st.none() | st.integers(1, 10**6),
        longer=st.sampled_from(["error", "skip"]),
    ),
    st.builds(Batching, max_new_tokens=st.integers(1, 999), batch_size=st.integers(1, 999), shards=st.integers(1, 99)),
    st.builds(
        Decoding,
        prefill=st.sampled_from(["none", "half", "all"]),
        temperature=st.floats(0, 1e300),
        top_k=st.integers(0, 10**6),
        seed=st.integers(0, 2**63),
        ignore_eos=st.booleans(),
        tokens_from=st.sampled_from(["own", "dense"]),
        replay=st.sampled_from(["forced", "steps"]),
    ),
    st.builds(Sampling, temperature=st.floats(0, 1e300), seed=st.integers(0, 2**63), ignore_eos=st.booleans()),
    st.builds(
        Capture,
        level=st.sampled_from(["full", "masks", "stats"]),
        # 0 is falsy, and `shlex.quote` makes '' of what is
        layers=st.lists(st.integers(0, 99), max_size=3).map(tuple),
        matrices=st.lists(MATRIX_NAME, max_size=3).map(tuple),
        every=st.integers(1, 99),
    ),
    st.builds(Greedy, tokens=st.integers(1, 10**9), step=st.floats(1e-300, 0.9)),
    st.builds(Quality, prefill=st.sampled_from(["half", "all"]), windows=st.none() | st.integers(1, 10**6)),
    st.builds(Packing, encoding=st.sampled_from(["split", "open"]), share_inputs=st.booleans()),
    st.builds(Machine, device=st.sampled_from(["auto", "cpu", "cuda"]), threads=st.integers(1, 512)),
]


@examples(deadline=None, max_examples=40)
@given(sections=st.tuples(*SECTIONS))
def test_options_carry_a_section_exactly(sections):
    """Section -> words of a shell command -> click's own parser -> the same section."""
    for section in sections:
        seen = []

        @click.command()
        @settings(type(section))
        def command(seen=seen, **values):
            seen.append(values)

        result = CliRunner().invoke(command, shlex.split(options(section)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert list(seen[0].values()) == [section]


@pytest.mark.parametrize("sparsity", [0, 0.25, 1e-05, 0.1234567, 0.9999999999999999])
def test_method_options_carry_a_setting_exactly(sparsity):
    (setting,) = (
        parse_study(methods({"name": "teal", "sparsity": sparsity, "label": "x.1"}), "x").runs["default"].methods
    )
    words = shlex.split(method_options(setting))
    values = {flag: [words[i + 1] for i, word in enumerate(words) if word == flag] for flag in words if flag[0] == "-"}
    assert parse_method(values["--method"][0], values["--set"], values["--label"][0]) == setting


def test_method_of_the_command_line():
    assert parse_method("dense", [], None).method == Dense()
    assert parse_method("teal", ["sparsity=0.5"], None).label == "teal-0.5"
    assert parse_method("teal", ["sparsity=0.5"], "own").label == "own"
    for parameters, message in (
        (["sparsity"], "--set must be NAME=VALUE, got 'sparsity'"),
        (["sparsity=2"], "--set: sparsity must be valid, got 2"),
        (["sparsity=x"], "--set: sparsity must be valid, got 'x'"),
        (["sparsity=0.5", "depth=3"], "keys must be among name, label, sparsity"),
        ([], "--set: sparsity must be given"),
        (["sparsity=[0.1, 0.2]"], "one value"),
        (["sparsity=[0.1"], "--set"),
        (["allocation={file: t.csv, sheet: 1}"], r"--set: allocation.*sheet must not be given"),
    ):
        with pytest.raises(InputError, match=message.replace("(", r"\(").replace("[", r"\[")):
            parse_method("teal", parameters, None)
    with pytest.raises(InputError, match="method name must be one of dense, teal"):
        parse_method("tael", [], None)


@pytest.fixture
def package(tmp_path):
    """A copy of the sources, and `source_hash` as that copy computes it."""
    root = ROOT
    for part in ("src/sparsetrace", "kernels/sparsetrace_kernels"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("copied_sources", tmp_path / "src/sparsetrace/study/sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tmp_path, module.source_hash


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "\n# edited\n")


def test_source_hash_follows_imports(package):
    """A made-up chain: by name, from a package, inside a function, into the kernels and through a package's init."""
    root, source_hash = package
    source, kernels = root / "src/sparsetrace", root / "kernels/sparsetrace_kernels"
    (source / "top.py").write_text("import sparsetrace.by_name\nfrom sparsetrace import from_package\n")
    (source / "by_name.py").write_text("def f():\n    from sparsetrace.lazy import x\n")
    (source / "from_package.py").write_text("import numpy\n")
    (source / "lazy.py").write_text("from sparsetrace_kernels.made_up import y\n")
    (kernels / "made_up.py").write_text("import sparsetrace.bundle.part\n")
    (source / "bundle").mkdir()
    (source / "bundle" / "__init__.py").write_text("from sparsetrace.bundle.other import z\n")
    for name in ("part", "other", "alone"):
        (source / "bundle" / f"{name}.py").write_text("")
    (source / "stranger.py").write_text("import sparsetrace.top\n")
    before = source_hash("top")
    for file in (
        source / "stranger.py",
        source / "bundle/alone.py",
        source / "workload/reader.py",
        kernels / "reference.py",
    ):
        edit(file)
        assert source_hash("top") == before, f"{file} is not imported"
    used = [source / f"{name}.py" for name in ("top", "by_name", "from_package", "lazy", "bundle/part", "bundle/other")]
    for file in [*used, kernels / "made_up.py", source / "bundle/__init__.py"]:
        edit(file)
        assert source_hash("top") != before, f"{file} is imported"
        before = source_hash("top")


def test_source_hash_refuses_a_module_that_moved_away(package):
    _, source_hash = package
    with pytest.raises(ValueError, match="must be among those of the package, got sparsetrace.packing.absent"):
        source_hash("packing.pack", "packing.absent")


# modules that rules name to `source_hash`
CONVERT, CALIBRATE, GENERATE = "model.convert", "calibration.calibrate", "generation.generate"
PACK, SPLIT, THRESHOLDS = "packing.pack", "generation.prompts", "calibration.derive"


@pytest.mark.parametrize(
    ("file", "changed", "same"),
    [
        ("src/sparsetrace/workload/reader.py", [], [CONVERT, CALIBRATE, GENERATE, PACK, SPLIT]),
        ("src/sparsetrace/packing/pack.py", [PACK], [CONVERT, CALIBRATE, GENERATE]),
        ("src/sparsetrace/model/convert.py", [CONVERT], [PACK, SPLIT, GENERATE]),
        ("src/sparsetrace/generation/engine.py", [GENERATE], [PACK, CONVERT, CALIBRATE]),
        ("src/sparsetrace/calibration/histogram.py", [CALIBRATE, THRESHOLDS], [PACK, CONVERT, GENERATE]),
        ("src/sparsetrace/calibration/counter.py", [CALIBRATE], [THRESHOLDS, GENERATE]),
        ("src/sparsetrace/calibration/allocation.py", [THRESHOLDS], [CALIBRATE, GENERATE]),
        ("src/sparsetrace/calibration/thresholds.py", [THRESHOLDS, GENERATE], [CALIBRATE]),
        ("src/sparsetrace/formats/numbers.py", [PACK, CONVERT, CALIBRATE, GENERATE], []),
        ("src/sparsetrace/methods/teal.py", [GENERATE], [PACK]),
        ("kernels/sparsetrace_kernels/torch_ops.py", [GENERATE], [PACK]),
        ("kernels/sparsetrace_kernels/reference.py", [], [CONVERT, CALIBRATE, GENERATE, PACK, SPLIT]),
    ],
)
def test_a_change_reaches_the_steps_that_use_it(package, file, changed, same):
    root, source_hash = package
    before = {step: source_hash(step) for step in [*changed, *same]}
    edit(root / file)
    assert [step for step in before if source_hash(step) != before[step]] == changed


def test_configuration_loads_no_torch():
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    modules = ", ".join(f"sparsetrace.study.{path.stem}" for path in (ROOT / "src/sparsetrace/study").glob("[a-z]*.py"))
    code = f"import sys, {modules}; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]


def test_the_embedded_model_has_the_layers_that_config_counts_on():
    from sparsetrace.model.demo.shape import CONFIG
    from sparsetrace.study.study import EMBEDDED_LAYERS

    assert CONFIG.num_hidden_layers == EMBEDDED_LAYERS
