"""A matrix in no layer, with rows for some of the captured tokens: all that is read of it, against its dense rows."""

import hashlib
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from head_testing import HEAD, VOCABULARY, WIDTH, build_with_head
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from workload_testing import HEAD as SITE
from workload_testing import LAYERS, has_logits, pack_all, write_dump

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.workload import stats
from sparsetrace.workload.export import FORMS, export, file_name
from sparsetrace.workload.schedule import replay
from sparsetrace.workload.torch_data import OperandDataset, OperandStream
from sparsetrace.workload.verify import verify


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def built(request, tmp_path_factory):
    """With `lm_head` in every number format."""
    return build_with_head(tmp_path_factory.mktemp(f"head-{request.param}"), request.param)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """In float16 alone, for what does not depend on the format."""
    return build_with_head(tmp_path_factory.mktemp("head"), "float16")


def tokens_of(built, holds=lambda row: True):
    return [row["token"] for row in built.head_rows if holds(row)]


def dense(built, tokens):
    """The rows of some tokens, as floats."""
    at = np.searchsorted(tokens_of(built), tokens)
    return FORMATS[built.dtype].to_float(built.head[at])


def same(found, expected):
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("encoding", ["split", "open"])
def test_every_row(built, tmp_path, encoding):
    folder = built.workload if encoding == "split" else build_with_head(tmp_path, built.dtype, encoding="open").workload
    ds = sparsetrace.open(folder)
    tokens = tokens_of(built)
    assert len(tokens) < len(built.tokens)
    assert ds.leaves[-1] == HEAD
    assert ds.layers == LAYERS
    assert ds.tokens.tolist() == built.tokens.tolist()
    assert ds.tokens_of(*HEAD).tolist() == tokens
    assert ds.tokens_of(1, "up").tolist() == built.tokens.tolist()
    assert (ds.features(*HEAD), ds.outputs(*HEAD)) == (WIDTH, VOCABULARY)
    rows = ds.matrix(*HEAD)
    assert (rows.layer, rows.matrix) == HEAD
    assert rows.token.tolist() == tokens
    assert same(rows.dense(), dense(built, tokens))
    for token in tokens:
        x = dense(built, [token])[0]
        assert same(ds[None, "lm_head", token], x)
        indices, values = ds.sparse(*HEAD, token)
        assert np.array_equal(indices, np.flatnonzero(x))
        assert same(values, x[x != 0])
    blocks = list(ds.blocks(*HEAD))
    assert np.concatenate([block.token for block in blocks]).tolist() == tokens
    assert same(np.concatenate([block.dense() for block in blocks]), dense(built, tokens))
    # a slice skips the tokens that have no row, a list takes any order
    some = [token for token in tokens if 100 <= token < 400]
    assert same(ds[None, "lm_head", 100:400], dense(built, some))
    assert same(ds[None, "lm_head", tokens[::-1]], dense(built, tokens[::-1]))
    figures = ds.figures(*HEAD).to_pydict()
    assert figures["token"] == tokens
    assert figures["nnz"] == (built.head != 0).sum(1).tolist()
    assert figures["position"] == [row["position"] for row in built.head_rows]
    assert ds.density(*HEAD) == (built.head != 0).mean()
    assert np.array_equal(pickle.loads(pickle.dumps(ds)).matrix(*HEAD).mask, rows.mask)


@pytest.mark.parametrize("level", ["masks", "stats"])
def test_lower_levels(tmp_path, level):
    built = build_with_head(tmp_path, "float16", level=level)
    ds = sparsetrace.open(built.workload)
    assert ds.figures(*HEAD)["nnz"].to_pylist() == (built.head != 0).sum(1).tolist()
    assert ds.tokens_of(*HEAD).tolist() == tokens_of(built)
    if level == "masks":
        assert np.array_equal(ds.matrix(*HEAD).keep(), built.head != 0)
        assert [rows.token.tolist() for step in ds.replay() for rows in step if rows.layer is None] != []


def test_a_selection_by_layers_leaves_it_out(half):
    ds = sparsetrace.open(half.workload)
    matrices = ["q", "k", "v", "o", "gate", "up", "down"]
    assert ds.select().leaves == ds.leaves == [(i, name) for i in range(LAYERS) for name in matrices] + [HEAD]
    assert ds.select(layer=1).leaves == [(1, name) for name in matrices]
    assert ds.select(layer=slice(None)).leaves == ds.leaves[:-1]
    assert ds.select(matrix="lm_head").leaves == [HEAD]
    assert ds.select(matrix=["lm_head", "q"]).leaves == [(0, "q"), (1, "q"), HEAD]
    assert ds.select(layer=1, matrix=["lm_head", "q"]).leaves == [(1, "q")]
    assert ds.select(layer=1, matrix="lm_head").leaves == []
    cases = [
        ({"phase": "decode"}, lambda row: row["phase"] == "decode"),
        ({"phase": "prefill"}, lambda row: row["phase"] == "prefill"),
        (
            {"sequence": [1, 4], "position": slice(3, 7)},
            lambda row: row["sequence"] in (1, 4) and 3 <= row["position"] < 7,
        ),
        ({"position": 3}, lambda row: row["position"] == 3),
        ({"position": 1}, lambda row: row["position"] == 1),
    ]
    for chosen, holds in cases:
        part = ds.select(**chosen)
        tokens = tokens_of(half, holds)
        assert part.tokens_of(*HEAD).tolist() == tokens
        assert part.matrix(*HEAD).token.tolist() == tokens
        assert same(part.matrix(*HEAD).dense(), dense(half, tokens))
        assert part.figures(*HEAD)["token"].to_pylist() == tokens
        nonzero = dense(half, tokens) != 0
        assert part.density(*HEAD) == (nonzero.mean() if tokens else 0)


UNKNOWN = "layer and matrix must be 0 to 1 and one of q, k, v, o, gate, up, down, or None and one of lm_head, got "
NO_ROW = "must be one that has a row in model/lm_head (see ds.tokens_of(None, 'lm_head'): 35 between 4 and 507), got 3"
GONE = "token must be one that was captured (see ds.tokens: "
REFUSALS = [
    # id, call, message
    ("layer", lambda ds: ds.matrix(1, "lm_head"), UNKNOWN + "1 and 'lm_head'"),
    ("no-layer", lambda ds: ds.matrix(None, "q"), UNKNOWN + "None and 'q'"),
    ("no-row", lambda ds: ds[None, "lm_head", 3], NO_ROW),
    ("list", lambda ds: ds[None, "lm_head", [4, 3]], NO_ROW),
    ("blocks", lambda ds: list(ds.blocks(*HEAD, tokens=np.array([3, 4]))), NO_ROW),
    ("gone", lambda ds: ds[None, "lm_head", 99], GONE + "41 between 3 and 507), got 99"),
    ("part", lambda ds: ds.select(sequence=0)[None, "lm_head", 104], GONE + "8 between 3 and 10), got 104"),
    ("name", lambda ds: ds.select(matrix="w"), "matrix must be among q, k, v, o, gate, up, down, lm_head, got w"),
    ("layers", lambda ds: ds.select(layer=2), "layer must be 0 to 1, got 2"),
    ("step", lambda ds: next(ds.select(layer=0).replay())[HEAD], "among those of the selection, got (None, 'lm_head')"),
]


@pytest.mark.parametrize(("call", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSALS])
def test_refusals(half, call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call(sparsetrace.open(half.workload))


@pytest.mark.parametrize("window", [1, 3000, 1 << 30])
def test_replay_gives_a_step_the_rows_that_there_are(half, window):
    ds = sparsetrace.open(half.workload)
    captured = sorted(
        (row for row in half.fed if row["captured"]), key=lambda row: (row["group"], row["step"], row["slot"])
    )
    steps = {}
    for row in captured:
        steps.setdefault((row["group"], row["step"]), []).append(row["token"])
    walked = list(replay(ds, True, window))
    assert [(step.group, step.step) for step in walked] == list(steps)
    fewer = 0
    for step, tokens in zip(walked, steps.values(), strict=True):
        own = [token for token in tokens if token in tokens_of(half)]
        fewer += own != tokens
        assert step.token.tolist() == tokens
        assert [(rows.layer, rows.matrix) for rows in step] == (ds.leaves if own else ds.leaves[:-1])
        for rows in step:
            assert rows.token.tolist() == (own if rows.layer is None else tokens)
        rows = step[HEAD]
        assert same(rows.dense(), dense(half, own))
        assert rows.offsets.tolist() == [0, *np.cumsum((dense(half, own) != 0).sum(1))]
        assert repr(step).endswith("tokens, up to 15 operands each)")
    assert fewer
    everything = np.sort(np.concatenate(list(ds.batches(2))))
    assert np.array_equal(everything, half.tokens)


def test_replay_skips_it_in_a_step_that_multiplies_nothing_with_it(half):
    """Prompt positions before the last."""
    ds = sparsetrace.open(half.workload)
    others = [token for token in half.tokens.tolist() if token not in tokens_of(half)]
    for step in ds.select(token=others, matrix=["up", "lm_head"]).replay():
        assert [(rows.layer, rows.matrix) for rows in step] == [(0, "up"), (1, "up")]
        assert len(step[HEAD]) == 0
        assert step[HEAD].keep().shape == (0, WIDTH)


def test_twin(built):
    ds = sparsetrace.open(built.workload).select(matrix=["lm_head", "q"])
    twin = ds.twin(3)
    rows = twin.matrix(*HEAD)
    assert rows.token.tolist() == tokens_of(built)
    p = ds.density(*HEAD)
    inputs = len(rows) * WIDTH
    assert abs(rows.nnz.sum() - p * inputs) < 5 * np.sqrt(p * (1 - p) * inputs)
    assert not np.array_equal(rows.mask, ds.matrix(*HEAD).mask)
    token = tokens_of(built)[7]
    assert np.array_equal(twin[None, "lm_head", token], rows.dense()[7])
    assert np.array_equal(ds.twin(3).select(token=token).matrix(*HEAD).dense(), rows.dense()[7:8])


def statistics_of(tables, name, kind):
    return [r for r in tables[name].to_pylist() if (r["masks"], r["layer"], r["matrix"]) == (kind, *HEAD)]


@pytest.mark.parametrize("kind", ["real", "twin"])
def test_statistics(half, kind):
    """By brute force over the rows that there are; the full set of formulas is in test_stats."""
    ds = sparsetrace.open(half.workload)
    tables = stats.statistics(ds, seed=2)
    keep = (ds if kind == "real" else ds.twin(2)).matrix(*HEAD).keep()
    fed = half.head_rows
    for phase in ("prefill", "decode"):
        own = [keep[i] for i, row in enumerate(fed) if row["phase"] == phase]
        (row,) = [r for r in statistics_of(tables, "sparsity", kind) if r["phase"] == phase]
        assert (row["rows"], row["nnz"]) == (len(own), np.sum(own))
    for row in statistics_of(tables, "positions", kind):
        own = [keep[i] for i, r in enumerate(fed) if r["position"] == row["position"]]
        assert (row["rows"], row["nnz"]) == (len(own), np.sum(own))
    assert [row["hits"] for row in statistics_of(tables, "neurons", kind)] == keep.sum(0).tolist()
    shares = []
    for (i, one), (j, other) in pairwise(enumerate(fed)):
        if other["token"] - one["token"] == 1 and one["sequence"] == other["sequence"]:
            shares.append((keep[i] & keep[j]).sum() / (keep[i] | keep[j]).sum() if (keep[i] | keep[j]).any() else None)
    known = [share for share in shares if share is not None]
    (row,) = [r for r in statistics_of(tables, "overlap", kind) if r["lag"] == 1]
    assert (row["pairs"], row["jaccard"]) == (len(known), pytest.approx(np.mean(known)))
    unions = []
    for first in range(0, 6, 2):
        for nth in range(9):
            own = []
            for sequence in (first, first + 1):
                decode = [i for i, r in enumerate(fed) if r["sequence"] == sequence and r["phase"] == "decode"]
                own += decode[nth : nth + 1]
            if len(own) == 2:
                unions.append(keep[own].any(axis=0).mean())
    (row,) = [r for r in statistics_of(tables, "unions", kind) if (r["over"], r["size"]) == ("batch", 2)]
    assert (row["unions"], row["density"]) == (len(unions), pytest.approx(np.mean(unions)))
    assert statistics_of(tables, "layers", kind) == []


def test_statistics_of_what_has_no_row(half):
    """Of a prompt's earlier positions `lm_head` has none: it is in no table, and alone it is refused."""
    ds = sparsetrace.open(half.workload)
    others = ds.select(token=np.setdiff1d(ds.tokens, ds.tokens_of(*HEAD)))
    tables = stats.statistics(others.select(matrix=["q", "lm_head"]))
    assert set(tables["neurons"]["matrix"].to_pylist()) == {"q"}
    assert all(statistics_of(tables, name, kind) == [] for name in tables for kind in ("real", "twin"))
    with pytest.raises(InputError, match="the selection must hold at least one row, got none"):
        stats.statistics(others.select(matrix="lm_head"))


def test_a_summary_of_statistics_is_of_the_layers(half):
    """An operand that no method thins out would dilute the means; alone it is what was asked for."""
    ds = sparsetrace.open(half.workload).select(matrix=["q", "lm_head"])
    assert stats.summary(stats.statistics(ds)) == stats.summary(stats.statistics(ds.select(matrix="q")))
    alone = dict((name, real) for name, real, _ in stats.summary(stats.statistics(ds.select(matrix="lm_head"))))
    assert alone["sparsity"] == pytest.approx(1 - ds.density(*HEAD))


def test_exports(half, tmp_path):
    ds = sparsetrace.open(half.workload)
    x = dense(half, tokens_of(half)).astype(np.float32)
    paths = {}
    for form in FORMS:
        paths[form] = tmp_path / file_name(*HEAD, form)
        export(ds, *HEAD, form, paths[form])
    assert paths["npy"].name == "model.lm_head.npy"
    assert file_name(3, "up", "mtx") == "L03.up.mtx"
    assert np.array_equal(np.load(paths["npy"]).astype(np.float32), x)
    assert np.array_equal(np.load(paths["bitmask"]), x != 0)
    assert paths["smtx"].read_text().startswith(f"{len(x)}, {WIDTH}, {(x != 0).sum()}\n")
    assert paths["mtx"].read_text().splitlines()[1] == ("% sparsetrace matrix lm_head: rows are tokens, columns inputs")
    with safe_open(paths["safetensors"], framework="np") as file:
        assert file.metadata() == {"format": "sparse_csr", "matrix": "lm_head"}
        assert file.get_tensor("token").tolist() == tokens_of(half)
    with pytest.raises(InputError, match="the selection must hold at least one row of lm_head, got none"):
        export(ds.select(token=3), *HEAD, "npy", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_torch(built, workers):
    ds = sparsetrace.open(built.workload)
    x = dense(built, tokens_of(built)).astype(np.float32)
    data = OperandDataset(ds, *HEAD)
    assert len(data) == len(x)
    assert data.tokens.tolist() == tokens_of(built)
    rows = torch.cat(list(DataLoader(data, batch_size=8, num_workers=workers)))
    assert rows.dtype == getattr(torch, built.dtype)
    assert np.array_equal(rows.float().numpy(), x)
    rows = torch.cat(list(DataLoader(OperandStream(ds, *HEAD), batch_size=8, num_workers=workers)))
    assert sorted(map(tuple, rows.float().numpy())) == sorted(map(tuple, x))


@pytest.mark.parametrize("kind", ["runtime", "original"])
def test_weight_and_product(half, tmp_path, kind):
    """Both kinds of model keep it as the checkpoint does, [out, in]."""
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    name, stored = ("lm_head", weight.half()) if kind == "runtime" else ("lm_head.weight", weight)
    save_file({name: stored}, tmp_path / "model.safetensors")
    ds = sparsetrace.open(half.workload, model=tmp_path)
    row = ds._stored.by_leaf[HEAD]
    row |= {"weight": "lm_head", "weight_sha256": "0" * 64}
    with pytest.raises(InputError, match="lm_head must have sha256 000000000000, got "):
        ds.weight(*HEAD)
    row |= {"weight_sha256": hashlib.sha256(weight.half().numpy().data).hexdigest()}
    exact = weight.half().double().T.numpy()
    assert np.array_equal(ds.weight(*HEAD), exact)
    assert ds.weight_mask(*HEAD) is None
    token = tokens_of(half)[9]
    wanted = dense(half, [token])[0].astype(np.float64) @ exact
    assert np.allclose(ds.product(*HEAD, token), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_summary_of_a_workload(half):
    lines = str(sparsetrace.open(half.workload)).splitlines()
    assert lines[-1].split()[:5] == ["lm_head", str(WIDTH), str(VOCABULARY), "-", "-"]


def test_nothing_else_was_captured(tmp_path):
    built = write_dump(tmp_path, "bfloat16", sites=(SITE,), some={SITE.key: has_logits})
    folder = pack_all(built)
    assert verify(folder) == []
    ds = sparsetrace.open(folder)
    assert (ds.layers, ds.leaves) == (0, [HEAD])
    assert ds.matrix(*HEAD).token.tolist() == built.tokens_of[HEAD].tolist()
    assert sum(len(rows) for step in ds.replay() for rows in step) == len(built.tokens_of[HEAD])
    assert str(ds).splitlines()[-1].split()[0] == "lm_head"
    assert {name for name, _, _ in stats.summary(stats.statistics(ds))} >= {"sparsity", "Gini of the hits"}
    with pytest.raises(InputError, match="layer and matrix must be None and one of lm_head, got 0 and 'q'"):
        ds.matrix(0, "q")
    with pytest.raises(InputError, match="layer must be left out, since no matrix belongs to a layer, got 0"):
        ds.select(layer=0)
