"""Reading a packed workload against the dense operands that it was made from: every bit must be equal."""

import re
import threading

import numpy as np
import pytest
import torch
from workload_testing import LAYERS, MATRICES, build

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.packing import gather
from sparsetrace.packing.card import data_card
from sparsetrace.workload import stored
from sparsetrace.workload.schedule import replay

LEAVES = [(layer, matrix) for layer in range(LAYERS) for matrix in MATRICES]


def patterns(built, values):
    return FORMATS[built.dtype].from_float(values)


@pytest.mark.parametrize("encoding", ["split", "open"])
@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_every_operand(built, tmp_path, encoding, share_inputs):
    again = build(tmp_path, built.dtype, encoding=encoding, share_inputs=share_inputs)
    ds = sparsetrace.open(again.workload)
    assert ds.leaves == LEAVES
    assert np.array_equal(ds.tokens, built.tokens)
    for layer, matrix in LEAVES:
        x = built.dense[layer, matrix]
        rows = ds.matrix(layer, matrix)
        assert (rows.layer, rows.matrix) == (layer, matrix)
        assert rows.dense().dtype == built.values(layer, matrix).dtype
        assert rows.dense().tobytes() == built.values(layer, matrix).tobytes()
        assert np.array_equal(rows.keep(), x != 0)
        assert np.array_equal(rows.indices(), np.nonzero(x)[1])
        assert np.array_equal(rows.patterns, x[x != 0])
        assert np.array_equal(rows.bitmask(), np.packbits(x != 0, axis=1, bitorder="little"))
        assert np.array_equal(rows.csr().toarray(), built.values(layer, matrix).astype(np.float32))
        assert np.array_equal(ds.matrix(layer, matrix, values=False).keep(), x != 0)
        figures = ds.figures(layer, matrix).to_pydict()
        exact = built.values(layer, matrix).astype(np.float64)
        assert figures["nnz"] == (x != 0).sum(1).tolist()
        assert np.array_equal(np.float32(figures["absmax"]), np.abs(exact).max(1).astype(np.float32))
        assert np.allclose(figures["l2"], np.sqrt((exact**2).sum(1)), rtol=1e-6)


def test_torch_forms_are_bitwise_equal(built):

    ds = sparsetrace.open(built.workload)
    x = built.dense[1, "down"]
    dense = ds.matrix(1, "down").torch()
    assert dense.dtype == getattr(torch, built.dtype)
    assert np.array_equal(dense.view(torch.int16 if x.itemsize == 2 else torch.int32).numpy().view(x.dtype), x)
    assert torch.equal(ds.matrix(1, "down").torch_csr().to_dense(), dense)


def test_tokens_in_any_order_and_twice(half):
    ds = sparsetrace.open(half.workload)
    at = np.random.default_rng(1).integers(0, len(half.tokens), 50)
    assert np.array_equal(patterns(half, ds[1, "o", half.tokens[at]]), half.dense[1, "o"][at])


def test_select_matches_a_filter_of_the_rows(half):
    ds = sparsetrace.open(half.workload)
    rows = sorted((row for row in half.fed if row["captured"]), key=lambda row: row["token"])
    cases = [
        ({"sequence": 2}, lambda r: r["sequence"] == 2),
        ({"sequence": [0, 5]}, lambda r: r["sequence"] in (0, 5)),
        ({"sequence": {0, 5}}, lambda r: r["sequence"] in (0, 5)),
        ({"position": (i for i in (4, 6))}, lambda r: r["position"] in (4, 6)),
        ({"position": slice(3, 7)}, lambda r: 3 <= r["position"] < 7),
        ({"position": slice(None, None, 3)}, lambda r: r["position"] % 3 == 0),
        ({"phase": "prefill"}, lambda r: r["phase"] == "prefill"),
        ({"phase": "decode", "token": slice(100, 400)}, lambda r: r["phase"] == "decode" and 100 <= r["token"] < 400),
        ({"phase": "forced"}, lambda r: False),
    ]
    for chosen, holds in cases:
        part = ds.select(**chosen, layer=1, matrix=["up", "q"])
        at = [i for i, row in enumerate(rows) if holds(row)]
        assert part.leaves == [(1, "q"), (1, "up")]
        assert part.tokens.tolist() == [rows[i]["token"] for i in at]
        assert np.array_equal(patterns(half, part.matrix(1, "up").dense()), half.dense[1, "up"][at])
        assert part.figures(1, "up").num_rows == len(at)
    assert len(ds.select(sequence=2).select(phase="prefill").tokens) == 1
    some = [i for i, row in enumerate(rows) if 4 <= row["token"] < 300]
    assert np.array_equal(patterns(half, ds[1, "up", 4:300]), half.dense[1, "up"][some])
    # a selection keeps the probabilities of the twin that it was taken from
    assert ds.twin(0).select(sequence=2).density(0, "q") == ds.density(0, "q") != ds.select(sequence=2).density(0, "q")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: ds.matrix(9, "q"), "layer and matrix must be 0 to 1"),
        (lambda ds: ds.matrix(0, "qq"), "one of q, k, v, o, gate, up, down, got 0 and 'qq'"),
        (lambda ds: ds[0, "q", 99], "token must be one that was captured"),
        (lambda ds: ds.select(sequence=0)[0, "q", 201], "token must be one that was captured"),
        (lambda ds: ds.select(matrix="w"), "matrix must be among q, k, v, o, gate, up, down, got w"),
        (lambda ds: ds.select(phase="train"), "phase must be among prefill, decode, forced, got train"),
        (lambda ds: ds.select(position=slice(-4, None)), "a slice of position must have a start and stop from 0"),
        (lambda ds: ds.weight(0, "q"), "model must be named for its weights"),
        (lambda ds: ds.batches(0), "size must be a whole number of at least 1, got 0"),
        (lambda ds: ds.batches(2.5), "size must be a whole number of at least 1, got 2.5"),
        (lambda ds: ds.select(layer=[0, 9]), "layer must be 0 to 1, got 0, 9"),
        (lambda ds: ds.select(layer=slice(2, 4)), "layer must be 0 to 1, got slice(2, 4, None)"),
        (lambda ds: ds.select(matrix=5), "matrix must be among q, k, v, o, gate, up, down, got 5"),
        (lambda ds: ds.select(sequence="1"), "sequence must be a whole number, a slice or a list of them, got '1'"),
        (lambda ds: ds.select(position=1.5), "position must be a whole number, a slice or a list of them, got 1.5"),
        (lambda ds: ds.select(token=ds.tokens > 9), "token must be a whole number, a slice or a list of them, got "),
        (lambda ds: ds[0, "q", 3.5], "token must be a whole number, a slice or a list of them, got 3.5"),
        (lambda ds: ds[0, "q", -3:], "a slice of token must have a start and stop from 0"),
        (lambda ds: ds.sparse(0, "q", [3, 4]), "token must be one number, got [3, 4]"),
        (lambda ds: ds.product(0, "q", slice(3)), "token must be one number, got slice"),
        (lambda ds: ds.blocks(0, "q", tokens=ds.tokens[::-1]), "tokens must ascend"),
        (lambda ds: ds.weight_mask(9, "q"), "layer and matrix must be 0 to 1"),
        (lambda ds: next(ds.replay())[0, "w"], "layer and matrix must be among those of the selection, got (0, 'w')"),
        (lambda ds: ds.twin(-1), "seed must be 0 to 2**64 - 1, got -1"),
        (lambda ds: ds.twin(1 << 64), "seed must be 0 to 2**64 - 1, got 18446744073709551616"),
        (lambda ds: ds.twin(0).figures(0, "q"), "rows must be real ones, got the i.i.d. twin"),
    ],
)
def test_refusals(half, call, message):
    with pytest.raises(sparsetrace.InputError, match=re.escape(message)):
        call(sparsetrace.open(half.workload))


def test_replay_is_the_order_of_execution(half):
    ds = sparsetrace.open(half.workload)
    captured = [row for row in half.fed if row["captured"]]
    wanted = sorted(captured, key=lambda row: (row["group"], row["step"], row["slot"]))
    for window in (1, 1 << 30):
        walked = list(replay(ds, True, window))
        assert [int(t) for step in walked for t in step.token] == [row["token"] for row in wanted]
        assert [(s.group, s.step) for s in walked] == sorted({(r["group"], r["step"]) for r in wanted})
        for step in walked:
            assert [(rows.layer, rows.matrix) for rows in step] == LEAVES
            at = np.searchsorted(half.tokens, step.token)
            for rows in step:
                assert np.array_equal(patterns(half, rows.dense()), half.dense[rows.layer, rows.matrix][at])
    masks = next(iter(ds.replay()))[0, "q"]
    assert masks.bits is None
    with pytest.raises(sparsetrace.InputError, match="values must have been captured"):
        masks.dense()


def test_batches(half):
    ds = sparsetrace.open(half.workload)
    captured = [row for row in half.fed if row["captured"]]
    run = {}
    for row in sorted(captured, key=lambda row: (row["group"], row["step"], row["slot"])):
        run.setdefault((row["group"], row["step"]), []).append(row["token"])
    assert [batch.tolist() for batch in ds.batches()] == list(run.values())

    sizes = [batch.tolist() for batch in ds.select(phase="decode").batches(4)]
    regrouped = []
    for first in range(0, 6, 4):
        for nth in range(9):
            batch = []
            for sequence in range(first, min(first + 4, 6)):
                own = [r["token"] for r in captured if r["sequence"] == sequence and r["phase"] == "decode"]
                batch += own[nth : nth + 1]
            if batch:
                regrouped.append(batch)
    assert sizes == regrouped
    everything = np.sort(np.concatenate(list(ds.batches(2))))
    assert np.array_equal(everything, half.tokens)
    prompts = [batch.tolist() for batch in ds.select(phase="prefill", sequence=3).batches(2)]
    assert prompts == [[303, 304], [305]]


def test_twin_has_equal_density_and_its_own_masks(built):
    ds = sparsetrace.open(built.workload)
    twin = ds.twin(seed=1)
    kept = inputs = 0
    for layer, matrix in LEAVES:
        real, random = ds.matrix(layer, matrix), twin.matrix(layer, matrix)
        assert np.array_equal(random.token, real.token)
        assert random.dense().shape == real.dense().shape
        assert np.array_equal(random.keep(), random.dense() != 0)
        # values come from the same row
        for i in range(len(real)):
            own = set(real.patterns[real.offsets[i] : real.offsets[i + 1]].tolist()) or {
                int(FORMATS[built.dtype].from_float(np.ones(1))[0])
            }
            assert set(random.patterns[random.offsets[i] : random.offsets[i + 1]].tolist()) <= own
        p = real.nnz.sum() / (len(real) * real.features)
        spread = 5 * np.sqrt(p * (1 - p) * len(real) * real.features)
        assert abs(random.nnz.sum() - real.nnz.sum()) < spread
        kept, inputs = kept + random.nnz.sum(), inputs + len(real) * real.features
    # the same rows whatever they are read with
    token = built.tokens[7]
    assert np.array_equal(twin[1, "up", int(token)], twin.matrix(1, "up").dense()[7])
    assert np.array_equal(ds.twin(1)[1, "up", int(token)], twin[1, "up", int(token)])
    assert not np.array_equal(ds.twin(2).matrix(1, "up").mask, twin.matrix(1, "up").mask)


def test_threads_read_what_one_reads(half):
    ds = sparsetrace.open(half.workload)
    faults = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            layer, matrix = LEAVES[rng.integers(len(LEAVES))]
            at = int(rng.integers(len(half.tokens)))
            if not np.array_equal(
                patterns(half, ds[layer, matrix, int(half.tokens[at])]), half.dense[layer, matrix][at]
            ):
                faults.append((layer, matrix, at))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("read_bytes", [1, 4 << 20], ids=["one", "all"])
def test_row_groups_are_read_one_or_many_at_a_time(tmp_path, monkeypatch, rng, read_bytes):
    monkeypatch.setattr(gather, "row_group_rows", lambda features: 3)
    monkeypatch.setattr(stored, "READ_BYTES", read_bytes)
    built = build(tmp_path, "float16")
    ds = sparsetrace.open(built.workload)
    x = built.dense[1, "up"]
    blocks = list(ds.blocks(1, "up"))
    assert np.array_equal(patterns(built, np.concatenate([rows.dense() for rows in blocks])), x)
    assert (max(map(len, blocks)) > 3) == (read_bytes > 1)
    assert ds.figures(1, "up")["token"].to_pylist() == built.tokens.tolist()
    for count in (1, 5, len(x) // 2):
        at = np.sort(rng.choice(len(x), count, replace=False))
        assert np.array_equal(patterns(built, ds[1, "up", built.tokens[at]]), x[at])
    assert list(stored.neighbours([0, 1, 2, 5, 6], 2)) == [(0, 2), (2, 3), (5, 7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "manifest.json must be a JSON object, got list"),
        ("{", "manifest.json must be JSON that can be read, got "),
        ('{"format": "sparsetrace-workload"}', "must have format version 1 revision 0 or 2 revision 0, got None"),
        (
            '{"format": "sparsetrace-workload", "version": 2, "revision": 7}',
            "or 2 revision 0, got 2 revision 7: install",
        ),
        ("{}", "must be a sparsetrace workload, got another manifest.json"),
    ],
)
def test_not_a_workload(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        sparsetrace.open(tmp_path)
    with pytest.raises(InputError, match="must be a file, got nothing there"):
        sparsetrace.open(tmp_path / "manifest.json")


def test_a_moved_folder_reads_the_same(half, tmp_path):
    moved = half.workload.rename(tmp_path / "elsewhere")
    try:
        assert np.array_equal(patterns(half, sparsetrace.open(moved)[0, "q", half.tokens]), half.dense[0, "q"])
        for text in ("manifest.json", "README.md", "views.sql"):
            assert str(half.folder) not in (moved / text).read_text()
    finally:
        moved.rename(half.workload)


def test_data_card_is_what_a_hub_reads(half):
    import yaml

    _, front, text = (half.workload / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["size_categories"] == ["n<1K"]
    assert {"pretty_name", "license", "tags", "task_categories", "configs"} <= set(fields)
    for config in fields["configs"]:
        assert list(half.workload.glob(config["data_files"])), config
    assert f"| rows (layer x matrix x token) | {14 * len(half.tokens)} |" in text


@pytest.mark.parametrize("name", ["made-up", "a: b # c", '"quoted"', "- x", "Ünïcode"])
def test_data_card_of_any_name(half, name):
    import yaml

    ds = sparsetrace.open(half.workload)
    text = data_card(ds.manifest | {"source": name}, ds.matrix_table)
    assert yaml.safe_load(text.split("---\n")[1])["pretty_name"] == f"{name} teal-0.5"


@pytest.mark.parametrize("level", ["masks", "stats"])
def test_capture_levels(tmp_path, level):
    built = build(tmp_path, "float16", level=level)
    ds = sparsetrace.open(built.workload)
    assert ds.level == level
    x = built.dense[1, "down"]
    figures = ds.figures(1, "down").to_pydict()
    assert figures["nnz"] == (x != 0).sum(1).tolist()
    assert np.array_equal(figures["absmax"], np.abs(built.values(1, "down")).max(1).astype(np.float32))
    if level == "masks":
        assert np.array_equal(ds.matrix(1, "down").keep(), x != 0)
        assert np.array_equal(ds.matrix(1, "down").indices(), np.nonzero(x)[1])
        assert ds.twin(0).matrix(1, "down").bits is None
    with pytest.raises(sparsetrace.InputError, match="must have been captured"):
        ds[1, "down", int(built.tokens[0])]
