"""Packing of sites as data: a matrix without a layer, and rows for some tokens only, against the dense operands.

Files are decoded in plain Python. Memory that numpy hands out is poisoned, so that an element never written is seen.
"""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from workload_testing import HEAD, LAYERS, SHARDS, SITES, has_logits, pack_all, plain_rows, tree, write_dump

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.dump import Block, write_block
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.schema import ENCODINGS, LEVELS, data_schema, leaf
from sparsetrace.packing import gather, order
from sparsetrace.packing import pack as packing
from sparsetrace.packing.index import index
from sparsetrace.workload.verify import verify

# One layer is enough. In it `mlp_in` has the rows of odd positions, and `mlp_mid` those of a sequence that the second
# shard lacks.
MODEL = (*(site for site in SITES if site.layer == 1), HEAD)
SOME = {
    HEAD.key: has_logits,
    (1, "mlp_in"): lambda row: row["position"] % 2 == 1,
    (1, "mlp_mid"): lambda row: row["sequence"] == 1,
}
OUT_MASKS = ((1, "o"), (1, "gate"), (1, "up"), (None, "lm_head"))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill whatever numpy leaves uninitialised."""
    for name in ("empty", "empty_like"):
        plain = getattr(np, name)

        def filled(*args, plain=plain, **kwargs):
            array = plain(*args, **kwargs)
            if array.size and array.dtype != object:
                array.view(np.uint8).fill(0xA5) if array.flags.c_contiguous and array.ndim else None
            return array

        monkeypatch.setattr(np, name, filled)


def dump(folder, dtype="float16", level="full", once=False, out_masks=OUT_MASKS):
    out_masks = () if level == "stats" else out_masks
    return write_dump(folder, dtype, level=level, once=once, sites=MODEL, some=SOME, out_masks=out_masks)


def data_files(workload, layer, matrix):
    return sorted((workload / "data" / leaf(layer, matrix)).glob("*.parquet"))


def check(built, workload, encoding="split", level="full", shared=False):
    """Every row of every matrix, and what the tables and the manifest say of them."""
    number = FORMATS[built.dtype]
    index_of = {row["token"]: (row["sequence"], row["position"]) for row in built.fed}
    manifest = json.loads((workload / "manifest.json").read_text())
    table = pq.read_table(workload / "matrices.parquet").to_pylist()
    assert [(row["layer"], row["matrix"]) for row in table] == list(built.dense)
    expected_files = set()
    for (layer, matrix), described in zip(built.dense, table, strict=True):
        x, tokens = built.dense[layer, matrix], built.tokens_of[layer, matrix].tolist()
        nnz = int(np.count_nonzero(x))
        assert (described["rows"], described["nnz"]) == (len(x), nnz)
        assert described["achieved_sparsity"] == 1 - nnz / x.size
        holder = {"k": "q", "v": "q", "up": "gate"}.get(matrix) if shared else None
        assert described["shares_input_with"] == holder
        if holder is not None:
            assert not data_files(workload, layer, matrix)
            continue
        rows = {}
        schema = data_schema(built.dtype, encoding, level, x.shape[1], layer is not None)
        for path in data_files(workload, layer, matrix):
            expected_files.add(path.relative_to(workload).as_posix())
            assert pq.ParquetFile(path).schema_arrow.equals(schema, check_metadata=True)
            found = plain_rows(path, built.dtype)
            (entry,) = [file for file in manifest["files"] if file["path"] == path.relative_to(workload).as_posix()]
            assert (entry["layer"], entry["matrix"], entry["rows"]) == (layer, matrix, len(found))
            assert (entry["first_token"], entry["last_token"]) == ((min(found), max(found)) if found else (None, None))
            assert entry["nnz"] == sum(row["nnz"] for row in found.values())
            assert not rows or not found or max(rows) < min(found)
            rows |= found
        assert list(rows) == tokens
        values = number.to_float(x).astype(np.float64)
        for at, token in enumerate(tokens):
            row = rows[token]
            assert (row["layer"], row["matrix"], row["expert"]) == (layer, matrix, None)
            assert (row["sequence"], row["position"]) == index_of[token]
            kept = np.flatnonzero(x[at])
            assert row["nnz"] == len(kept)
            assert row["kept"] == (None if level == "stats" else kept.tolist())
            assert row["values"] == (x[at][kept].tolist() if level == "full" else None)
            assert row["absmax"] == np.float32(np.abs(values[at]).max())
            assert row["l2"] == pytest.approx(np.sqrt(np.square(values[at]).sum()), rel=1e-6)
            if level != "stats":
                out_mask = built.out_masks.get((layer, matrix))
                assert row["out_mask"] == (None if out_mask is None else out_mask[at].tobytes())
    assert manifest["tokens"] == len(built.tokens)
    assert manifest["rows"] == sum(len(x) for x in built.dense.values())
    assert manifest["nnz"] == sum(int(np.count_nonzero(x)) for x in built.dense.values())
    files = {path.relative_to(workload).as_posix() for path in (workload / "data").rglob("*.parquet")}
    assert files == expected_files == {file["path"] for file in manifest["files"] if "matrix" in file}


def test_the_made_up_dump_is_what_the_tests_need(tmp_path):
    """Blocks with all rows of a matrix, with some and with none."""
    built = dump(tmp_path)
    blocks = [Block(path) for path in sorted(tmp_path.rglob("*.safetensors"))]
    shares = {block.partial.get("L01.gate", block.rows) / block.rows for block in blocks}
    assert len(blocks) > 4 and min(shares) > 0 and max(shares) < 1
    assert {block.partial.get("L01.down", block.rows) for block in blocks} > {0}
    assert any("model.lm_head" not in block.partial for block in blocks)
    assert any("model.lm_head" in block.partial for block in blocks)
    assert 0 < len(built.dense[None, "lm_head"]) < len(built.tokens)
    assert len(built.dense[1, "o"]) == len(built.tokens)


@pytest.mark.parametrize(
    ("dtype", "level", "encoding"),
    [
        *((dtype, "full", encoding) for dtype in FORMATS for encoding in ENCODINGS),
        *(("bfloat16", level, encoding) for level in LEVELS[1:] for encoding in ENCODINGS),
    ],
)
def test_every_row(tmp_path, dtype, level, encoding):
    built = dump(tmp_path, dtype, level)
    check(built, pack_all(built, encoding=encoding), encoding, level)


@pytest.mark.parametrize("once", [False, True], ids=["each", "once"])
@pytest.mark.parametrize("threads", [1, 3])
def test_shared_inputs(tmp_path, once, threads):
    built = dump(tmp_path, "bfloat16", once=once, out_masks=())
    check(built, pack_all(built, share_inputs=True, threads=threads), shared=True)


def test_an_operand_that_the_dump_holds_once_makes_the_same_bytes(tmp_path):
    each, once = (dump(tmp_path / name, once=name == "once") for name in ("each", "once"))
    assert tree(pack_all(once)) == tree(pack_all(each))


def test_a_matrix_without_a_layer_alone(tmp_path):
    """As with `capture.matrices: [lm_head]`; it has no row for some of the captured tokens."""
    built = write_dump(tmp_path, "float32", sites=(HEAD,), some={HEAD.key: has_logits})
    workload = pack_all(built)
    check(built, workload)
    assert [path.name for path in (workload / "data").iterdir()] == ["model"]


def test_a_matrix_without_any_row(tmp_path):
    built = write_dump(tmp_path, "float16", sites=MODEL, some={HEAD.key: lambda row: False})
    workload = pack_all(built)
    row = pq.read_table(workload / "matrices.parquet").to_pylist()[-1]
    assert (row["matrix"], row["rows"], row["nnz"], row["achieved_sparsity"]) == ("lm_head", 0, 0, None)
    assert [pq.read_metadata(path).num_rows for path in data_files(workload, None, "lm_head")] == [0] * len(SHARDS)
    assert "| lm_head | - | - | - |" in (workload / "README.md").read_text()


@pytest.mark.parametrize("settings", [{}, {"encoding": "open"}, {"share_inputs": True}], ids=str)
def test_the_reader_and_verify_agree(tmp_path, settings):
    built = write_dump(tmp_path, "bfloat16", sites=MODEL, some={HEAD.key: has_logits})
    workload = pack_all(built, **settings)
    assert [str(fault) for fault in verify(workload)] == []
    ds = sparsetrace.open(workload)
    assert ds.leaves == list(built.dense)
    for key, x in built.dense.items():
        assert np.array_equal(FORMATS["bfloat16"].from_float(ds.matrix(*key).dense()), x)


def test_bytes_do_not_depend_on_what_is_held_at_a_time(tmp_path, monkeypatch):
    """The order is kept in a file and sorted a range at a time; rows are gathered from one block; threads."""
    monkeypatch.setattr(gather, "row_group_rows", lambda features: 4)
    built = dump(tmp_path, "bfloat16")
    whole = tree(pack_all(built))
    monkeypatch.setattr(order, "ORDER_ROWS", 3)
    monkeypatch.setattr(order, "ORDER_CELLS", 2)
    assert tree(pack_all(built, "ranges")) == whole
    monkeypatch.setattr(gather, "MAPPED_BLOCKS", 1)
    monkeypatch.setattr(gather, "PIECE_ROWS", 3)
    monkeypatch.setattr(gather, "RELEASE_BYTES", 1)
    assert tree(pack_all(built, "pieces")) == whole
    assert tree(pack_all(built, "threads", threads=3)) == whole
    check(built, built.folder / "threads")
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize("threads", [1, 2])
def test_files_are_cut_by_the_rows_of_each_matrix(tmp_path, monkeypatch, threads):
    """And an interrupted pack goes on after its last file."""
    monkeypatch.setattr(packing, "FILE_ROWS", 7)
    monkeypatch.setattr(order, "ORDER_ROWS", 5)
    built = dump(tmp_path)
    workload = pack_all(built, threads=threads)
    check(built, workload)
    for key in built.dense:
        for shard in range(len(SHARDS)):
            mine = {row["token"] for row in built.fed if row["shard"] == shard}
            rows = len(mine & set(built.tokens_of[key].tolist()))
            paths = [path for path in data_files(workload, *key) if f"part-{shard:05d}" in path.name]
            sizes = [pq.read_metadata(path).num_rows for path in paths]
            assert sizes == ([rows] if rows <= 7 else [7] * (rows // 7) + [rows % 7] * (rows % 7 > 0))
    manifest = tmp_path / "dump" / "00000" / "manifest.json"
    written, write = [], packing._Shard._write_files

    def dies(self, job, *rest):
        if job.operand.layer is None and job.cut == 1:
            raise KeyboardInterrupt
        written.append(job)
        return write(self, job, *rest)

    monkeypatch.setattr(packing._Shard, "_write_files", dies)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(manifest, tmp_path / "again", tmp_path / "again-parts" / "00000.json", threads=threads)
    monkeypatch.setattr(packing._Shard, "_write_files", write)
    packing.pack(manifest, tmp_path / "again", tmp_path / "again-parts" / "00000.json", threads=threads)
    mine = {name: data for name, data in tree(workload).items() if "part-00000" in name}
    assert tree(tmp_path / "again") == mine


def test_an_order_is_made_once_for_all_files_of_an_operand(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "FILE_ROWS", 3)
    built = dump(tmp_path, once=True)
    made, init = [], order.Order.__init__
    monkeypatch.setattr(order.Order, "__init__", lambda self, *args: made.append(args[2:]) or init(self, *args))
    pack_all(built)
    partial = [("L01.gate",), ("L01.down",), ("model.lm_head",)]
    assert made == [(), *partial] * len(SHARDS)


def edited(folder, change):
    """The dump of the first shard with one block changed."""
    block = sorted((folder / "dump" / "00000").glob("*.safetensors"))[0]
    opened = Block(block)
    header = json.loads(block.read_bytes()[8 : 8 + int.from_bytes(block.read_bytes()[:8], "little")])
    arrays = {name: opened[name].copy() for name in header if name != "__metadata__"}
    change(arrays)
    write_block(block, arrays)
    return folder / "dump" / "00000" / "manifest.json", block


@pytest.mark.parametrize(
    "rows",
    [lambda rows, T: rows[::-1].copy(), lambda rows, T: np.full_like(rows, 1), lambda rows, T: rows - 2,
     lambda rows, T: rows + T],
    ids=["descending", "twice", "negative", "beyond"],
)  # fmt: skip
def test_refuses_rows_that_do_not_ascend_within_the_block(tmp_path, rows):
    dump(tmp_path)

    def change(arrays):
        arrays["L01.gate.rows"] = rows(arrays["L01.gate.rows"], len(arrays["rows.token"])).astype(np.int32)

    manifest, block = edited(tmp_path, change)
    count = Block(block).rows
    with pytest.raises(
        InputError, match=f"L01.gate.rows of {block} must ascend below {count}, got .*generate it again"
    ):
        packing.pack(manifest, tmp_path / "w", tmp_path / "parts" / "00000.json")
    assert not (tmp_path / "parts" / "00000.json").exists()


@pytest.mark.parametrize("name", ["offsets", "mask"])
def test_refuses_arrays_of_another_number_of_rows(tmp_path, name):
    dump(tmp_path)

    def change(arrays):
        arrays["L01.gate.rows"] = arrays["L01.gate.rows"][:-1]
        other = "mask" if name == "offsets" else "offsets"
        arrays[f"L01.gate.{other}"] = arrays[f"L01.gate.{other}"][:-1]

    manifest, block = edited(tmp_path, change)
    with pytest.raises(InputError, match=f"{block} must have .* of L01.gate.{name}, got .*: generate it again"):
        packing.pack(manifest, tmp_path / "w", tmp_path / "parts" / "00000.json")


def test_index_removes_a_matrix_that_is_captured_no_more(tmp_path):
    built = dump(tmp_path)
    workload = pack_all(built)
    assert (workload / "data" / "model").is_dir()
    shutil.rmtree(tmp_path / "dump")
    again = write_dump(tmp_path, "float16")
    parts = []
    for shard in range(len(SHARDS)):
        parts.append(tmp_path / "workload-parts" / f"{shard:05d}.json")
        packing.pack(tmp_path / "dump" / f"{shard:05d}" / "manifest.json", workload, parts[-1])
    index(parts, workload)
    assert sorted(path.name for path in (workload / "data").iterdir()) == [f"L{layer:02d}" for layer in range(LAYERS)]
    check(again, workload)
