"""What stored fields determine of a method's rule: each kind of damage is named, and each method repeats itself.

The workloads are real runs of a tiny model; damage is written into their files, and the manifest made to fit.
"""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_verify import edited_table, resign, rewrite, said

from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.core.settings import Batching, Calibration, Capture, Decoding, Machine, PromptSet
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.methods import NM, Cats, Dense, ExactZeros, Griffin, Teal, TopK, Wina
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack
from sparsetrace.tools.recompute import recompute

METHODS = {
    "teal": Teal(sparsity=0.5),
    "topk": TopK(sparsity=0.5),
    "cats": Cats(sparsity=0.5),
    "wina": Wina(sparsity=0.5),
    "wina-threshold": Wina(sparsity=0.5, select="threshold"),
    "nm": NM(pattern="2:4"),
    "griffin": Griffin(sparsity=0.5),
    "dense": Dense(),
    "exact_zeros": ExactZeros(),
}
CPU = Machine(device="cpu")
BATCHING = Batching(max_new_tokens=5, batch_size=2)
PART = "data/L01/{}/part-00000.parquet"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A function that gives the model and the workload of a method, made once."""
    folder = tmp_path_factory.mktemp("methods")
    rng = tiny.rng("method rules")
    # widths that are a multiple of four
    sizes = {"hidden_size": 32, "intermediate_size": 44, "torch_dtype": "bfloat16"}
    models = {act: tiny.model(folder / act, rng, hidden_act=act, **sizes) for act in ("silu", "relu")}
    (folder / "text.txt").write_text(tiny.words(rng, 600))
    prompts = tiny.prompts(folder / "prompts.jsonl", rng, [5, 9, 4])
    made = {}

    def make(name, capture=None):
        method, model = METHODS[name], models["relu" if name == "exact_zeros" else "silu"]
        here = folder / f"{name}-{capture}"
        if here not in made:
            here.mkdir()
            counts, table = here / "histograms.safetensors", here / "thresholds.parquet"
            scores = [method.name] if method.score in ("scaled", "gate") else []
            settings = Calibration(tokens=600, sequence_length=20)
            calibrate(CalibrationJob(model, folder / "text.txt", counts, settings, CPU, scores=scores))
            derive_thresholds(method.label, method, counts, table)
            groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), BATCHING)
            write_split(groups, 1, here / "split.parquet")
            decoding = Decoding(prefill="half", ignore_eos=True)
            dump, part = here / "dump" / "00000" / "manifest.json", here / "parts" / "00000.json"
            kept = capture or Capture()
            generate(Job(model, here / "split.parquet", 0, dump, decoding, BATCHING, CPU, table, kept))
            pack(dump, here / "workload", part)
            index([part], here / "workload")
            made[here] = here / "workload"
        return model, made[here]

    return make


@pytest.fixture
def damaged(run, tmp_path):
    """A function that gives a copy of a method's workload, to be damaged."""
    return lambda name: shutil.copytree(run(name)[1], tmp_path / "workload")


@pytest.mark.parametrize("name", METHODS)
def test_a_sound_run_has_no_fault_and_repeats_itself(run, name):
    model, workload = run(name)
    assert said(workload) == []
    assert recompute(workload, model.folder, 3, CPU) == []


@pytest.mark.parametrize("level", ["masks", "stats"])
@pytest.mark.parametrize("name", ["griffin", "topk"])
def test_lower_levels(run, name, level):
    model, workload = run(name, Capture(level=level))
    assert said(workload) == []
    assert recompute(workload, model.folder, 3, CPU) == []


def keep_more(table, place=None):
    """The first row keeps one input more, with the smallest value that the row has elsewhere."""
    row = table.slice(0, 1).to_pylist()[0]
    bits = np.unpackbits(np.frombuffer(row["mask"], np.uint8), bitorder="little")
    place = int(np.flatnonzero(bits == 0)[0]) if place is None else place
    assert not bits[place]
    before = int(bits[:place].sum())
    bits[place] = 1
    changed = {"mask": np.packbits(bits, bitorder="little").tobytes(), "nnz": row["nnz"] + 1}
    for name in ("values_lo", "values_hi"):
        changed[name] = row[name][:before] + row[name][:1] + row[name][before:]
    return {
        name: pa.array([value, *table[name].to_pylist()[1:]], table.schema.field(name).type)
        for name, value in changed.items()
    }


@pytest.mark.parametrize(
    ("name", "matrix", "message"),
    [
        ("topk", "q", "column nnz of row group 0: must be at most 16 under topk-0.5, got 17 in token "),
        ("wina", "down", "column nnz of row group 0: must be at most 22 under wina-0.5, got 23 in token "),
        ("griffin", "down", "column nnz of row group 0: must be at most 22 under griffin-0.5, got 23 in token "),
        ("nm", "o", "column mask of row group 0: must keep at most 2 of each 4 neighbours, got more in token "),
    ],
)
def test_an_input_too_many(damaged, name, matrix, message):
    folder = damaged(name)
    rewrite(folder, keep_more, PART.format(matrix))
    assert any(message in fault for fault in said(folder))


def flip_output(table):
    masks = table["out_mask"].to_pylist()
    return {"out_mask": pa.array([bytes([masks[0][0] ^ 1]) + masks[0][1:], *masks[1:]], pa.binary())}


def test_a_neuron_too_few(damaged):
    folder = damaged("griffin")
    rewrite(folder, flip_output, PART.format("gate"))
    message = (
        "column out_mask of row group 0: must name 22 of 44 outputs under griffin-0.5, got another number in token "
    )
    assert any(message in fault for fault in said(folder))


def test_outputs_of_another_matrix_or_token(damaged):
    folder = damaged("griffin")

    def exchange(table):
        masks = np.array([list(mask) for mask in table["out_mask"].to_pylist()], np.uint8)
        bits = np.unpackbits(masks, axis=1, count=44, bitorder="little")
        one, zero = np.flatnonzero(bits[0] == 1)[0], np.flatnonzero(bits[0] == 0)[0]
        bits[0, [one, zero]] = bits[0, [zero, one]]
        masks = np.packbits(bits, axis=1, bitorder="little")
        return {"out_mask": pa.array([mask.tobytes() for mask in masks], pa.binary())}

    rewrite(folder, exchange, PART.format("gate"))
    faults = said(folder)
    assert "data/L01/up: out_mask must be that of gate" in faults
    assert "data/L01/gate: column out_mask: must be one for all of sequence 0, got several" in faults


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_down_keeps_what_was_not_computed(damaged, name):
    folder = damaged(name)
    dropped = pq.read_table(folder / PART.format("up"))["out_mask"].to_pylist()

    def move(table):
        """One kept input goes to a place that was not computed."""
        masks = table["mask"].to_pylist()
        bits = np.unpackbits(np.frombuffer(masks[0], np.uint8), bitorder="little")
        out = np.unpackbits(np.frombuffer(dropped[0], np.uint8), bitorder="little")
        bits[np.flatnonzero(bits)[0]] = 0
        bits[np.flatnonzero(out)[0]] = 1
        return {"mask": pa.array([np.packbits(bits, bitorder="little").tobytes(), *masks[1:]], pa.binary())}

    rewrite(folder, move, PART.format("down"))
    message = "data/L01/down: column mask: must keep no input that "
    assert any(fault.startswith(message) and "did not compute" in fault for fault in said(folder))


@pytest.mark.parametrize(
    ("name", "matrix", "rule"), [("cats", "up", "be there in every row"), ("dense", "q", "be null")]
)
def test_out_mask_lost_or_invented(damaged, name, matrix, rule):
    folder = damaged(name)

    def other(table):
        stated = table["out_mask"].null_count == 0
        return {"out_mask": pa.array([None if stated else b"0"] * len(table), pa.binary())}

    rewrite(folder, other, PART.format(matrix))
    message = f"column out_mask of row group 0: must {rule} under method {name}, got the contrary"
    assert any(message in fault for fault in said(folder))


def test_out_mask_of_another_width(damaged):
    folder = damaged("cats")

    def bits_beyond(table):
        masks = [mask[:-1] + bytes([mask[-1] | 0x80]) for mask in table["out_mask"].to_pylist()]
        return {"out_mask": pa.array(masks, pa.binary())}

    rewrite(folder, bits_beyond, PART.format("up"))
    assert any("column out_mask of row group 0: bits beyond the last output" in fault for fault in said(folder))
    rewrite(folder, lambda t: {"out_mask": pa.array([b"0"] * len(t), pa.binary())}, PART.format("up"))
    assert any("column out_mask of row group 0: must have 6 bytes in every row" in fault for fault in said(folder))


@pytest.mark.parametrize("name", ["dense", "exact_zeros", "topk"])
def test_a_threshold_where_there_is_none(damaged, name):
    folder = damaged(name)
    edited_table(
        folder, "matrices.parquet", lambda rows: [row | {"threshold": 0.5, "threshold_bits": 16128} for row in rows]
    )
    resign(folder)
    message = f"matrices.parquet: layer 0 q: threshold must be null under method {name}, got 0.5"
    assert message in said(folder)


def test_parameters_of_another_method(damaged):
    folder = damaged("nm")
    resign(folder, parameters={"sparsity": 0.5})
    assert any(fault.startswith("manifest.json: parameters must be those of method nm, got ") for fault in said(folder))


def test_recomputing_finds_another_output(run, damaged):
    """An out_mask of `up` that no stored field contradicts: nothing was kept there, and CATS says no number."""
    model, workload = run("cats")
    down = pq.read_table(workload / PART.format("down"))["mask"].to_pylist()
    folder = damaged("cats")

    def more(table):
        masks = table["out_mask"].to_pylist()
        out, kept = (np.frombuffer(mask, np.uint8) for mask in (masks[0], down[0]))
        bits = np.unpackbits(~(out | kept), count=44, bitorder="little")
        # a neuron that was computed and gave zero is rare; without one, one that was not computed is said to be
        place = (
            int(np.flatnonzero(bits)[0])
            if bits.any()
            else int(np.flatnonzero(np.unpackbits(out, bitorder="little"))[0])
        )
        changed = np.unpackbits(out, bitorder="little")
        changed[place] ^= 1
        return {"out_mask": pa.array([np.packbits(changed, bitorder="little").tobytes(), *masks[1:]], pa.binary())}

    rewrite(folder, more, PART.format("up"))
    assert said(folder) == []
    (fault,) = recompute(folder, model.folder, 3, CPU)
    assert str(fault).startswith("data/L01/up: token ")
