"""Loading a model: the weights on a device are those of its files, byte for byte."""

import subprocess
import sys

import pytest
import torch

from sparsetrace.core.settings import Conversion
from sparsetrace.model import runtime
from sparsetrace.model.convert import convert


@pytest.mark.parametrize("staged_bytes", [1, 7, 1 << 20])
def test_copies_are_equal_whatever_they_pass_through(rng, monkeypatch, staged_bytes):
    monkeypatch.setattr(runtime, "STAGED_BYTES", staged_bytes)
    shapes = {"a": (3, 5), "b": (1,), "c": (40, 2), "d": (17,)}
    mapped = {
        name: torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        for (name, shape), dtype in zip(
            shapes.items(), [torch.float16, torch.bfloat16, torch.float32, torch.float16], strict=True
        )
    }
    copied = runtime._copy(mapped, torch.device("cpu"))
    assert list(copied) == list(mapped)
    for name, tensor in mapped.items():
        assert copied[name].dtype == tensor.dtype and torch.equal(copied[name], tensor)
        assert copied[name].data_ptr() != tensor.data_ptr()


def test_loading_a_model_imports_nothing_slow(tiny, tmp_path, rng):
    """A second of every step that runs a model."""
    convert(tiny.checkpoint(tmp_path / "c", rng), tmp_path / "m", Conversion())
    code = (
        "import sys, torch; from pathlib import Path; from sparsetrace.model.runtime import open_model;"
        "open_model(Path(sys.argv[1])).load(torch.device('cpu')); print('sympy' in sys.modules)"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "m")]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "False\n"


def test_steps_that_run_no_model_are_done_without_torch(tiny, tmp_path, rng):
    """Its import is two seconds, of each of them and of every setting's thresholds."""
    model = tiny.model(tmp_path, rng)
    tiny.thresholds(tmp_path, model, rng)
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", rng, [3, 5])
    code = (
        "import sys; from sparsetrace.cli.main import cli; cli(sys.argv[1:], standalone_mode=False);"
        "assert 'torch' not in sys.modules"
    )
    histograms = tmp_path / "histograms.safetensors"
    for step in (
        ["calibrate", "--merge", histograms],
        ["thresholds", histograms, "--method", "teal", "--set", "sparsity=0.3"],
        ["split", model.folder, "--prompts", prompts],
    ):
        subprocess.run([sys.executable, "-c", code, *map(str, step), "--out", str(tmp_path / step[0])], check=True)
        assert (tmp_path / step[0]).is_file()


def test_a_checkpoints_architecture_is_read_without_torch(tiny, tmp_path, rng):
    """`estimate` does, of a study whose models do not exist yet; the embedded model's stands in numbers too."""
    checkpoint = tiny.checkpoint(tmp_path / "c", rng, **tiny.qwen3)
    code = (
        "import json, sys; from pathlib import Path; import sparsetrace.model.demo.shape, sparsetrace.model.layout;"
        "from sparsetrace.core.settings import Conversion; from sparsetrace.model.read_config import read_config;"
        "path = Path(sys.argv[1]); raw = json.loads((path / 'config.json').read_text());"
        "family, config = read_config(raw, Conversion(), path);"
        "print(len(family.sites(config)), len(list(family.tensors(config))), 'torch' in sys.modules)"
    )
    line = [sys.executable, "-c", code, str(checkpoint)]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "9 19 False\n"


@pytest.mark.gpu
def test_weights_on_a_gpu_are_those_of_the_files(tiny, tmp_path, rng):
    model = convert(tiny.checkpoint(tmp_path / "c", rng), tmp_path / "m", Conversion(dtype="bfloat16"))
    here, there = (model.load(torch.device(kind)).state_dict() for kind in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert there[name].is_cuda and torch.equal(there[name].cpu(), tensor), name
