"""Allocations: the greedy search against a search written here over errors of the whole model run by hand, in
float64 arithmetic, lookups by hand, and thresholds of the user's own.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from sparsetrace.calibration import greedy as step
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.greedy import SearchJob, allocate, search
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.search_table import SearchTable, read_search_table, search_table_schema
from sparsetrace.calibration.threshold_file import read_threshold_file
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.calibration.windows import calibration_windows
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Calibration, Greedy, Machine
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Site, by_leaf, layer_sites
from sparsetrace.methods import MatrixRule, Teal, Wina
from sparsetrace.model.patch import install, observe

CPU = Machine(device="cpu")
SETTINGS = Greedy(tokens=48, sequence_length=16, step=0.4)
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture
def made(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    tiny.thresholds(tmp_path, model, rng)
    return model, tmp_path / "histograms.safetensors", tmp_path / "text.txt"


def by_hand(model, histograms_path, text, layer, sparsities):
    """Error of one layer's output, the whole model run with that layer sparsified."""
    histograms, _ = Histograms.load(histograms_path)
    windows = torch.from_numpy(
        calibration_windows(model.tokenizer(), text, Calibration(tokens=48, sequence_length=16), 128)
    )
    positions = torch.arange(16).expand_as(windows)

    sites = by_leaf(layer_sites(model.sites))

    def bits(la, m):
        return histograms.threshold(la, sites[la, m].name, sparsities[m]).bits if la == layer else 0

    outputs = []
    for sparse in (False, True):
        decoder = model.load(torch.device("cpu"))
        patch = install(decoder, Teal(sparsity=0.5), [MatrixRule(*leaf, bits(*leaf)) for leaf in sites])
        patch.sparsified_BT = (positions >= 8) if sparse else False
        decoder.layers[layer].register_forward_hook(lambda _m, _i, y: outputs.append(y.double()))
        with torch.inference_mode():
            decoder(windows, positions)
    difference = (outputs[1] - outputs[0])[:, 12:].numpy()
    return np.sqrt((difference**2).sum(1)).mean()


@pytest.mark.parametrize("layer", [0, 1])
def test_table_is_that_of_a_search_by_hand(made, tmp_path, layer):
    model, histograms, text = made
    allocate(SearchJob(model, histograms, text, layer, tmp_path / "t.parquet", Teal, SETTINGS, CPU))
    metadata, table = read_search_table(tmp_path / "t.parquet")
    assert (metadata["layer"], metadata["model_hash"], metadata["method"]) == (layer, model.model_hash, "teal")
    assert pq.read_schema(tmp_path / "t.parquet").remove_metadata().equals(search_table_schema(MATRICES))
    sites = by_leaf(model.sites)
    size = {m: sites[layer, m].in_features * sites[layer, m].outputs(m) for m in MATRICES}
    # with grouped queries k is half of q, so its step is twice as long
    assert size["q"] == 2 * size["k"] == 36 * 32
    now = dict.fromkeys(MATRICES, 0.0)
    for row, (reached, error, uniform) in enumerate(
        zip(table.effective, table.error, table.uniform_error, strict=True)
    ):
        grown = {m: min(now[m] + 0.4 * size["q"] / size[m], 0.99) for m in MATRICES}
        moved = [m for m in MATRICES if table.sparsities[row][m] != now[m]]
        assert len(moved) == 1
        assert table.sparsities[row][moved[0]] == pytest.approx(grown[moved[0]], abs=1e-9)
        if row % 5 == 0:
            errors = {
                m: by_hand(model, histograms, text, layer, now | {m: round(grown[m], 12)})
                for m in MATRICES
                if now[m] < 0.99
            }
            assert errors[moved[0]] == pytest.approx(min(errors.values()), rel=1e-4)
            assert error == pytest.approx(errors[moved[0]], rel=1e-4)
            assert uniform == pytest.approx(
                by_hand(model, histograms, text, layer, dict.fromkeys(MATRICES, reached)), rel=1e-4
            )
        now = table.sparsities[row]
        assert reached == pytest.approx(sum(now[m] * size[m] for m in MATRICES) / sum(size.values()))
    assert table.effective[-2] < 0.9 <= table.effective[-1]


def test_search_goes_by_parameters_and_error():
    """Errors that are known: `down` costs nothing until 0.5, then all cost alike; k takes steps eight times as long."""
    size = dict.fromkeys(MATRICES, 800) | {"k": 100}

    def error(s):
        return 10 * max(s["down"] - 0.5, 0) + sum(s[m] for m in MATRICES if m != "down") / 10

    rows = list(search(size, 0.1, error, []))
    assert [row["down"] for row in rows[:5]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rows[5]["q"] == pytest.approx(0.1)
    first_k = next(row["k"] for row in rows if row["k"])
    assert first_k == pytest.approx(0.8)
    assert max(row[m] for row in rows for m in MATRICES) == 0.99
    assert rows[-1]["effective_sparsity"] >= 0.9
    resumed = list(search(size, 0.1, error, rows[:17]))
    assert resumed == rows[17:]


def test_goes_on_after_an_interruption(made, tmp_path, monkeypatch):
    model, histograms, text = made
    job = SearchJob(model, histograms, text, 1, tmp_path / "whole.parquet", Teal, SETTINGS, CPU)
    whole = allocate(job)

    class KilledError(Exception):
        pass

    def report(reached, of):
        if reached > 0.4:
            raise KilledError

    out = tmp_path / "again.parquet"
    job = replace(job, out=out)
    with pytest.raises(KilledError):
        allocate(job, report)
    assert not out.exists()
    done = len((tmp_path / ".again.parquet.progress").read_text().splitlines()) - 1
    assert 3 < done < whole.num_rows
    with (tmp_path / ".again.parquet.progress").open("a") as file:
        file.write('{"effective_sparsity": 0.9')
    counted = []
    plain = step.search
    monkeypatch.setattr(step, "search", lambda *a: counted.append(len(a[3])) or plain(*a))
    allocate(job)
    assert counted == [done]
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / ".again.parquet.progress").exists()
    # another step size starts anew
    with pytest.raises(KilledError):
        allocate(job, report)
    allocate(replace(job, greedy=Greedy(tokens=48, sequence_length=16, step=0.45)))
    assert counted[-1] == 0


def test_wina_is_searched_by_its_own_masks(tiny, tmp_path, rng):
    from sparsetrace.calibration.calibrate import CalibrationJob, calibrate

    model = tiny.model(tmp_path, rng)
    text, path = tmp_path / "text.txt", tmp_path / "h.safetensors"
    text.write_text(tiny.words(rng, 400))
    settings = Calibration(tokens=200, sequence_length=20)
    calibrate(CalibrationJob(model, text, path, settings, CPU, scores=["wina"]))
    for kind in (Wina, Teal):
        for layer in range(2):
            allocate(SearchJob(model, path, text, layer, tmp_path / f"{kind.name}{layer}", kind, SETTINGS, CPU))
    assert read_search_table(tmp_path / "wina0")[1].error != read_search_table(tmp_path / "teal0")[1].error
    method = Wina(sparsity=0.5, select="threshold", allocation="greedy")
    result = derive_thresholds("w", method, path, tmp_path / "t", [tmp_path / "wina0", tmp_path / "wina1"])
    assert read_thresholds(tmp_path / "t", model).method == method
    assert result.overall()[0] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(InputError, match="must be of this model and method, got another method"):
        derive_thresholds("w", method, path, tmp_path / "t", [tmp_path / "wina0", tmp_path / "teal1"])


TABLE = SearchTable(
    matrices=MATRICES,
    effective=[0.1, 0.2, 0.3, 0.92],
    error=[3.0, 1.0, 2.0, 5.0],
    uniform_error=[2.0, 2.0, 2.0, 6.0],
    sparsities=[{m: step / 10 + i / 100 for i, m in enumerate(MATRICES)} for step in range(4)],
)


@pytest.mark.parametrize(
    ("target", "step", "uniform"),
    [(0.19, 1, False), (0.26, 2, False), (0.9, 3, False), (0.12, None, True), (0.05, None, True), (0, 0, False)],
)
def test_lookup(target, step, uniform):
    found, is_uniform = TABLE.lookup(target, "test")
    assert is_uniform == uniform
    if target == 0:
        assert set(found.values()) == {0}
    else:
        assert found == (dict.fromkeys(MATRICES, target) if uniform else TABLE.sparsities[step])
    assert TABLE.worse_than_uniform() == [0]


def test_lookup_beyond_the_table():
    with pytest.raises(InputError, match=r"test: sparsity must be at most 0.9200, where its table ends, got 0.95"):
        TABLE.lookup(0.95, "test")


def write_table(path, model, layer, table=TABLE):
    rows = [
        {"effective_sparsity": e, "error": a, "uniform_error": b} | s
        for e, a, b, s in zip(table.effective, table.error, table.uniform_error, table.sparsities, strict=True)
    ]
    metadata = {"sparsetrace_greedy": json.dumps({"layer": layer, "model_hash": model.model_hash, "method": "teal"})}
    pq.write_table(pa.Table.from_pylist(rows, schema=search_table_schema(MATRICES).with_metadata(metadata)), path)
    return path


def test_thresholds_from_tables(made, tmp_path):
    model, path, _ = made
    tables = [write_table(tmp_path / f"{layer}", model, layer) for layer in (1, 0)]
    result = derive_thresholds("g", Teal(sparsity=0.3, allocation="greedy"), path, tmp_path / "t", tables)
    for row in result.rows:
        assert row["target_sparsity"] == TABLE.sparsities[2][row["matrix"]]
    assert result.notes == ("greedy loses to uniform in 2 of 8 rows, layers 0, 1",)
    result = derive_thresholds("g", Teal(sparsity=0.1, allocation="greedy"), path, tmp_path / "t", tables)
    assert {row["target_sparsity"] for row in result.rows} == {0.1}
    assert result.notes[1] == "looked up as uniform: layers 0, 1"
    with pytest.raises(InputError, match="greedy must have a table for every layer, got none for 1: run"):
        derive_thresholds("g", Teal(sparsity=0.3, allocation="greedy"), path, tmp_path / "t", tables[1:])
    with pytest.raises(InputError, match="must be a greedy table, got nothing there"):
        derive_thresholds("g", Teal(sparsity=0.3, allocation="greedy"), path, tmp_path / "t", [tmp_path / "x"])


def test_per_layer(made, tmp_path):
    model, path, _ = made
    each = {m: i / 10 for i, m in enumerate(MATRICES)}
    result = derive_thresholds("p", Teal(allocation={"per_layer": [0.25, each]}), path, tmp_path / "t")
    assert [row["target_sparsity"] for row in result.rows] == [0.25] * 7 + list(each.values())
    assert result.rows[7]["threshold_bits"] == 0
    assert read_thresholds(tmp_path / "t", model).method == result.method
    with pytest.raises(InputError, match="for each of the model's 2 layers, got 3"):
        derive_thresholds("p", Teal(allocation={"per_layer": [0.25, 0.5, 0.5]}), path, tmp_path / "t")
    with pytest.raises(InputError, match="must give a target for every matrix of layer 1, got none for k"):
        derive_thresholds("p", Teal(allocation={"per_layer": [0.25, {"q": 0.5}]}), path, tmp_path / "t")
    with pytest.raises(
        InputError, match="must name matrices of layer 1, which are q, k, v, o, gate, up, down, got qk, w$"
    ):
        derive_thresholds("p", Teal(allocation={"per_layer": [0.25, {"qk": 0.5, "w": 0}]}), path, tmp_path / "t")
    # `estimate` asks for targets of a model that nobody has checked them against
    with pytest.raises(InputError, match="must have a target for every layer of the model, got 1"):
        Teal(allocation={"per_layer": [0.25]}).target(1, "q")


def own_file(path, rows):
    table = pa.Table.from_pylist(rows)
    pa_csv.write_csv(table, path) if path.suffix == ".csv" else pq.write_table(table, path)
    return path


def own_rows(**extra):
    return [
        {"layer": la, "matrix": m, "threshold": 0.1 + la / 3 + i / 7, **extra}
        for la in range(2)
        for i, m in enumerate(MATRICES)
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_file_keeps_exactly_what_lies_above(tiny, tmp_path, rng, suffix, dtype):
    """The threshold is no number of the dtype; what is kept is what lies above it all the same."""
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    tiny.thresholds(tmp_path, model, rng)
    file = own_file(tmp_path / f"own.{suffix}", own_rows())
    method = Teal(allocation={"file": str(file)})
    result = derive_thresholds("f", method, tmp_path / "histograms.safetensors", tmp_path / "t")
    decoder, seen, sites = model.load(torch.device("cpu")), {}, by_leaf(model.sites)
    text = tmp_path / "text.txt"
    windows = torch.from_numpy(
        calibration_windows(model.tokenizer(), text, Calibration(tokens=600, sequence_length=20), 128)
    )
    with torch.inference_mode(), observe(decoder, lambda la, s, x: seen.setdefault((la, s), x)):
        decoder(windows, torch.arange(20).expand_as(windows))
    for row, given in zip(result.rows, own_rows(), strict=True):
        x = seen[sites[row["layer"], row["matrix"]].key]
        keep = method.keep(x, MatrixRule(row["layer"], row["matrix"], row["threshold_bits"]))
        above = x.double().abs() > given["threshold"]
        assert torch.equal(keep, above)
        if dtype == "float32":
            assert row["dropped"] is None, "a bucket of float32 does not say"
        else:
            assert row["dropped"] == int((~above).sum())
        assert row["target_sparsity"] is None
    assert result.overall() == (None, None)


def test_floor_of_the_formats():
    for name, number in FORMATS.items():
        for value in (0.0, 1e-50, 0.1, 1 / 3, 1.0, 1e3, 1e30, 1e300):
            bits = number.floor_bits(value)
            floor, above = (float(number.to_float(np.array([b], number.bits))[0]) for b in (bits, bits + 1))
            assert floor <= value, name
            assert above > value or math.isinf(above), name


SITES = [Site("in", layer, MATRICES, 6, (5,) * 7) for layer in range(2)] + [
    Site("head_in", None, ("lm_head",), 6, (9,))
]

REFUSALS = [
    # id, rows, message
    ("column", [{"layer": 0, "matrix": "q"}], "must have the columns layer, matrix, threshold, got no threshold"),
    ("missing", own_rows()[:-2], "must have a row for every matrix, got none for layer 1 up, layer 1 down"),
    ("twice", own_rows() + own_rows()[:1], "layer 0 q must have one row, got two"),
    (
        "layer",
        [*own_rows(), {"layer": 2, "matrix": "q", "threshold": 1.0}],
        "layer 2 q must be a matrix of a model of 2",
    ),
    ("matrix", [*own_rows(), {"layer": 0, "matrix": "w", "threshold": 1.0}], "layer 0 w must be a matrix"),
    (
        "negative",
        [*own_rows()[1:], {"layer": 0, "matrix": "q", "threshold": -1.0}],
        "must be a number of at least 0, got -1",
    ),
    (
        "nan",
        [*own_rows()[1:], {"layer": 0, "matrix": "q", "threshold": math.nan}],
        "must be .* got (nan|None)",
    ),
]


@pytest.mark.parametrize(("rows", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSALS])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_refuses_files(tmp_path, rows, message, suffix):
    with pytest.raises(InputError, match=message) as error:
        read_threshold_file(own_file(tmp_path / f"own.{suffix}", rows), SITES)
    assert "\n" not in str(error.value)


def test_refuses_what_is_no_file_of_thresholds(tmp_path):
    (tmp_path / "own.parquet").write_text("x")
    with pytest.raises(InputError, match=r"must be Parquet, or CSV with the suffix .csv"):
        read_threshold_file(tmp_path / "own.parquet", SITES)
    with pytest.raises(InputError, match="must be a file, got nothing there"):
        read_threshold_file(tmp_path / "absent.csv", SITES)


def test_refuses_layers_and_histograms_of_other_models(made, tiny, tmp_path, rng):
    model, histograms, text = made
    with pytest.raises(InputError, match="layer must be 0 to 1, got 2"):
        allocate(SearchJob(model, histograms, text, 2, tmp_path / "t", Teal, SETTINGS, CPU))
    other = tiny.model(tmp_path / "other", rng)
    with pytest.raises(InputError, match="must be of this model, got another's"):
        allocate(SearchJob(other, histograms, text, 0, tmp_path / "t", Teal, SETTINGS, CPU))
    with pytest.raises(InputError, match="method wina needs, got none of wina.q"):
        allocate(SearchJob(model, histograms, text, 0, tmp_path / "t", Wina, SETTINGS, CPU))
