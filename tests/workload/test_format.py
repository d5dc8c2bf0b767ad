"""The format: golden bytes, the schema and the recipe of docs/format.md; and what packing promises.

The planes were written by hand from docs/format.md; the files in `golden_v1.txt` were written by the code of version 1.
"""

import base64
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workload_testing import LAYERS, SHARDS, build, pack_all, write_dump

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.columns import Index, decode_rows, encode_rows
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.row_statistics import RowStatistics
from sparsetrace.formats.rows import Rows
from sparsetrace.formats.schema import ENCODINGS, LEVELS, data_schema, row_group_rows
from sparsetrace.formats.tables import MATRIX_TABLE, SEQUENCES, TOKENS, WEIGHT_MASKS
from sparsetrace.packing import data_file, gather, order
from sparsetrace.packing import pack as packing
from sparsetrace.packing.index import index
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


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("dtype", "level", "settings"),
    [
        ("float16", "full", {}),
        ("float32", "full", {"encoding": "open"}),
        ("bfloat16", "full", {"share_inputs": True, "threads": 2}),
        ("float16", "masks", {}),
        ("float16", "stats", {}),
    ],
)
def test_an_operand_that_the_dump_holds_once_makes_the_same_bytes(tmp_path, dtype, level, settings):
    built, once = (build(tmp_path / name, dtype, level, once=name == "once", **settings) for name in ("each", "once"))
    each_bytes, once_bytes = (sum(f.stat().st_size for f in b.folder.rglob("*.block-*")) for b in (built, once))
    assert once_bytes < 0.8 * each_bytes
    whole = tree(built.workload)
    assert whole == tree(once.workload)
    leaves = LAYERS * (4 if "share_inputs" in settings else 7)
    assert len([path for path in whole if path.startswith("data/")]) == leaves * len(SHARDS)


def test_bytes_do_not_depend_on_threads_or_blocks(tmp_path, monkeypatch):
    built = build(tmp_path, "bfloat16")
    monkeypatch.setattr(gather, "RELEASE_BYTES", 1)
    assert tree(pack_all(built, "threads", threads=3)) == tree(built.workload)


@pytest.mark.parametrize(
    ("module", "setting", "value"),
    [(order, "ORDER_ROWS", 2), (order, "ORDER_CELLS", 2), (gather, "PIECE_ROWS", 3), (data_file, "SINK_BYTES", 1)],
    ids=["ORDER_ROWS", "ORDER_CELLS", "PIECE_ROWS", "SINK_BYTES"],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_do_not_depend_on_what_is_held_at_a_time(tmp_path, monkeypatch, module, setting, value, encoding):
    monkeypatch.setattr(gather, "row_group_rows", lambda features: 4)
    built = build(tmp_path, "float16", encoding=encoding)
    if setting == "ORDER_CELLS":
        monkeypatch.setattr(order, "ORDER_ROWS", 3)
    if setting == "PIECE_ROWS":
        monkeypatch.setattr(gather, "MAPPED_BLOCKS", 1)
    monkeypatch.setattr(module, setting, value)
    assert tree(pack_all(built, "again", encoding=encoding)) == tree(built.workload)
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def test_order_of_a_long_shard_is_sorted_a_range_at_a_time(tmp_path, monkeypatch, rng):
    """Clusters of numbers far apart, some of them twice: ranges of any width give what a single sort gives."""
    from sparsetrace.formats.dump import Block, write_block

    clumps = [rng.permutation(rng.choice(300, 200)) + at for at in (-50, 10_000, 1 << 40)]
    token = rng.permutation(np.concatenate(clumps))
    blocks = []
    for number, piece in enumerate([*np.array_split(token, 7), token[:0]]):
        arrays = {"rows.token": piece, "rows.sequence": piece.astype(np.int32), "rows.position": piece.astype(np.int32)}
        write_block(tmp_path / f"{number}", arrays)
        blocks.append(Block(tmp_path / f"{number}"))
    whole = order.Order(blocks, tmp_path)
    sizes = []
    ranges = order._Tokens.sorted
    monkeypatch.setattr(order, "ORDER_ROWS", 20)
    monkeypatch.setattr(order, "ORDER_CELLS", 5)
    monkeypatch.setattr(
        order._Tokens, "sorted", lambda self, *span: (sizes.append(len(ranges(self, *span))), ranges(self, *span))[1]
    )
    again = order.Order(blocks, tmp_path)
    assert max(sizes) <= 20
    assert (len(again), again.distinct, again.token_range()) == (600, len(np.unique(token)), (token.min(), token.max()))
    assert np.array_equal(again[0:600], whole[0:600])
    assert np.array_equal(again[17:31], whole[17:31])
    assert np.array_equal(whole[0:600]["token"], np.sort(token))
    assert len(order.Order(blocks[7:], tmp_path)) == 0


@pytest.mark.parametrize("spilled", [False, True])
def test_a_long_shard_is_cut_into_files(tmp_path, monkeypatch, spilled):
    """Readers find the rows of uncut files, in order; an interrupted pack goes on after its last finished cut."""
    built = build(tmp_path, "float16")
    dump = built.folder / "dump" / "00000" / "manifest.json"
    whole = sparsetrace.open(built.workload)
    rows = next(file["rows"] for file in whole.manifest["files"] if "matrix" in file)
    monkeypatch.setattr(packing, "FILE_ROWS", 7)
    if spilled:
        monkeypatch.setattr(order, "ORDER_ROWS", 5)
    written, write = [], packing._Shard._write_files

    def dies(self, job, *rest):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(job.cut)
        return write(self, job, *rest)

    monkeypatch.setattr(packing._Shard, "_write_files", dies)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(dump, tmp_path / "cut", tmp_path / "parts" / "00000.json")
    monkeypatch.setattr(packing._Shard, "_write_files", write)
    packed = packing.pack(dump, tmp_path / "cut", tmp_path / "parts" / "00000.json")
    cuts = -(-rows // 7)
    assert cuts > 2 and len(packed["files"]) == 14 * cuts
    for leaf in whole.leaves:
        files = sorted((tmp_path / "cut" / "data" / f"L{leaf[0]:02d}" / leaf[1]).iterdir())
        assert [file.name for file in files] == [f"part-00000-{cut:03d}.parquet" for cut in range(cuts)]
        tables = [pq.read_table(file) for file in files]
        assert [len(table) for table in tables] == [7] * (cuts - 1) + [rows - 7 * (cuts - 1)]
        one = pq.read_table(built.workload / "data" / f"L{leaf[0]:02d}" / leaf[1] / "part-00000.parquet")
        assert pa.concat_tables(tables).equals(one)
    index([tmp_path / "parts" / "00000.json"], tmp_path / "cut")
    ds = sparsetrace.open(tmp_path / "cut")
    for leaf in whole.leaves:
        assert np.array_equal(ds.matrix(*leaf).dense(), whole.matrix(*leaf, ds.tokens).dense())
    assert [str(fault) for fault in verify(tmp_path / "cut")] == []


def test_an_interrupted_pack_goes_on(tmp_path, monkeypatch):
    built = build(tmp_path, "float16")
    dump, out = built.folder / "dump" / "00000" / "manifest.json", tmp_path / "again-parts" / "00000.json"
    written, write = [], packing._Shard._write_files

    def dies_after_five(self, job, *rest):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(job)
        return write(self, job, *rest)

    monkeypatch.setattr(packing._Shard, "_write_files", dies_after_five)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(dump, tmp_path / "again", out)
    assert not out.exists()
    assert not list((tmp_path / "again").rglob("*.partial"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.parquet")}
    assert len(files) == 5
    # a file that was damaged in the meantime is written again
    damaged = next(iter(files))
    damaged.write_bytes(b"short")

    monkeypatch.setattr(
        packing._Shard, "_write_files", lambda self, job, *rest: written.append(job) or write(self, job, *rest)
    )
    packing.pack(dump, tmp_path / "again", out)
    assert len(written) == 5 + 14 - 4
    assert all(path == damaged or path.stat().st_mtime_ns == time for path, time in files.items())
    whole = tree(built.workload)
    assert all(whole[name] == data for name, data in tree(tmp_path / "again").items())

    # a finished pack is left alone, though its blocks are gone
    assert not list(dump.parent.glob("group-*"))
    packing.pack(dump, tmp_path / "again", out)
    assert len(written) == 5 + 14 - 4


def test_another_setting_packs_anew(tmp_path):
    built = build(tmp_path, "float16")
    before = tree(built.workload)
    dump, out = built.folder / "dump" / "00000" / "manifest.json", built.folder / "workload-parts" / "00000.json"
    packing.pack(dump, built.workload, out, encoding="open")
    after = tree(built.workload)
    assert "manifest.json" not in after
    assert all(after[name] != before[name] for name in after if name.endswith("part-00000.parquet"))
    parts = sorted(out.parent.glob("0*.json"))
    with pytest.raises(InputError, match="must be of one run, got .* with another encoding"):
        index(parts, built.workload)


def test_memory_stays_bounded(tmp_path):
    """A dump many times as large as the memory bound is packed in little more memory than a small one."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from sparsetrace.packing.pack import pack\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))\n"
        # not ru_maxrss, which starts at the value of this process
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(line.split()[1] for line in status if line.startswith('VmHWM')))\n"
    )
    peaks = []
    for blocks in (1, 24):
        folder = tmp_path / f"{blocks}"
        wide_dump(folder, blocks)
        arguments = [folder / "manifest.json", folder / "workload", folder / "parts" / "00000.json"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, script, *arguments], capture_output=True, text=True, check=True, env=environment
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 80, f"peaks of {peaks} MiB for 8 and 200 MiB of dump"


def wide_dump(folder: Path, blocks: int, rows: int = 1024, features: int = 4096):
    """A dump of one group and one matrix, 8 MiB a block."""
    from sparsetrace.formats.dump import block_name, write_block

    built = write_dump(folder / "model", "float16")
    manifest = json.loads((built.folder / "dump" / "00000" / "manifest.json").read_text())
    rng = np.random.default_rng(0)
    values = rng.integers(1, 1 << 15, rows * features // 2, dtype=np.uint16)
    for block in range(blocks):
        arrays = {
            "rows.token": np.arange(rows) + block * rows,
            "rows.sequence": np.zeros(rows, np.int32),
            "rows.position": np.arange(rows, dtype=np.int32),
            "L00.q.offsets": np.arange(rows + 1) * (features // 2),
            "L00.q.values": values,
            "L00.q.mask": np.full((rows, features // 8), 0x55, np.uint8),
        }
        write_block(folder / block_name(0, block), arrays)
    manifest |= {"matrices": [manifest["matrices"][0] | {"in_features": features}], "groups": [0]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"rows": rows * blocks}))
    names = [block_name(0, block) for block in range(blocks)]
    (folder / "group-00000.json").write_text(json.dumps({"key": "k", "blocks": names, "rows": rows * blocks}))
    for table in ("tokens", "sequences"):
        (built.folder / "dump" / "00000" / f"group-00000.{table}.parquet").rename(
            folder / f"group-00000.{table}.parquet"
        )
