"""Every export format read back: by its own well-kept reader where there is one, else by a parser written out here."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from safetensors import safe_open
from workload_testing import OUTPUTS, build

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.workload import export_traces
from sparsetrace.workload.export import FORMS, export
from sparsetrace.workload.export_operands import Layout

LEAF = (1, "down")


@pytest.fixture(params=["all", "slice", "twin"])
def selection(request, built):
    """A selection, and its dense operands as the float32 that they are exactly."""
    ds = sparsetrace.open(built.workload)
    if request.param == "twin":
        twin = ds.twin(5)
        return twin, twin.matrix(*LEAF).dense().astype(np.float32)
    part = ds if request.param == "all" else ds.select(phase="decode", sequence=[1, 2])
    at = np.searchsorted(built.tokens, part.tokens)
    return part, built.values(*LEAF)[at].astype(np.float32)


def written(selection, form, tmp_path, **settings):
    path = tmp_path / f"x{FORMS[form].suffix}"
    export(selection, *LEAF, form, path, **settings)
    return path


def test_mtx(selection, tmp_path):
    ds, x = selection
    found = scipy.io.mmread(written(ds, "mtx", tmp_path))
    assert found.nnz == (x != 0).sum()
    # in the reader's own float64, not only when rounded
    assert np.array_equal(found.toarray(), x.astype(np.float64))


def test_smtx(selection, tmp_path):
    ds, x = selection
    size, offsets, columns = written(ds, "smtx", tmp_path).read_text().split("\n")[:3]
    rows, inputs, nnz = (int(part) for part in size.split(", "))
    indptr, indices = (np.array(line.split(), int) for line in (offsets, columns))
    matrix = scipy.sparse.csr_matrix((np.ones(nnz), indices, indptr), shape=(rows, inputs))
    assert np.array_equal(matrix.toarray() != 0, x != 0)


def test_npz(selection, tmp_path):
    ds, x = selection
    found = scipy.sparse.load_npz(written(ds, "npz", tmp_path))
    assert found.format == "csr"
    assert np.array_equal(found.toarray(), x)


def test_safetensors(selection, tmp_path):
    import torch

    ds, x = selection
    path = written(ds, "safetensors", tmp_path)
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert parts["values"].dtype == getattr(torch, ds.manifest["dtype"])
    assert np.array_equal(parts["token"].numpy(), ds.tokens)
    csr = torch.sparse_csr_tensor(
        parts["crow_indices"], parts["col_indices"], parts["values"].float(), size=parts["shape"].tolist()
    )
    assert np.array_equal(csr.to_dense().numpy(), x)


def test_npy_and_bitmask(selection, tmp_path):
    ds, x = selection
    dense = np.load(written(ds, "npy", tmp_path))
    assert dense.dtype == (np.float16 if ds.manifest["dtype"] == "float16" else np.float32)
    assert np.array_equal(dense.astype(np.float32), x)
    mask = np.load(written(ds, "bitmask", tmp_path))
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, x != 0)


def test_density(selection, tmp_path):
    ds, x = selection
    lines = written(ds, "density", tmp_path, tile=16).read_text().splitlines()
    assert lines[0] == "tile_density,tiles,probability"
    tiles = {}
    for row in x:
        for start in range(0, x.shape[1], 16):
            density = float(np.mean(row[start : start + 16] != 0))
            tiles[density] = tiles.get(density, 0) + 1
    found = [tuple(map(float, line.split(","))) for line in lines[1:]]
    assert [row[0] for row in found] == pytest.approx(sorted(tiles))
    assert [row[1] for row in found] == [tiles[density] for density in sorted(tiles)]
    assert sum(row[2] for row in found) == pytest.approx(1)


LAYOUTS = {
    "rows": Layout(),
    "strided": Layout(base=1 << 33, stride=1000, line=32),
    "unaligned": Layout(base=24, line=64, bundle=3, cycles=5),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_traces(selection, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(export_traces, "TRACE_LINES", 7)
    ds, x = selection
    row_bytes = OUTPUTS["down"] * (4 if ds.manifest["dtype"] == "float32" else 2)
    stride = layout.stride or row_bytes
    addresses, objects = [], []
    for row in x:
        for bundle in sorted({int(i) // layout.bundle for i in np.flatnonzero(row)}):
            first = bundle * layout.bundle
            last = min(first + layout.bundle, x.shape[1]) - 1
            begin, end = layout.base + first * stride, layout.base + last * stride + row_bytes
            objects.append((bundle, end - begin))
            addresses += [line * layout.line for line in range(begin // layout.line, (end - 1) // layout.line + 1)]
    ramulator = written(ds, "ramulator", tmp_path, layout=layout).read_text().splitlines()
    assert [line.split()[0] for line in ramulator] == ["LD"] * len(addresses)
    assert [int(line.split()[1], 16) for line in ramulator] == addresses
    dramsim3 = [line.split() for line in written(ds, "dramsim3", tmp_path, layout=layout).read_text().splitlines()]
    assert [int(address, 16) for address, _, _ in dramsim3] == addresses
    assert [(what, int(cycle)) for _, what, cycle in dramsim3] == [
        ("READ", i * layout.cycles) for i in range(len(addresses))
    ]
    cache = written(ds, "libcachesim", tmp_path, layout=layout).read_text().splitlines()
    assert cache[0] == "time,object,size"
    assert [tuple(map(int, line.split(","))) for line in cache[1:]] == [(i, *o) for i, o in enumerate(objects)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "csv"}, "format must be one of mtx, smtx, npz"),
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"matrix": "w"}, "layer and matrix must be 0 to 1 and one of q, k"),
        ({"form": "ramulator", "layout": Layout(stride=8)}, "stride must be at least the 74 bytes of a row, got 8"),
        ({"form": "dramsim3", "layout": Layout(base=(1 << 63) - 9)}, "base must leave the weight below address 0x8000"),
        ({"form": "libcachesim", "layout": Layout(base=1 << 64)}, "base must leave the weight below address 0x8000"),
    ],
)
def test_refusals(half, tmp_path, change, message):
    settings = {"layer": 1, "matrix": "down", "form": "npy"} | change
    with pytest.raises(InputError, match=message):
        export(sparsetrace.open(half.workload), out=tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_refuses_nothing_and_what_was_not_captured(half, tmp_path):
    with pytest.raises(InputError, match="the selection must hold at least one token, got none"):
        export(sparsetrace.open(half.workload).select(phase="forced"), *LEAF, "npy", tmp_path / "x")
    with pytest.raises(InputError, match="line must be at least 1, got 0"):
        Layout(line=0)
    ds = sparsetrace.open(build(tmp_path / "masks", "float16", level="masks").workload)
    for name, form in FORMS.items():
        if form.values:
            message = f"values must have been captured for {name}, got capture level `masks`: use smtx, bitmask, "
            with pytest.raises(InputError, match=message):
                written(ds, name, tmp_path)
        else:
            assert written(ds, name, tmp_path).stat().st_size > 0
    stats = sparsetrace.open(build(tmp_path / "stats", "float16", level="stats").workload)
    with pytest.raises(InputError, match="masks must have been captured, got capture level `stats`"):
        written(stats, "smtx", tmp_path)


def test_formats_lie_in_one_folder():
    assert len({form.suffix for form in FORMS.values()}) == len(FORMS)


def test_the_last_addresses(half, tmp_path):
    """A weight may end right below the last address that is allowed."""
    ds = sparsetrace.open(half.workload)
    base = (1 << 63) - 64 - ds.features(*LEAF) * 2 * OUTPUTS["down"]
    last = written(ds, "ramulator", tmp_path, layout=Layout(base=base)).read_text().splitlines()[-1]
    assert base < int(last.split()[1], 16) < 1 << 63


def test_what_is_interrupted_leaves_nothing(half, tmp_path, monkeypatch):
    ds = sparsetrace.open(half.workload)
    path = written(ds, "smtx", tmp_path)
    whole = path.read_bytes()

    def stop(operands, path):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMS, "smtx", replace(FORMS["smtx"], write=stop))
    with pytest.raises(KeyboardInterrupt):
        written(ds, "smtx", tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [whole]
