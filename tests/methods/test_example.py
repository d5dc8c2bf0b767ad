"""The example of docs/methods.md, as it stands there: one file and one entry, from a study to an operand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetrace import methods
from sparsetrace.calibration import thresholds
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.files import InputError
from sparsetrace.methods import MatrixRule
from sparsetrace.study import sections
from sparsetrace.study.options import method_options, parse_method
from sparsetrace.study.study import parse_study

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def example(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    namespace = {}
    exec(code, namespace)  # noqa: S102  # the documentation is ours
    for module in (methods, sections, thresholds):
        monkeypatch.setitem(module.METHODS, "topp", namespace["TopP"])
    return namespace["TopP"]


def test_it_is_a_method(example, tiny, tmp_path, rng):
    study = {
        "models": {"m": {"checkpoint": "c", "calibration_text": "t"}},
        "runs": {"r": {"prompts": "p", "methods": [{"name": "topp", "share": [0.5, 0.9]}]}},
    }
    settings = parse_study(study, "test").runs["r"].methods
    assert [setting.label for setting in settings] == ["topp-0.5", "topp-0.9"]
    assert method_options(settings[0]) == "--method topp --set share=0.5 --label topp-0.5"
    assert parse_method("topp", ["share=0.5"], None) == settings[0]
    with pytest.raises(InputError, match="keys must be among name, label, share, got sparsity"):
        parse_method("topp", ["sparsity=0.5"], None)

    x = torch.randn(3, 5, 43)
    keep = example(share=0.8).keep(x, MatrixRule(0, "q", None)).numpy()
    for row, mask in zip(x.double().abs().reshape(-1, 43).numpy(), keep.reshape(-1, 43), strict=True):
        order = np.argsort(-row)
        fewest = 1 + int(np.searchsorted(row[order].cumsum(), 0.8 * row.sum()))
        assert set(np.flatnonzero(mask)) == set(order[:fewest])

    model = tiny.model(tmp_path, rng)
    tiny.thresholds(tmp_path, model, rng)
    derive_thresholds("topp-0.5", example(share=0.5), tmp_path / "histograms.safetensors", tmp_path / "t.parquet")
    assert read_thresholds(tmp_path / "t.parquet", model).method == example(share=0.5)


def test_the_table_names_every_method():
    text = DOCS.read_text(encoding="utf-8")
    for name in methods.METHODS:
        assert f"\n| `{name}` |" in text
    for name in methods.WEIGHT_METHODS:
        assert name in text
