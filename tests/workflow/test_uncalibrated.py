"""A study whose settings need no calibration, run by the workflow: what it makes, and what the screen shows of it."""

import pytest
from study_testing import inputs, snakemake, write_study

LABELS = ("dense", "topk-0.5")


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("uncalibrated")
    inputs(folder, tiny, "uncalibrated")
    # tables of another study, which are none of this one's
    (folder / "results/demo/default/teal-0.5/workload").mkdir(parents=True)
    write_study(folder, run={"methods": [{"name": "dense"}, {"name": "topk", "sparsity": 0.5}]})
    screen = snakemake(folder, "--cores", "2").stdout
    return folder, screen


def test_the_screen_shows_the_tables_of_this_study(study):
    folder, screen = study
    titles = [line for line in screen.splitlines() if line.startswith("sparsetrace workload")]
    assert titles == [f"sparsetrace workload out/tiny/first/{label}/workload" for label in LABELS]
    assert "sparsetrace workload" not in snakemake(folder, "--dry-run", "--cores", "1").stdout
