"""Bytes of packing do not depend on threads, blocks, memory or interruptions; and its memory stays bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workload_testing import LAYERS, SHARDS, build, pack_all, tree, write_dump

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.dump import Block, block_name, write_block
from sparsetrace.formats.schema import ENCODINGS
from sparsetrace.packing import data_file, gather, order
from sparsetrace.packing import pack as packing
from sparsetrace.packing.index import index
from sparsetrace.workload.verify import verify


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
