"""`sparsetrace tune`: which shapes are measured, that the fastest wins, the table's round trip, which table chooses.

Measurements are faked: no test needs a GPU.
"""

import json
import os
from dataclasses import replace

import pytest
import torch

from sparsetrace.cli.main import cli
from sparsetrace.core import devices
from sparsetrace.core.files import InputError
from sparsetrace.tools import tuning
from sparsetrace_kernels import configs
from sparsetrace_kernels import tune as tuner
from sparsetrace_kernels.configs import GemvConfig, active_table, choose_config, decode_config, table_path

GPU = "Test GPU 1"
BEST = GemvConfig("list", 4, 32, 64, 1, num_stages=5)


class Pool:
    """Stands for the pool of compiling processes."""

    shut = 0

    def __init__(self, *_, **__):
        pass

    def map(self, _, jobs):
        for _ in jobs:
            yield None

    def shutdown(self, cancel_futures):
        assert cancel_futures
        Pool.shut += 1


class Problem:
    """Stands for tensors on a GPU: a call is what would be launched."""

    def __init__(self, K, N, *_):
        self.K, self.N = K, N

    def calls(self, op, sparsity, config):
        return [(op, sparsity, config)]


@pytest.fixture(autouse=True)
def _own_locks(monkeypatch, tmp_path_factory):
    """Locks of GPUs in a folder of the test: another job on this machine may hold the real ones."""
    folder = tmp_path_factory.mktemp("locks")
    monkeypatch.setattr(devices, "lock_folder", lambda job: folder)
    # the command sets it and leaves it set; the fixture restores it
    monkeypatch.setenv(devices.VISIBLE, os.environ.get(devices.VISIBLE, ""))
    monkeypatch.delenv(devices.VISIBLE)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU, on which BEST is the fastest at half sparsity and above."""

    def time(calls, **_):
        op, sparsity, config = calls[0]
        assert op == "list"
        us = 10.0 - 5 * (config == BEST) * (sparsity >= 0.5) + config.use_pdl + config.split / 1000
        return us, us, us

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    for name, value in {"ProcessPoolExecutor": Pool, "Problem": Problem, "time_in_graph": time}.items():
        monkeypatch.setattr(tuner, name, value)
    monkeypatch.setattr(tuner, "num_copies", lambda *_: 2)
    monkeypatch.delenv(configs.OWN_TABLE, raising=False)
    Pool.shut = 0
    return GPU


def test_table_holds_the_fastest_and_chooses_once_it_is_named(gpu, tmp_path, monkeypatch):
    steps = []
    out = tmp_path / "new" / "table.json"
    path, entries = tuning.tune(
        [(512, 4096), (512, 4096)], "float16", out, tmp_path, lambda *step: steps.append(step[:2])
    )
    assert (path, entries) == (out, len(tuner.SPARSITIES))
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    document = json.loads(out.read_text())
    assert document["gpu"] == gpu and document["torch"] == torch.__version__
    for entry in document["entries"]:
        assert entry["op"] == "list"
        assert (decode_config(entry["config"]) == BEST) == (entry["sparsity"] >= 0.5)
    assert tuner.format_table(document) == out.read_text()
    assert Pool.shut == 1

    shape = ("list", 512, 4096, torch.bfloat16, 0.75)
    assert active_table(gpu) is None
    assert choose_config(*shape, active_table(gpu)) != BEST
    monkeypatch.setenv(configs.OWN_TABLE, str(out))
    assert table_path(gpu) == out
    assert choose_config(*shape, active_table(gpu)) == BEST


def test_kernels_that_triton_tells_apart_are_compiled_ahead():
    """Of the split it tells one program from several; of the inputs, the number of sections up to a power of two."""
    config = GemvConfig("list", 4, 32, 64, 1, num_stages=5)
    jobs = [("float16", K, replace(config, split=split)) for K in (512, 4096, 8192, 11008) for split in (1, 2, 8)]
    found = {(K, config.split) for _, K, config in tuner.distinct_kernels(jobs)}
    # 8192 and 11008 inputs are listed in up to 16 sections
    assert found == {(512, 1), (512, 8), (4096, 1), (4096, 8), (11008, 1), (11008, 8)}


def test_another_table_in_the_same_process_is_read(gpu, tmp_path, monkeypatch):
    entry = {"op": "list", "dtype": "float16", "k": 8, "n": 16, "sparsity": 0.5, "us": 1.0}
    for name, split in (("one", 1), ("two", 2)):
        config = GemvConfig("list", split, 32, 64, 1)
        document = {"gpu": gpu, "entries": [entry | {"config": config.encode()}]}
        (tmp_path / name).write_text(tuner.format_table(document))
        monkeypatch.setenv(configs.OWN_TABLE, str(tmp_path / name))
        assert choose_config("list", 8, 16, torch.float16, 0.5, active_table(gpu)) == config


def test_default_file_is_named_after_the_gpu(gpu, tmp_path):
    path, _ = tuning.tune([(512, 4096)], "bfloat16", None, tmp_path / "tables")
    assert path == tmp_path / "tables" / "test-gpu-1.json"
    assert {entry["dtype"] for entry in json.loads(path.read_text())["entries"]} == {"bfloat16"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_leaves_the_old_table_and_no_work_behind(gpu, tmp_path, error):
    out = tmp_path / "table.json"
    out.write_text("old")

    def stop(done, total, what):
        if done == total - 1:
            raise error

    with pytest.raises(error):
        tuning.tune([(512, 4096)], "float16", out, tmp_path, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"] and out.read_text() == "old"
    assert Pool.shut == 1


def test_shapes_are_those_of_the_merged_sites(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16")
    shapes = tuning.site_shapes(model.config)
    assert shapes == {"attn_in": (36, 64), "attn_out": (32, 36), "mlp_in": (36, 86), "mlp_mid": (43, 36)}
    decoder = model.load(torch.device("cpu"))
    for site, shape in shapes.items():
        assert tuple(getattr(decoder.layers[0], site).weight.shape) == shape
    assert tuning.choose_dtype([model], None) == "bfloat16"
    assert tuning.choose_dtype([model], "float16") == "float16"
    assert tuning.choose_dtype([], None) == "float16"


def test_command_measures_models_and_shapes(gpu, tiny, tmp_path, rng, monkeypatch):
    from click.testing import CliRunner

    seen = []
    monkeypatch.setattr(tuner, "tune", lambda shapes, dtypes, report: seen.append((shapes, dtypes)) or {"entries": []})
    tiny.model(tmp_path, rng, torch_dtype="bfloat16")
    words = ["tune", str(tmp_path / "model"), "--shape", "36x64", "--shape", "48x16", "--out", str(tmp_path / "t.json")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert seen == [([(36, 64), (32, 36), (36, 86), (43, 36), (48, 16)], [torch.bfloat16])]
    assert f"export {configs.OWN_TABLE}={tmp_path / 't.json'}" in result.output


def test_refuses(gpu, tiny, tmp_path, rng, monkeypatch):
    with pytest.raises(InputError, match="a model or --shape must be given, got neither"):
        tuning.tune([], "float16", None, tmp_path)
    for text in ("4096", "4096x", "0x16", "ax2", "4x4x4"):
        with pytest.raises(InputError, match=f"--shape must be INPUTSxOUTPUTS, such as 4096x11008, got {text}"):
            tuning.parse_shape(text)
    with pytest.raises(InputError, match="dtype must be one of float16, bfloat16, got float32"):
        tuning.choose_dtype([tiny.model(tmp_path, rng)], None)

    other, broken = tmp_path / "other.json", tmp_path / "broken.json"
    other.write_text('{"gpu": "Other", "entries": []}')
    broken.write_text('{"entries": []}')
    for path, match in (
        (tmp_path / "none.json", "must name a table file, got .*none.json: write one"),
        (other, "must name a table measured on Test GPU 1, got one of Other"),
        (broken, "must be a table that `sparsetrace tune` wrote, got KeyError"),
    ):
        monkeypatch.setenv(configs.OWN_TABLE, str(path))
        with pytest.raises(InputError, match=match):
            tuning.refuse_own_table()


def test_refuses_where_there_is_no_gpu(monkeypatch, tmp_path, capsys):
    from sparsetrace.cli.main import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["sparsetrace", "tune", "--shape", "64x64", "--out", str(tmp_path / "t.json")])
    with pytest.raises(SystemExit, match="1"):
        main()
    message = "error: tune: a CUDA GPU must be there, got none: run it on the machine that generates\n"
    assert capsys.readouterr().err == message
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(configs.OWN_TABLE, str(tmp_path / "none.json"))
    # nothing is chosen by a table there
    tuning.refuse_own_table()
