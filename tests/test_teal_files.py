"""TEAL's published calibration: thresholds against figures of TEAL's own code, and sets that belong elsewhere.

`fixtures/teal/icdf.csv` holds TEAL's `Distribution.icdf` for all layers and matrices (its README says how it was made);
the real histograms of one layer lie beside it. Where SPARSETRACE_TEAL names the folder of Llama-2-7B's files
(`histograms`, `lookup`), all 896 figures are compared.
"""

import csv
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sparsetrace.calibration.teal_files import MATRICES, SITE_OF, import_teal, read_lookup
from sparsetrace.calibration.teal_histograms import PLACES, SignedHistogram, read_histograms
from sparsetrace.calibration.threshold_file import read_threshold_file
from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import Site

FIXTURES = Path(__file__).parent / "fixtures" / "teal"
LLAMA_2_7B = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
CONFIG = {"hidden_size": 6, "num_attention_heads": 2, "intermediate_size": 10, "num_hidden_layers": 2}
WIDTHS = {"attn_in": 6, "attn_out": 6, "mlp_in": 6, "mlp_mid": 10}
SPARSITIES = ("0.25", "0.4", "0.5", "0.65")


def figures():
    with (FIXTURES / "icdf.csv").open() as file:
        return {(int(row["layer"]), row["matrix"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def real():
    """The four histograms of Llama-2-7B's layer 24, by site."""
    arrays = np.load(FIXTURES / "layer-24.npz")
    return {
        site: SignedHistogram(
            torch.from_numpy(arrays[f"{site}.centers"]), torch.from_numpy(arrays[f"{site}.counts"].astype(np.float32))
        )
        for site in PLACES
    }


def test_figures_are_complete():
    assert set(figures()) == {(layer, matrix) for layer in range(32) for matrix in MATRICES}


def test_equals_teals_own_quantile(real):
    for matrix in MATRICES:
        for sparsity in SPARSITIES:
            found = real[SITE_OF[matrix]].teal_threshold(float(sparsity))
            assert found == float(figures()[24, matrix][sparsity])


@pytest.mark.skipif("SPARSETRACE_TEAL" not in os.environ, reason="SPARSETRACE_TEAL names no folder of TEAL's files")
def test_equals_teals_own_quantile_everywhere():
    found = read_histograms(Path(os.environ["SPARSETRACE_TEAL"]) / "histograms", 32)
    for (layer, matrix), row in figures().items():
        for sparsity in SPARSITIES:
            assert found[layer, SITE_OF[matrix]].teal_threshold(float(sparsity)) == float(row[sparsity])


def test_real_histograms_miss_the_target_by_teals_rule_and_not_by_magnitude(real):
    """P(|x| <= t) counted bin by bin: `o` of layer 24 drops 23.5 % at 25 %."""
    for site, histogram in real.items():
        centers, counts = histogram.centers.double().numpy(), histogram.counts.double().numpy()
        for sparsity in map(float, SPARSITIES):
            for threshold in (histogram.teal_threshold(sparsity), histogram.magnitude_threshold(sparsity)):
                inside = (np.abs(centers) <= threshold).sum()
                # a bin more or less at either edge
                step = 2 * counts[np.abs(np.abs(centers) - threshold).argsort()[:4]].max() / counts.sum()
                share = counts[np.abs(centers) <= threshold].sum() / counts.sum()
                assert inside > 10
                assert abs(histogram.implied_sparsity(threshold) - share) <= step
            exact = histogram.implied_sparsity(histogram.magnitude_threshold(sparsity))
            assert exact == pytest.approx(sparsity, abs=1e-9), site
    assert real["attn_out"].implied_sparsity(real["attn_out"].teal_threshold(0.25)) == pytest.approx(0.2349, abs=1e-4)


def test_rules_on_a_histogram_that_is_known():
    """Ten activations in five bins; quantiles by hand."""
    histogram = SignedHistogram(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0, 2.0, 1.0]))
    # cumulative 1 3 7 9 10; 0.5 + s/2 of 10 is 8 for s = 0.6: half way between 0 (7) and 1 (9)
    assert histogram.teal_threshold(0.6) == pytest.approx(0.5)
    assert histogram.teal_threshold(0) == histogram.magnitude_threshold(0) == 0
    # F(1) - F(-1) = 0.9 - 0.3, linear from 0 at t = 0
    assert histogram.implied_sparsity(1.0) == pytest.approx(0.6)
    assert histogram.magnitude_threshold(0.3) == pytest.approx(0.5)
    assert histogram.implied_sparsity(0.0) == 0
    assert histogram.mass == 10


def write(folder: Path, rng, tokens=20, widths=WIDTHS, layers=2) -> Path:
    """A set in TEAL's layout; each site's mass is tokens x width."""
    for layer in range(layers):
        content = {"self_attn": {}, "mlp": {}}
        for site, (part, key) in PLACES.items():
            x = np.sort(rng.normal(size=tokens * widths[site]))
            counts, edges = np.histogram(x, bins=50)
            content[part][key] = torch.from_numpy(counts).float()
            content[part][f"{key}_centers"] = torch.from_numpy((edges[1:] + edges[:-1]) / 2).float()
        for part, tensors in content.items():
            path = folder / f"layer-{layer}" / part
            path.mkdir(parents=True)
            torch.save(tensors, path / "histograms.pt")
    return folder


def write_lookup(folder: Path, layers=2) -> Path:
    """Three steps; the first loses to uniform."""
    for layer in range(layers):
        path = folder / f"layer-{layer}"
        path.mkdir(parents=True)
        rows = [(0.1, 2.0, 1.0), (0.3, 2.0, 3.0), (0.5, 4.0, 5.0)]
        lines = ["Effective Sparsity,Activation Error,Baseline Error," + ",".join(MATRICES)]
        lines += [",".join(map(str, (*row, *(round(row[0] + i / 100, 2) for i in range(7))))) for row in rows]
        (path / "results.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(tmp_path):
    def put(**changes):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
        return tmp_path / "config.json"

    return put


@pytest.mark.parametrize("rule", ["teal", "magnitude"])
def test_imports_a_set(tmp_path, rng, config, rule):
    folder, out = write(tmp_path / "h", rng), tmp_path / "t.parquet"
    import_teal(folder, config(), 0.5, out, rule)
    table = pq.read_table(out)
    assert table.column_names == ["layer", "matrix", "sparsity", "threshold", "implied_sparsity"]
    rows = table.to_pylist()
    assert [(row["layer"], row["matrix"]) for row in rows] == [(la, m) for la in range(2) for m in MATRICES]
    histograms = read_histograms(folder, 2)
    for row in rows:
        histogram = histograms[row["layer"], SITE_OF[row["matrix"]]]
        expected = histogram.teal_threshold(0.5) if rule == "teal" else histogram.magnitude_threshold(0.5)
        assert row["threshold"] == expected > 0
        assert row["implied_sparsity"] == histogram.implied_sparsity(expected)
    choices = read_threshold_file(out, [Site("in", layer, MATRICES, 6, (6,) * 7) for layer in range(2)])
    assert choices[1, "down"].threshold == rows[-1]["threshold"]
    assert choices[1, "down"].sparsity == 0.5


def test_greedy_targets_from_the_lookup(tmp_path, rng, config):
    folder, lookup = write(tmp_path / "h", rng), write_lookup(tmp_path / "l")

    def targets(sparsity):
        rows = import_teal(folder, config(), sparsity, tmp_path / "t.parquet", "teal", lookup).to_pylist()
        return [Fraction(str(row["sparsity"])) for row in rows if row["layer"] == 1]

    # the nearest row
    assert targets(0.32) == [Fraction(30 + i, 100) for i in range(7)]
    assert targets(0.45) == [Fraction(50 + i, 100) for i in range(7)]
    # the search lost there, so uniform
    assert targets(0.12) == [Fraction(12, 100)] * 7
    with pytest.raises(
        InputError, match=r"layer 0 of .* sparsity must be at most 0.5000, where its table ends, got 0.6"
    ):
        targets(0.6)


def test_the_published_row_that_loses_to_uniform(tmp_path):
    """Layer 16 of Llama-2-7B: 0.0071 against 0.0062 at 0.41 %; everywhere else the search wins."""
    (tmp_path / "layer-0").mkdir()
    (tmp_path / "layer-0" / "results.csv").write_bytes((FIXTURES / "results-layer-16.csv").read_bytes())
    table = read_lookup(tmp_path, 1)[0]
    assert (len(table.error), table.worse_than_uniform()) == (218, [0])
    assert table.lookup(0.004, "test") == (dict.fromkeys(MATRICES, 0.004), True)
    found, uniform = table.lookup(0.5, "test")
    assert not uniform
    assert sum(found.values()) / 7 == pytest.approx(0.5, abs=0.1)
    assert table.effective[-1] > 0.9


def test_a_set_of_another_model_is_refused(tmp_path, rng, config):
    """As published: Llama-3-8B's set is Llama-2-7B's, whose feed-forward width is another."""
    with pytest.raises(
        InputError, match=r"must be a multiple of the model's width at every site, got 200 in layer 0 at "
    ):
        import_teal(write(tmp_path / "h", rng), config(intermediate_size=14), 0.5, tmp_path / "t")
    # 15 divides 200 tokens' worth at neither site, but 20 divides it: the tokens then differ
    with pytest.raises(InputError, match="same number of tokens at every site, got 10 in layer 0 at mlp_mid and 20"):
        import_teal(tmp_path / "h", config(intermediate_size=20), 0.5, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_set_that_lost_a_count_is_accepted_on_demand_only(tmp_path, rng, config):
    """As published for Mistral-7B: one histogram lacks one activation."""
    folder = write(tmp_path / "h", rng)
    path = folder / "layer-1" / "mlp" / "histograms.pt"
    tensors = torch.load(path, weights_only=True)
    tensors["h2"][tensors["h2"].argmax()] -= 1
    torch.save(tensors, path)
    message = "got 199 in layer 1 at mlp_mid, which is 1 short of 20 times 10: accept that with --lost 1"
    with pytest.raises(InputError, match=message):
        import_teal(folder, config(), 0.5, tmp_path / "t")
    assert import_teal(folder, config(), 0.5, tmp_path / "t", lost=1).num_rows == 14
    tensors["h2"][tensors["h2"].argmax()] += 2
    torch.save(tensors, path)
    with pytest.raises(InputError, match="which is 9 short of 21 times 10|which is 20.10 times 10"):
        import_teal(folder, config(), 0.5, tmp_path / "t", lost=1)


def test_the_published_copy_is_refused(tmp_path, real, config):
    """The real masses of Llama-2-7B's layer 24 under Llama-3-8B's config."""
    for model, fits in ((LLAMA_2_7B, True), (LLAMA_3_8B, False)):
        masses = {site: histogram.mass for site, histogram in real.items()}
        widths = {"attn_in": 4096, "attn_out": 4096, "mlp_in": 4096, "mlp_mid": model["intermediate_size"]}
        assert all(mass % widths[site] == 0 for site, mass in masses.items()) == fits


REFUSALS = [
    # id, what is done to the set, message
    (
        "missing-layer",
        lambda f: (f / "h/layer-1").rename(f / "h/other"),
        "must cover all 2 layers of the model, got none of 1",
    ),
    ("more-layers", lambda f: (f / "h/layer-2").mkdir(), "must be of the model's 2 layers, got layer 2 too"),
    ("no-file", lambda f: (f / "h/layer-1/mlp/histograms.pt").unlink(), "must be a file, got nothing there"),
    (
        "no-key",
        lambda f: torch.save({"h1": torch.ones(3)}, f / "h/layer-1/mlp/histograms.pt"),
        "must hold h1 and h1_centers",
    ),
    (
        "pickle",
        lambda f: torch.save(os.system, f / "h/layer-0/mlp/histograms.pt"),
        "must be tensors saved by torch, got ",
    ),
    ("text", lambda f: (f / "h/layer-0/mlp/histograms.pt").write_text("x"), "must be tensors saved by torch, got "),
    (
        "list",
        lambda f: torch.save([torch.ones(3)], f / "h/layer-0/mlp/histograms.pt"),
        "must hold named tensors, got list",
    ),
    ("lookup-layer", lambda f: (f / "l/layer-0").rename(f / "l/x"), "lookup tables in .* must cover all 2 layers"),
    (
        "lookup-column",
        lambda f: (f / "l/layer-0/results.csv").write_text("q,k\n1,2\n"),
        "must have the columns Effective",
    ),
    ("lookup-text", lambda f: (f / "l/layer-1/results.csv").write_text("\n"), "must list ascending finite"),
]


@pytest.mark.parametrize(("spoil", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSALS])
def test_refuses(tmp_path, rng, config, spoil, message):
    folder, lookup = write(tmp_path / "h", rng), write_lookup(tmp_path / "l")
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        import_teal(folder, config(), 0.4, tmp_path / "t.parquet", "teal", lookup)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t.parquet").exists()


def test_refuses_odd_numbers(tmp_path, rng, config):
    folder = write(tmp_path / "h", rng)
    with pytest.raises(InputError, match="sparsity must be at least 0 and below 1, got 1"):
        import_teal(folder, config(), 1, tmp_path / "t")
    with pytest.raises(InputError, match="num_hidden_layers must be a positive integer, got '2'"):
        import_teal(folder, config(num_hidden_layers="2"), 0.5, tmp_path / "t")
    path = folder / "layer-0/mlp/histograms.pt"
    for counts, centers in (
        ([1.5, 2.5], [0.0, 1.0]),
        ([-1.0, 2.0], [0.0, 1.0]),
        ([1.0, 2.0], [1.0, 0.0]),
        ([1.0, 2.0], [0.0, float("nan")]),
    ):
        torch.save({"h1": torch.tensor(counts), "h1_centers": torch.tensor(centers)}, path)
        with pytest.raises(InputError, match="must be counts over ascending bin centers"):
            import_teal(folder, config(), 0.5, tmp_path / "t")
