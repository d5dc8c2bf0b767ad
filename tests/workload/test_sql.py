"""DuckDB with the views and macros, polars and pyarrow against the dense operands: they must read the same bits."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from workload_testing import HEAD, LAYERS, MATRICES, SITES, build, has_logits, pack_all, write_dump

duckdb = pytest.importorskip("duckdb")


def connect(folder):
    """Run views.sql as its header says for another working directory than the workload's folder."""
    connection = duckdb.connect()
    connection.execute(f"SET file_search_path = '{folder}'")
    connection.execute((folder / "views.sql").read_text())
    return connection


@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_views(built, tmp_path, share_inputs):
    again = build(tmp_path, built.dtype, share_inputs=share_inputs)
    sql = connect(again.workload)
    count = sql.execute("SELECT count(*) FROM data").fetchone()[0]
    assert count == LAYERS * len(MATRICES) * len(built.tokens)
    for layer, matrix, rows, sparsity in sql.execute("SELECT * FROM sparsity").fetchall():
        x = built.dense[layer, matrix]
        assert rows == len(x)
        assert sparsity == pytest.approx((x == 0).mean(), abs=1e-12)
    stored = sum(1 for file in json.loads((again.workload / "manifest.json").read_text())["files"] if "matrix" in file)
    assert stored == (2 * LAYERS * (4 if share_inputs else 7))


@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_views_of_a_matrix_without_a_layer(tmp_path, share_inputs):
    """Its layer is null, which equals nothing in SQL; and it has rows for some tokens only."""
    some = {HEAD.key: has_logits, (1, "mlp_in"): lambda row: row["position"] % 2 == 1}
    built = write_dump(tmp_path, "float16", sites=(*SITES, HEAD), some=some)
    sql = connect(pack_all(built, share_inputs=share_inputs))
    counted = sql.execute("SELECT layer, matrix, count(*), count(DISTINCT token) FROM data GROUP BY ALL").fetchall()
    assert {row[:2]: row[2:] for row in counted} == {key: (len(x), len(x)) for key, x in built.dense.items()}
    sparsity = sql.execute("SELECT * FROM sparsity").fetchall()
    assert len(sparsity) == len(built.dense)
    for layer, matrix, rows, share in sparsity:
        x = built.dense[layer, matrix]
        assert (rows, share) == (len(x), pytest.approx((x == 0).mean(), abs=1e-12))
    found = sql.execute(
        "SELECT token, kept_inputs(mask), row_values(values_lo, values_hi) FROM data "
        "WHERE layer IS NULL AND matrix = 'lm_head' ORDER BY token"
    ).fetchall()
    values = built.values(None, "lm_head")
    assert [row[0] for row in found] == built.tokens_of[None, "lm_head"].tolist()
    for x, (_, inputs, row) in zip(values, found, strict=True):
        assert inputs == np.flatnonzero(x).tolist()
        assert row == x[inputs].astype(float).tolist()


def test_other_readers_of_a_matrix_without_a_layer(tmp_path):
    """polars and pyarrow read all files as one data set, though `layer` may be null in some of them only."""
    pl = pytest.importorskip("polars")
    built = write_dump(tmp_path, "float16", sites=(*SITES, HEAD), some={HEAD.key: has_logits})
    workload = pack_all(built)
    rows = pl.scan_parquet(workload / "data/*/*/*.parquet")
    tokens = built.tokens_of[None, "lm_head"].tolist()
    assert rows.filter(pl.col("layer").is_null()).collect()["token"].to_list() == tokens
    table = pq.read_table(workload / "data")
    assert len(table) == sum(map(len, built.dense.values()))
    assert table.filter(pc.field("layer").is_null())["token"].to_pylist() == tokens
    assert len(pq.read_table(workload / "data", filters=[("layer", "=", 1)])) == 7 * len(built.tokens)


def test_macros_decode_values_and_masks(built):
    sql = connect(built.workload)
    planes = ", ".join(f"d.{name}" for name in (["values_lo", "values_hi"] if built.dtype != "float32" else FLOAT32))
    query = f"SELECT token, kept_inputs(mask), row_values({planes}) FROM data d WHERE layer = 1 AND matrix = 'down'"
    found = sorted(sql.execute(query).fetchall())
    values = built.values(1, "down")
    assert [token for token, _, _ in found] == built.tokens.tolist()
    for i, (_, inputs, row) in enumerate(found):
        assert inputs == np.flatnonzero(built.dense[1, "down"][i]).tolist()
        assert row == values[i][inputs].astype(float).tolist()


FLOAT32 = [f"values_b{i}" for i in range(4)]


def test_overlap(half):
    sql = connect(half.workload)
    found = sql.execute(
        "SELECT a.token, overlap(a.mask, b.mask), jaccard(a.mask, b.mask), bit_count(a.mask::BIT & b.mask::BIT) "
        "FROM data a JOIN data b ON b.layer = a.layer AND b.matrix = a.matrix AND b.token = a.token - 1 "
        "WHERE a.layer = 0 AND a.matrix = 'up' AND a.sequence = b.sequence ORDER BY a.token"
    ).fetchall()
    keep = dict(zip(half.tokens.tolist(), half.dense[0, "up"] != 0, strict=True))
    assert [row[0] for row in found] == [t for t in keep if t - 1 in keep]
    for token, both, share, again in found:
        a, b = keep[token], keep[token - 1]
        assert both == again == (a & b).sum()
        either = (a | b).sum()
        assert share == pytest.approx((a & b).sum() / either) if either else np.isnan(share) or share is None


def test_open_encoding_is_plain_lists(built, tmp_path):
    again = build(tmp_path, built.dtype, encoding="open")
    sql = connect(again.workload)
    query = "SELECT indices, values FROM data WHERE layer = 1 AND matrix = 'o' ORDER BY token"
    for i, (indices, values) in enumerate(sql.execute(query).fetchall()):
        assert indices == np.flatnonzero(built.dense[1, "o"][i]).tolist()
        assert values == built.values(1, "o")[i][indices].astype(float).tolist()


@pytest.mark.parametrize("level", ["masks", "stats"])
def test_views_of_lower_capture_levels(tmp_path, level):
    built = write_dump(tmp_path, "float16", level=level)
    sql = connect(pack_all(built))
    assert sql.execute("SELECT sum(rows) FROM sparsity").fetchone()[0] == LAYERS * len(MATRICES) * len(built.tokens)


def test_polars_example(built):
    """The example of docs/format.md."""
    pl = pytest.importorskip("polars")
    ds = pl.scan_parquet(built.workload / "data/*/*/*.parquet")
    row = ds.filter(layer=1, matrix="gate", token=int(built.tokens[5])).collect().row(0, named=True)
    x = built.dense[1, "gate"][5]
    keep = np.unpackbits(np.frombuffer(row["mask"], np.uint8), bitorder="little")[: x.size].astype(bool)
    assert np.array_equal(keep, x != 0)
    if built.dtype == "float16":
        planes = [np.frombuffer(row[name], np.uint8) for name in ("values_lo", "values_hi")]
        assert np.array_equal(planes[0] | planes[1].astype(np.uint16) << 8, x[keep])
    mean = ds.group_by("layer", "matrix").agg(pl.col("nnz").mean()).collect()
    assert mean.height == LAYERS * len(MATRICES)


def documented(before, language):
    """The first code block in a language behind some words of docs/format.md."""
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    return re.search(rf"```{language}\n(.*?)```", text[text.index(before) :], re.DOTALL)[1]


def test_documented_views(half, tmp_path, monkeypatch, capsys):
    """From a folder that is neither the workload's nor above it; and from the workload's own, without the setting."""
    monkeypatch.chdir(tmp_path)
    block = documented("DuckDB finds the files", "python")
    names = {"Path": Path}
    # the text of our own page
    exec(block.replace("results/demo/default/teal-0.5/workload", str(half.workload)), names)  # noqa: S102
    assert capsys.readouterr().out.count("down") == LAYERS
    monkeypatch.chdir(half.workload)
    sql = duckdb.connect()
    sql.execute(Path("views.sql").read_text())
    found = sql.execute("SELECT * FROM sparsity").fetchall()
    expected = names["sql"].execute("SELECT * FROM sparsity").fetchall()
    assert [row[:3] for row in found] == [row[:3] for row in expected] and len(found) == LAYERS * len(MATRICES)
    # threads add up a mean in any order
    assert [row[3:] for row in found] == [pytest.approx(row[3:], rel=1e-12) for row in expected]


def test_documented_tables(half, monkeypatch):
    monkeypatch.chdir(half.folder)
    names = {"pq": pq}
    block = documented("A reader that takes every", "python").replace('"=", 2', '"=", 1')
    exec(block, names)  # noqa: S102
    assert set(names["rows"]["matrix"].to_pylist()) == {"down"} and len(names["rows"]) == len(half.tokens)
    assert len(names["tokens"]) >= len(half.tokens)
    with pytest.raises(pa.ArrowInvalid):
        pq.read_table("workload")


def test_documented_queries(half):
    """The queries of docs/format.md, but with a layer and a token of this workload."""
    sql = connect(half.workload)
    block = (
        documented("DuckDB finds the files", "sql")
        .replace("layer = 2", "layer = 1")
        .replace("token = 17", f"token = {half.tokens[5]}")
    )
    sparsity, row, overlap = (sql.execute(query).fetchall() for query in block.split(";")[:3])
    x = half.dense[1, "down"]
    assert len(sparsity) == LAYERS * len(MATRICES)
    kept = np.flatnonzero(x[5])
    assert row == [(kept.tolist(), half.values(1, "down")[5][kept].astype(float).tolist())]
    keep = dict(zip(half.tokens.tolist(), x != 0, strict=True))
    pairs = [(keep[t], keep[t - 1]) for t in keep if t - 1 in keep]
    shares = [(a & b).sum() / (a | b).sum() for a, b in pairs if (a | b).any()]
    assert overlap == [(pytest.approx(np.mean(shares)),)]


def test_documented_polars(half, tmp_path, monkeypatch):
    pl = pytest.importorskip("polars")
    monkeypatch.chdir(half.folder)
    block = documented("polars:", "python").replace("layer=2", "layer=1").replace("token=17", f"token={half.tokens[5]}")
    *lines, last = block.strip().splitlines()
    names = {"pl": pl}
    # the text of our own page
    exec("\n".join(lines), names)  # noqa: S102
    assert names["row"]["nnz"] == np.count_nonzero(half.dense[1, "down"][5])
    means = {row[:2]: row[2] for row in eval(last, names).rows()}
    assert means[1, "down"] == pytest.approx(np.count_nonzero(half.dense[1, "down"], axis=1).mean())
