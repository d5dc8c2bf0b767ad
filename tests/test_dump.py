"""The dump block: golden bytes, the safetensors library as second reader, and refusal of what is not whole."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sparsetrace.capture import Recorder, Rows
from sparsetrace.dump import Block, block_name, group_name, write_block
from sparsetrace.files import InputError
from sparsetrace.model import ModelConfig

# A block of two rows of one layer: K = 2 everywhere, bfloat16; q keeps (1.0, -2.0) and nothing, the rest as q.
GOLDEN_HEADER = (
    b'{"rows.token":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"rows.sequence":{"dtype":"I32","shape":[2],"data_offsets":[16,24]},'
    b'"rows.position":{"dtype":"I32","shape":[2],"data_offsets":[24,32]}'
)
GOLDEN_ROWS = bytes.fromhex("0500000000000000 0900000000000000 01000000 02000000 03000000 04000000")
GOLDEN_MATRIX = bytes.fromhex("0000000000000000 0200000000000000 0200000000000000 803f 00c0 03 00")


def every_dtype(rng) -> dict[str, np.ndarray]:
    return {
        "bytes": rng.integers(0, 256, (3, 5), np.uint8),
        "halves": rng.integers(0, 1 << 16, 7, np.uint16),
        "words": rng.integers(0, 1 << 32, (2, 1), np.uint32),
        "ints": rng.integers(-5, 5, 3, np.int32),
        "none": np.empty((0, 4), np.uint16),
        "longs": rng.integers(-(1 << 62), 1 << 62, 2, np.int64),
        "one": np.array([7], np.uint8),
    }


def test_golden_bytes(tmp_path):
    """Of a block as the recorder writes it; a change here changes every dump and needs a new version."""
    config = ModelConfig(
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=4,
        max_position_embeddings=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    recorder = Recorder(tmp_path, 3, config, 8, torch.device("cpu"))
    recorder.begin(Rows(np.array([0, 1]), np.array([5, 9]), np.array([1, 2]), np.array([3, 4])))
    for matrix in ("q", "k", "v", "o", "gate", "up", "down"):
        recorder.record(0, matrix, torch.tensor([[[1.0, -2.0], [0.0, 0.0]]], dtype=torch.bfloat16))
    recorder.end()
    recorder.close()
    assert recorder.blocks == ["group-00003.block-000.safetensors"]
    data = (tmp_path / recorder.blocks[0]).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header, body = data[8 : 8 + length], data[8 + length :]
    assert header.startswith(GOLDEN_HEADER)
    assert header.rstrip(b" ").endswith(
        b'"L00.down.values":{"dtype":"U16","shape":[2],"data_offsets":[236,240]},'
        b'"L00.down.mask":{"dtype":"U8","shape":[2,1],"data_offsets":[240,242]}}'
    )
    assert body == GOLDEN_ROWS + 7 * GOLDEN_MATRIX


def test_opens_with_the_safetensors_library(rng, tmp_path):
    arrays = every_dtype(rng)
    write_block(tmp_path / "block", arrays)
    found = load_file(tmp_path / "block")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    with safe_open(tmp_path / "block", "np") as file:
        assert set(file.keys()) == set(arrays)


def test_reads_what_it_wrote_and_what_safetensors_wrote(rng, tmp_path):
    arrays = every_dtype(rng)
    write_block(tmp_path / "ours", arrays)
    save_file(arrays, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        block = Block(tmp_path / name)
        for key, array in arrays.items():
            assert np.array_equal(block[key], array)
            assert block[key].dtype == array.dtype
            assert block[key].shape == array.shape
        with pytest.raises(KeyError):
            block["absent"]


def test_arrays_lie_in_the_order_given(rng, tmp_path):
    arrays = every_dtype(rng)
    write_block(tmp_path / "block", arrays)
    data = (tmp_path / "block").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    at = 0
    for name, array in arrays.items():
        assert header[name]["data_offsets"] == [at, at + array.nbytes]
        at += array.nbytes
    assert data[-at:] == b"".join(array.tobytes() for array in arrays.values())


def test_not_contiguous_arrays_are_written_as_they_read(rng, tmp_path):
    array = rng.integers(0, 1 << 16, (6, 8), np.uint16)
    write_block(tmp_path / "block", {"x": array[::2, 1::3].T})
    assert np.array_equal(load_file(tmp_path / "block")["x"], array[::2, 1::3].T)


def test_every_truncation_is_refused(rng, tmp_path):
    """At any byte, and with bytes too many."""
    write_block(tmp_path / "block", every_dtype(rng))
    data = (tmp_path / "block").read_bytes()
    for size in [*range(len(data)), len(data) + 1]:
        (tmp_path / "cut").write_bytes((data + b"x")[:size])
        with pytest.raises(InputError, match=r"dump: .*cut must .*: generate it again"):
            Block(tmp_path / "cut")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    class Broken:
        dtype, shape, nbytes = np.dtype(np.uint8), (3,), 3

        def __array__(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_block(tmp_path / "block", {"good": np.arange(3, dtype=np.uint8), "x": Broken()})
    assert not list(tmp_path.iterdir())


def test_names_sort_in_the_order_of_the_numbers():
    names = [block_name(group, block) for group in (0, 3, 99, 1234) for block in (0, 7, 345)]
    assert names == sorted(names)
    assert block_name(12, 3) == "group-00012.block-003.safetensors"
    assert block_name(12, 3).startswith(group_name(12))
