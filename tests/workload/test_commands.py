"""The commands that read a workload, called as a shell does, on workloads of a tiny model."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from run_testing import invoke, make_run, study

import sparsetrace
from sparsetrace.cli import main as cli
from sparsetrace.core.settings import Capture


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A function that makes a workload under a capture setting, from one tiny model and prompt set."""
    return make_run(tiny, tmp_path_factory.mktemp("runs"))


def test_commands(run, tmp_path):
    for words in ((), ("--recompute", 1, "--model", run.model.folder)):
        code, text = invoke("verify", run.full, *words)
        assert (code, text.splitlines()[-1]) == (0, f"{run.full}: no fault found")
    broken = shutil.copytree(run.full, tmp_path / "broken")
    (broken / "data/L00/q/part-00001.parquet").unlink()
    code, text = invoke("verify", broken)
    assert code == 1
    assert "error: data/L00/q/part-00001.parquet: must be there, got nothing" in text

    # each is checked, whatever is wrong with those before it
    code, text = invoke("verify", broken, tmp_path / "none", run.full)
    assert code == 1
    assert f"{run.full}: no fault found" in text
    assert f"error: {broken}: data/L00/q/part-00001.parquet: must be there, got nothing" in text
    assert f"error: {tmp_path / 'none'}: " in text

    code, text = invoke("stats", run.full, "--out", tmp_path / "stats", "--phase", "decode", "--layer", 1)
    assert code == 0
    assert "Jaccard of neighbouring tokens" in text
    assert {row["layer"] for row in pq.read_table(tmp_path / "stats" / "overlap.parquet").to_pylist()} == {1}

    # of one position no two tokens are neighbours
    code, text = invoke("stats", run.full, "--out", tmp_path / "stats", "--position", 5)
    assert code == 0
    assert "Jaccard of neighbouring tokens" not in text

    words = ("--matrix", "q", "--matrix", "down", "--position", "2:6", "--out", tmp_path / "out", "--twin", 3)
    code, text = invoke("export", run.full, "--format", "npy", *words)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"L{layer:02d}.{matrix}.npy" for layer in (0, 1) for matrix in ("down", "q")
    ]
    part = sparsetrace.open(run.full).select(position=slice(2, 6)).twin(3)
    assert np.array_equal(np.load(tmp_path / "out" / "L01.down.npy"), part.matrix(1, "down").dense())

    code, text = invoke("estimate", study(run, tmp_path)[1], "--device", "cpu")
    assert code == 0
    assert "tiny/one/teal-0.5" in text


def test_commands_take_a_matrix_in_no_layer(run, tmp_path):
    folder = run("commands", Capture(matrices=("down", "lm_head")))
    assert "lm_head" in invoke("show", folder)[1]
    assert invoke("verify", folder)[0] == 0
    code, _ = invoke("stats", folder, "--matrix", "lm_head", "--out", tmp_path / "stats")
    assert code == 0
    assert set(pq.read_table(tmp_path / "stats" / "neurons.parquet")["layer"].to_pylist()) == {None}
    assert invoke("export", folder, "--format", "npy", "--out", tmp_path / "out")[0] == 0
    names = ["L00.down.npy", "L01.down.npy", "model.lm_head.npy"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert np.array_equal(
        np.load(tmp_path / "out" / names[-1]), sparsetrace.open(folder).matrix(None, "lm_head").dense()
    )


def refused(*words):
    return str(CliRunner().invoke(cli.cli, [str(word) for word in words]).exception)


def test_commands_refuse(run, tmp_path):
    sample = run("sampled", Capture(layers=(1,)))
    to = ("--out", tmp_path / "none")
    message = f"export: the selection must hold a layer and matrix that {sample} captured, got none"
    assert refused("export", sample, "--format", "npy", "--layer", 0, *to) == message
    assert refused("export", run.full, "--format", "csv", *to).startswith("export: --format must be one of mtx, smtx,")
    # before the long search, not after it
    assert refused("verify", tmp_path, "--recompute", 1).startswith("verify: --model must be given with --recompute")
    assert not (tmp_path / "none").exists()
