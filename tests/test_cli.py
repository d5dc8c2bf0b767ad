"""The command line: help, the whole way from checkpoint to workload, and errors of one line without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import sparsetrace
from sparsetrace.cli.main import cli, main
from sparsetrace.core.settings import Capture
from sparsetrace.study.options import options


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command as the console script does: (status, standard output, standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sparsetrace", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = error.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def fails(result, *parts):
    """Status 1, nothing but lines that begin with `error: `, all parts named."""
    status, _, err = result
    assert status == 1
    assert "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    for part in parts:
        assert part in err
    return err.splitlines()


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_of_each_command(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert cli.commands[name].help.split("\n")[0].split()[0] in result.output
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.output
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


def test_help_and_version():
    result = CliRunner().invoke(cli, ["-h"])
    assert result.exit_code == 0
    for name in cli.commands:
        assert name in result.output
    assert sparsetrace.__version__ in CliRunner().invoke(cli, ["--version"]).output


def test_the_whole_way(run, tiny, tmp_path, rng, monkeypatch):
    """Each step of the README by hand; what it prints is what the files say."""
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(Path("tiny"), rng)
    Path("text.txt").write_text(tiny.words(rng, 700))
    tiny.prompts(Path("prompts.jsonl"), rng, [4, 7, 2, 150])

    def good(*words):
        status, out, err = run(*words)
        assert status == 0, err
        return out

    batching = ["--batch-size", 2, "--max-new-tokens", 4, "--shards", 2]
    out = good("convert", "tiny", "--out", "model", "--dtype", "bfloat16")
    assert "2 layers of 7 matrices" in out
    assert json.loads(Path("model/config.json").read_text())["model_hash"] in out
    calibration = ["--tokens", 400, "--sequence-length", 20]
    assert "8 histograms" in good("calibrate", "model", "--text", "text.txt", "--out", "h.safetensors", *calibration)
    out = good("thresholds", "h.safetensors", "--method", "teal", "--set", "sparsity=0.5", "--out", "t.parquet")
    assert "teal-0.5" in out
    assert "target 0.5000, achieved 0.5" in out
    out = good("split", "model", "--prompts", "prompts.jsonl", "--out", "split.parquet", "--longer", "skip", *batching)
    assert "3 sequences in 2 groups and 2 shards" in out
    assert "skipped 1 prompts longer than the context" in out
    captured = 0
    for shard, (group_name, rows) in enumerate([("00000", 6), ("00001", 3)]):
        out = good(
            *("generate", "model", "--thresholds", "t.parquet", "--prompts", "split.parquet", "--shard", shard),
            *("--out", f"dump/{group_name}/manifest.json", "--ignore-eos", *batching),
        )
        assert f"{rows} tokens captured of 14 matrices, in 1 groups" in out
        captured += rows
        out = good("pack", f"dump/{group_name}/manifest.json", "--workload", "w", "--out", f"parts/{group_name}.json")
        assert "14 files" in out
    out = good("index", "parts/00000.json", "parts/00001.json", "--workload", "w")
    assert f"{captured} captured of" in out
    assert good("show", "w") == out
    ds = sparsetrace.open("w")
    assert len(ds.tokens) == captured
    assert ds.manifest["decoding"]["ignore_eos"] is True
    assert ds.manifest["dtype"] == "bfloat16"


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]], ids=str)
def test_only_the_layers_that_are_named_are_captured(run, tiny, tmp_path, rng, layers):
    model = tiny.model(tmp_path, rng)
    thresholds = tiny.thresholds(tmp_path, model, rng)
    prompts = ["--prompts", tiny.prompts(tmp_path / "prompts.jsonl", rng, [3]), "--out", tmp_path / "split.parquet"]
    batching = ["--batch-size", 1, "--max-new-tokens", 3]
    assert run("split", model.folder, *prompts, *batching)[0] == 0
    words = ["--thresholds", thresholds, "--prompts", tmp_path / "split.parquet", *batching, "--ignore-eos"]
    out = tmp_path / "dump" / "manifest.json"
    chosen = options(Capture(layers=tuple(layers))).split()
    status, _, err = run("generate", model.folder, *words, "--out", out, *chosen)
    assert status == 0, err
    manifest = json.loads(out.read_text())
    assert manifest["capture"]["layers"] == layers
    assert [row["layer"] for row in manifest["matrices"]] == [layer for layer in layers for _ in range(7)]


def test_errors_are_one_line_each(run, tiny, tmp_path, rng):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)
    model = tmp_path / "m"
    assert run("convert", checkpoint, "--out", model)[0] == 0
    assert len(fails(run("convert", tmp_path / "absent", "--out", tmp_path / "x"), "must be a file, got nothing")) == 1
    assert not (tmp_path / "x").exists()
    text = ["--text", tmp_path / "absent.txt", "--out", tmp_path / "h"]
    fails(run("calibrate", model, *text, "--sequence-length", 20), "absent.txt must be a file, got nothing there")
    lines = fails(
        run("calibrate", model, *text, "--tokens", 0, "--sequence-length", 1), "--tokens", "--sequence-length"
    )
    assert len(lines) == 2
    fails(run("show", tmp_path), "manifest.json must be a file")
    fails(run("thresholds", tmp_path / "h", "--method", "tael", "--out", tmp_path / "t"), "must be one of dense, teal")
    fails(
        run("pack", tmp_path / "d", "--workload", tmp_path / "w", "--out", tmp_path / "part.json"), "such as 00000.json"
    )
    shard = ["--prompts", tmp_path / "absent.parquet", "--out", tmp_path / "d" / "manifest.json"]
    words = ["--thresholds", tmp_path / "t", *shard, "--tokens-from", "text"]
    fails(run("generate", model, *words), "decoding: prefill must be half or all with tokens_from text, got none")
    fails(run("generate", model, "--thresholds", tmp_path / "absent.parquet", *shard), "absent.parquet")
    for name in ("layer", "token", "sequence", "position"):
        fails(run("stats", tmp_path, f"--{name}", "1:2:3"), f"--{name} must be a number or START:STOP, got 1:2:3")
    chosen = ["--matrices", "q", "--matrices", "a/b", "--layers", "-1"]
    lines = fails(run("generate", model, "--thresholds", tmp_path / "t", *shard, *chosen), "--matrices", "--layers")
    assert len(lines) == 2 and "--matrices must be valid, got 'a/b'" in lines[1]


@pytest.mark.parametrize("kind", ["text", "cut"])
def test_files_that_are_no_parquet_are_errors_of_one_line(run, tiny, tmp_path, rng, kind):
    model = tiny.model(tmp_path, rng)
    thresholds = tiny.thresholds(tmp_path, model, rng)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no Parquet at all" if kind == "text" else thresholds.read_bytes()[:-7])
    out = ["--out", tmp_path / "dump" / "manifest.json"]
    fails(run("generate", model.folder, "--thresholds", bad, "--prompts", bad, *out), "bad.parquet")
    fails(run("generate", model.folder, "--thresholds", thresholds, "--prompts", bad, *out), "bad.parquet")


def test_wrong_usage_is_explained(run):
    for words, part in (
        (["convert"], "Missing argument 'CHECKPOINT'"),
        (["convert", "x"], "Missing option '--out'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["generate", "m", "--prefill", "some"], "'some' is not one of 'none', 'half', 'all'"),
        (["split", "m", "--batch-size", "many"], "'many' is not a valid integer"),
    ):
        status, _, err = run(*words)
        assert status == 2
        assert part in err
        assert "Traceback" not in err


def test_system_errors_name_the_file_and_the_remedy(run, tiny, tmp_path, rng, monkeypatch):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "/results/weights")

    monkeypatch.setattr("sparsetrace.model.write_weights._write_at", full)
    status, _, err = run("convert", checkpoint, "--out", tmp_path / "m")
    assert status == 1
    # after the lines of progress
    remedy = "free some space, then run the same command again"
    assert err.splitlines()[-1] == f"error: /results/weights: No space left on device: {remedy}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_an_interrupt_leaves_nothing(run, tiny, tmp_path, rng, monkeypatch):
    checkpoint = tiny.checkpoint(tmp_path / "c", rng)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsetrace.model.write_weights._write_at", interrupt)
    status, _, err = run("convert", checkpoint, "--out", tmp_path / "m")
    assert status == 130
    assert "interrupted" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_a_fault_of_ours_is_not_hidden(run, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("sparsetrace.study.study.load_study", broken)
    with pytest.raises(ZeroDivisionError):
        run("check-config", "x.yaml")


def test_check_config(run, tmp_path, tiny, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path / "c", rng)
    tiny.prompts(tmp_path / "p.jsonl", rng, [3, 5])
    (tmp_path / "t.txt").write_text(tiny.words(rng, 100))
    model = {"checkpoint": "c", "calibration_text": "t.txt", "calibration": {"tokens": 64, "sequence_length": 32}}
    content = {
        "results": "elsewhere",
        "models": {"tiny": model},
        "runs": {"default": {"prompts": "p.jsonl", "methods": [{"name": "teal", "sparsity": [0.25, 0.5]}]}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run("check-config", path)[:2] == (
        0,
        "elsewhere/tiny/default/teal-0.25/workload\nelsewhere/tiny/default/teal-0.5/workload\n",
    )
    content["models"]["tiny"]["chekpoint"] = "c"
    path.write_text(yaml.safe_dump(content))
    fails(run("check-config", path), "models.tiny.chekpoint must be one of the known keys (checkpoint, ")


def test_module_and_console_script_are_the_same(tmp_path):
    """Once through a real process: `python -m sparsetrace` fails with one line and status 1."""
    paths = [str(Path(sparsetrace.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "sparsetrace", "show", str(tmp_path / "absent")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: open: {tmp_path / 'absent' / 'manifest.json'} must be a file, got nothing there"
    ]
