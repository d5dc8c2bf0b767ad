"""Histograms added up, taken up again and refused: against the histograms of the whole text, byte by byte."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sparsetrace.calibration import calibrate as step
from sparsetrace.calibration import windows
from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.counter import ActivationCounter
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.merge import merge
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Calibration, Machine
from sparsetrace.formats.sites import Site, layer_sites

CPU = Machine(device="cpu")
SCORES = ("cats", "wina")


@pytest.fixture
def made(tiny, tmp_path, rng, monkeypatch):
    """A model, a text, and what counts it in passes of four sequences."""
    monkeypatch.setattr(windows, "PASS_TOKENS", 68)
    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16")

    def count(name, report=None, words=None, shard=0, scores=SCORES, model=model, **changes):
        text = tmp_path / f"{words or 'text'}.txt"
        if not text.exists():
            text.write_text(tiny.words(rng, 500))
        settings = Calibration(**{"tokens": 300, "sequence_length": 17} | changes)
        calibrate(CalibrationJob(model, text, tmp_path / name, settings, CPU, shard, scores), report)
        return tmp_path / name

    return model, count


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_add_up_to_the_whole(made, tmp_path, shards):
    _, count = made
    whole = count("whole")
    parts = [count(f"part{shard}", shard=shard, shards=shards) for shard in range(shards)]
    merged = merge(parts[::-1], tmp_path / "merged")
    assert merged.tokens == 18 * 17
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()


def test_runs_add_up(made, tmp_path):
    """Two texts: the counts are the sums, and the hash names both, in any order."""
    _, count = made
    paths = [count("one", words="one"), count("two", words="two", tokens=170)]
    merged = merge(paths, tmp_path / "both")
    assert merged == merge(paths[::-1], tmp_path / "htob")
    assert merged.tokens == (18 + 10) * 17
    one, two, both = (load_file(path) for path in (*paths, tmp_path / "both"))
    for name in both:
        assert np.array_equal(both[name], one[name] + two[name])
    _, found = Histograms.load(tmp_path / "both")
    assert found == merged
    assert merged.text_hash not in {Histograms.load(path)[1].text_hash for path in paths}
    with pytest.raises(InputError, match="every text must be counted once"):
        merge([tmp_path / "both", paths[0]], tmp_path / "x")


def test_refuses_what_does_not_belong_together(made, tiny, tmp_path, rng):
    _, count = made
    one = count("one")
    other = tiny.model(tmp_path / "other", rng, torch_dtype="bfloat16")
    same_but_dtype = tiny.model(tmp_path / "half", rng, torch_dtype="float16")
    for path, message in (
        (count("another", model=other), "model_hash of all files must be that of"),
        (count("dtype", model=same_but_dtype), "model_hash of all files"),
        (
            count("scores", scores=("cats",), words="other"),
            "scores of all files must be .*'cats', 'wina'.*got .*'cats'",
        ),
        (count("again"), "every text must be counted once, got shard 0 of"),
    ):
        with pytest.raises(InputError, match=message) as error:
            merge([one, path], tmp_path / "x")
        assert "\n" not in str(error.value)
    shards = [count(f"part{shard}", shard=shard, shards=3) for shard in range(3)]
    for paths, message in (
        ([shards[0], shards[2]], r"all 3 shards of text .* must be there, got none of \[1\]"),
        ([*shards, shards[1]], "every text must be counted once, got shard 1"),
        ([shards[0], count("half0", shard=0, shards=2)], "every text must be counted once"),
        ([one, shards[0]], "every text must be counted once"),
    ):
        with pytest.raises(InputError, match=message):
            merge(paths, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save_file({"x": np.zeros(3)}, tmp_path / "no")
    with pytest.raises(InputError, match="must be a histogram file of sparsetrace"):
        merge([one, tmp_path / "no"], tmp_path / "x")


def test_goes_on_after_an_interruption(made, tmp_path, monkeypatch):
    _, count = made
    monkeypatch.setattr(step, "SAVE_SECONDS", -1)
    whole = count("whole")

    class KilledError(Exception):
        pass

    def report(done, total):
        if done > 150:
            raise KilledError

    with pytest.raises(KilledError):
        count("again", report)
    assert not (tmp_path / "again").exists()
    told = []
    again = count("again", lambda done, total: told.append(done))
    assert told == [16 * 17, 18 * 17], "three passes of four sequences were there"
    assert again.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*.progress"))
    # other settings, or a file that was cut off, start anew
    for spoil in (lambda path: None, lambda path: path.write_bytes(path.read_bytes()[:-5])):
        with pytest.raises(KilledError):
            count("again", report)
        spoil(tmp_path / ".again.progress")
        told.clear()
        count(
            "again", lambda done, total: told.append(done), seed=3 if spoil(tmp_path / ".again.progress") is None else 0
        )
        assert told[0] == 68


def test_the_seed_draws_the_sequences(made):
    _, count = made
    files = [count(f"seed{seed}", tokens=100, seed=seed).read_bytes() for seed in (0, 0, 1)]
    assert files[0] == files[1] != files[2]


def test_padding_is_not_counted(made):
    """Every site has counted tokens x width, and no sequence is padded to make it so."""
    model, count = made
    histograms, provenance = Histograms.load(count("h", tokens=290))
    widths = {site.key: site.in_features for site in layer_sites(model.sites)}
    assert set(widths) < set(histograms.counts)
    for (layer, name), counts in histograms.counts.items():
        if (layer, name) in widths:
            assert int(counts.sum()) == provenance.tokens * widths[layer, name], layer


def test_shards_are_refused(made):
    _, count = made
    with pytest.raises(InputError, match="shard must be below the number of shards, 2, got 2"):
        count("x", shard=2, shards=2)
    with pytest.raises(InputError, match="shards must be at most the passes of 4 sequences, 5, got 6"):
        count("x", shards=6)


@pytest.mark.gpu
def test_gpu_counts_as_the_cpu_does(rng):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(3, 1001).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found = []
        for device in ("cpu", "cuda"):
            counter = ActivationCounter([Site("attn_in", 0, ("q",), 1001, (1,))], name, device)
            counter.count(0, "attn_in", x.to(device))
            found.append(counter.histograms().counts[0, "attn_in"])
        assert np.array_equal(*found)
