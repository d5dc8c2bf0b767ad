"""Quality of a method against the same figures computed in numpy, window by window, on a model patched by hand."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sparsetrace.calibration import quality as quality_module
from sparsetrace.calibration.dense_states import DenseJob, quality_windows, scored_states, write_dense_states
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.quality import QUALITY, QualityJob, measure
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Machine, Quality
from sparsetrace.methods import Dense, Griffin, Teal, TopK
from sparsetrace.model.patch import install

CPU = Machine(device="cpu")
SETTINGS = Quality(context=11, stride=5)


@pytest.fixture
def made(tiny, tmp_path, rng):
    """A model, a text of 61 tokens and the table of a setting."""
    model = tiny.model(tmp_path, rng)
    tiny.thresholds(tmp_path, model, rng)
    text = tmp_path / "held-out.txt"
    text.write_text(tiny.words(rng, 60))

    def table(method):
        path = tmp_path / f"{method.label}.parquet"
        derive_thresholds(method.label, method, tmp_path / "histograms.safetensors", path)
        return path

    return model, text, table


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("prefill", ["half", "all"])
def test_figures_are_those_of_numpy(made, tmp_path, prefill):
    model, text, table = made
    quality = Quality(context=11, stride=5, prefill=prefill)
    path = table(Teal(sparsity=0.5))
    rows = measure(QualityJob(model, text, [path], tmp_path / "q.parquet", quality, CPU)).to_pylist()

    ids = model.tokenizer().encode(text.read_text(), "test")
    setting = read_thresholds(path, model)
    dense, sparse = model.load(torch.device("cpu")), model.load(torch.device("cpu"))
    patch = install(sparse, setting.method, setting.rules)
    nll, dense_nll, kl, agree = [], [], [], []
    for start in range(0, len(ids) - 15, 5):
        window = torch.tensor([ids[start : start + 16]])
        positions = torch.arange(16)[None]
        patch.sparsified_BT = positions >= (8 if prefill == "half" else 0)
        with torch.inference_mode():
            p, q = (softmax(m.logits(m(window, positions))[0].double().numpy()) for m in (dense, sparse))
        for position in range(10, 15):
            following = ids[start + position + 1]
            dense_nll.append(-np.log(p[position, following]))
            nll.append(-np.log(q[position, following]))
            kl.append((p[position] * np.log(p[position] / q[position])).sum())
            agree.append(p[position].argmax() == q[position].argmax())
    assert [row["tokens"] for row in rows] == [len(nll)] * 2 == [50] * 2
    assert rows[0]["perplexity"] == pytest.approx(np.exp(np.mean(dense_nll)), rel=1e-5)
    assert rows[1]["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert rows[1]["kl_divergence"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert rows[1]["top1_agreement"] == np.mean(agree)
    assert rows[1]["target_sparsity"] == pytest.approx(0.5)
    assert 0.3 < rows[1]["achieved_sparsity"] < 0.7
    assert pq.read_schema(tmp_path / "q.parquet").equals(QUALITY)


def test_what_drops_nothing_is_the_dense_model(made, tmp_path):
    model, text, table = made
    paths = [table(method) for method in (Dense(), Teal(sparsity=0), TopK(sparsity=0), Griffin(sparsity=0))]
    rows = measure(QualityJob(model, text, paths, tmp_path / "q.parquet", SETTINGS, CPU)).to_pylist()
    assert [row["label"] for row in rows] == ["dense", "dense", "teal-0", "topk-0", "griffin-0"]
    for row in rows:
        assert (row["kl_divergence"], row["top1_agreement"]) == (0, 1)
        assert row["perplexity"] == rows[0]["perplexity"]


def test_settings_do_not_disturb_each_other(made, tmp_path):
    """The same figures alone and together; a sequence's state does not outlive its window."""
    model, text, table = made
    paths = [table(method) for method in (Griffin(sparsity=0.5), Teal(sparsity=0.4), TopK(sparsity=0.6))]
    together = measure(QualityJob(model, text, paths, tmp_path / "q.parquet", SETTINGS, CPU)).to_pylist()
    for path, row in zip(paths, together[1:], strict=True):
        alone = measure(QualityJob(model, text, [path], tmp_path / "q.parquet", SETTINGS, CPU)).to_pylist()
        assert alone == [together[0], row]
    assert [row["target_sparsity"] for row in together] == [None, 0.5, pytest.approx(0.4), 0.6]
    assert all(np.isfinite(row["perplexity"]) and row["kl_divergence"] > 0 for row in together[1:])


def test_windows(made):
    model, text, _ = made
    ids = model.tokenizer().encode(text.read_text(), "test")
    windows = quality_windows(model.tokenizer(), text, SETTINGS, 128)
    assert windows.tolist() == [ids[start : start + 16] for start in range(0, 46, 5)]
    assert len(windows) == 10
    # every token after the first context is scored once
    assert np.concatenate(windows[:, -5:]).tolist() == ids[11:61]
    assert len(quality_windows(model.tokenizer(), text, Quality(context=11, stride=5, windows=3), 128)) == 3


def test_refuses(made, tmp_path):
    model, text, table = made
    out = tmp_path / "q.parquet"
    for quality, message in (
        (Quality(context=100, stride=29), "together must be at most the model's 128 positions, got 129"),
        (Quality(context=60, stride=5), "must hold at least one window of 65 tokens, got 61"),
    ):
        with pytest.raises(InputError, match=message):
            measure(QualityJob(model, text, [table(Dense())], out, quality, CPU))
    with pytest.raises(InputError, match="prefill must be half with method griffin, got all"):
        every = Quality(context=11, stride=5, prefill="all")
        measure(QualityJob(model, text, [table(Griffin(sparsity=0.5))], out, every, CPU))
    assert not out.exists()


@pytest.mark.parametrize("stride", [5, 1])
def test_states_of_the_dense_model_give_the_same_bytes(made, tmp_path, stride):
    """Whether the dense model is run beside each setting or once before them; several passes, the last one short."""
    model, text, table = made
    text.write_text(text.read_text() * 40)
    quality, path = Quality(context=16 - stride, stride=stride, windows=300), table(Teal(sparsity=0.5))
    dense, own, given = tmp_path / "dense.safetensors", tmp_path / "own.parquet", tmp_path / "given.parquet"
    reports = []
    assert write_dense_states(DenseJob(model, text, dense, quality, CPU), lambda *r: reports.append(r)) == 300 * stride
    assert reports == [(256, 300), (300, 300)]
    measure(QualityJob(model, text, [path], own, quality, CPU))
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_module, "scored_states", lambda *a: ran.append(1) or scored_states(*a))
        measure(QualityJob(model, text, [path], given, quality, CPU, dense))
    assert given.read_bytes() == own.read_bytes()
    # the setting alone
    assert len(ran) == 2
    for other, name in (
        (Quality(context=10, stride=5), "windows_hash"),
        (Quality(context=10, stride=6), "windows_hash, stride"),
    ):
        with pytest.raises(InputError, match=f"must be of this model, text and windows, got another .*{name}"):
            measure(QualityJob(model, text, [path], given, other, CPU, dense))
    dense.write_bytes(dense.read_bytes()[:-9])
    with pytest.raises(InputError, match="must be a readable file of dense states"):
        measure(QualityJob(model, text, [path], given, quality, CPU, dense))
