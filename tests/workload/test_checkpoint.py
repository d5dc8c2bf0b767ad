"""Weights of a workload's model: against the tensors that were saved, and products in float64."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from test_read import LEAVES
from workload_testing import SITES

import sparsetrace
from sparsetrace.core.files import InputError, sha256_file
from sparsetrace.formats.tables import MATRIX_TABLE
from sparsetrace.workload.weights import site_rows


def test_weights_and_products(tmp_path, half):
    """Against a float64 product, with the checkpoint in both orders and in another dtype."""
    rng = torch.Generator().manual_seed(0)
    plain, merged, digests = {}, {}, {}
    for site in SITES:
        weights = {m: torch.randn(site.outputs(m), site.in_features, generator=rng) for m in site.matrices}
        plain |= {f"model.layers.{site.layer}.{m}": w for m, w in weights.items()}
        whole = torch.cat([w.half().T for w in weights.values()], dim=1).contiguous()
        merged[f"layers.{site.layer}.{site.name}.weight"] = whole
        digests[site.key] = hashlib.sha256(whole.numpy().data).hexdigest()
    for name, tensors in (("runtime", merged), ("original", plain)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    folder = shutil.copytree(half.workload, tmp_path / "w")
    table = pq.read_table(folder / "matrices.parquet")
    rows = [r | {"weight_sha256": digests[r["layer"], r["site"]]} for r in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=MATRIX_TABLE), folder / "matrices.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for file in manifest["files"]:
        file["sha256"] = sha256_file(folder / file["path"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in ("runtime", "original"):
        ds = sparsetrace.open(folder, model=tmp_path / name)
        for layer, matrix in LEAVES:
            exact = plain[f"model.layers.{layer}.{matrix}"].half().double().T.numpy()
            weight = ds.weight(layer, matrix)
            assert np.array_equal(weight, exact)
            # of the runtime model a view of the mapped file; the original is float32 and has to be rounded
            assert (weight.flags.owndata or weight.flags.writeable) == (name == "original")
            y = ds.product(layer, matrix, int(half.tokens[9]))
            wanted = half.values(layer, matrix)[9].astype(np.float64) @ exact
            assert np.allclose(y, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    other = {k: v + 1 for k, v in merged.items()}
    save_file(other, tmp_path / "runtime" / "model.safetensors")
    with pytest.raises(InputError, match="must have sha256"):
        sparsetrace.open(folder, model=tmp_path / "runtime").weight(0, "q")


SIBLINGS = [
    # id, site, matrices in the workload, whether it is a sample of matrices, matrices of the site in their order
    ("all", "attn_in", "vqk", False, 15, "qkv"),
    ("all-of-a-sample", "attn_in", "vqk", True, 15, "qkv"),
    ("some", "attn_in", "kv", True, 15, ""),
    ("first", "attn_in", "q", True, 15, ""),
    ("single", "mlp_mid", "q", True, 5, "q"),
    ("open-name", "experts_in", "kq", True, 10, "qk"),
    # written before the count of columns was
    ("version-1", "attn_in", "vqk", False, None, "qkv"),
    ("version-1-sample", "attn_in", "vqk", True, None, ""),
]


@pytest.mark.parametrize(
    ("site", "stored", "sampled", "columns", "wanted"), [pytest.param(*c[1:], id=c[0]) for c in SIBLINGS]
)
def test_rows_of_a_whole_site(site, stored, sampled, columns, wanted):
    """A hash over a site's tensor can be told from the checkpoint only if no matrix of the site is missing."""
    count = {"weight_columns": columns} if columns else {}
    same = {"site": site, "out_features": 5, **count}
    rows = [{"layer": 0, "matrix": name, "weight_column": "qkv".index(name), **same} for name in stored]
    rows += [{"layer": 1, "matrix": "q", "weight_column": 0, **same}]
    found = site_rows(rows[0], rows, sampled)
    assert [(row["layer"], row["matrix"]) for row in found] == [(0, name) for name in wanted]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole[:-1], "must have [0-9]+ bytes, got [0-9]+: copy it again"),
        (lambda whole: whole[:20], "must be a safetensors file, got JSONDecodeError"),
        (lambda whole: b"", "must be a safetensors file, got JSONDecodeError"),
        (lambda whole: b"x" * 100, "must be a safetensors file, got "),
        (lambda whole: (2).to_bytes(8, "little") + b"[]", "must be a safetensors file, got "),
        (lambda whole: (9).to_bytes(8, "little") + b'{"a": {}}', "must be a safetensors file, got KeyError"),
    ],
)
def test_damaged_weights(half, tmp_path, change, message):
    save_file({"a": torch.ones(3, 4)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(change(whole))
    with pytest.raises(InputError, match=f"model.safetensors {message}"):
        sparsetrace.open(half.workload, model=tmp_path).weight(0, "q")
