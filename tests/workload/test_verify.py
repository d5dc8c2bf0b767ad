"""Each kind of damage is found and named; an undamaged workload has none."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workload_testing import build

from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.folder import footer_sha256
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.schema import LEVELS, column_encodings, data_schema
from sparsetrace.workload.verify import verify
from sparsetrace.workload.verify_manifest import DATA_FILE, MANIFEST

PART = "data/L01/down/part-00000.parquet"


@pytest.fixture
def folder(half, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(half.workload, tmp_path / "workload")


def said(folder):
    return [str(fault) for fault in verify(folder)]


def resign(folder, **changes):
    """Make the manifest fit the files again, as someone who edits a workload by hand would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest.pop("sha256")
    manifest["files"] = [file for file in manifest["files"] if (folder / file["path"]).is_file()]
    for file in manifest["files"]:
        file |= {"bytes": (folder / file["path"]).stat().st_size, "sha256": sha256_file(folder / file["path"])}
        if "footer_sha256" in file:
            file["footer_sha256"] = footer_sha256(folder / file["path"])
    path.write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))


def rewrite(folder, change, path=PART):
    """Write a data file anew with some columns changed, and make the manifest fit."""
    table = pq.read_table(folder / path, partitioning=None)
    columns = {name: table[name] for name in table.column_names} | change(table)
    # in any order, as a careless tool would
    pq.write_table(pa.table(columns, schema=table.schema), folder / path)
    resign(folder)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", ["split", "open"])
def test_sound_workloads_have_no_fault(tmp_path, encoding, level):
    for dtype in FORMATS:
        built = build(tmp_path / dtype, dtype, level=level, encoding=encoding, share_inputs=dtype == "float16")
        assert said(built.workload) == []


def test_truncated_file(folder):
    (folder / PART).write_bytes((folder / PART).read_bytes()[:-9])
    faults = said(folder)
    assert any(f.startswith(f"{PART}: must have ") and "bytes" in f for f in faults)
    assert any(f.startswith(f"{PART}: must be readable") for f in faults)


@pytest.mark.parametrize("column", data_schema("float16").names)
def test_flipped_bit_in_each_column(folder, column):
    path = folder / PART
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(0).column(metadata.schema.names.index(column) if column != "matrix" else 1)
    assert chunk.path_in_schema == column
    data = bytearray(path.read_bytes())
    # the last byte of the column's pages
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start + chunk.total_compressed_size - 1] ^= 0x10
    path.write_bytes(data)
    faults = said(folder)
    assert any(f.startswith(f"{PART}: must have sha256") for f in faults)
    assert any(f.startswith(f"{PART}: column {column} of row group 0 must be readable") for f in faults)


def test_flipped_bit_in_each_table(half, tmp_path):
    for name in ("tokens", "sequences", "matrices"):
        folder = shutil.copytree(half.workload, tmp_path / name)
        data = bytearray((folder / f"{name}.parquet").read_bytes())
        data[len(data) // 3] ^= 4
        (folder / f"{name}.parquet").write_bytes(data)
        assert any(f.startswith(f"{name}.parquet: must have sha256") for f in said(folder))


def test_missing_part(folder):
    (folder / PART).unlink()
    faults = said(folder)
    assert f"{PART}: must be there, got nothing" in faults
    assert any(f.startswith("data/L01/down: must hold every captured token, got ") for f in faults)
    resign(folder)
    assert any(f.startswith("data/L01/down: must hold every captured token, got ") for f in said(folder))


def test_added_part(folder):
    shutil.copy(folder / PART, folder / "data/L01/down/part-00007.parquet")
    assert said(folder) == ["data/L01/down/part-00007.parquet: must be in the manifest, got a file it lacks"]


def test_duplicated_and_exchanged_tokens(folder):
    def twice(table):
        token = table["token"].to_numpy().copy()
        token[1] = token[0]
        return {"token": pa.array(token)}

    rewrite(folder, twice)
    faults = said(folder)
    assert any("column token: must ascend" in f for f in faults)
    assert any(f.startswith("data/L01/down: tokens must differ, got 3 more than once") for f in faults)
    assert any("must hold every captured token, got 1 missing, 4 the first" in f for f in faults)


def test_strange_token(folder):
    def strange(table):
        token = table["token"].to_numpy().copy()
        token[-1] += 50
        return {"token": pa.array(token)}

    rewrite(folder, strange)
    assert any(f.startswith("data/L01/down: must hold captured tokens only, got ") for f in said(folder))


def test_swapped_files(folder):
    one, other = folder / "data/L01/gate/part-00000.parquet", folder / "data/L01/up/part-00000.parquet"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    faults = said(folder)
    assert sum("must have sha256" in f or "bytes, got" in f for f in faults) == 2
    resign(folder)
    faults = said(folder)
    assert (
        "data/L01/gate/part-00000.parquet: column matrix of row group 0: must be gate in every row, got another"
        in faults
    )
    assert (
        "data/L01/up/part-00000.parquet: column matrix of row group 0: must be up in every row, got another" in faults
    )


@pytest.mark.parametrize("place", [0, -1])
def test_a_token_that_is_not_of_its_sequence(folder, place):
    """The first position and the last."""

    def other(rows):
        rows[place]["token_id"] += 1
        return rows

    edited_table(folder, "tokens.parquet", other)
    resign(folder)
    sequence = pq.read_table(folder / "tokens.parquet")["sequence"].to_pylist()[place]
    wanted = f"tokens.parquet: token ids of sequence {sequence} must be its prompt and its output without the last"
    assert said(folder) == [f"{wanted}, got others"]


def edited_table(folder, name, change):
    table = pq.read_table(folder / name, partitioning=None)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), folder / name)


def test_edited_threshold(folder):
    def higher(rows):
        for row in rows:
            if (row["layer"], row["matrix"]) == (1, "down"):
                row["threshold_bits"] += 300
        return rows

    edited_table(folder, "matrices.parquet", higher)
    assert any(f.startswith("matrices.parquet: must have ") for f in said(folder))
    resign(folder)
    assert any(f.startswith("matrices.parquet: layer 1 down: threshold must be ") for f in said(folder))
    assert any(f.startswith(PART) and "kept |x| must be above the threshold" in f for f in said(folder))


def test_edited_counts(folder):
    def lower(rows):
        rows[0]["achieved_sparsity"] -= 0.01
        rows[1]["nnz"] += 1
        return rows

    edited_table(folder, "matrices.parquet", lower)
    resign(folder)
    faults = said(folder)
    assert any(f.startswith("matrices.parquet: layer 0 q: achieved_sparsity must be ") for f in faults)
    assert any(f.startswith("matrices.parquet: layer 0 k: nnz must be ") for f in faults)


def test_edited_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"temperature": 0.0', '"temperature": 1.0'))
    assert said(folder) == ["manifest.json: its own sha256 must fit its content: it was edited or damaged"]


def edit_manifest(folder, change):
    """Change the manifest's content, and make its own hash fit."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest.pop("sha256")
    path.write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))


@pytest.mark.parametrize("key", MANIFEST)
def test_a_key_of_the_manifest(folder, key):
    keep = (folder / "manifest.json").read_text()
    edit_manifest(folder, lambda manifest: manifest.pop(key))
    assert f"manifest.json: {key} must be there, got nothing" in said(folder)
    (folder / "manifest.json").write_text(keep)
    edit_manifest(folder, lambda manifest: manifest.update({key: 1.5}))
    assert any(fault.startswith(f"manifest.json: {key} must be ") for fault in said(folder))


@pytest.mark.parametrize("key", DATA_FILE)
def test_a_key_of_a_file_of_the_manifest(folder, key):
    keep = (folder / "manifest.json").read_text()
    path = json.loads(keep)["files"][3]["path"]
    edit_manifest(folder, lambda manifest: manifest["files"][3].pop(key))
    assert said(folder) == [f"manifest.json: {key} of {'a file' if key == 'path' else path} must be there, got nothing"]
    (folder / "manifest.json").write_text(keep)
    edit_manifest(folder, lambda manifest: manifest["files"][3].update({key: 1.5}))
    assert any(fault.startswith(f"manifest.json: {key} of ") and fault.endswith("got 1.5") for fault in said(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(nnz=m["nnz"] + 1), "nnz must be "),
        (lambda m: m.update(rows=m["rows"] + 1), "rows must be "),
        (lambda m: m["capture"].update(level="half"), "level must be one of full, masks, stats, got half"),
        (lambda m: m.update(dtype="int8"), "dtype must be one of float16, bfloat16, float32, got int8"),
        (lambda m: m.update(encoding="zip"), "encoding must be one of split, open, got zip"),
        (lambda m: m["files"].append("x"), "files must be objects, got 'x'"),
    ],
    ids=["nnz", "rows", "level", "dtype", "encoding", "files"],
)
def test_a_manifest_that_says_something_else(folder, change, message):
    edit_manifest(folder, change)
    assert any(fault.startswith(f"manifest.json: {message}") for fault in said(folder))


def test_any_flipped_bit_of_the_manifest_is_named(folder):
    """In a number, a key or a path: it is not JSON any more, or its hash does not fit; never a traceback."""
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 97):
        data = bytearray(whole)
        data[place] ^= 1 << place % 7
        path.write_bytes(data)
        try:
            assert "manifest.json: its own sha256 must fit its content: it was edited or damaged" in said(folder), place
        except InputError as error:
            assert "manifest.json must be JSON" in str(error) or "must be a sparsetrace workload" in str(error)


@pytest.mark.parametrize("name", ["README.md", "views.sql"])
def test_missing_text(folder, name):
    (folder / name).unlink()
    assert said(folder) == [f"{name}: must be there, got nothing"]


def test_edited_views(folder):
    """The data card alone may be written into."""
    for name in ("README.md", "views.sql"):
        path = folder / name
        path.write_text(path.read_text().replace("token", "tokem", 1))
    (fault,) = said(folder)
    assert re.fullmatch("views.sql: must have sha256 [0-9a-f]{12}, got [0-9a-f]{12}", fault)


@pytest.mark.parametrize("name", ["data/L00/q/notes.txt", "data/L00/.part-00000.parquet.partial"])
def test_an_unexpected_file_among_the_data(folder, name):
    (folder / name).write_text("")
    assert said(folder) == [f"{name}: must be in the manifest, got a file it lacks"]


def test_missing_statistics(folder):
    """Without those of `token` the reader does not know which row group holds a token."""
    table = pq.read_table(folder / PART, partitioning=None)
    pq.write_table(table, folder / PART, write_statistics=["layer", "matrix", "sequence", "position", "nnz", "absmax"])
    resign(folder)
    assert said(folder) == [
        f"{PART}: column {name} of row group 0 must have statistics, got none" for name in ("token", "l2")
    ]


def test_edited_tokens(folder):
    def moved(rows):
        rows[3]["position"] += 1
        return rows

    edited_table(folder, "tokens.parquet", moved)
    resign(folder)
    assert any(f.startswith("tokens.parquet: token 3 must be base + position") for f in said(folder))


def change_value(pattern):
    """The first kept value of the first row becomes another pattern."""

    def change(table):
        planes = {}
        for i, name in enumerate(("values_lo", "values_hi")):
            rows = table[name].to_pylist()
            rows[0] = bytes([pattern >> 8 * i & 255]) + rows[0][1:]
            planes[name] = pa.array(rows, pa.binary())
        return planes

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_value(0x8000),
            "column values of row group 0: kept values must not be zero, got 0.0 or -0.0 in token 3",
        ),
        (change_value(0x7E00), "column values of row group 0: values must be finite, got Inf or NaN in token 3"),
        (change_value(0x0001), "column values of row group 0: kept |x| must be above the threshold"),
        (
            lambda t: {"nnz": pa.array(t["nnz"].to_numpy() + np.int32(1))},
            "column values_lo of row group 0: must have nnz",
        ),
        (
            lambda t: {"absmax": pa.array(t["absmax"].to_numpy() * np.float32(2))},
            "column absmax of row group 0: must be",
        ),
        (lambda t: {"l2": pa.array(t["l2"].to_numpy() + np.float32(1))}, "column l2 of row group 0: must be that of"),
        (
            lambda t: {"position": pa.array(t["position"].to_numpy() + np.int32(1))},
            "position of token 3 must be that of",
        ),
        (
            lambda t: {"mask": pa.array([bytes([m[0] ^ 1]) + m[1:] for m in t["mask"].to_pylist()], pa.binary())},
            "column mask of row group 0: must have nnz set bits",
        ),
        (
            lambda t: {"mask": pa.array([m[:-1] + bytes([m[-1] | 128]) for m in t["mask"].to_pylist()], pa.binary())},
            "column mask of row group 0: bits beyond the last input must be zero",
        ),
        (lambda t: {"mask": pa.array([m + b"0" for m in t["mask"].to_pylist()], pa.binary())}, "must have 9 bytes in"),
    ],
)
def test_rows_that_break_a_rule(folder, change, message):
    rewrite(folder, change)
    assert any(message in fault for fault in said(folder))


def test_another_schema(folder):
    table = pq.read_table(folder / PART, partitioning=None)
    pq.write_table(table.drop_columns(["l2"]), folder / PART)
    resign(folder)
    assert f"{PART}: schema must be that of the format, got another" in said(folder)
    assert column_encodings(table.schema)["mask"] == "DELTA_LENGTH_BYTE_ARRAY"


def test_not_a_workload(tmp_path):
    with pytest.raises(InputError, match="must be a file, got nothing there"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "sparsetrace-workload", "version": 9}')
    with pytest.raises(InputError, match="must have format version 1 revision 0 or 2 revision 0, got 9 revision 0"):
        verify(tmp_path)


def test_any_flipped_bit_is_found_and_none_breaks_the_search(folder):
    rng = np.random.default_rng(1)
    for name in (PART, "tokens.parquet", "sequences.parquet", "matrices.parquet"):
        whole = (folder / name).read_bytes()
        for place in [730, 3309, *rng.integers(0, len(whole), 20).tolist()]:
            data = bytearray(whole)
            data[place % len(whole)] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(data)
            assert any(fault.startswith(name) for fault in said(folder)), place
        (folder / name).write_bytes(whole)
    assert said(folder) == []
