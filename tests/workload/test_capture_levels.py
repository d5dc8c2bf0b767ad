"""Capture levels, samples, and recomputing, on a tiny model run through the whole pipeline.

The oracle of a lower level or a sample is the full workload of the same run: what is kept must be equal bit for bit.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_testing import CPU, MATRICES, make_run

import sparsetrace
from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.folder import footer_sha256
from sparsetrace.core.settings import Capture
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.row_statistics import row_norms
from sparsetrace.tools.recompute import recompute
from sparsetrace.workload.verify import verify


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A function that makes a workload under a capture setting, from one tiny model and prompt set."""
    return make_run(tiny, tmp_path_factory.mktemp("runs"))


def test_levels_and_samples_equal_the_full_run(run):
    full = sparsetrace.open(run.full)
    for name, capture in {
        "masks": Capture(level="masks"),
        "stats": Capture(level="stats"),
        "sample": Capture(layers=(1,), matrices=("k", "down"), every=3),
    }.items():
        folder = run(name, capture)
        ds = sparsetrace.open(folder)
        assert [str(fault) for fault in verify(folder)] == []
        assert ds.manifest["capture"] == capture.model_dump(mode="json")
        wanted = full if name != "sample" else full.select(position=slice(0, None, 3), layer=1, matrix=["k", "down"])
        assert ds.leaves == wanted.leaves
        assert np.array_equal(ds.tokens, wanted.tokens)
        # what is generated does not change
        assert ds.sequence_table.equals(full.sequence_table)
        for leaf in ds.leaves:
            assert ds.figures(*leaf).equals(wanted.figures(*leaf))
            if name != "stats":
                assert np.array_equal(ds.matrix(*leaf).mask, wanted.matrix(*leaf).mask)
            if name == "sample":
                assert np.array_equal(ds.matrix(*leaf).patterns, wanted.matrix(*leaf).patterns)


def test_shared_inputs_are_stored_once(run):
    full, shared = sparsetrace.open(run.full), run("shared", share_inputs=True)
    ds = sparsetrace.open(shared)
    assert [str(fault) for fault in verify(shared)] == []
    others = {(row["layer"], row["matrix"]): row["shares_input_with"] for row in ds.matrix_table.to_pylist()}
    assert others == {(layer, m): {"k": "q", "v": "q", "up": "gate"}.get(m) for layer in (0, 1) for m in MATRICES}
    for leaf in full.leaves:
        assert np.array_equal(ds.matrix(*leaf).dense(), full.matrix(*leaf).dense())
    sizes = [sum(f["bytes"] for f in w.manifest["files"] if "matrix" in f) for w in (ds, full)]
    assert sizes[0] < 0.7 * sizes[1]
    assert all(row["shares_input_with"] is None for row in full.matrix_table.to_pylist())


def test_a_layer_that_the_model_lacks(run):
    with pytest.raises(InputError, match="capture: layers must be 0 to 1, got 7"):
        run("beyond", Capture(layers=(7,)))


def test_recomputed_sequences_are_bitwise_equal(run):
    assert recompute(run.full, run.model.folder, 5, CPU) == []
    assert recompute(run("masks", Capture(level="masks")), run.model.folder, 1, CPU) == []
    assert recompute(run("stats", Capture(level="stats")), run.model.folder, 1, CPU) == []


def test_lm_head_gives_the_tokens_that_were_written(run):
    """The operand of `lm_head` times its weight is what greedy decoding chose the next token by."""
    folder = run("head", Capture(matrices=(*MATRICES, "lm_head")))
    assert [str(fault) for fault in verify(folder)] == []
    assert recompute(folder, run.model.folder, 5, CPU) == []
    full = sparsetrace.open(run.full)
    for model in (run.model.folder, run.folder / "checkpoint"):
        ds = sparsetrace.open(folder, model=model)
        assert ds.leaves == [*full.leaves, (None, "lm_head")]
        assert ds.sequence_table.equals(full.sequence_table)
        for row in ds.sequence_table.to_pylist():
            first = row["base"] + len(row["prompt_ids"]) - 1
            tokens = range(first, first + len(row["output_ids"]))
            written = [int(ds.product(None, "lm_head", token).argmax()) for token in tokens if token in ds.tokens]
            assert written == row["output_ids"][-len(written) :]
            assert len(written) >= len(row["output_ids"]) - 1
    assert np.array_equal(ds.matrix(0, "q").patterns, full.matrix(0, "q").patterns)


def unnoticed_flip(table) -> tuple[int, int]:
    """A row and a value in it whose lowest bit changes neither the row's largest magnitude nor its rounded norm."""
    planes = [table[f"values_b{i}"].to_pylist() for i in range(4)]
    for row in range(table.num_rows):
        patterns = sum(
            np.frombuffer(plane[row], np.uint8).astype(np.uint32) << (8 * i) for i, plane in enumerate(planes)
        )
        figures = row_norms(patterns, np.array([0, len(patterns)]), FORMATS["float32"])
        for value in range(len(patterns)):
            flipped = patterns.copy()
            flipped[value] ^= 1
            if row_norms(flipped, np.array([0, len(patterns)]), FORMATS["float32"]) == figures:
                return row, value
    raise AssertionError("every value shows in its row's figures")


def test_a_changed_value_is_found_by_recomputing(run, tmp_path):
    """The lowest bit of one kept value: no rule of the format can know."""
    folder = shutil.copytree(run.full, tmp_path / "workload")
    part = folder / "data/L01/up/part-00000.parquet"
    table = pq.read_table(part, partitioning=None)
    rows = table["values_b0"].to_pylist()
    row, value = unnoticed_flip(table)
    rows[row] = rows[row][:value] + bytes([rows[row][value] ^ 1]) + rows[row][value + 1 :]
    i = table.column_names.index("values_b0")
    pq.write_table(table.set_column(i, table.schema.field(i), pa.array(rows, pa.binary())), part)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    for file in manifest["files"]:
        file |= {"bytes": (folder / file["path"]).stat().st_size, "sha256": sha256_file(folder / file["path"])}
        if "footer_sha256" in file:
            file["footer_sha256"] = footer_sha256(folder / file["path"])
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
    assert verify(folder) == []
    token = table["token"][row].as_py()
    (fault,) = recompute(folder, run.model.folder, 1, CPU)
    assert str(fault) == f"data/L01/up: token {token} must be the same when run again, got another"


def test_recompute_refuses_another_model(run, tiny, tmp_path):
    other = tiny.model(tmp_path, tiny.rng("other"))
    with pytest.raises(InputError, match="must be the workload's model"):
        recompute(run.full, other.folder, 1, CPU)
    with pytest.raises(InputError, match="must hold every layer and matrix to be recomputed"):
        recompute(run("sample", Capture(every=2, layers=(1,))), run.model.folder, 1, CPU)
