"""The format: golden bytes, the schema and the recipe of docs/format.md.

The planes were written by hand from docs/format.md; the files in `golden_v1.txt` were written by the code of version 1.
"""

import base64
import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workload_testing import build

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.columns import Index, decode_rows, encode_rows
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.row_statistics import RowStatistics
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import ENCODINGS, LEVELS, data_schema, row_group_rows
from sparsetrace.formats.tables import MATRIX_TABLE, SEQUENCES, TOKENS, WEIGHT_MASKS
from sparsetrace.packing import gather
from sparsetrace.workload import verify_data as verification
from sparsetrace.workload.verify import verify

# one row of nine inputs; inputs 0, 3 and 8 are kept: 1.0, -2.5 and the smallest positive number
KEPT = [0, 3, 8]
MASK = bytes([0b0000_1001, 0b0000_0001])
PLANES = {
    # 0x3C00, 0xC100, 0x0001
    "float16": [bytes([0x00, 0x00, 0x01]), bytes([0x3C, 0xC1, 0x00])],
    # 0x3F80, 0xC020, 0x0001, rotated left by one: 0x7F00, 0x8041, 0x0002
    "bfloat16": [bytes([0x00, 0x41, 0x02]), bytes([0x7F, 0x80, 0x00])],
    # 0x3F800000, 0xC0200000, 0x00000001
    "float32": [bytes([0, 0, 1]), bytes([0, 0, 0]), bytes([0x80, 0x20, 0]), bytes([0x3F, 0xC0, 0])],
}
PATTERNS = {"float16": [0x3C00, 0xC100, 1], "bfloat16": [0x3F80, 0xC020, 1], "float32": [0x3F800000, 0xC0200000, 1]}


def one_row(dtype, encoding="split"):
    number = FORMATS[dtype]
    bits = np.array(PATTERNS[dtype], number.bits)
    mask = np.frombuffer(MASK, np.uint8)[None]
    rows = Rows(3, "up", 9, dtype, np.array([5]), mask, np.array([0, 3]), bits)
    figures = RowStatistics(np.array([3]), np.array([2.5], np.float32), np.array([2.7], np.float32))
    index = Index(np.array([5]), np.array([1]), np.array([2]))
    return rows, encode_rows(data_schema(dtype, encoding, features=9), 3, "up", index, figures, rows)


@pytest.mark.parametrize("dtype", FORMATS)
def test_golden_bytes_of_a_row(dtype):
    rows, table = one_row(dtype)
    assert table["mask"].to_pylist() == [MASK]
    assert [table[name][0].as_py() for name in FORMATS[dtype].planes] == PLANES[dtype]
    again = decode_rows(table, 3, "up", 9, FORMATS[dtype])
    assert again.patterns.tolist() == rows.patterns.tolist()
    assert again.indices().tolist() == KEPT
    _, lists = one_row(dtype, "open")
    assert lists["indices"].to_pylist() == [KEPT]
    assert decode_rows(lists, 3, "up", 9, FORMATS[dtype]).patterns.tolist() == PATTERNS[dtype]


def test_files_of_version_1_are_read_for_ever():
    """`golden_v1.txt` holds a data file of each number format as base64, which must never be generated again."""
    kept = (Path(__file__).parent / "golden_v1.txt").read_text().split("\n\n")
    assert len(kept) == len(FORMATS)
    for text in kept:
        dtype, *lines = text.split()
        file = pq.ParquetFile(pa.BufferReader(base64.b64decode("".join(lines))), page_checksum_verification=True)
        assert file.schema_arrow.equals(data_schema(dtype), check_metadata=True)
        again = decode_rows(file.read(), 3, "up", 9, FORMATS[dtype])
        assert (again.token.tolist(), again.patterns.tolist()) == ([5], PATTERNS[dtype])
        assert (again.indices().tolist(), again.mask.tobytes()) == (KEPT, MASK)


def test_three_lines_of_numpy():
    """How docs/format.md decodes a row."""
    _, table = one_row("float16")
    row = table.to_pylist()[0]
    x = np.zeros(9, np.float16)
    keep = np.unpackbits(np.frombuffer(row["mask"], np.uint8), count=9, bitorder="little").astype(bool)
    lo, hi = (np.frombuffer(row[name], np.uint8).astype(np.uint16) for name in ("values_lo", "values_hi"))
    x[keep] = (lo | hi << 8).view(np.float16)
    assert x.tolist() == [1.0, 0, 0, -2.5, 0, 0, 0, 0, 2.0**-24]


def test_every_column_and_key_is_described(half):
    """docs/format.md names them all."""
    from sparsetrace.calibration.quality import QUALITY

    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    words = set(re.findall(r"\w+", page))
    columns = {name for dtype in FORMATS for encoding in ENCODINGS for name in data_schema(dtype, encoding).names}
    # the page names the first and the last of values_b0 to values_b3
    columns -= {"values_b1", "values_b2"}
    for table in (TOKENS, SEQUENCES, MATRIX_TABLE, WEIGHT_MASKS, QUALITY):
        columns |= set(table.names)
    assert columns - words == set()
    manifest = json.loads((half.workload / "manifest.json").read_text())
    described = set(re.findall(r"`(\w+)`", page[page.index("## Manifest") : page.index("## The rule of the method")]))
    assert manifest.keys() - described == set()
    assert {key for file in manifest["files"] for key in file} - words == set()
    assert {path.name for path in half.workload.iterdir()} <= set(re.findall(r"[\w.]+", page))


def test_golden_schema():
    assert [(f.name, str(f.type), f.nullable) for f in data_schema("float16")] == [
        ("layer", "int16", False),
        ("matrix", "dictionary<values=string, indices=int8, ordered=0>", False),
        ("token", "int64", False),
        ("sequence", "int32", False),
        ("position", "int32", False),
        ("expert", "int16", True),
        ("nnz", "int32", False),
        ("absmax", "float", False),
        ("l2", "float", False),
        ("mask", "binary", False),
        ("out_mask", "binary", True),
        ("values_lo", "binary", False),
        ("values_hi", "binary", False),
    ]
    assert data_schema("float32").names[-4:] == ["values_b0", "values_b1", "values_b2", "values_b3"]
    lists = data_schema("bfloat16", "open", features=1 << 17)
    assert lists.field("indices").type.value_type == pa.uint32()
    assert lists.field("values").type.value_type == pa.float32()
    assert [len(data_schema("float16", level=level).names) for level in LEVELS] == [13, 11, 9]


def test_schema_of_a_matrix_without_a_layer():
    """Only `layer` may be null in addition, and version 2 was the first to have such files."""
    for dtype, encoding, level in product(FORMATS, ENCODINGS, LEVELS):
        inside, outside = (data_schema(dtype, encoding, level, 37, in_layer) for in_layer in (True, False))
        assert outside.field("layer") == pa.field("layer", pa.int16())
        assert list(outside)[1:] == list(inside)[1:]
        assert inside.metadata[b"sparsetrace_version"] == b"1"
        assert outside.metadata == inside.metadata | {b"sparsetrace_version": b"2"}


@pytest.mark.parametrize("dtype", FORMATS)
def test_files_hold_the_schema_and_small_row_groups(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(gather, "row_group_rows", lambda features: 8)
    built = build(tmp_path, dtype)
    ds = sparsetrace.open(built.workload)
    for layer, matrix in ds.leaves:
        values = FORMATS[dtype].from_float(ds.matrix(layer, matrix).dense())
        assert np.array_equal(values, built.dense[layer, matrix])
    for path in sorted((built.workload / "data").rglob("*.parquet")):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.equals(data_schema(dtype), check_metadata=True)
        assert max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) <= 8
        for i in range(file.metadata.num_columns):
            column = file.metadata.row_group(0).column(i)
            assert column.compression == "ZSTD"
            operand = column.path_in_schema in ("mask", *FORMATS[dtype].planes)
            assert column.is_stats_set is not operand or column.path_in_schema in ("expert", "out_mask")


@pytest.mark.parametrize(
    ("features", "rows"),
    [
        (1, 8192),
        (192, 8192),
        (256, 8192),
        (257, 4096),
        (1024, 2048),
        (4095, 512),
        (4096, 512),
        (14336, 512),
        (1 << 22, 512),
    ],
)
def test_rows_of_a_row_group(features, rows):
    """The numbers of the table in docs/format.md."""
    assert row_group_rows(features) == rows


def test_a_large_row_group_is_found(tmp_path, monkeypatch):
    """One with more rows than the format allows, but not one with just as many."""
    monkeypatch.setattr(verification, "row_group_rows", lambda features: 8)
    monkeypatch.setattr(gather, "row_group_rows", lambda features: 8)
    built = build(tmp_path, "float16")
    assert [str(fault) for fault in verify(built.workload)] == []
    monkeypatch.setattr(verification, "row_group_rows", lambda features: 7)
    faults = {str(fault) for fault in verify(built.workload)}
    assert any("column token of row group 0: must hold at most 7 rows, got 8" in fault for fault in faults)


def test_unknown_versions_are_refused(tmp_path, half):
    folder = tmp_path / "w"
    folder.mkdir()
    manifest = json.loads((half.workload / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    known = "must have format version 1 revision 0 or 2 revision 0"
    with pytest.raises(InputError, match=f"{known}, got 3 revision 0: install the sparsetrace that knows it"):
        sparsetrace.open(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="must be a sparsetrace workload, got another"):
        sparsetrace.open(folder)
