"""Files that people give and that are not what they must be: one line that says what and where, in bounded memory."""

import errno
import gzip
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sparsetrace.core.files import MESSAGE_HEAD, MESSAGE_TAIL, InputError, parse_json, read_json, write_beside
from sparsetrace.core.settings import Batching, Calibration
from sparsetrace.core.text import UNPACKED_BYTES, read_documents
from sparsetrace.formats.dump import write_block
from sparsetrace.methods import Teal
from sparsetrace.study.options import parse_method
from sparsetrace.study.study import load_study, study_of
from sparsetrace.study.yaml_text import MOST_BYTES, parse_yaml

STUDY = {
    "models": {"m": {"checkpoint": "c", "calibration_text": "t.txt"}},
    "runs": {"r": {"prompts": "p.txt", "methods": [{"name": "teal", "sparsity": 0.5}]}},
}


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) <= MESSAGE_HEAD + MESSAGE_TAIL + 5
    return text


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = [
    ("latin", "x: café".encode("latin-1"), "must be YAML in UTF-8"),
    ("utf-16", "x: 1".encode("utf-16"), "must be YAML"),
    ("binary", bytes(range(256)), "must be YAML"),
    ("control", b"x: \x07", "must be YAML"),
    ("flow-nesting", b"x: " + b"[" * 20_000, "levels, got more"),
    ("mapping-nesting", b"{a: " * 3_000, "levels, got more"),
    ("levels", b"x: " + b"[" * 40 + b"]" * 40, "at most 32 levels"),
    ("digits", b"x: " + b"9" * 5_000, "must be YAML, got Exceeds the limit"),
    ("date", b"x: 2024-13-45", "must be YAML, got month must be in 1..12"),
    ("time", b"x: 2024-01-01 99:00:00", "must be YAML, got hour must be in 0..23"),
    ("python", b"x: !!python/object/apply:os.system [ls]", "must be YAML, got could not determine a constructor"),
    ("twice", b"models: {}\nruns: {}\nmodels: {a: 1}", "each key once, got 'models' twice in line 3"),
    ("twice-inside", b"x:\n  - {a: 1, b: 2, a: 3}", "each key once, got 'a' twice in line 2"),
    ("itself", b"x: &x [*x]", "without an alias inside its own value, got one in line 1"),
    ("itself-mapping", b"&x {a: *x}", "without an alias inside its own value"),
    ("merge-itself", b"&x {<<: *x}", "without an alias inside its own value"),
    ("laughs", LAUGHS.encode(), "at most 50,000 values, got more with its aliases unfolded"),
    ("list-key", b"? [a]\n: 1", "must be YAML"),
    ("merge-word", b"<<: x", "must be YAML"),
    ("long", b"x: " + b"y" * MOST_BYTES, "at most 262,144 bytes"),
    ("two", b"a: 1\n---\nb: 2", "must be YAML"),
    ("number", b"3", "must hold `models` and `runs`, got 3"),
    ("empty", b"", "must hold `models` and `runs`, got None"),
]


@pytest.mark.parametrize(("data", "message"), [pytest.param(*case[1:], id=case[0]) for case in YAML])
def test_yaml_that_is_not_taken(tmp_path, data, message):
    path = tmp_path / "s.yaml"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        load_study(path)
    assert message in one_line(error) and str(path) in str(error.value)
    assert time.monotonic() - start < 5


def test_aliases_and_merges_that_people_use():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: [*a, *a]\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text)


def test_keys_twice_are_refused_in_what_snakemake_read(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(STUDY) + "\nmodels: {}")
    with pytest.raises(InputError, match="each key once, got 'models' twice"):
        study_of(STUDY, tmp_path / "none", [path])
    path = tmp_path / "s.json"
    path.write_text(json.dumps(STUDY)[:-1] + ',\t"runs": {}}')
    with pytest.raises(InputError, match="the key 'runs' twice"):
        study_of(STUDY, tmp_path / "none", [str(path)])
    path.write_text(json.dumps(STUDY))
    study_of(STUDY, tmp_path / "none", [path, tmp_path / "gone"])


JSON = [
    ("nesting", b"[" * 100_000, "deeper nesting"),
    ("digits", b'{"x": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
    ("latin", '{"x": "é"}'.encode("latin-1"), "can't decode"),
    ("twice", b'{"a": {"x": 1, "y": 2, "x": 3}}', "the key 'x' twice"),
    ("list", b"[]", "must be a JSON object, got list"),
    ("empty", b"", "must be JSON"),
]


@pytest.mark.parametrize(("data", "message"), [pytest.param(*case[1:], id=case[0]) for case in JSON])
def test_json_that_is_not_taken(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_json(path, "step")
    assert message in one_line(error) and str(path) in str(error.value)


def test_json_is_what_the_library_reads(rng):
    content = {"a": [1, 2.5, None, True], "b": {"c": "é\N{GRINNING FACE}"}, "": {}}
    assert parse_json(json.dumps(content), "x") == content == parse_json(json.dumps(content).encode(), "x")


STUDIES = [
    ("braces", {"results": "a{x}"}, "results: must be a path without braces and control characters, got 'a{x}'"),
    ("empty", {"results": ""}, "results: must be a path without braces"),
    ("newline", {"results": "a\nb"}, r"results: must be a path .*, got 'a\\nb'"),
    ("zero", {"results": "a\0"}, "results: must be a path"),
    ("prompts", {"runs": {"r": STUDY["runs"]["r"] | {"prompts": "{p}.txt"}}}, "runs.r.prompts: must be a path"),
    ("checkpoint", {"models": {"m": STUDY["models"]["m"] | {"checkpoint": "{"}}}, "checkpoint: must be a path"),
    (
        "shards",
        {"runs": {"r": STUDY["runs"]["r"] | {"batching": {"shards": 1_000_000_000}}}},
        "batching.shards must be valid, got 1000000000: .* less than or equal to 99999",
    ),
    (
        "settings",
        {"runs": {"r": STUDY["runs"]["r"] | {"methods": [{"name": "nm", "pattern": ["2:4"] * 2000}]}}},
        "at most 1000 settings, got 2000",
    ),
    ("long", {"machine": {"device": "x" * 100_000}}, "machine.device must be valid, got 'xxx.* ... .*"),
]


@pytest.mark.parametrize(("changes", "message"), [pytest.param(*case[1:], id=case[0]) for case in STUDIES])
def test_studies_that_are_not_taken(changes, message):
    with pytest.raises(InputError, match=message) as error:
        study_of(STUDY | changes, Path("none"))
    one_line(error)


def test_many_faults_are_counted():
    models = {f"m{i}": {"checkpoint": 3} for i in range(1000)}
    with pytest.raises(InputError) as error:
        study_of(STUDY | {"models": models}, Path("none"))
    assert str(error.value).count("\n") == 20 and "more faults" in str(error.value)


@pytest.mark.parametrize("section", [Batching, Calibration])
def test_numbers_of_shards_have_five_digits(section):
    section(shards=99_999)
    with pytest.raises(ValueError, match="99999"):
        section(shards=100_000)


@pytest.mark.parametrize("layers", [2_000_000_000, 0, -1, True, "2", None, [2]], ids=repr)
def test_layers_are_doubted_before_they_are_planned(tmp_path, layers):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    models = {"m": STUDY["models"]["m"] | {"checkpoint": str(tmp_path)}}
    greedy = {"prompts": "p.txt", "methods": [{"name": "teal", "sparsity": 0.5, "allocation": "greedy"}]}
    study = study_of(STUDY | {"models": models, "runs": {"r": greedy}}, Path("none"))
    with pytest.raises(InputError, match="num_hidden_layers must be a whole number from 1 to 1000, got"):
        study.greedy_layers("m", "r", "teal-greedy-0.5")


ALLOCATIONS = ["best", 3, None, [], {}, {"per_layer": [0.5], "file": "t"}, {"x": 1}, True]


@pytest.mark.parametrize("value", ALLOCATIONS, ids=repr)
def test_an_allocation_of_no_known_form_is_refused_in_one_line(value):
    run = STUDY["runs"]["r"] | {"methods": [{"name": "teal", "sparsity": 0.5, "allocation": [value]}]}
    wanted = "must be uniform, greedy, {per_layer: [...]} or {file: PATH}, got " + repr(value)
    with pytest.raises(InputError) as error:
        study_of(STUDY | {"runs": {"r": run}}, Path("none"))
    # with a form of its own, a setting has no sparsity: that may be said first
    assert wanted in one_line(error) or "sparsity must not be given" in str(error.value)
    with pytest.raises(ValueError, match="must be uniform, greedy, "):
        Teal(allocation=value) if not isinstance(value, str) else Teal(sparsity=0.5, allocation=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"per_layer": []}, "at least 1"),
        ({"per_layer": 3}, "per_layer"),
        ({"per_layer": [0.5], "x": 1}, "x must not be given"),
        ({"file": 3}, "file must be valid, got 3"),
        ({"file": ""}, "file must be valid, got ''"),
    ],
    ids=repr,
)
def test_only_the_form_that_was_meant_is_spoken_of(value, message):
    with pytest.raises(InputError) as error:
        parse_method("teal", [f"allocation={json.dumps(value)}"], None)
    assert message in one_line(error) and "uniform" not in str(error.value)


@pytest.mark.parametrize("word", ["x: [", "&a [*a]", "9" * 5_000, "2024-13-45"])
def test_a_parameter_that_is_no_yaml(word):
    with pytest.raises(InputError, match="--set: sparsity must be a YAML value, got") as error:
        parse_method("teal", [f"sparsity={word}"], None)
    one_line(error)


TEXTS = [
    (
        "high",
        '{"prompt": "a\\ud800b"}',
        "record 0: prompt must be text, got half a surrogate pair, '\\ud800', as character 1",
    ),
    ("low", '{"prompt": "\\udc00"}', "half a surrogate pair"),
    ("turns", '{"turns": ["\\udfff"]}', "half a surrogate pair"),
    ("bare", '"\\ud83d"', "half a surrogate pair"),
    ("digits", '{"prompt": ' + "9" * 5_000 + "}", "a.jsonl:1 must be JSON, got Exceeds"),
    ("nesting", '{"prompt": ' + "[" * 100_000, "a.jsonl:1 must be JSON of a few levels"),
    ("twice", '{"prompt": "a", "prompt": "b"}', "a.jsonl:1 must be JSON, got the key 'prompt' twice"),
    ("keys", json.dumps({f"k{i}": 1 for i in range(5_000)}), "name it in `field`"),
]


@pytest.mark.parametrize(("text", "message"), [pytest.param(*case[1:], id=case[0]) for case in TEXTS])
def test_texts_that_are_not_taken(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(InputError) as error:
        read_documents(path, None, "prompts")
    assert message in one_line(error)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}')
    assert read_documents(tmp_path / "a.jsonl", None, "x") == ["\N{GRINNING FACE}"]


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.txt").mkdir()
    for name, kind in {"pipe": "a pipe or device", "zero": "a pipe or device", "folder": "a folder"}.items():
        with pytest.raises(InputError, match=f"{name}.txt must be .*, got {kind}") as error:
            read_documents(tmp_path / f"{name}.txt", None, "prompts")
        one_line(error)
        with pytest.raises(InputError, match=f"got {kind}"):
            load_study(tmp_path / f"{name}.txt")


def limited(code: str, megabytes: int) -> str:
    """What a process with so much memory prints."""
    preamble = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20}, {megabytes << 20}))\n"
    done = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_a_gzip_bomb_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(bytes(2 * UNPACKED_BYTES)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=f"must unpack to at most {UNPACKED_BYTES:,} bytes, got more"):
        read_documents(path, None, "prompts")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * UNPACKED_BYTES / 1024


def test_too_little_memory_is_one_line(tmp_path):
    # sparse: takes no space
    (tmp_path / "x.txt").touch()
    os.truncate(tmp_path / "x.txt", 4 << 30)
    code = f"""
import sys
sys.argv = ["sparsetrace", "show", "x"]
from sparsetrace.cli import main, workload
def short(*arguments, **settings):
    open({str(tmp_path / "x.txt")!r}, "rb").read()
workload.show.callback = short
main.main()
"""
    found = limited(code, 700)
    assert found.startswith("error: memory: must suffice for this step, got too little"), found
    assert found.count("\n") == 1


@pytest.mark.parametrize("write", ["text", "block"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, write):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparsetrace.core.files.sync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        if write == "block":
            import numpy as np

            write_block(tmp_path / "x", {"a": np.zeros(3, np.uint8)})
        else:
            with write_beside(tmp_path / "x") as partial:
                partial.write_text("x")
    assert error.value.filename == str(tmp_path / "x") and list(tmp_path.iterdir()) == []


def test_a_long_message_keeps_its_begin_and_its_remedy():
    error = InputError("a: x must be y, got " + "z" * 10_000 + ": do this\nsecond")
    first, second = str(error).split("\n")
    assert len(first) < 1_000 and first.startswith("a: x must be y") and first.endswith(": do this")
    assert second == "second"


MANIFEST = {"files": [{"path": "data/x", "sha256": "1"}], "versions": {}, "study": STUDY | {"results": "r"}}
MANIFESTS = [
    ("no-files", {"files": None}, "files must be list, got None"),
    ("no-versions", {"versions": 3}, "versions must be dict, got 3"),
    ("file", {"files": [{"path": "x"}]}, "files must have a path and a sha256 each"),
    (
        "name",
        {"files": [{"path": "../x", "sha256": "1"}]},
        "a path below its own folder, got '../x'",
    ),
    ("study", {"study": ["x"]}, "study must be an object, got"),
    ("braces", {"study": STUDY | {"results": "{x}"}}, "results: must be a path without braces"),
    ("none", {"study": None}, "must carry its study, got none"),
]


@pytest.mark.parametrize(("changes", "message"), [pytest.param(*case[1:], id=case[0]) for case in MANIFESTS])
def test_manifests_that_are_not_made_again(tmp_path, changes, message):
    from sparsetrace.tools.reproduce import reproduce

    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | changes))
    with pytest.raises(InputError) as error:
        reproduce(tmp_path, tmp_path / "again", tmp_path)
    assert message in one_line(error)


def test_a_study_of_somebody_else_reads_nothing_outside_its_base(tmp_path):
    from sparsetrace.tools.reproduce import relocated

    base = tmp_path / "base"
    base.mkdir()
    for path in (base / "c", base / "t.txt", base / "p.txt", tmp_path / "secret"):
        path.touch()
    relocated(STUDY, base, tmp_path / "again")
    (base / "link").symlink_to(tmp_path / "secret")
    for name in ("../secret", str(tmp_path / "secret"), "link", "/etc/passwd"):
        study = STUDY | {"runs": {"r": STUDY["runs"]["r"] | {"prompts": name}}}
        with pytest.raises(InputError, match=f"reproduce: prompts must lie in {base}, got .*--outside") as error:
            relocated(study, base, tmp_path / "again")
        one_line(error)
        relocated(study, base, tmp_path / "again", outside=True)
