"""`sparsetrace bench`: the tables' arithmetic, with faked times and engine; thresholds and prompts are real."""

import json
import os

import numpy as np
import pytest
import torch

from sparsetrace.core import devices
from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import layer_sites
from sparsetrace.model.patch import install, observe
from sparsetrace.tools import bench
from sparsetrace_kernels import configs

NEW, GROUPS = 5, 3
BLOCK_BYTES = 300


@pytest.fixture
def calls(monkeypatch):
    """Configurations that were timed, on a GPU that is faked: 3 us a call for dense, 2 us for ours, 1 ns a byte."""
    timed = []

    class Problem:
        def __init__(self, *_):
            pass

        def dense_calls(self):
            return [[4.0], [3.0]]

        def calls(self, op, sparsity, config):
            assert (config.kernel == "list") == (op == "list") and sparsity == 0.25
            timed.append(config.encode())
            return [2.0]

    monkeypatch.setattr(bench, "Problem", Problem)
    monkeypatch.setattr(bench, "time_in_graph", lambda calls, _: (0, calls[0], 9))
    monkeypatch.setattr(bench, "read_floor", lambda num_bytes, _: num_bytes / 1000)
    monkeypatch.setattr(bench, "num_copies", lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    monkeypatch.delenv(configs.OWN_TABLE, raising=False)
    return timed


def test_kernel_rows_are_shares_of_the_bytes_needed(tiny, tmp_path, rng, calls):
    config = tiny.model(tmp_path, rng, torch_dtype="bfloat16").config
    rows = list(bench.kernel_rows(config, 0.25, torch.device("cpu")))
    assert [(row.site, row.impl) for row in rows[:3]] == [("attn_in", impl) for impl in ("dense", "single", "list")]
    assert len(rows) == 12
    # attn_in is 36 x 64, of which 9 inputs are dropped
    assert (rows[0].K, rows[0].N, rows[0].us) == (36, 64, 3.0)
    assert rows[0].floor_share == pytest.approx(2 * (36 * 64 + 36 + 64) / 1000 / 3)
    assert rows[1].floor_share == rows[2].floor_share == pytest.approx(2 * (27 * 64 + 36 + 64) / 1000 / 2)


def test_kernel_rows_say_what_chose_their_configuration(tiny, tmp_path, rng, calls, monkeypatch):
    """`list` follows the user's table, `single` the committed one; what neither holds is left to the heuristic."""

    def write(path, op, k, n, config):
        entry = {"op": op, "dtype": "float16", "k": k, "n": n, "sparsity": 0.5, "config": config, "us": 1.0}
        path.write_text(json.dumps({"gpu": "none", "entries": [entry]}))

    single, listed = "predicated:3:16:32:1:1:0:0", "list:7:16:32:1:5:0:0"
    (tmp_path / "committed").mkdir()
    monkeypatch.setattr(configs, "TABLES", tmp_path / "committed")
    write(tmp_path / "committed" / "none.json", "single", 36, 64, single)
    write(tmp_path / "own.json", "list", 36, 86, listed)
    monkeypatch.setenv(configs.OWN_TABLE, str(tmp_path / "own.json"))
    config = tiny.model(tmp_path, rng, torch_dtype="bfloat16").config
    rows = list(bench.kernel_rows(config, 0.25, torch.device("cpu")))
    from_table = {(row.site, row.impl): row.config for row in rows if row.chosen_by == "table"}
    assert from_table == {("attn_in", "single"): single, ("mlp_in", "list"): listed}
    assert {row.chosen_by for row in rows if row.impl != "dense"} == {"table", "heuristic"}
    assert [row.config for row in rows if row.impl != "dense"] == calls
    assert all(row.config == row.chosen_by == "" for row in rows if row.impl == "dense")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_observed_thresholds_drop_the_target(tiny, tmp_path, rng, dtype):
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    decoder = model.load(torch.device("cpu"))
    rules = bench.observed_rules(decoder, 0.5)
    sites = {site.key: site.matrices for site in layer_sites(model.sites)}
    leaves = [(layer, matrix) for (layer, _), matrices in sites.items() for matrix in matrices]
    assert [(rule.layer, rule.matrix) for rule in rules] == leaves
    # what chooses kernel configurations
    assert {rule.expected for rule in rules} == {0.5}
    by_matrix = {(rule.layer, rule.matrix): rule for rule in rules}
    method, shares = bench.Teal(sparsity=0.5), {}

    def see(layer, site, x_BTK):
        for matrix in sites[layer, site]:
            shares[layer, matrix] = 1 - method.keep(x_BTK, by_matrix[layer, matrix]).float().mean().item()

    T = model.config.max_position_embeddings
    tokens_BT = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    with observe(decoder, see):
        decoder(tokens_BT, torch.arange(T)[None])
    # few bits make values tie at the threshold
    assert all(abs(share - 0.5) < 0.01 for share in shares.values()), shares
    install(decoder, method, rules)


def test_groups_are_numbered_like_a_split(tiny, tmp_path, rng):
    config = tiny.model(tmp_path, rng).config
    groups = bench.random_groups(config, 2, 3, NEW)
    sequences = [sequence for group in groups for sequence in group]
    assert [s.sequence for s in sequences] == list(range(6)) and [s.group for s in sequences] == [0] * 3 + [1] * 3
    assert [s.slot for s in sequences] == [0, 1, 2, 0, 1, 2]
    assert np.diff([s.base for s in sequences]).tolist() == [bench.PROMPT_TOKENS + NEW] * 5
    assert all(0 <= token < config.vocab_size for s in sequences for token in s.prompt_ids)
    assert groups == bench.random_groups(config, 2, 3, NEW)


class Clock:
    """Time that passes only where a fake does work."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Engine:
    """Stands for the engine: a group takes one second, the first group ten."""

    block_rows = 4
    made = []

    def __init__(self, setup):
        assert setup.backend == "torch" and setup.positions == bench.PROMPT_TOKENS + NEW
        assert setup.decoding.ignore_eos
        self.batch, self.label = setup.batching.batch_size, setup.patch.method.label
        self.device = setup.device
        Engine.made.append((self.batch, self.label))

    def run(self, group, recorder):
        assert len(group) == self.batch
        self.clock.now += 10 if group[0].group == 0 else 1
        if recorder is not None:
            recorder.rows = len(group) * (NEW - 1)


class Recorder:
    """Stands for the recorder: blocks are on the disk only after `wait`."""

    def __init__(self, selection, rows, device):
        assert rows == Engine.block_rows
        assert len(selection.leaves) == 7 * len({site.layer for site in layer_sites(selection.sites)})
        self.pending = []

    def open(self, folder, group):
        self.folder, self.group = folder, group

    def close(self, then):
        self.pending.append((self.group, self.rows, then))

    def shutdown(self):
        pass

    def wait(self):
        for group, rows, then in self.pending:
            (self.folder / f"block-{group}").write_bytes(bytes(BLOCK_BYTES))
            then([f"block-{group}"], rows)
            self.clock.now += 0.5
        self.pending = []


def test_decoding_counts_groups_after_the_first_and_waits_for_the_disk(tiny, tmp_path, rng, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(Engine, "clock", clock, raising=False)
    monkeypatch.setattr(Recorder, "clock", clock, raising=False)
    monkeypatch.setattr(Engine, "made", [])
    model = tiny.model(tmp_path, rng)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = (model, 0.5, (1, 2), NEW, GROUPS, scratch, torch.device("cpu"))
    monkeypatch.setattr(bench, "Engine", Engine)
    monkeypatch.setattr(bench, "Recorder", Recorder)
    rows = list(bench.decode_rows(*arguments))
    assert [(row.batch, row.method, row.sink) for row in rows] == [
        *((1, "dense", "none"), (2, "dense", "none")),
        *((1, "teal-0.5", "none"), (1, "teal-0.5", "disk"), (2, "teal-0.5", "none"), (2, "teal-0.5", "disk")),
    ]
    assert Engine.made == [(1, "dense"), (2, "dense"), (1, "teal-0.5"), (2, "teal-0.5")]
    for row in rows:
        seconds = GROUPS * (1.5 if row.sink == "disk" else 1)
        assert row.tokens_per_s == pytest.approx(GROUPS * row.batch * NEW / seconds)
        assert row.bytes_per_token == (BLOCK_BYTES / (row.batch * (NEW - 1)) if row.sink == "disk" else 0)
    assert not list(scratch.iterdir())


def test_refuses(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    with pytest.raises(InputError, match="new tokens must be at most 96 for .*, got 97"):
        next(bench.decode_rows(model, 0.5, (1,), 97, 1, tmp_path, torch.device("cpu")))


def test_refuses_where_there_is_no_gpu(tiny, tmp_path, rng, monkeypatch, capsys):
    from sparsetrace.cli.main import main

    # another job on this machine may hold the real locks; the command sets the variable and leaves it set
    monkeypatch.setattr(devices, "lock_folder", lambda job: tmp_path / "locks")
    monkeypatch.setenv(devices.VISIBLE, os.environ.get(devices.VISIBLE, ""))
    monkeypatch.delenv(devices.VISIBLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny.model(tmp_path, rng)
    monkeypatch.setattr("sys.argv", ["sparsetrace", "bench", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match="1"):
        main()
    message = "error: bench: a CUDA GPU must be there, got none: run it on the machine that generates\n"
    assert capsys.readouterr() == ("", message)
