"""From prompts to Parquet by real runs of tiny models: the bits of the dump's blocks come back, and bytes repeat."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from workload_testing import dense_rows, tree

import sparsetrace
from sparsetrace.core.files import sha256_file
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine, PromptSet
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.packing import pack as packing
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack


@pytest.fixture
def blocks(monkeypatch):
    """Arrays of every block that is packed, by the name of its file."""
    found = {}

    def keeping(dump_manifest, *args, **kwargs):
        found.update({file.name: load_file(file) for file in dump_manifest.parent.glob("*.safetensors")})
        return pack(dump_manifest, *args, **kwargs)

    monkeypatch.setattr("sparsetrace.packing.pack.pack", keeping)
    return found


@pytest.mark.parametrize("dtype", FORMATS)
def test_round_trip_of_a_real_run(tiny, tmp_path, rng, dtype, monkeypatch, blocks):
    """Engine -> dump -> Parquet -> dense: the bits of the blocks come back, with a row for each matrix and token."""
    monkeypatch.setattr("sparsetrace.generation.selection.BLOCK_BYTES", 9_000)
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    decoding, batching = Decoding(prefill="half", ignore_eos=True), Batching(max_new_tokens=4, batch_size=3, shards=2)
    lengths = [2, 9, 5, 1, 7, 4, 11]
    workload = tiny.workload(tmp_path / "run", model, rng, lengths, decoding, batching)
    ds = sparsetrace.open(workload)
    # prompts have a begin token; half of each prompt is captured, and all new tokens but the last
    captured = sum((length + 1) // 2 + 3 for length in lengths)
    assert len(ds.tokens) == ds.manifest["tokens"] == captured
    assert ds.manifest["rows"] == 2 * 7 * captured
    assert sum(pq.read_metadata(file).num_rows for file in (workload / "data").rglob("*.parquet")) == 2 * 7 * captured
    assert len(blocks) > 3
    seen = 0
    for layer in range(2):
        for matrix in ("q", "k", "v", "o", "gate", "up", "down"):
            width = {"o": 32, "down": 43}.get(matrix, 36)
            found = {}
            for part in range(2):
                found |= dense_rows(workload / f"data/L{layer:02d}/{matrix}/part-{part:05d}.parquet", dtype, width)
            for arrays in blocks.values():
                # the matrices of a site have equal thresholds
                holder = {"k": "q", "v": "q", "up": "gate"}.get(matrix, matrix)
                stem = f"L{layer:02d}.{holder}"
                keep = np.unpackbits(arrays[f"{stem}.mask"], axis=1, count=width, bitorder="little").astype(bool)
                dense = np.zeros(keep.shape, FORMATS[dtype].bits)
                dense[keep] = arrays[f"{stem}.values"]
                for token, row in zip(arrays["rows.token"].tolist(), dense, strict=True):
                    assert np.array_equal(found[token], row)
                    assert np.array_equal(FORMATS[dtype].from_float(ds[layer, matrix, token]), row)
                    seen += 1
    assert seen == 2 * 7 * captured
    for file in ds.manifest["files"]:
        assert sha256_file(workload / file["path"]) == file["sha256"]
        assert (workload / file["path"]).stat().st_size == file["bytes"]
    for row in ds.matrix_table.to_pylist():
        kept = int((ds.matrix(row["layer"], row["matrix"]).nnz).sum())
        assert (row["rows"], row["nnz"]) == (captured, kept)
        assert row["achieved_sparsity"] == 1 - kept / (captured * row["in_features"])


@pytest.mark.parametrize("dtype", FORMATS)
def test_lm_head_of_a_real_run(tiny, tmp_path, rng, dtype, monkeypatch, blocks):
    """It has a row for each decoded token and for the last position of each prompt, with the bits of the blocks."""
    monkeypatch.setattr("sparsetrace.generation.selection.BLOCK_BYTES", 3_000)
    model = tiny.model(tmp_path, rng, torch_dtype=dtype)
    decoding, batching = Decoding(prefill="half", ignore_eos=True), Batching(max_new_tokens=4, batch_size=3)
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", rng, [2, 9, 5, 1, 7])
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), batching)
    write_split(groups, 1, tmp_path / "split.parquet")
    dump, capture = tmp_path / "dump" / "manifest.json", Capture(matrices=["down", "lm_head"])
    table, on = tiny.thresholds(tmp_path, model, rng, 0.5), Machine(device="cpu")
    generate(Job(model, tmp_path / "split.parquet", 0, dump, decoding, batching, on, table, capture))
    packing.pack(dump, tmp_path / "w", tmp_path / "parts" / "00000.json")
    index([tmp_path / "parts" / "00000.json"], tmp_path / "w")
    found = dense_rows(tmp_path / "w" / "data/model/lm_head/part-00000.parquet", dtype, 36)
    fed = pq.read_table(tmp_path / "w" / "tokens.parquet").to_pylist()
    last = {row["sequence"]: row["position"] for row in fed if row["phase"] == "prefill"}
    captured = [row for row in fed if row["captured"]]
    wanted = [row["token"] for row in captured if row["position"] >= last[row["sequence"]]]
    assert list(found) == wanted and len(wanted) < len(captured)
    seen = 0
    for arrays in blocks.values():
        keep = np.unpackbits(arrays["model.lm_head.mask"], axis=1, count=36, bitorder="little").astype(bool)
        dense = np.zeros(keep.shape, FORMATS[dtype].bits)
        dense[keep] = arrays["model.lm_head.values"]
        tokens = arrays["rows.token"]
        tokens = tokens[arrays["model.lm_head.rows"]] if "model.lm_head.rows" in arrays else tokens
        for token, row in zip(tokens.tolist(), dense, strict=True):
            assert np.array_equal(found[token], row)
            seen += 1
    assert seen == len(wanted) and any("model.lm_head.rows" in arrays for arrays in blocks.values())
    matrices = pq.read_table(tmp_path / "w" / "matrices.parquet").to_pylist()
    assert [(row["layer"], row["matrix"], row["method"]) for row in matrices] == [
        (0, "down", "teal"),
        (1, "down", "teal"),
        (None, "lm_head", "dense"),
    ]
    assert [row["rows"] for row in matrices] == [len(captured), len(captured), len(wanted)]


def test_two_whole_runs_give_identical_data_files(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16")
    decoding, batching = Decoding(prefill="all", temperature=0.8), Batching(max_new_tokens=4, batch_size=2, shards=2)
    state = rng.bit_generator.state
    found = []
    for name in ("a", "b"):
        rng.bit_generator.state = state
        found.append(tree(tiny.workload(tmp_path / name, model, rng, [3, 5, 1, 4], decoding, batching)))
    assert found[0] == found[1]
    assert {"manifest.json", "README.md", "views.sql", "tokens.parquet"} <= found[0].keys()


def test_shards_cut_the_same_data(tiny, tmp_path, rng):
    """The rows do not depend on the number of shards, since the groups do not."""
    model = tiny.model(tmp_path, rng)
    state = rng.bit_generator.state
    rows = []
    for shards in (1, 3):
        rng.bit_generator.state = state
        batching = Batching(max_new_tokens=4, batch_size=2, shards=shards)
        ds = sparsetrace.open(tiny.workload(tmp_path / str(shards), model, rng, [3, 5, 1, 4, 6], Decoding(), batching))
        rows.append([ds.matrix(*key).dense().tobytes() for key in ds.leaves])
        assert ds.token_table.to_pylist() == sorted(ds.token_table.to_pylist(), key=lambda row: row["token"])
    assert rows[0] == rows[1]
