"""Loading a model: the weights on a device are those of its files, byte for byte."""

import dataclasses
import random
import shutil
import subprocess
import sys

import pytest
import torch

from sparsetrace.core.files import InputError
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
    copied, checksums = runtime._copy(mapped, torch.device("cpu"))
    assert checksums == runtime._place(mapped, torch.device("cpu"))[1]
    assert list(copied) == list(mapped)
    for name, tensor in mapped.items():
        assert copied[name].dtype == tensor.dtype and torch.equal(copied[name], tensor)
        assert copied[name].data_ptr() != tensor.data_ptr()


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    """A converted model in two files, and its weights."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsetrace.model.layout.FILE_BYTES", 60_000)
        model = tiny.model(folder, tiny.rng("sound"))
    assert len(list(model.folder.glob("*.safetensors"))) == 2
    return model, {name: tensor.clone() for name, tensor in model.load(torch.device("cpu")).state_dict().items()}


def flipped(model, folder, file, position, bit):
    """A copy of a model in which one bit of a weight file is another."""
    shutil.copytree(model.folder, folder, dirs_exist_ok=True)
    data = bytearray((model.folder / file).read_bytes())
    data[position] ^= 1 << bit
    (folder / file).write_bytes(data)
    return dataclasses.replace(model, folder=folder)


def test_one_flipped_bit_of_the_weights_ends_in_one_line(sound, tmp_path):
    model, _ = sound
    draw = random.Random(0)
    for file in ("weights-00000.safetensors", "weights-00001.safetensors"):
        size = (model.folder / file).stat().st_size
        begin = 8 + int.from_bytes((model.folder / file).read_bytes()[:8], "little")
        for position in (begin, size - 1, *(draw.randrange(begin, size) for _ in range(30))):
            damaged = flipped(model, tmp_path / "m", file, position, draw.randrange(8))
            message = r"tensor \S+ must be as config.json records it, got other bytes in 1 of \d+ tensors: conv"
            with pytest.raises(InputError, match=message) as error:
                damaged.load(torch.device("cpu"))
            assert str(error.value).startswith("model: ") and "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "m")


def test_a_flipped_bit_before_the_weights_alters_none(sound, tmp_path):
    """The header names tensors, types, shapes and places; some of its bits say nothing."""
    model, weights = sound
    file, draw = "weights-00000.safetensors", random.Random(1)
    begin = 8 + int.from_bytes((model.folder / file).read_bytes()[:8], "little")
    refused = 0
    for position in range(0, begin, 11):
        damaged = flipped(model, tmp_path / "m", file, position, draw.randrange(8))
        try:
            found = damaged.load(torch.device("cpu")).state_dict()
        except InputError as error:
            assert str(error).endswith(": convert again") and "\n" not in str(error)
            refused += 1
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert refused > begin // 11 // 2


def test_a_flipped_bit_of_the_tokenizer_ends_in_one_line(sound, tmp_path):
    model, draw = sound[0], random.Random(2)
    for _ in range(20):
        position = draw.randrange((model.folder / "tokenizer.json").stat().st_size)
        damaged = flipped(model, tmp_path / "m", "tokenizer.json", position, draw.randrange(8))
        with pytest.raises(InputError, match="^model: .*tokenizer.json must be as config.json records it, .* again$"):
            damaged.tokenizer()
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="got another or none: convert again"):
        damaged.tokenizer()


@pytest.mark.gpu
def test_a_flipped_bit_is_found_on_the_way_to_a_gpu(sound, tmp_path):
    damaged = flipped(sound[0], tmp_path / "m", "weights-00001.safetensors", -1, 0)
    with pytest.raises(InputError, match="got other bytes in 1 of .*: convert again"):
        damaged.load(torch.device("cuda"))


def test_weights_of_another_model_are_refused(tiny, sound, tmp_path, rng):
    model = sound[0]
    other = tiny.model(tmp_path, rng, vocab_size=95)
    shutil.copyfile(other.folder / "weights-00000.safetensors", tmp_path / "model" / "weights-00001.safetensors")
    for file in model.folder.glob("weights-00000*"):
        shutil.copyfile(file, tmp_path / "model" / file.name)
    with pytest.raises(InputError, match="must be as config.json records it, got .*: convert again"):
        dataclasses.replace(model, folder=tmp_path / "model").load(torch.device("cpu"))


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
