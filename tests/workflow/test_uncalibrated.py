"""A study whose settings need no calibration, run by the workflow: what it makes, and what the screen shows of it."""

import pyarrow.parquet as pq
import pytest
import yaml
from study_testing import inputs, planned, snakemake, write_study

import sparsetrace
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.core.files import InputError
from sparsetrace.methods import Teal
from sparsetrace.tools.reproduce import relocated

LABELS = ("dense", "topk-0.5")


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("uncalibrated")
    inputs(folder, tiny, "uncalibrated")
    # tables of another study, which are none of this one's
    (folder / "results/demo/default/teal-0.5/workload").mkdir(parents=True)
    (folder / "text.txt").unlink()
    write_study(
        folder,
        model={"calibration_text": None, "calibration": None},
        run={"methods": [{"name": "dense"}, {"name": "topk", "sparsity": 0.5}]},
    )
    screen = snakemake(folder, "--cores", "2").stdout
    return folder, screen


def test_the_screen_shows_the_tables_of_this_study(study):
    folder, screen = study
    titles = [line for line in screen.splitlines() if line.startswith("sparsetrace workload")]
    assert titles == [f"sparsetrace workload out/tiny/first/{label}/workload" for label in LABELS]
    assert "sparsetrace workload" not in snakemake(folder, "--dry-run", "--cores", "1").stdout


def test_nothing_is_calibrated(study, tmp_path):
    folder, _ = study
    assert {path.name for path in (folder / "out/logs").iterdir()} == {
        "convert",
        "thresholds",
        "split",
        "generate",
        "pack",
        "index",
    }
    for label, target in zip(LABELS, (None, 0.5), strict=True):
        workload = folder / "out/tiny/first" / label / "workload"
        manifest = sparsetrace.open(workload).manifest
        assert manifest["calibration"] == {}
        assert {row["target_sparsity"] for row in pq.read_table(workload / "matrices.parquet").to_pylist()} == {target}
        assert relocated(manifest["study"], folder, tmp_path)["models"]["tiny"]["calibration_text"] is None


def test_a_model_is_no_source_of_thresholds(study, tmp_path):
    with pytest.raises(InputError, match="histograms must be given for method teal, got the model .*: run `sparsetr"):
        derive_thresholds("x", Teal(sparsity=0.5), study[0] / "out/tiny/model/config.json", tmp_path / "t.parquet")


UNCALIBRATED = {"convert", "thresholds", "split", "generate", "pack", "index", "all"}
PLANS = [
    pytest.param({"prune": {"name": "magnitude", "sparsity": 0.5}}, "topk", {"prune"}, id="magnitude"),
    pytest.param(
        {"prune": {"name": "wanda", "sparsity": 0.5}, "calibration_text": "text.txt"}, "topk", {"prune"}, id="wanda"
    ),
    pytest.param({"calibration_text": "text.txt"}, "griffin", set(), id="text-unused"),
    pytest.param({"calibration_text": "text.txt"}, "teal", {"calibrate", "histograms"}, id="teal"),
    pytest.param({"calibration_text": "text.txt"}, "wina", set(), id="wina-topk"),
]


@pytest.mark.parametrize(("model", "method", "more"), PLANS)
def test_what_is_planned(tmp_path, tiny, model, method, more):
    inputs(tmp_path, tiny, "plans")
    write_study(tmp_path, {"calibration_text": None} | model, {"methods": [{"name": method, "sparsity": 0.5}]})
    assert set(planned(tmp_path)) == UNCALIBRATED | more


def test_the_dense_model_is_measured_once_for_all_settings(study):
    """Quality of two settings, added to the finished study: three jobs, and the dense row is the same in both."""
    folder, _ = study
    content = yaml.safe_load((folder / "my.yaml").read_text())
    content["models"]["tiny"] |= {"quality_text": "held-out.txt", "quality": {"context": 12, "stride": 5}}
    (folder / "held-out.txt").write_text(" ".join(f"w{i % 90 + 3}" for i in range(200)))
    (folder / "quality.yaml").write_text(yaml.safe_dump(content))
    targets = [f"out/tiny/first/{label}/quality.parquet" for label in LABELS]
    words = ("--configfile", "quality.yaml", "--cores", "1", "--", *targets)
    assert planned(folder, *words) == {"quality_dense": 1, "quality": 2}
    snakemake(folder, *words)
    dense, topk = (pq.read_table(folder / target).to_pylist() for target in targets)
    assert [row["label"] for row in topk] == ["dense", "topk-0.5"]
    assert dense[0] == topk[0] and dense[1]["kl_divergence"] == 0 < topk[1]["kl_divergence"]
