"""The reader on a workload that the engine made, against its Parquet files read with plain pyarrow."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

import sparsetrace
from sparsetrace.core.settings import Batching, Decoding

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
WIDTHS = {matrix: {"o": 32, "down": 43}.get(matrix, 36) for matrix in MATRICES}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A float16 workload in two shards, and its dense rows by (layer, matrix), tokens ascending."""
    folder = tmp_path_factory.mktemp("reader")
    rng = tiny.rng("reader")
    model = tiny.model(folder, rng, torch_dtype="float16")
    batching = Batching(max_new_tokens=5, batch_size=3, shards=2)
    path = tiny.workload(
        folder / "run", model, rng, [4, 1, 6, 3, 8], Decoding(prefill="half", ignore_eos=True), batching
    )
    dense, tokens = {}, None
    for layer in range(2):
        for matrix in MATRICES:
            rows = sorted(
                (row["token"], row)
                for file in (path / f"data/L{layer:02d}/{matrix}").glob("*.parquet")
                for row in pq.ParquetFile(file).read().to_pylist()
            )
            tokens = [token for token, _ in rows]
            values = np.zeros((len(rows), WIDTHS[matrix]), np.float16)
            for i, (_, row) in enumerate(rows):
                bits = np.unpackbits(np.frombuffer(row["mask"], np.uint8), bitorder="little")[: WIDTHS[matrix]]
                planes = np.stack([np.frombuffer(row[name], np.uint8) for name in ("values_lo", "values_hi")], axis=1)
                values[i, bits.astype(bool)] = planes.copy().view("<f2")[:, 0]
            dense[layer, matrix] = values
    return path, dense, tokens


@pytest.fixture
def ds(made):
    return sparsetrace.open(made[0])


def same(found, expected) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def test_one_row(made, ds):
    _, dense, tokens = made
    assert ds.tokens.tolist() == tokens
    for (layer, matrix), expected in dense.items():
        for i, token in enumerate(tokens):
            assert same(ds[layer, matrix, token], expected[i])
            indices, values = ds.sparse(layer, matrix, token)
            assert indices.dtype == np.int32
            assert np.array_equal(indices, np.flatnonzero(expected[i]))
            assert same(values, expected[i][expected[i] != 0])
    assert same(ds[1, "o", np.int64(tokens[3])], dense[1, "o"][3])


def test_many_rows(made, ds, rng):
    _, dense, tokens = made
    expected = dense[1, "down"]
    assert same(ds[1, "down", :], expected)
    assert same(ds.matrix(1, "down").dense(), expected)
    for start, stop in ((tokens[2], tokens[9]), (0, tokens[4] + 1), (tokens[5], None), (tokens[-1] + 1, None)):
        chosen = [i for i, token in enumerate(tokens) if token >= start and (stop is None or token < stop)]
        assert same(ds[1, "down", start:stop], expected[chosen])
    at = rng.integers(0, len(tokens), 50)
    assert same(ds[1, "down", [tokens[i] for i in at]], expected[at])
    assert same(ds[1, "down", np.array(tokens)[at]], expected[at])
    assert same(ds[1, "down", [tokens[0]]], expected[:1])
    assert same(ds[1, "down", []], expected[:0])


def test_csr_is_the_dense_matrix(made, ds):
    scipy = pytest.importorskip("scipy.sparse")
    _, dense, tokens = made
    for key, expected in dense.items():
        csr = ds.matrix(*key).csr()
        assert scipy.issparse(csr)
        assert csr.shape == expected.shape
        assert csr.dtype == np.float32
        assert csr.has_canonical_format
        assert csr.nnz == (expected != 0).sum()
        assert np.array_equal(csr.toarray(), expected.astype(np.float32))
    some = ds.matrix(0, "q", tokens[3:7]).csr()
    assert np.array_equal(some.toarray(), dense[0, "q"][3:7].astype(np.float32))


def test_rows_say_what_they_are(made, ds):
    _, dense, tokens = made
    rows = ds.matrix(0, "gate", tokens[2:5])
    expected = dense[0, "gate"][2:5]
    assert (rows.layer, rows.matrix, rows.features, rows.dtype, len(rows)) == (0, "gate", 36, "float16", 3)
    assert rows.token.tolist() == tokens[2:5]
    assert np.array_equal(rows.keep(), expected != 0)
    assert rows.nnz.tolist() == (expected != 0).sum(1).tolist()
    assert np.array_equal(rows.indices(), np.nonzero(expected)[1])


REFUSALS = [
    # id, key, message
    ("layer", (2, "q", 0), "layer and matrix must be 0 to 1 and one of q, k, v, o, gate, up, down, got 2 and 'q'"),
    ("negative-layer", (-1, "q", 0), "got -1 and 'q'"),
    ("matrix", (0, "Q", 0), "got 0 and 'Q'"),
    ("swapped", ("q", 0, 0), "got q and 0"),
    ("token", (0, "q", 10**9), "token must be one that was captured .* got 1000000000"),
    ("negative", (0, "q", -1), "token must be one that was captured .* got -1"),
    ("uncaptured", (0, "q", 0), "token must be one that was captured .* got 0"),
    ("one-of-many", (0, "q", [10**9]), "got 1000000000"),
    ("step", (0, "q", slice(0, 9, 2)), "a slice of tokens must have step 1, got 2"),
    ("two", (0, "q"), r"index must be \[layer, matrix, token\], got \(0, 'q'\)"),
    ("one", 0, r"index must be \[layer, matrix, token\], got 0"),
]


@pytest.mark.parametrize(("key", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSALS])
def test_refuses(ds, key, message):
    assert 0 not in ds.tokens, "the first position of a prompt is not captured under `half`"
    with pytest.raises(sparsetrace.InputError, match=message):
        ds[key]


def test_gaps_between_captured_tokens_are_refused(made, ds):
    _, _, tokens = made
    gaps = sorted(set(range(tokens[-1])) - set(tokens))
    assert gaps
    for token in gaps:
        with pytest.raises(sparsetrace.InputError, match=f"got {token}$"):
            ds[0, "up", token]


def test_refuses_what_is_no_workload(made, tmp_path):
    path, *_ = made
    with pytest.raises(sparsetrace.InputError, match="manifest.json must be a file, got nothing there"):
        sparsetrace.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(sparsetrace.InputError, match="2 revision 0, got 99 revision 0: install the sparsetrace"):
        sparsetrace.open(copy)
    (copy / "manifest.json").write_text(json.dumps({"name": "something else"}))
    with pytest.raises(sparsetrace.InputError, match="must be a sparsetrace workload, got another manifest.json"):
        sparsetrace.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(sparsetrace.InputError, match="must be JSON"):
        sparsetrace.open(copy)


@pytest.mark.parametrize("size", [0, 3, 200, -1])
def test_refuses_a_truncated_part(made, tmp_path, size):
    path, _, tokens = made
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    part = copy / "data/L00/q/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:size])
    ds = sparsetrace.open(copy)
    assert ds[0, "k", tokens[0]].shape == (36,)
    with pytest.raises(sparsetrace.InputError, match="part-00000.parquet must be a whole Parquet file"):
        ds[0, "q", tokens[0]]


def test_threads_read_at_once(made):
    """One open workload, cold, read by many threads in every order."""
    path, dense, tokens = made
    ds = sparsetrace.open(path)

    def read(seed):
        rng = np.random.default_rng(seed)
        keys = list(dense)
        for i in rng.permutation(len(keys)):
            at = rng.integers(0, len(tokens), 5)
            if not same(ds[(*keys[i], [tokens[a] for a in at])], dense[keys[i]][at]):
                return False
            if not same(ds[(*keys[i], tokens[at[0]])], dense[keys[i]][at[0]]):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(24)))


def test_tables(made, ds):
    _, _, tokens = made
    assert ds.layers == 2
    assert ds.token_table.num_rows == sum([5, 2, 7, 4, 9]) + 5 * 4
    assert ds.token_table.filter(ds.token_table["captured"])["token"].to_pylist() == tokens
    assert ds.sequence_table.num_rows == 5
    assert ds.matrix_table.num_rows == 14
    for row in ds.sequence_table.to_pylist():
        own = ds.token_table.filter(np.equal(ds.token_table["sequence"].to_numpy(), row["sequence"]))
        assert own["token"].to_pylist() == list(range(row["base"], row["base"] + own.num_rows))
        assert own["token_id"].to_pylist() == row["prompt_ids"] + row["output_ids"][:-1]


def test_rows_and_steps_print_as_one_line(made, ds):
    _, dense, tokens = made
    kept = np.count_nonzero(dense[1, "down"])
    shown = f"{len(tokens)} tokens x {WIDTHS['down']} float16, {kept} kept"
    assert repr(ds.matrix(1, "down")) == f"Rows(layer 1, down: {shown})"
    assert repr(ds.matrix(1, "down", values=False)) == f"Rows(layer 1, down: {shown}, masks only)"
    step = next(ds.replay())
    assert repr(step) == f"Step(group=0, step={step.step}, {len(step.token)} tokens, 14 operands each)"


def test_summary_names_what_matters(made, ds):
    text = str(ds)
    for part in (str(made[0]), "2 layers, float16", "teal-0.5", f"{len(made[2])} captured of", "achieved", "down"):
        assert part in text
