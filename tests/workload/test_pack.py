"""From dump to Parquet, decoded by hand with pyarrow: every bit of every row; and packing again after interruptions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from workload_testing import dense_rows, tree

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.packing import gather
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack

DTYPES = ["float16", "bfloat16", "float32"]
# all but one are no multiples of eight
WIDTHS = {(0, "q"): 13, (0, "down"): 1, (2, "up"): 64, (11, "o"): 257}


def patterns_of(rng, dtype, rows, width) -> np.ndarray:
    """Dense bit patterns of finite numbers but -0.0, also denormal ones; some rows keep nothing, some all inputs."""
    number = FORMATS[dtype]
    magnitudes = rng.integers(1, number.infinity, (rows, width))
    small = rng.random((rows, width)) < 0.1
    magnitudes[small] = rng.integers(1, 4, small.sum())
    signs = rng.integers(0, 2, (rows, width)) * number.sign
    keep = rng.random((rows, width)) < rng.random((rows, 1))
    keep[rng.random(rows) < 0.1] = False
    keep[rng.random(rows) < 0.1] = True
    return np.where(keep, magnitudes | signs, 0).astype(number.bits)


def hand_made(tiny, folder, rng, dtype, group_rows, widths=WIDTHS):
    """A dump of several groups and blocks; the tokens have gaps and are in no order within a group."""
    groups, token, dense = {}, {}, {key: {} for key in widths}
    for group, block_rows in group_rows.items():
        numbers = rng.permutation(rng.choice(3 * sum(block_rows) + 5, sum(block_rows), replace=False)) + 10_000 * group
        groups[group], start = [], 0
        for block, rows in enumerate(block_rows):
            token[group, block] = numbers[start : start + rows]
            arrays = {key: patterns_of(rng, dtype, rows, width) for key, width in widths.items()}
            for key, array in arrays.items():
                dense[key] |= dict(zip(token[group, block].tolist(), array, strict=True))
            groups[group].append(arrays)
            start += rows
    return tiny.dump(folder, dtype, groups, token), dense


def equal(found, expected) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_a_hand_made_dump(tiny, tmp_path, rng, dtype, monkeypatch):
    """More rows than a row group holds, blocks of every size, two shards; read by hand and by the reader.

    The first shard is cut as files of every width once were, in row groups of 512; both are read alike.
    """
    expected = {key: {} for key in WIDTHS}
    parts = []
    for shard, group_rows in enumerate([{0: [300, 1, 251], 1: [90]}, {2: [7, 0, 3]}]):
        manifest, dense = hand_made(tiny, tmp_path / str(shard), rng, dtype, group_rows)
        parts.append(tmp_path / "parts" / f"{shard:05d}.json")
        with monkeypatch.context() as patch:
            if shard == 0:
                patch.setattr(gather, "row_group_rows", lambda features: 512)
            pack(manifest, tmp_path / "w", parts[-1])
        for key, rows in dense.items():
            path = tmp_path / "w" / f"data/L{key[0]:02d}/{key[1]}/part-{shard:05d}.parquet"
            assert equal(dense_rows(path, dtype, WIDTHS[key]), rows)
            tokens = pq.read_table(path, columns=["token"])["token"].to_pylist()
            assert tokens == sorted(rows)
            metadata = pq.read_metadata(path)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            assert sizes == ([512, 130] if shard == 0 else [10])
            expected[key] |= rows
    index(parts, tmp_path / "w")
    ds = sparsetrace.open(tmp_path / "w")
    assert ds.leaves == list(WIDTHS)
    assert ds.tokens.tolist() == sorted(expected[0, "q"])
    for key, rows in expected.items():
        dense = np.stack([rows[token] for token in sorted(rows)])
        found = FORMATS[dtype].from_float(ds.matrix(*key).dense())
        assert np.array_equal(found, dense)
    nnz = sum(int((row != 0).sum()) for rows in expected.values() for row in rows.values())
    assert ds.manifest["nnz"] == nnz
    assert ds.manifest["rows"] == len(WIDTHS) * len(ds.tokens)


# 1.0, -2.5 and the smallest positive number in inputs 0, 3 and 8 of nine
GOLDEN = {
    "float16": ([0x3C00, 0xC100, 1], {"values_lo": "000001", "values_hi": "3cc100"}),
    "bfloat16": ([0x3F80, 0xC020, 1], {"values_lo": "004102", "values_hi": "7f8000"}),
    "float32": (
        [0x3F800000, 0xC0200000, 1],
        {"values_b0": "000001", "values_b1": "000000", "values_b2": "802000", "values_b3": "3fc000"},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_bytes_of_the_columns(tiny, tmp_path, dtype):
    kept, planes = GOLDEN[dtype]
    patterns = np.zeros((2, 9), FORMATS[dtype].bits)
    patterns[1, [0, 3, 8]] = kept
    manifest = tiny.dump(tmp_path / "dump", dtype, {4: [{(3, "gate"): patterns}]}, {(4, 0): [70, 60]})
    pack(manifest, tmp_path / "w", tmp_path / "parts" / "00000.json")
    full, empty = pq.read_table(tmp_path / "w/data/L03/gate/part-00000.parquet").to_pylist()
    index_columns = {"layer": 3, "matrix": "gate", "sequence": 4, "expert": None, "out_mask": None}
    norm = np.float32(7.25**0.5)
    assert full == index_columns | {
        "token": 60,
        "position": 1,
        "nnz": 3,
        "absmax": 2.5,
        "l2": float(norm),
        "mask": bytes([0b00001001, 0b00000001]),
    } | {name: bytes.fromhex(data) for name, data in planes.items()}
    assert empty == index_columns | {
        "token": 70,
        "position": 0,
        "nnz": 0,
        "absmax": 0.0,
        "l2": 0.0,
        "mask": bytes(2),
    } | dict.fromkeys(planes, b"")


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES)
def test_figures_are_those_of_float64(tiny, tmp_path, rng, dtype):
    manifest, dense = hand_made(tiny, tmp_path / "dump", rng, dtype, {0: [40]}, {(0, "q"): 21})
    pack(manifest, tmp_path / "w", tmp_path / "parts" / "00000.json")
    for row in pq.read_table(tmp_path / "w/data/L00/q/part-00000.parquet").to_pylist():
        patterns = dense[0, "q"][row["token"]]
        exact = FORMATS[dtype].to_float(patterns).astype(np.float64)
        assert row["absmax"] == np.float32(np.abs(exact).max())
        # the norm of the largest float32 numbers exceeds float32
        with np.errstate(over="ignore"):
            norm = float(np.sqrt(np.square(exact).sum()).astype(np.float32))
        assert row["l2"] == norm or abs(row["l2"] - norm) <= 1e-6 * norm


@pytest.fixture
def packed(tiny, tmp_path, rng):
    """A packed shard: manifest of its dump, workload, manifest of the shard, and the dense rows."""
    manifest, dense = hand_made(tiny, tmp_path / "dump", rng, "bfloat16", {0: [5, 6], 1: [3]})
    workload, part = tmp_path / "w", tmp_path / "parts" / "00000.json"
    pack(manifest, workload, part)
    index([part], workload)
    return manifest, workload, part, dense


def test_blocks_are_removed_and_the_manifest_stays(packed):
    manifest, *_ = packed
    assert [file.name for file in manifest.parent.iterdir()] == ["manifest.json"]


def test_packing_again_touches_nothing(packed):
    manifest, workload, part, _ = packed
    before = tree(workload)
    times = {file: file.stat().st_mtime_ns for file in workload.rglob("*") if file.is_file()}
    told = []
    first = json.loads(part.read_text())
    assert pack(manifest, workload, part, lambda *args: told.append(args)) == first
    assert tree(workload) == before
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert told == []


def test_a_deleted_manifest_of_the_part_is_restored(packed):
    """A workflow deletes it after a kill, when the blocks are gone."""
    manifest, workload, part, _ = packed
    before, data = part.read_bytes(), tree(workload)
    part.unlink()
    pack(manifest, workload, part)
    assert part.read_bytes() == before
    assert tree(workload) == data


def test_a_kill_before_the_blocks_were_removed(tiny, tmp_path, rng):
    manifest, _ = hand_made(tiny, tmp_path / "again", rng, "float16", {0: [4]})
    copy = tmp_path / "copy"
    shutil.copytree(manifest.parent, copy)
    part = tmp_path / "x" / "00000.json"
    pack(copy / "manifest.json", tmp_path / "y", part)
    data = tree(tmp_path / "y")
    # the same dump, whose blocks are still there
    pack(manifest, tmp_path / "y", part)
    assert tree(tmp_path / "y") == data
    assert [file.name for file in manifest.parent.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("victim", ["data/L02/up/part-00000.parquet", "data/L00/q/part-00000.parquet"])
def test_lost_data_with_lost_blocks_is_said(packed, victim):
    manifest, workload, part, _ = packed
    (workload / victim).unlink()
    with pytest.raises(InputError, match="group-00000.json must be a file, got nothing there"):
        pack(manifest, workload, part)
    assert not (workload / "manifest.json").exists(), "a data set that is not whole must not look whole"


def test_another_dump_replaces_the_part(packed, tiny, tmp_path, rng):
    _, workload, part, _ = packed
    manifest, dense = hand_made(tiny, tmp_path / "other", rng, "bfloat16", {0: [8]})
    pack(manifest, workload, part)
    assert not (workload / "manifest.json").exists(), "until index says so again"
    index([part], workload)
    ds = sparsetrace.open(workload)
    assert ds.tokens.tolist() == sorted(dense[0, "q"])
    assert equal(dense_rows(workload / "data/L11/o/part-00000.parquet", "bfloat16", 257), dense[11, "o"])


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_refuses_truncated_blocks(tiny, tmp_path, rng, cut):
    manifest, _ = hand_made(tiny, tmp_path / "dump", rng, "float16", {0: [3, 4]})
    block = manifest.parent / "group-00000.block-001.safetensors"
    block.write_bytes(block.read_bytes()[:cut])
    with pytest.raises(InputError, match="block-001.safetensors must .*: generate it again"):
        pack(manifest, tmp_path / "w", tmp_path / "parts" / "00000.json")
    assert not (tmp_path / "parts" / "00000.json").exists()
    assert block.is_file(), "nothing of the dump is removed"


def test_refuses_a_dump_that_does_not_add_up(tiny, tmp_path, rng):
    manifest, _ = hand_made(tiny, tmp_path / "dump", rng, "float16", {0: [3, 4]})
    content = json.loads(manifest.read_text())
    out = tmp_path / "parts" / "00000.json"
    manifest.write_text(json.dumps(content | {"rows": 8}))
    with pytest.raises(InputError, match="must hold 8 rows of different tokens, got 7 with 7 different"):
        pack(manifest, tmp_path / "w", out)
    manifest.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(InputError, match="must have version 3, got 99"):
        pack(manifest, tmp_path / "w", out)
    rows = {(0, "q"): patterns_of(rng, "float16", 2, 9)}
    twice = tiny.dump(tmp_path / "twice", "float16", {0: [rows, rows]}, {(0, 0): [1, 2], (0, 1): [2, 3]})
    with pytest.raises(InputError, match="must hold 4 rows of different tokens, got 4 with 3 different"):
        pack(twice, tmp_path / "w", out)


def test_refuses_a_width_that_is_another(tiny, tmp_path, rng):
    manifest, _ = hand_made(tiny, tmp_path / "dump", rng, "float16", {0: [3]}, {(0, "q"): 17})
    content = json.loads(manifest.read_text())
    content["matrices"][0]["in_features"] = 16
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match="L00.q must have 16 inputs, got 3 mask bytes"):
        pack(manifest, tmp_path / "w", tmp_path / "parts" / "00000.json")


def test_index_refuses_parts_that_do_not_belong_together(tiny, tmp_path, rng):
    parts = []
    for shard, label in enumerate(["teal-0.5", "teal-0.5", "other"]):
        manifest, _ = hand_made(tiny, tmp_path / str(shard), rng, "float16", {shard: [3]})
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {"label": label}))
        parts.append(tmp_path / "parts" / f"{shard:05d}.json")
        pack(manifest, tmp_path / "w", parts[-1])
    with pytest.raises(InputError, match="shards must be of one run, got .*00002.json with another label"):
        index(parts, tmp_path / "w")
    with pytest.raises(InputError, match=r"shards must be 0 to 0, got \[1\]"):
        index(parts[1:2], tmp_path / "w")
    with pytest.raises(InputError, match=r"shards must be 0 to 1, got \[0, 0\]"):
        index([parts[0], parts[0]], tmp_path / "w")
    assert not (tmp_path / "w" / "manifest.json").exists()
    (tmp_path / "w" / "data/L00/q/part-00001.parquet").unlink()
    with pytest.raises(InputError, match="must have all its files, got some missing: pack it again"):
        index(parts[:2], tmp_path / "w")


def test_index_removes_unexpected_files(packed):
    """Data files that an earlier study with more shards left are no rows of this data set."""
    _, workload, part, _ = packed
    shutil.copy(workload / "data/L00/q/part-00000.parquet", workload / "data/L00/q/part-00001.parquet")
    (workload / "data/L07/q").mkdir(parents=True)
    shutil.copy(workload / "data/L00/q/part-00000.parquet", workload / "data/L07/q/part-00000.parquet")
    index([part], workload)
    assert not (workload / "data/L00/q/part-00001.parquet").exists()
    assert not (workload / "data/L07").exists()
    assert len(list((workload / "data").rglob("*.parquet"))) == len(WIDTHS)


def test_packing_loads_no_torch():
    paths = [str(Path(sparsetrace.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = "import sys, sparsetrace.packing.pack, sparsetrace.workload.reader; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
