"""Every statistic against brute force over the dense operands, one row and one bit at a time."""

from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest
from workload_testing import LAYERS, MATRICES, build

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.workload import stats, stats_chunks, stats_unions

LEAVES = [(layer, matrix) for layer in range(LAYERS) for matrix in MATRICES]
TILES = (5, 16)


@pytest.fixture(scope="module")
def tables(half):
    """All tables, computed in chunks so small that every lag and window crosses them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(stats_chunks, "CHUNK_ROWS", 3)
    patch.setattr(stats_unions, "BATCH_STEPS", 2)
    out = half.folder / "stats"
    found = stats.statistics(sparsetrace.open(half.workload), out, seed=3, tiles=TILES)
    patch.undo()
    assert sorted(path.stem for path in out.iterdir()) == sorted(found)
    return found


@pytest.fixture(scope="module", params=["real", "twin"])
def masks(request, half):
    """(kind, {leaf: bool [T, D]}, rows of the captured tokens)."""
    ds = sparsetrace.open(half.workload)
    if request.param == "real":
        keep = {leaf: half.dense[leaf] != 0 for leaf in LEAVES}
    else:
        keep = {leaf: ds.twin(3).matrix(*leaf).keep() for leaf in LEAVES}
    captured = sorted((row for row in half.fed if row["captured"]), key=lambda row: row["token"])
    return request.param, keep, captured


def rows_of(tables, name, kind, leaf, *columns):
    rows = [r for r in tables[name].to_pylist() if (r["masks"], r["layer"], r["matrix"]) == (kind, *leaf)]
    return [tuple(row[column] for column in columns) for row in rows]


def jaccard(a, b):
    either = sum(x or y for x, y in zip(a, b, strict=True))
    return sum(x and y for x, y in zip(a, b, strict=True)) / either if either else None


def mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


@pytest.mark.parametrize("leaf", [(0, "q"), (1, "down")], ids=str)
def test_sparsity(tables, masks, leaf):
    kind, keep, captured = masks
    x = keep[leaf]
    for name, key in (("sparsity", "phase"), ("positions", "position")):
        found = rows_of(tables, name, kind, leaf, key, "rows", "nnz", "sparsity")
        assert len(found) == len({row[key] for row in captured})
        for value, rows, nnz, sparsity in found:
            own = [x[i] for i, row in enumerate(captured) if row[key] == value]
            assert (rows, nnz) == (len(own), sum(int(v.sum()) for v in own))
            assert sparsity == pytest.approx(1 - nnz / (len(own) * x.shape[1]))


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_neurons_and_concentration(tables, masks, leaf):
    kind, keep, _ = masks
    hits = [int(sum(row[i] for row in keep[leaf])) for i in range(keep[leaf].shape[1])]
    found = rows_of(tables, "neurons", kind, leaf, "input", "hits", "frequency")
    assert found == [(i, h, h / len(keep[leaf])) for i, h in enumerate(hits)]
    D, total = len(hits), sum(hits)
    (row,) = rows_of(
        tables, "concentration", kind, leaf, "gini", "share_of_top_10_percent", "effective_inputs", "never_kept"
    )
    assert row[0] == pytest.approx(sum(abs(a - b) for a in hits for b in hits) / (2 * D * total))
    assert row[1] == pytest.approx(sum(sorted(hits)[::-1][: int(np.ceil(D / 10))]) / total)
    p = [h / total for h in hits if h]
    assert row[2] == pytest.approx(np.exp(-sum(q * np.log(q) for q in p)))
    assert row[3] == hits.count(0)


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_overlap(tables, masks, leaf):
    kind, keep, captured = masks
    place = {row["token"]: i for i, row in enumerate(captured)}
    wanted = []
    for lag in range(1, 17):
        shares = [
            jaccard(keep[leaf][i], keep[leaf][place[row["token"] - lag]])
            for i, row in enumerate(captured)
            if row["token"] - lag in place
            and all(row["token"] - back in place for back in range(lag))
            and row["position"] >= lag
        ]
        if known := [share for share in shares if share is not None]:
            wanted.append((lag, len(known), pytest.approx(mean(known))))
    assert rows_of(tables, "overlap", kind, leaf, "lag", "pairs", "jaccard") == wanted


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_unions(tables, masks, leaf):
    kind, keep, captured = masks
    x = keep[leaf]
    wanted = []
    for size in (2, 4, 8):
        unions = []
        for sequence in range(6):
            own = {row["position"]: i for i, row in enumerate(captured) if row["sequence"] == sequence}
            for start in range(0, 16, size):
                if all(start + i in own for i in range(size)):
                    unions.append(x[[own[start + i] for i in range(size)]].any(axis=0).mean())
        if unions:
            wanted.append(("window", size, len(unions), pytest.approx(mean(unions))))
    for size in (2, 4):
        unions = []
        for first in range(0, 6, size):
            for nth in range(9):
                own = []
                for sequence in range(first, min(first + size, 6)):
                    decode = [i for i, r in enumerate(captured) if r["sequence"] == sequence and r["phase"] == "decode"]
                    own += decode[nth : nth + 1]
                if len(own) == size:
                    unions.append(x[own].any(axis=0).mean())
        wanted.append(("batch", size, len(unions), pytest.approx(mean(unions))))
    assert rows_of(tables, "unions", kind, leaf, "over", "size", "unions", "density") == wanted


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_runs_blocks_and_patterns(tables, masks, leaf):
    kind, keep, _ = masks
    x = keep[leaf]
    D = x.shape[1]
    lengths = {"kept": {}, "dropped": {}}
    for row in x.tolist():
        length = 0
        for i, value in enumerate(row):
            length += 1
            if i + 1 == D or row[i + 1] != value:
                counts = lengths["kept" if value else "dropped"]
                counts[length] = counts.get(length, 0) + 1
                length = 0
    wanted = [(name, length, counts[length]) for name, counts in lengths.items() for length in sorted(counts)]
    assert rows_of(tables, "runs", kind, leaf, "kind", "length", "runs") == wanted

    for block, occupied, blocks, share in rows_of(
        tables, "blocks", kind, leaf, "block", "occupied", "blocks", "kept_in_occupied"
    ):
        groups = [row[start : start + block] for row in x for start in range(0, D, block)]
        assert (occupied, blocks) == (sum(group.any() for group in groups), len(groups))
        assert share == pytest.approx(x.sum() / occupied)
    for n, m in ((2, 4), (4, 8), (8, 16)):
        fits = [[row[start : start + m].sum() <= n for start in range(0, D, m)] for row in x]
        (found,) = [
            r[1:]
            for r in rows_of(tables, "structured", kind, leaf, "pattern", "rows_satisfied", "groups_satisfied")
            if r[0] == f"{n}:{m}"
        ]
        assert found == (sum(map(all, fits)), pytest.approx(np.mean(fits)))
    for tile, rows, average, worst in rows_of(tables, "imbalance", kind, leaf, "tile", "rows", "mean", "max"):
        ratios = []
        for row in x:
            load = [row[start : start + tile].sum() for start in range(0, D, tile)]
            if sum(load):
                ratios.append(max(load) / (sum(load) / len(load)))
        assert (rows, average, worst) == (len(ratios), pytest.approx(mean(ratios)), pytest.approx(max(ratios)))


@pytest.mark.parametrize("leaf", [(0, "gate"), (1, "o")], ids=str)
def test_coactivation(tables, masks, leaf):
    kind, keep, _ = masks
    x = keep[leaf]
    hits = x.sum(axis=0)
    top = sorted(range(x.shape[1]), key=lambda i: (-hits[i], i))[:32]
    wanted = [
        (i, j, int((x[:, i] & x[:, j]).sum()), pytest.approx((x[:, i] & x[:, j]).sum() * len(x) / (hits[i] * hits[j])))
        for i, j in combinations(top, 2)
    ]
    assert rows_of(tables, "coactivation", kind, leaf, "input_a", "input_b", "both", "lift") == wanted


def test_layers(tables, masks):
    kind, keep, _ = masks
    found = [row for row in tables["layers"].to_pylist() if row["masks"] == kind]
    assert [(row["matrix"], row["layer"], row["next_layer"]) for row in found] == [(m, 0, 1) for m in MATRICES]
    for row in found:
        pairs = zip(keep[0, row["matrix"]], keep[1, row["matrix"]], strict=True)
        shares = [share for share in (jaccard(a, b) for a, b in pairs) if share is not None]
        assert (row["pairs"], row["jaccard"]) == (len(shares), pytest.approx(mean(shares)))


def test_every_table_is_there_whatever_is_selected(half, tmp_path):
    """Of one position no two tokens are neighbours, of one layer there is no next: empty, not of an earlier call."""
    ds = sparsetrace.open(half.workload)
    stats.statistics(ds, tmp_path, seed=1)
    tables = stats.statistics(ds.select(layer=1, position=6), tmp_path, seed=2)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(stats.TABLES)
    for name, schema in stats.TABLES.items():
        table = pq.read_table(tmp_path / f"{name}.parquet")
        assert table.equals(tables[name])
        assert table.schema.equals(schema)
        assert table.schema.metadata == {
            b"sparsetrace_workload": ds.manifest["sha256"].encode(),
            b"sparsetrace_tokens": b"6",
            b"sparsetrace_seed": b"2",
        }
        assert set(table["layer"].to_pylist()) <= {1}
    assert [len(tables[name]) for name in ("overlap", "layers", "unions")] == [0, 0, 2 * 7 * 2]
    assert "Jaccard of neighbouring tokens" not in [name for name, _, _ in stats.summary(tables)]


def test_a_row_that_keeps_nothing(half):
    """Shares of no hits are null, and the columns stay."""
    ds = sparsetrace.open(half.workload)
    empty = ds.tokens[ds.matrix(0, "q").nnz == 0]
    tables = stats.statistics(ds.select(token=empty))
    (row,) = [r for r in tables["concentration"].to_pylist() if r["masks"] == "real" and r["layer"] == 0][:1]
    assert (row["gini"], row["share_of_top_10_percent"], row["effective_inputs"]) == (None, None, 0)
    assert set(tables["sparsity"]["sparsity"].to_pylist()) == {1}


def test_what_is_interrupted_leaves_nothing(half, tmp_path, monkeypatch):
    """Interrupted as the last table is written: none has its name yet, nor is a part of one left."""
    written = []

    def stop(table, path, **settings):
        written.append(path)
        if len(written) == len(stats.TABLES):
            raise KeyboardInterrupt
        pq.ParquetWriter(path, table.schema).close()

    monkeypatch.setattr(stats.pq, "write_table", stop)
    with pytest.raises(KeyboardInterrupt):
        stats.statistics(sparsetrace.open(half.workload).select(layer=0, matrix="q"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refusals(half, tmp_path):
    ds = sparsetrace.open(half.workload)
    with pytest.raises(InputError, match="the selection must hold at least one row, got none"):
        stats.statistics(ds.select(phase="forced"))
    with pytest.raises(InputError, match="tiles must be at least 1 wide, got 0"):
        stats.statistics(ds, tiles=(0,))
    with pytest.raises(InputError, match="masks must have been captured"):
        stats.statistics(sparsetrace.open(build(tmp_path, "float16", level="stats").workload))
