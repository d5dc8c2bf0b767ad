"""The choice of a configuration depends on shape, sparsity and table alone; every committed table can be run."""

import json

import pytest
import torch
import triton

from sparsetrace_kernels import configs
from sparsetrace_kernels.configs import GemvConfig, TuningTable, choose_config, decode_config
from sparsetrace_kernels.tune import candidates, format_table

LIST_CONFIG = GemvConfig("list", 4, 32, 64, num_warps=1, num_stages=5, use_dot=True, use_pdl=True)


def make_table(dtype="float16"):
    shape = {"op": "list", "dtype": dtype, "k": 64, "n": 32, "us": 1.0}
    document = {
        "gpu": "NVIDIA H200",
        "entries": [
            {**shape, "sparsity": 0.25, "config": LIST_CONFIG.encode()},
            {**shape, "sparsity": 0.75, "config": "list:1:16:32:1:1:0:0"},
        ],
    }
    return TuningTable.from_json(format_table(document))


def test_config_round_trips_as_text():
    assert decode_config(LIST_CONFIG.encode()) == LIST_CONFIG


def test_nearest_sparsity_wins_and_the_lower_of_two_equally_near():
    table = make_table()
    assert choose_config("list", 64, 32, torch.float16, 0.5, table) == LIST_CONFIG
    assert choose_config("list", 64, 32, torch.float16, 0.6, table).split == 1


def test_one_half_type_stands_in_for_the_other():
    assert choose_config("list", 64, 32, torch.bfloat16, 0.2, make_table("float16")) == LIST_CONFIG
    assert choose_config("list", 64, 32, torch.float16, 0.2, make_table("bfloat16")) == LIST_CONFIG


@pytest.mark.parametrize("op", ["single", "list"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (4096, 6144), (28672, 8192), (200000, 128)])
def test_heuristic_fits_any_shape(op, sparsity, K, N):
    config = choose_config(op, K, N, torch.bfloat16, sparsity)
    assert (config.kernel == "list") == (op == "list")
    assert config == choose_config(op, K, N, torch.bfloat16, sparsity)
    if config.kernel == "compacting":
        assert triton.cdiv(K, config.split) <= configs.MAX_CHUNK_K


@pytest.mark.parametrize("path", sorted(configs.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_table_is_named_after_its_gpu_and_fits_its_shapes(path):
    document = json.loads(path.read_text())
    assert configs.table_path(document["gpu"]) == path
    assert format_table(document) == path.read_text()
    for entry in document["entries"]:
        config = decode_config(entry["config"])
        assert (config.kernel == "list") == (entry["op"] == "list")
        if config.kernel == "compacting":
            assert triton.cdiv(entry["k"], config.split) <= configs.MAX_CHUNK_K


def test_candidates_are_distinct_and_of_the_kernel_that_the_engine_launches():
    found = candidates(4096)
    assert len({config.encode() for config in found}) == len(found) > 50
    assert all(config.kernel == "list" for config in found)
    # some for every shape that a model may have
    assert all(candidates(N) for N in (1, 16, 64, 65, 128))


def test_the_kernel_that_is_not_tuned_keeps_the_committed_table(monkeypatch, tmp_path):
    gpu = "NVIDIA H200"
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"gpu": gpu, "entries": []}))
    monkeypatch.delenv(configs.OWN_TABLE, raising=False)
    committed = configs.active_table(gpu)
    monkeypatch.setenv(configs.OWN_TABLE, str(own))
    assert configs.table_for("list", gpu) == TuningTable(gpu, {})
    assert configs.table_for("single", gpu) == committed != TuningTable(gpu, {})
    assert configs.table_for("single", "Other GPU") is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: GemvConfig("fast", 1, 32, 32, 1), "kernel must be one of predicated, compacting, list, got 'fast'"),
        (lambda: GemvConfig("list", 1, 24, 32, 1), "block_k must be a power of two, got 24"),
        (lambda: GemvConfig("list", 0, 32, 32, 1), "split and num_stages must be positive, got 0 and 1"),
        (lambda: GemvConfig("list", 1, 8, 16, 1, use_dot=True), "at least 8 rows, and 16 x 16 for a dot, got 8 x 16"),
        (lambda: decode_config("list:1:2"), "text must be what GemvConfig.encode writes, got 'list:1:2'"),
        (lambda: choose_config("gemm", 1, 1, torch.float16, 0.5), "op must be single or list, got 'gemm'"),
        (lambda: choose_config("list", 1, 1, torch.float16, 50), r"sparsity must be in \[0, 1\], got 50"),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()
