"""The dump block: golden bytes, the safetensors library as second reader, and refusal of incomplete blocks."""

import errno
import json
import mmap
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Capture
from sparsetrace.formats import dump
from sparsetrace.formats.architecture import ModelConfig, sites_of
from sparsetrace.formats.dump import Block, array_prefix, block_name, group_name, write_block
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.selection import Selection

# A block of two rows of one layer in bfloat16 with K = 2: each matrix keeps both inputs, 1.0 and -2.0, of the first row
# and none of the second.
GOLDEN_SUMS = (
    b'{"__metadata__":{"header":"add55e4b9e9a3e56","rows.token":"d3c9ade5f5122453","rows.sequence":"0389e2c8892d5450","'
)
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
    """A block as the recorder writes it: a change here changes every dump and needs a new version."""
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
    sites = sites_of(config)
    apart = {site.key: [[matrix] for matrix in site.matrices] for site in sites}
    recorder = Recorder(Selection(sites, config.dtype, apart, (), Capture()), 8, torch.device("cpu"))
    recorder.open(tmp_path, 3)
    recorder.reserve(2)
    recorder.place(torch.tensor([True, True]), torch.tensor([3, 4]), torch.tensor([2, 5]), torch.tensor([1, 2]))
    for matrix in ("q", "k", "v", "o", "gate", "up", "down"):
        recorder.record(0, matrix, torch.tensor([[[1.0, -2.0], [0.0, 0.0]]], dtype=torch.bfloat16))
    assert recorder.close() == (["group-00003.block-000.safetensors"], 2)
    data = (tmp_path / "group-00003.block-000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header, body = data[8 : 8 + length], data[8 + length :]
    assert header.startswith(GOLDEN_SUMS)
    assert header[header.index(b'"},"') + 3 :].startswith(GOLDEN_HEADER[1:])
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
        assert "absent" not in block


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
    """At every byte, and also excess bytes."""
    write_block(tmp_path / "block", every_dtype(rng))
    data = (tmp_path / "block").read_bytes()
    for size in [*range(len(data)), len(data) + 1]:
        (tmp_path / "cut").write_bytes((data + b"x")[:size])
        with pytest.raises(InputError, match=r"dump: .*cut must .*: generate it again"):
            Block(tmp_path / "cut")


def test_every_flipped_bit_is_noticed(rng, tmp_path):
    """In the header or in an array, whatever is read of the block."""
    arrays = partial_block(**every_dtype(rng))
    write_block(tmp_path / "block", arrays)
    data = (tmp_path / "block").read_bytes()
    changed = 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            block = Block(tmp_path / "flipped")
            found = {name: block[name] for name in arrays}
        except InputError as error:
            assert str(error).startswith("dump: ") and "generate it again" in str(error)
            changed += 1
        else:
            # the name of the checksums themselves, without which a block is another program's
            assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert changed > len(data) - 20


def test_an_array_is_checked_once(rng, tmp_path, monkeypatch):
    write_block(tmp_path / "block", {"x": rng.integers(0, 256, 3 << 20, np.uint8)})
    block, checked = Block(tmp_path / "block"), []
    plain = block._check
    monkeypatch.setattr(block, "_check", lambda *arguments: (checked.append(arguments[1]), plain(*arguments)))
    for _ in range(2):
        block["x"]
        block.release()
    assert checked == ["x"]


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


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 8192 - 60, 100_000])
@pytest.mark.parametrize("refuses", [None, "open", "write"])
def test_large_blocks_go_around_the_page_cache(rng, tmp_path, monkeypatch, size, refuses):
    """Direct I/O writes the same arrays, at sizes near a page and a chunk; so does what replaces it if refused."""
    arrays = {"a": rng.integers(0, 256, size, dtype=np.uint8), "b": rng.integers(0, 9, 77, dtype=np.int64)}
    write_block(tmp_path / "plain", arrays)
    monkeypatch.setattr(dump, "_DIRECT_BYTES", 0)
    monkeypatch.setattr(dump, "_DIRECT_CHUNK_BYTES", 8192)
    monkeypatch.setattr(dump, "_DIRECT_RUN_BYTES", 1 << 40)
    opened, refused = os.open, []

    def refusing(path, flags, *rest):
        if flags & os.O_DIRECT and refuses == "open":
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    def refusing_write(file, view):
        refused.append(file)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "open", refusing)
    if refuses == "write":
        monkeypatch.setattr(dump, "_write_whole", refusing_write)
    write_block(tmp_path / "direct", arrays)
    assert bool(refused) == (refuses is not None)
    # the header is padded to a page
    for name, array in load_file(tmp_path / "direct").items():
        assert np.array_equal(array, arrays[name])
    assert load_file(tmp_path / "direct").keys() == arrays.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "plain"]


@pytest.mark.parametrize("sizes", [[5000, 9000, 3], [4096, 4096], [70_000], [1, 12_288, 20_000, 4097]], ids=str)
def test_neighbours_in_memory_are_written_from_there(rng, tmp_path, monkeypatch, sizes):
    """Arrays on the pages of one buffer are written without a copy, except for what does not fill a page."""
    monkeypatch.setattr(dump, "_DIRECT_BYTES", 0)
    monkeypatch.setattr(dump, "_DIRECT_CHUNK_BYTES", 8192)
    monkeypatch.setattr(dump, "_DIRECT_RUN_BYTES", 4096)
    buffer = np.frombuffer(mmap.mmap(-1, 1 << 18), np.uint8)
    buffer[:] = rng.integers(0, 256, len(buffer))
    # two page-aligned runs, with smaller arrays before, between and after them
    arrays, at = {"first": rng.integers(0, 9, 33, dtype=np.int64)}, 0
    for run in range(2):
        for number, size in enumerate(sizes):
            arrays[f"run{run}.{number}"] = buffer[at : at + size]
            at += size
        arrays[f"between{run}"] = rng.integers(0, 9, 5, dtype=np.int32)
        at += -at % mmap.PAGESIZE
    written = []
    plain = dump._write_whole
    monkeypatch.setattr(dump, "_write_whole", lambda file, view: (written.append(len(view)), plain(file, view)))
    write_block(tmp_path / "block", arrays)
    block, found = Block(tmp_path / "block"), load_file(tmp_path / "block")
    for name, array in arrays.items():
        assert np.array_equal(found[name], array) and np.array_equal(block[name], array)
    assert all(name in arrays or name.startswith("fill.") for name in found)
    body = sum(sizes) // mmap.PAGESIZE * mmap.PAGESIZE
    assert written.count(body) >= 2, "the runs are written whole"


def test_a_full_disk_is_not_mistaken_for_one_that_refuses(rng, tmp_path, monkeypatch):
    def full(file, view):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dump, "_DIRECT_BYTES", 0)
    monkeypatch.setattr(dump, "_write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        write_block(tmp_path / "block", {"a": np.zeros(5, np.uint8)})
    assert not list(tmp_path.iterdir())


def test_prefixes_of_arrays():
    assert [array_prefix(*leaf) for leaf in ((7, "q"), (123, "up"), (None, "lm_head"))] == [
        "L07.q",
        "L123.up",
        "model.lm_head",
    ]


def partial_block(**changes) -> dict[str, np.ndarray]:
    """A block of three rows, of which one operand has two."""
    arrays = {
        "rows.token": np.arange(3),
        "L00.q.offsets": np.array([0, 0, 1, 1]),
        "L00.q.values": np.array([7], np.uint16),
        "L00.q.mask": np.zeros((3, 1), np.uint8),
        "model.lm_head.rows": np.array([0, 2], np.int32),
        "model.lm_head.mask": np.zeros((2, 1), np.uint8),
        "model.lm_head.absmax": np.zeros(2, np.float32),
    }
    return arrays | changes


def test_rows_of_some_tokens_only(tmp_path):
    write_block(tmp_path / "block", partial_block())
    block = Block(tmp_path / "block")
    assert (block.rows, block.partial) == (3, {"model.lm_head": 2})
    # an operand may have no row of a block
    write_block(tmp_path / "none", {"rows.token": np.arange(3), "L00.q.rows": np.empty(0, np.int32)})
    assert Block(tmp_path / "none").partial == {"L00.q": 0}


@pytest.mark.parametrize(
    ("name", "array", "rows"),
    [
        ("L00.q.mask", np.zeros((2, 1), np.uint8), 3),
        ("L00.q.offsets", np.zeros(3, np.int64), 4),
        ("model.lm_head.mask", np.zeros((3, 1), np.uint8), 2),
        ("model.lm_head.absmax", np.zeros(1, np.float32), 2),
    ],
)
def test_refuses_another_number_of_rows(tmp_path, name, array, rows):
    write_block(tmp_path / "block", partial_block(**{name: array}))
    with pytest.raises(InputError, match=f"must have {rows} rows of {name}, got {len(array)}: generate it again"):
        Block(tmp_path / "block")
