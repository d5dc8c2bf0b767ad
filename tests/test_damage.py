"""Files that one step writes and another reads: whatever bit of them flips on the way, the reading step says so.

The oracle is the undamaged run: a step must either refuse in one line or give what it gives for the sound file.
"""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.search_table import read_search_table, search_table_schema, write_search_table
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.checked import BLANK, read_checked_table, write_checked_table
from sparsetrace.core.files import InputError, read_sealed_json, write_sealed_json
from sparsetrace.core.settings import Batching, Calibration, Decoding, Machine, PromptSet
from sparsetrace.formats.dump import read_manifest, read_seal
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import read_shard, split, write_split
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack

CPU = Machine(device="cpu")
BATCHING = Batching(max_new_tokens=3, batch_size=2)
FLIPS = 150
SEAL = {"key": "k", "blocks": [], "rows": 0}


class Made:
    """Every artefact of a tiny run, in `folder`."""

    def __init__(self, tiny, folder):
        rng = tiny.rng("damage")
        self.folder = folder
        self.model = tiny.model(folder, rng, num_hidden_layers=1)
        tiny.thresholds(folder, self.model, rng)
        prompts = tiny.prompts(folder / "prompts.jsonl", rng, [4, 6, 5])
        groups, _ = split(prompts, self.model.tokenizer(), 128, PromptSet(), BATCHING)
        write_split(groups, 1, folder / "split.parquet")
        job = Job(
            self.model,
            folder / "split.parquet",
            0,
            folder / "dump" / "manifest.json",
            Decoding(),
            BATCHING,
            CPU,
            folder / "thresholds.parquet",
        )
        generate(job)
        identity = {"model_hash": "m", "method": "teal", "layer": 0}
        row = dict.fromkeys(search_table_schema(["q", "k"]).names, 0.25)
        write_search_table(folder / "greedy.parquet", identity, ["q", "k"], [row])
        shutil.copytree(folder / "dump", folder / "packed_dump")
        pack(folder / "packed_dump" / "manifest.json", folder / "workload", folder / "parts" / "00000.json")

    def pack(self, folder):
        """What packing the dump in `folder` gives."""
        pack(folder / "manifest.json", folder / "w", folder / "parts" / "00000.json")
        return packed_bytes(folder)

    def index(self, folder):
        """What indexing the parts in `folder` gives."""
        shutil.copytree(self.folder / "workload", folder / "w")
        index([folder / "00000.json"], folder / "w")
        manifest = json.loads((folder / "w" / "manifest.json").read_text())
        return {file["path"]: file["sha256"] for file in manifest["files"]}


def packed_bytes(folder):
    files = {**tree(folder / "w"), **tree(folder / "parts")}
    return {name: data for name, data in files.items() if not name.startswith(".")}


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return Made(tiny, tmp_path_factory.mktemp("damage"))


def histograms(path):
    found, provenance = Histograms.load(path)
    return found.counts_HP.tobytes(), found.zeros_H.tobytes(), provenance


READERS = {
    "histograms.safetensors": lambda made, path: histograms(path),
    "thresholds.parquet": lambda made, path: read_thresholds(path, made.model),
    "split.parquet": lambda made, path: read_shard(path, 0),
    "greedy.parquet": lambda made, path: read_search_table(path),
    "dump/manifest.json": lambda made, path: read_manifest(path, "pack"),
    "dump/group-00000.json": lambda made, path: read_seal(path, "pack"),
    "parts/.00000.json.record": lambda made, path: read_sealed_json(path, "pack", ("dump",)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_refused(made, tmp_path, rng, name):
    sound = (made.folder / name).read_bytes()
    path = tmp_path / name.rpartition("/")[2]
    path.write_bytes(sound)
    expected = READERS[name](made, path)
    refused = 0
    for place in rng.integers(0, len(sound), FLIPS).tolist():
        flipped = bytearray(sound)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = READERS[name](made, path)
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            # only the name of the checksum's own key, which is one more of a JSON file then
            assert (found if not isinstance(found, dict) else {key: found[key] for key in expected}) == expected
    assert refused >= 0.7 * FLIPS


DUMP = ["group-00000.block-000.safetensors", "group-00000.tokens.parquet", "group-00001.sequences.parquet"]


@pytest.mark.parametrize("name", DUMP)
def test_pack_refuses_a_damaged_dump(made, tmp_path, rng, name):
    shutil.copytree(made.folder / "dump", tmp_path / "sound")
    expected = made.pack(tmp_path / "sound")
    sound = (made.folder / "dump" / name).read_bytes()
    refused = 0
    for number, place in enumerate(rng.integers(0, len(sound), 8).tolist()):
        folder = shutil.copytree(made.folder / "dump", tmp_path / f"{number}")
        flipped = bytearray(sound)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(flipped)
        try:
            assert made.pack(folder) == expected
        except InputError as error:
            assert name in str(error)
            assert not (folder / "parts" / "00000.json").exists()
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize("name", ["00000.json", "00000.tokens.parquet", "00000.sequences.parquet"])
def test_index_refuses_damaged_parts(made, tmp_path, rng, name):
    expected = made.index(shutil.copytree(made.folder / "parts", tmp_path / "sound"))
    sound = (made.folder / "parts" / name).read_bytes()
    for number, place in enumerate(rng.integers(0, len(sound), 8).tolist()):
        folder = shutil.copytree(made.folder / "parts", tmp_path / f"{number}")
        flipped = bytearray(sound)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(flipped)
        try:
            assert made.index(folder) == expected
        except InputError as error:
            assert name in str(error)
            assert not (folder / "w" / "manifest.json").exists()


def test_histograms_of_the_wrong_shape_or_sign_are_refused(made, tmp_path):
    """As another program may write them, without a checksum."""
    from safetensors.numpy import load, save_file

    data = (made.folder / "histograms.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = json.loads(header["__metadata__"]["sparsetrace_histograms"])
    del content["checksum"]
    arrays = load(data)
    path = tmp_path / "h.safetensors"

    def refused(arrays, content):
        save_file(arrays, path, metadata={"sparsetrace_histograms": json.dumps(content)})
        with pytest.raises(InputError, match=r"^histograms: .*h.safetensors") as error:
            Histograms.load(path)
        return str(error.value)

    name = "L00.attn_in"
    assert "at least 0" in refused(arrays | {name: -arrays[name]}, content)
    assert f"none for {name}" in refused(arrays | {name: arrays[name][1:]}, content)
    assert f"none for {name}" in refused(arrays | {name: arrays[name].astype("int32")}, content)
    assert "got 1 arrays" in refused({name: arrays[name]}, content)
    for key in ("sites", "dtype", "model_hash"):
        assert "what it was counted on" in refused(arrays, {k: v for k, v in content.items() if k != key})
        assert "what it was counted on" in refused(arrays, content | {key: ["x"]}) or key == "model_hash"
    save_file(arrays, path, metadata={"sparsetrace_histograms": "[" * 100_000})
    with pytest.raises(InputError, match="deeper nesting"):
        Histograms.load(path)


def test_an_interrupted_calibration_with_damaged_counts_begins_anew(made, tmp_path, tiny):
    text = made.folder / "text.txt"
    job = CalibrationJob(made.model, text, tmp_path / "h.safetensors", Calibration(tokens=600, sequence_length=20), CPU)
    progress = tmp_path / ".h.safetensors.progress"
    progress.write_bytes((made.folder / "histograms.safetensors").read_bytes()[:-50])
    calibrate(job)
    assert not progress.exists()
    assert histograms(tmp_path / "h.safetensors") == histograms(made.folder / "histograms.safetensors")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("threshold_bits", -1, "threshold_bits must be the pattern of a finite number, got -1"),
        ("threshold_bits", 1 << 40, "threshold_bits must be the pattern of a finite number"),
        ("target_sparsity", 1.0, "target_sparsity must be at least 0 and below 1, got 1.0"),
        ("matrix", "x", "one row for each matrix of the model, in order, got others: layer 0 q, layer 0 x"),
    ],
)
def test_impossible_thresholds_are_refused(made, tmp_path, column, value, message):
    table = pq.read_table(made.folder / "thresholds.parquet")
    rows = table.to_pylist()
    rows[0][column] = value
    write_checked_table(type(table).from_pylist(rows, schema=table.schema), tmp_path / "t.parquet")
    with pytest.raises(InputError) as error:
        read_thresholds(tmp_path / "t.parquet", made.model)
    assert message in str(error.value)


def test_files_of_other_programs_are_taken_as_they_are(made, tmp_path):
    table = pq.read_table(made.folder / "thresholds.parquet")
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_thresholds(tmp_path / "t.parquet", made.model) == read_thresholds(
        made.folder / "thresholds.parquet", made.model
    )
    (tmp_path / "seal.json").write_text(json.dumps(SEAL))
    assert read_seal(tmp_path / "seal.json", "pack")["rows"] == 0


def test_the_mark_in_the_data_is_no_checksum(tmp_path):
    """A prompt may quote it."""
    import pyarrow as pa

    table = pa.table({"text": [BLANK, "x" + BLANK[:-3], BLANK * 3]})
    write_checked_table(table, tmp_path / "t.parquet")
    assert read_checked_table(tmp_path / "t.parquet", "t", "a table").equals(table)


@pytest.mark.parametrize("content", [{"key": "k", "blocks": []}, SEAL | {"rows": None}, SEAL | {"blocks": 3}])
def test_a_seal_without_what_it_must_say_is_refused(tmp_path, content):
    write_sealed_json(tmp_path / "seal.json", content)
    with pytest.raises(InputError, match=r"pack: .*seal.json"):
        read_seal(tmp_path / "seal.json", "pack")


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b"])
def test_a_seal_names_blocks_beside_it(tmp_path, name):
    write_sealed_json(tmp_path / "seal.json", SEAL | {"blocks": [name]})
    with pytest.raises(InputError, match="must name the blocks beside it"):
        read_seal(tmp_path / "seal.json", "pack")
