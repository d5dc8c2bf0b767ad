"""Generation of shards: schedules against brute-force lists, and identical bytes whatever happened on the way."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Capture, Decoding, PromptSet
from sparsetrace.formats.tables import TOKENS
from sparsetrace.generation import selection
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.matrix_table import matrix_table
from sparsetrace.generation.prompts import read_shard, split, write_split
from sparsetrace.generation.seal import repeated_share
from sparsetrace.generation.selection import select
from sparsetrace.methods import Dense, Teal
from sparsetrace.model.patch import install

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LENGTHS = [3, 9, 1, 6, 4, 12, 2]


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """A model, thresholds and one shard of two groups, of four sequences and of three."""
    folder = tmp_path_factory.mktemp("generate")
    rng = tiny.rng("generate")
    model = tiny.model(folder, rng, num_hidden_layers=2)
    thresholds = tiny.thresholds(folder, model, rng)
    prompts = tiny.prompts(folder / "prompts.jsonl", rng, LENGTHS)
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), Batching(max_new_tokens=6, batch_size=4))
    write_split(groups, 1, folder / "split.parquet")
    return model, thresholds, folder / "split.parquet"


def make(inputs, folder: Path, machine, decoding=None, batching=None) -> Path:
    """Generate into a folder."""
    batching = batching or Batching(max_new_tokens=6, batch_size=4)
    generate(job(inputs, folder, machine, decoding or Decoding(), batching))
    return folder


def job(inputs, folder, machine, decoding, batching) -> Job:
    model, thresholds, prompts = inputs
    out = folder / "manifest.json"
    return Job(model, prompts, 0, out, decoding, batching, machine, thresholds=thresholds)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def table(folder: Path, name: str) -> list[dict]:
    return [row for file in sorted(folder.glob(f"*.{name}.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("prefill", ["none", "half", "all"])
def test_two_runs_give_identical_files(inputs, tmp_path, machine, prefill, temperature):
    decoding = Decoding(prefill=prefill, temperature=temperature, seed=5)
    first = make(inputs, tmp_path / "first", machine, decoding)
    second = make(inputs, tmp_path / "elsewhere" / "second", machine, decoding)
    assert contents(first) == contents(second)
    assert not [name for name in contents(first) if "partial" in name]


@pytest.mark.parametrize("prefill", ["none", "half", "all"])
def test_schedule_is_the_brute_force_list(inputs, tmp_path, machine, prefill, monkeypatch):
    """Every position fed, in which pass and slot, which are sparsified and captured, and how many rows come of it."""
    for limit in ("BLOCK_BYTES", "GPU_BLOCK_BYTES"):
        monkeypatch.setattr(selection, limit, 20_000)
    _, _, shard = inputs
    folder = make(inputs, tmp_path, machine, Decoding(prefill=prefill))
    outputs = {row["sequence"]: row["output_ids"] for row in table(folder, "sequences")}
    # chunks of prefill hold what a block holds, a row being both layers' operands in float32, of equal thresholds
    row_bytes = 2 * (2 * 36 + 32 + 43) * 4
    chunk = 10**9 if prefill == "none" else 20_000 // row_bytes // 4
    expected = []
    for group in read_shard(shard, 0):
        longest = max(len(sequence.prompt_ids) for sequence in group)
        chunks = -(-longest // min(chunk, longest))
        for sequence in group:
            length = len(sequence.prompt_ids)
            fed = sequence.prompt_ids + outputs[sequence.sequence][:-1]
            first = {"none": length, "half": length - length // 2, "all": 0}[prefill]
            for position, token_id in enumerate(fed):
                decoding = position >= length
                expected.append(
                    {
                        "token": sequence.base + position,
                        "sequence": sequence.sequence,
                        "position": position,
                        "token_id": token_id,
                        "text": ["<unk>", "<s>", "</s>"][token_id] if token_id < 3 else f"w{token_id}",
                        "phase": "decode" if decoding else "prefill",
                        "captured": position >= first,
                        "sparsified": position >= first,
                        "group": sequence.group,
                        "step": chunks + position - length if decoding else position // chunk,
                        "slot": sequence.slot,
                    }
                )
    expected.sort(key=lambda row: row["token"])
    assert table(folder, "tokens") == expected
    assert pq.read_schema(folder / "group-00000.tokens.parquet").equals(TOKENS)

    captured = [row["token"] for row in expected if row["captured"]]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == len(captured)
    assert len(manifest["matrices"]) == 2 * 7
    stored = []
    for file in folder.glob("*.safetensors"):
        arrays = load_file(file)
        stored += arrays["rows.token"].tolist()
        held = {f"L{matrix['layer']:02d}.{matrix['held_by']}.mask" for matrix in manifest["matrices"]}
        assert {name for name in arrays if name.endswith(".mask")} == held
        assert {len(array) for name, array in arrays.items() if name.endswith(".mask")} == {len(arrays["rows.token"])}
    assert sorted(stored) == captured


def test_order_of_the_prompt_file_does_not_matter(inputs, tiny, tmp_path, rng, machine):
    model, thresholds, _ = inputs
    lines = tiny.prompts(tmp_path / "prompts.jsonl", rng, LENGTHS).read_text().splitlines(keepends=True)
    found = []
    for number, order in enumerate([np.arange(len(lines)), rng.permutation(len(lines))]):
        (tmp_path / "prompts.jsonl").write_text("".join(lines[i] for i in order))
        batching = Batching(max_new_tokens=6, batch_size=4)
        groups, _ = split(tmp_path / "prompts.jsonl", model.tokenizer(), 128, PromptSet(), batching)
        write_split(groups, 1, tmp_path / f"{number}.parquet")
        folder = make((model, thresholds, tmp_path / f"{number}.parquet"), tmp_path / str(number), machine)
        data = {
            name: data for name, data in contents(folder).items() if name.endswith(("safetensors", "tokens.parquet"))
        }
        rows = table(folder, "sequences")
        assert [json.loads(lines[order[row["source_index"]]])["prompt"] for row in rows] == [r["prompt"] for r in rows]
        found.append((data, [{k: v for k, v in row.items() if k != "source_index"} for row in rows]))
    assert found[0] == found[1]


def run_group(model, group, machine, batching, folder, decoding=None):
    decoder = model.load(torch.device(machine.device))
    rules = middle_rules()
    patch = install(decoder, Teal(sparsity=0.5), rules)
    engine = Engine(
        EngineSetup(decoder, patch, decoding or Decoding(prefill="all", ignore_eos=True), batching, model.eos)
    )
    chosen = select(model.sites, model.config.dtype, patch, Capture())
    recorder = Recorder(chosen, engine.block_rows, engine.device)
    recorder.open(folder, group[0].group)
    result = engine.run(group, recorder)
    rows = {}
    for name in recorder.close()[0]:
        arrays = load_file(folder / name)
        for i, token in enumerate(arrays["rows.token"].tolist()):
            for stem in {key.rsplit(".", 1)[0] for key in arrays} - {"rows"}:
                start, stop = arrays[f"{stem}.offsets"][i : i + 2]
                rows[token, stem] = (
                    arrays[f"{stem}.mask"][i].tobytes(),
                    arrays[f"{stem}.values"][start:stop].tobytes(),
                )
    return result, rows


def middle_rules():
    """Thresholds near the middle of what a random model feeds its matrices."""
    from sparsetrace.methods import MatrixRule

    bits = int(torch.tensor(0.4).view(torch.int32))
    return [MatrixRule(layer, matrix, bits) for layer in range(2) for matrix in MATRICES]


def test_empty_slots_do_not_matter(inputs, tmp_path, machine):
    """Three of four sequences give the bits that they give beside the fourth."""
    model, _, shard = inputs
    full = read_shard(shard, 0)[0]
    batching = Batching(max_new_tokens=6, batch_size=4)
    # the longest stays, since it sets the shape
    kept = [full[1], full[2], full[3]]
    _, rows_of_four = run_group(model, [full[1], full[2], full[3], full[0]], machine, batching, tmp_path / "four")
    result, rows_of_three = run_group(model, kept, machine, batching, tmp_path / "three")
    bases = [sequence.base for sequence in kept]
    tokens = {base + p for base, sequence in zip(bases, kept, strict=True) for p in range(len(sequence.prompt_ids) + 5)}
    assert {token for token, _ in rows_of_three} == tokens
    assert rows_of_three == {key: value for key, value in rows_of_four.items() if key[0] in tokens}
    assert set(result.fed["slot"].to_pylist()) == {0, 1, 2}


def test_stops_at_end_of_sequence(inputs, tmp_path, machine):
    """Each sequence is what it is without an end, cut after its first end token, which is never fed."""
    model, thresholds, shard = inputs
    decoding = Decoding(temperature=1.0, seed=3)
    free = make(
        (model, thresholds, shard), tmp_path / "free", machine, decoding.model_copy(update={"ignore_eos": True})
    )
    endless = {row["sequence"]: row for row in table(free, "sequences")}
    assert all(len(row["output_ids"]) == 6 and not row["stopped"] for row in endless.values())
    # a token that some sequences reach in the middle, and one that a sequence reaches at once
    ends = frozenset({endless[1]["output_ids"][2], endless[4]["output_ids"][0]})
    ending = dataclasses.replace(model, eos=ends)
    stopped = make((ending, thresholds, shard), tmp_path / "stopped", machine, decoding)
    rows = {row["sequence"]: row for row in table(stopped, "sequences")}
    for number, row in rows.items():
        full = endless[number]["output_ids"]
        end = next((i for i, token in enumerate(full) if token in ends), None)
        assert row["output_ids"] == (full if end is None else full[: end + 1])
        assert row["stopped"] == (end is not None)
    assert len(rows[4]["output_ids"]) == 1
    fed = table(stopped, "tokens")
    for number, row in rows.items():
        own = [r["token_id"] for r in fed if r["sequence"] == number]
        assert own == row["prompt_ids"] + row["output_ids"][:-1]
    ignoring = make(
        (ending, thresholds, shard), tmp_path / "ignoring", machine, decoding.model_copy(update={"ignore_eos": True})
    )
    assert [row["output_ids"] for row in table(ignoring, "sequences")] == [r["output_ids"] for r in endless.values()]


def test_a_sequence_that_ended_does_not_disturb_the_others(inputs, tmp_path, machine):
    model, _, shard = inputs
    group = read_shard(shard, 0)[0]
    batching = Batching(max_new_tokens=6, batch_size=4)
    endless, free_rows = run_group(model, group, machine, batching, tmp_path / "free")
    ending = dataclasses.replace(model, eos=frozenset({endless.output_ids[2][1]}))
    stopped, rows = run_group(ending, group, machine, batching, tmp_path / "stop", Decoding(prefill="all"))
    assert sum(map(len, stopped.output_ids)) < sum(map(len, endless.output_ids))
    assert rows == {key: free_rows[key] for key in rows}


def test_resumes_at_the_first_unsealed_group(inputs, tmp_path, machine):
    """A seal that is gone: its group is made again, the others are not touched, and the bytes are the same."""
    whole = make(inputs, tmp_path / "whole", machine, Decoding(prefill="half"))
    expected = contents(whole)
    sealed = [file for file in whole.iterdir() if file.name.startswith("group-00000")]
    times = {file: file.stat().st_mtime_ns for file in sealed}
    (whole / "group-00001.json").unlink()
    (whole / "manifest.json").unlink()
    (whole / "group-00001.block-000.safetensors").write_bytes(b"cut off")
    (whole / "group-00001.block-007.safetensors").write_bytes(b"stray")
    (whole / ".group-00001.block-001.safetensors.partial").write_bytes(b"half")
    make(inputs, whole, machine, Decoding(prefill="half"))
    left = contents(whole)
    left.pop(".group-00001.block-001.safetensors.partial", None)
    assert left == expected
    assert {file: file.stat().st_mtime_ns for file in sealed} == times


def test_complete_dump_loads_no_weights(inputs, tmp_path, machine):
    model, thresholds, shard = inputs
    folder = make(inputs, tmp_path / "dump", machine)
    expected = contents(folder)
    # no weights there any more
    moved = dataclasses.replace(model, folder=tmp_path / "gone")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "tokenizer.json").write_bytes((model.folder / "tokenizer.json").read_bytes())
    make((moved, thresholds, shard), folder, machine)
    assert contents(folder) == expected


@pytest.mark.parametrize("what", ["decoding", "batching", "thresholds", "end tokens", "prompts"])
def test_groups_of_another_run_are_not_reused(inputs, tiny, tmp_path, rng, machine, what):
    model, thresholds, shard = inputs
    folder = make(inputs, tmp_path / "dump", machine, Decoding(ignore_eos=True, temperature=0.5))
    decoding, batching = Decoding(ignore_eos=True, temperature=0.5), Batching(max_new_tokens=6, batch_size=4)
    match what:
        case "decoding":
            decoding = Decoding(ignore_eos=True, temperature=0.5, prefill="half")
        case "batching":
            batching = Batching(max_new_tokens=3, batch_size=4)
        case "thresholds":
            thresholds = tiny.thresholds(tmp_path, model, rng, 0.3)
        case "end tokens":
            decoding = Decoding(temperature=0.5)
            ids = table(folder, "sequences")[0]["output_ids"]
            make((model, thresholds, shard), folder, machine, decoding)
            model = dataclasses.replace(model, eos=frozenset({ids[1]}))
        case "prompts":
            prompts = tiny.prompts(tmp_path / "other.jsonl", rng, LENGTHS[:3])
            groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), batching)
            shard = tmp_path / "other.parquet"
            write_split(groups, 1, shard)
    fresh = tmp_path / "fresh"
    for place in (folder, fresh):
        generate(job((model, thresholds, shard), place, machine, decoding, batching))
    assert contents(folder) == contents(fresh)


def test_small_blocks_hold_the_same_numbers(inputs, tmp_path, machine, monkeypatch):
    """How rows are cut into blocks shapes prefill, so values agree to rounding and decode-only dumps exactly."""
    model, _, shard = inputs
    group = read_shard(shard, 0)[0]
    batching = Batching(max_new_tokens=6, batch_size=4)
    decoding = Decoding(ignore_eos=True)
    _, whole = run_group(model, group, machine, batching, tmp_path / "whole", decoding)
    for limit in ("BLOCK_BYTES", "GPU_BLOCK_BYTES"):
        monkeypatch.setattr(selection, limit, 1)
    _, cut = run_group(model, group, machine, batching, tmp_path / "cut", decoding)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 5
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    assert cut == whole


def test_dense_captures_everything(inputs, tmp_path, machine):
    model, thresholds, shard = inputs
    derive_thresholds("dense", Dense(), thresholds.parent / "histograms.safetensors", tmp_path / "dense.parquet")
    folder = make((model, tmp_path / "dense.parquet", shard), tmp_path / "dump", machine)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["method"] == "dense"
    assert {row["threshold"] for row in manifest["matrices"]} == {None}
    for file in folder.glob("*.safetensors"):
        arrays = load_file(file)
        for stem in {key.rsplit(".", 1)[0] for key in arrays} - {"rows"}:
            width = {"o": 32, "down": 43}.get(stem[4:], 36)
            # a zero is not stored even where nothing is dropped; random activations hold hardly any
            assert arrays[f"{stem}.offsets"][-1] > 0.999 * width * len(arrays["rows.token"])


def test_matrix_table_leads_to_the_weights(inputs):
    """File, tensor and column of each matrix lead to the checkpoint's own tensor."""
    from safetensors.torch import load_file as load_torch

    model, thresholds, _ = inputs
    source = load_torch(model.folder.parent / "checkpoint" / "model.safetensors")
    rows = matrix_table(model, read_thresholds(thresholds, model), Capture())
    assert [(row["layer"], row["matrix"]) for row in rows] == [(layer, m) for layer in range(2) for m in MATRICES]
    for row in rows:
        runtime = load_torch(model.folder / model.tensors[row["weight"]]["file"])[row["weight"]]
        columns = slice(row["weight_column"], row["weight_column"] + row["out_features"])
        assert torch.equal(runtime[:, columns].T, source[row["source_weight"]])
        assert source[row["source_weight"]].shape == (row["out_features"], row["in_features"])


def test_report_and_manifest_count_the_same(inputs, tmp_path, machine):
    told = []
    batching = Batching(max_new_tokens=6, batch_size=4)
    manifest = generate(job(inputs, tmp_path, machine, Decoding(), batching), lambda *args: told.append(args))
    assert [entry[:2] for entry in told] == [(1, 2), (2, 2)]
    assert told[-1][2] == manifest["rows"] == sum(row["captured"] for row in table(tmp_path, "tokens"))
    assert json.loads((tmp_path / "manifest.json").read_text()) == json.loads(json.dumps(manifest))


def test_batch_of_the_split_is_demanded(inputs, tmp_path, machine):
    with pytest.raises(InputError, match="batch_size must be that of the split .* got 2"):
        make(inputs, tmp_path, machine, batching=Batching(max_new_tokens=6, batch_size=2))


@pytest.mark.parametrize(
    ("lengths", "texts", "new_tokens", "room"),
    [
        pytest.param([3, 5], False, 7, 6, id="more-new-tokens-than-the-split"),
        pytest.param([3, 5], True, 1, 0, id="a-split-of-texts"),
        pytest.param([121], False, 7, 6, id="beyond-the-context"),
    ],
)
def test_a_split_that_leaves_too_little_room_is_refused(
    inputs, tiny, tmp_path, rng, machine, lengths, texts, new_tokens, room
):
    """Otherwise two sequences would share token numbers."""
    model, thresholds, _ = inputs
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", rng, lengths)
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), Batching(max_new_tokens=6), texts=texts)
    write_split(groups, 1, tmp_path / "split.parquet")
    batching = Batching(max_new_tokens=new_tokens)
    with pytest.raises(InputError, match=f"room for {new_tokens} new tokens .* got room for {room} behind sequence 0"):
        make((model, thresholds, tmp_path / "split.parquet"), tmp_path / "dump", machine, batching=batching)


@pytest.mark.parametrize(
    ("ids", "share"), [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([5] * 7, 0.75), ([1, 2] * 4, 0.6)]
)
def test_repeated_share(ids, share):
    assert repeated_share(ids) == pytest.approx(share)
