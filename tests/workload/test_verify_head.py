"""Rows of a matrix in no layer: what `verify` demands of them, and what running again compares."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from head_testing import HEAD, build_with_head
from test_verify import edited_table, resign, rewrite, said

import sparsetrace
from sparsetrace.core.files import sha256_json
from sparsetrace.formats.dump import Block, write_block
from sparsetrace.formats.schema import LEVELS
from sparsetrace.tools.recompute import _differences

PART = "data/model/lm_head/part-00000.parquet"
WHERE = "data/model/lm_head"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_with_head(tmp_path_factory.mktemp("verify-head"), "float16")


@pytest.fixture
def folder(built, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(built.workload, tmp_path / "workload")


@pytest.mark.parametrize("encoding", ["split", "open"])
@pytest.mark.parametrize("level", LEVELS)
def test_sound(tmp_path, encoding, level):
    assert said(build_with_head(tmp_path, "bfloat16", level, encoding).workload) == []


def keep_rows(folder, keep, path=PART):
    """Rewrite a file with the rows at some places, and make the manifest and `matrices.parquet` fit."""
    whole = pq.read_table(folder / path, partitioning=None)
    table = whole.take([place for place in range(len(whole)) if keep(place)])
    pq.write_table(table, folder / path)
    lost = {"rows": len(whole) - len(table), "nnz": sum(whole["nnz"].to_pylist()) - sum(table["nnz"].to_pylist())}

    def fewer(rows):
        for row in rows:
            if row["layer"] is None:
                row |= {name: row[name] - count for name, count in lost.items()}
                row["achieved_sparsity"] = 1 - row["nnz"] / (row["rows"] * row["in_features"])
        return rows

    edited_table(folder, "matrices.parquet", fewer)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["path"] == path:
            numbers = table["token"].to_pylist()
            file |= {"rows": len(table), "nnz": sum(table["nnz"].to_pylist())}
            file |= {"first_token": numbers[0], "last_token": numbers[-1]}
    counts = {name: manifest[name] - count for name, count in lost.items()}
    resign(folder, files=manifest["files"], **counts)


def test_a_row_too_few(folder):
    keep_rows(folder, lambda place: place != 1)
    rule = "must hold every captured token from the last position of its prompt on"
    (fault,) = said(folder)
    assert fault == f"{WHERE}: {rule}, got 1 missing, 5 the first"


def test_a_row_of_a_prompt_before_its_last_position(folder):
    def earlier(table):
        token, position = (table[name].to_numpy().copy() for name in ("token", "position"))
        token[0], position[0] = token[0] - 1, position[0] - 1
        return {"token": pa.array(token), "position": pa.array(position)}

    rewrite(folder, earlier, PART)
    faults = said(folder)
    rule = "captured token from the last position of its prompt on"
    assert f"{WHERE}: must hold every {rule}, got 1 missing, 4 the first" in faults
    assert f"{WHERE}: must hold {rule.replace('token', 'tokens')} only, got 3" in faults


def test_any_other_matrix_in_no_layer_may_lack_rows(tmp_path):
    folder = build_with_head(tmp_path, "float16", matrix="probe").workload
    assert said(folder) == []
    part = "data/model/probe/part-00000.parquet"
    keep_rows(folder, lambda place: place in (1, 4, 5), part)
    assert said(folder) == []
    rewrite(folder, lambda table: {"position": pa.array(table["position"].to_numpy() + np.int32(1))}, part)
    assert said(folder) == ["data/model/probe: position of token 5 must be that of tokens.parquet, got another"]


def test_a_layer_where_there_is_none(folder):
    rewrite(folder, lambda table: {"layer": pa.array(np.zeros(len(table), np.int16))}, PART)
    assert said(folder) == [f"{PART}: column layer of row group 0: must be null in every row, got another"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "teal", "parameters": '{"sparsity": 0.5}'}, "lm_head: method must be dense, got teal"),
        ({"threshold": 0.5, "threshold_bits": 0x3800}, "lm_head: threshold must be null under method dense, got 0.5"),
        ({"rows": 9}, "lm_head: rows must be 35, got 9"),
        ({"nnz": 9}, "lm_head: nnz must be 1258, got 9"),
    ],
    ids=["method", "threshold", "rows", "nnz"],
)
def test_its_row_of_the_matrices(folder, change, message):
    edited_table(folder, "matrices.parquet", lambda rows: [*rows[:-1], rows[-1] | change])
    resign(folder)
    assert f"matrices.parquet: {message}" in said(folder)


def test_its_own_method_is_what_it_is_checked_by(folder):
    """Under the workload's method its values would have to be above a threshold."""
    edited_table(folder, "matrices.parquet", lambda rows: [*rows[:-1], rows[-1] | {"threshold_bits": 0x7000}])
    resign(folder)
    assert not any("kept |x| must be above" in fault for fault in said(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dense", "parameters": "{}"}, "layer 0 q: method must be teal, got dense"),
        ({"method": "dense", "parameters": '{"a": 1}'}, "layer 0 q: parameters must be those of method dense, got "),
        ({"method": "of another program"}, "layer 0 q: method must be teal, got of another program"),
    ],
    ids=["another", "parameters", "unknown"],
)
def test_a_method_that_is_not_the_manifests(folder, change, message):
    edited_table(folder, "matrices.parquet", lambda rows: [rows[0] | change, *rows[1:]])
    resign(folder)
    assert any(fault.startswith(f"matrices.parquet: {message}") for fault in said(folder))


def test_the_first_version_of_the_format(half, tmp_path):
    """Every matrix had a layer, and the width of a merged weight was not told."""
    folder = shutil.copytree(half.workload, tmp_path / "workload")
    table = pq.read_table(folder / "matrices.parquet").drop_columns("weight_columns")
    pq.write_table(table.cast(table.schema.set(0, pa.field("layer", pa.int16(), False))), folder / "matrices.parquet")
    assert any("schema must be that of the format" in fault for fault in signed(folder, version=2))
    assert signed(folder, version=1) == []
    assert sparsetrace.open(folder).leaves == sparsetrace.open(half.workload).leaves


def signed(folder, **changes):
    resign(folder, **changes)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    if changes["version"] == 1:
        manifest.pop("revision", None)
    path.write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
    return said(folder)


def block_again(folder, ds, built, lose=None, change=None):
    """A block as a second run would write it: all captured tokens of sequences 1 and 0, `lm_head` with its own rows."""
    tokens = np.concatenate([ds.select(sequence=s).tokens for s in (1, 0)])
    arrays = {"rows.token": tokens}
    for layer, matrix in ds.leaves:
        own = tokens[np.isin(tokens, ds.tokens_of(layer, matrix))]
        if matrix == "lm_head":
            own = own[own != lose]
            arrays["model.lm_head.rows"] = np.flatnonzero(np.isin(tokens, own)).astype(np.int32)
        prefix = "model.lm_head" if layer is None else f"L{layer:02d}.{matrix}"
        rows = ds.matrix(layer, matrix, own)
        arrays |= {f"{prefix}.offsets": rows.offsets, f"{prefix}.values": rows.bits, f"{prefix}.mask": rows.mask}
    if change is not None:
        change(arrays)
    write_block(folder / "block.safetensors", {name: array.copy() for name, array in arrays.items()})
    return Block(folder / "block.safetensors"), tokens


def compare(folder, built, **changes):
    ds = sparsetrace.open(built.workload)
    block, tokens = block_again(folder, ds, built, **changes)
    held = {leaf: leaf[1] for leaf in ds.leaves}
    return [str(fault) for fault in _differences(ds, block, held, torch.device("cpu"))], ds, tokens


def test_a_block_that_is_the_same_again(built, tmp_path):
    assert compare(tmp_path, built)[0] == []


def test_a_block_with_another_value(built, tmp_path):
    def change(arrays):
        arrays["model.lm_head.values"][-1] ^= 1

    faults, ds, tokens = compare(tmp_path, built, change=change)
    last = tokens[np.isin(tokens, ds.tokens_of(*HEAD))][-1]
    (fault,) = faults
    assert fault.startswith(f"{WHERE}: token {last} must be the same when run again, got another")


def test_a_block_that_lacks_a_row(built, tmp_path):
    (fault,), _, _ = compare(tmp_path, built, lose=5)
    assert fault == f"{WHERE}: must hold a row of token 5 only if it is captured when run again, got the contrary"
