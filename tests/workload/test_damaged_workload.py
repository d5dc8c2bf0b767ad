"""A finished workload that was damaged, or that names files which are not its own: the reader says so in one line.

The oracle of damage is the sound workload: whatever bit flips, what is read is equal or refused.
"""

import json
import shutil

import numpy as np
import pytest

from sparsetrace.core.files import InputError, sha256_json
from sparsetrace.workload.export import export
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.verify import verify

BATCHES = (3, 4)


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    from sparsetrace.core.settings import Batching, Decoding

    rng, folder = tiny.rng("damaged workload"), tmp_path_factory.mktemp("sound")
    model = tiny.model(folder, rng, num_hidden_layers=1)
    batching = Batching(max_new_tokens=4, batch_size=2)
    return tiny.workload(folder / "run", model, rng, [4, 5, 3], Decoding(prefill="half"), batching)


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "w")


def contents(folder):
    """Everything that a reader gives of one matrix, and the tables."""
    ds = Workload(folder)
    rows = ds.matrix(0, "down")
    tables = [table.to_pylist() for table in (ds.token_table, ds.sequence_table, ds.matrix_table)]
    return rows.token.tolist(), rows.dense().tolist(), ds.figures(0, "down").to_pylist(), tables


def resealed(folder, change):
    """Edit the manifest and give it the hash that fits."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))


def entry(manifest, path):
    return next(file for file in manifest["files"] if file["path"] == path)


PART = "data/L00/down/part-00000.parquet"


@pytest.mark.parametrize("name", [PART, "tokens.parquet", "sequences.parquet", "matrices.parquet", "manifest.json"])
def test_a_flipped_bit_is_noticed(copy, rng, name):
    expected, data, refused = contents(copy), (copy / name).read_bytes(), 0
    flips = 120
    for place in rng.integers(0, len(data), flips).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (copy / name).write_bytes(flipped)
        try:
            assert contents(copy) == expected, f"byte {place}"
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    # the headers of pages carry no checksum, nor do the bytes that begin the file
    assert refused > 0.6 * flips


def test_export_refuses_damaged_values(copy, tmp_path):
    data = bytearray((copy / PART).read_bytes())
    data[len(data) // 3] ^= 1
    (copy / PART).write_bytes(data)
    with pytest.raises(InputError, match="must be undamaged, got .*: run `sparsetrace verify`"):
        export(Workload(copy), 0, "down", "npy", tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_footers_of_an_earlier_workload_are_taken_as_they_are(copy):
    expected = contents(copy)
    resealed(copy, lambda manifest: [file.pop("footer_sha256", None) for file in manifest["files"]])
    assert contents(copy) == expected and verify(copy) == []


def test_verify_compares_footers(copy):
    resealed(copy, lambda manifest: entry(manifest, PART).update(footer_sha256="0" * 64))
    assert any(f"footer_sha256 of {PART} must be" in str(fault) for fault in verify(copy))


NAMES = ["../w/" + PART, "/etc/passwd", "", "data/../../x", "data/./L00", "a\0b", "..\\x", 3, None]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_outside_the_folder_are_refused(copy, name):
    resealed(copy, lambda manifest: entry(manifest, PART).update(path=name))
    with pytest.raises(InputError) as error:
        contents(copy)
    assert "\n" not in str(error.value)
    assert any("path" in str(fault) or "must name files" in str(fault) for fault in verify(copy))


@pytest.mark.parametrize("name", [PART, "tokens.parquet"])
def test_links_that_lead_outside_are_refused(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"must name files in its own folder, got '{name}', a link to"):
        contents(copy)
    assert any("a link to" in str(fault) for fault in verify(copy))


def test_links_within_and_the_cache_of_the_hub_are_read(sound, copy, tmp_path):
    expected = contents(sound)
    (copy / PART).rename(copy / "moved")
    (copy / PART).symlink_to(copy / "moved")
    assert contents(copy) == expected
    # a snapshot of the hub's cache is made of links to its blobs
    hub = tmp_path / "hub" / "datasets--x"
    snapshot = shutil.copytree(sound, hub / "snapshots" / "1" / "w")
    (hub / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(hub / "blobs" / str(number))
        path.symlink_to(hub / "blobs" / str(number))
    assert contents(snapshot) == expected and verify(snapshot) == []
    # the workload's own folder may be reached by a link
    (tmp_path / "link").symlink_to(sound)
    assert contents(tmp_path / "link") == expected


@pytest.mark.parametrize("key", ["dtype", "tokens", "files"])
@pytest.mark.parametrize("value", ["absent", None, "x", [3]], ids=repr)
def test_a_manifest_that_lacks_a_key_is_refused(copy, key, value):
    resealed(copy, lambda m: m.pop(key) if value == "absent" else m.update({key: value}))
    with pytest.raises(InputError, match=r"^open: .*manifest.json"):
        Workload(copy)


@pytest.mark.parametrize("key", ["path", "rows", "first_token", "layer"])
def test_a_file_that_lacks_a_key_is_refused(copy, key):
    resealed(copy, lambda m: entry(m, PART).pop(key))
    with pytest.raises(InputError, match=r"^open: .*manifest.json"):
        Workload(copy)


def test_what_a_matching_hash_covers_is_still_looked_at(copy):
    """A file that fits the manifest and does not fit the format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sparsetrace.core.folder import footer_sha256

    table = pq.read_table(copy / PART, partitioning=None)
    masks = pa.array([b"\xff" for _ in range(len(table))], pa.binary())
    pq.write_table(table.set_column(table.schema.get_field_index("mask"), "mask", masks), copy / PART)
    resealed(copy, lambda m: entry(m, PART).update(footer_sha256=footer_sha256(copy / PART)))
    with pytest.raises(InputError, match="must be undamaged"):
        contents(copy)
    assert np.isfinite(Workload(copy).density(0, "q"))
