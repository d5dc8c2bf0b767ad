"""Tokens given to several settings: each sees what the dense model wrote, or a text, whatever it drops.

The oracle of the tokens is the dense model's own run; of a replay at sparsity 0, that run's operands.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sparsetrace
from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.folder import footer_sha256
from sparsetrace.core.settings import Batching, Decoding, Machine, PromptSet
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.packing.card import data_card
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack
from sparsetrace.tools.recompute import recompute
from sparsetrace.workload.stats import statistics
from sparsetrace.workload.verify import verify

LENGTHS = [3, 9, 1, 6, 4, 12, 2]
BATCHING = Batching(max_new_tokens=6, batch_size=2, shards=2)
OWN = Decoding(temperature=0.8, seed=3)
CPU = Machine(device="cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A function that takes one tiny model and prompt set to a workload."""
    folder = tmp_path_factory.mktemp("replay")
    rng = tiny.rng("replay")
    model = tiny.model(folder, rng, eos_token_id=list(range(2, 20)))
    tables = {}
    for sparsity in (0, 0.3, 0.7):
        (folder / str(sparsity)).mkdir()
        tables[sparsity] = tiny.thresholds(folder / str(sparsity), model, tiny.rng("thresholds"), sparsity)
    prompts = tiny.prompts(folder / "prompts.jsonl", rng, LENGTHS)

    def splitted(name, path=prompts, batching=BATCHING, texts=False):
        groups, _ = split(path, model.tokenizer(), 128, PromptSet(), batching, texts=texts)
        write_split(groups, batching.shards, folder / f"{name}.parquet")
        return folder / f"{name}.parquet"

    def dense(name, prompts=None, model=model, batching=BATCHING, decoding=OWN):
        """The dense model's tokens, all shards."""
        for shard in range(batching.shards):
            out = folder / name / f"{shard:05d}" / "manifest.json"
            generate(Job(model, prompts or make.split, shard, out, decoding, batching, CPU, capture=None))
        return folder / name

    def make(name, sparsity, decoding, tokens=None, prompts=None, batching=BATCHING):
        """A workload; sparsity None is the dense model."""
        parts = []
        for shard in range(batching.shards):
            dump = folder / name / "dump" / f"{shard:05d}" / "manifest.json"
            given = tokens and tokens / f"{shard:05d}" / "manifest.json"
            table = None if sparsity is None else tables[sparsity]
            asked = Job(model, prompts or make.split, shard, dump, decoding, batching, CPU, table, dense_tokens=given)
            generate(asked)
            parts.append(folder / name / "parts" / f"{shard:05d}.json")
            pack(dump, folder / name / "workload", parts[-1])
        index(parts, folder / name / "workload")
        return folder / name / "workload"

    make.folder, make.model, make.splitted, make.dense = folder, model, splitted, dense
    make.split = splitted("split")
    make.tokens = dense("tokens")
    return make


def replay(**changes) -> Decoding:
    return Decoding(tokens_from="dense", **(OWN.sampling.model_dump() | changes))


def fed(ds) -> list[tuple]:
    columns = ("token", "sequence", "position", "token_id", "text")
    return list(zip(*(ds.token_table[name].to_pylist() for name in columns), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("prefill", ["none", "half", "all"])
@pytest.mark.parametrize("mode", ["forced", "steps"])
def test_every_sparsity_sees_the_dense_models_tokens(run, mode, prefill):
    decoding = replay(prefill=prefill, replay=mode)
    own = sparsetrace.open(run(f"own-{mode}-{prefill}", None, OWN))
    lengths = {len(ids) for ids in own.sequence_table["output_ids"].to_pylist()}
    assert min(lengths) < 6, "some sequence ends early"
    hashes = set()
    for sparsity in (0, 0.3, 0.7):
        folder = run(f"{mode}-{prefill}-{sparsity}", sparsity, decoding, run.tokens)
        ds = sparsetrace.open(folder)
        assert ds.sequence_table.equals(own.sequence_table)
        assert fed(ds) == fed(own)
        assert set(ds.token_table["phase"].to_pylist()) == {"prefill", "forced" if mode == "forced" else "decode"}
        assert [str(fault) for fault in verify(folder)] == []
        assert recompute(folder, run.model.folder, 3, CPU) == []
        assert ds.manifest["decoding"] == decoding.model_dump() and ds.manifest["engine"] == "torch"
        hashes.add(ds.manifest["given"])
        assert "tokens_from dense" in data_card(ds.manifest, ds.matrix_table)
        assert sum(map(len, ds.batches(4))) == sum(map(len, ds.batches(None))) == len(ds.tokens)
    assert len(hashes) == 1 and None not in hashes
    assert own.manifest["given"] is None


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_steps_at_sparsity_0_have_the_operands_of_the_dense_models_own_run(run, ignore_eos):
    decoding = OWN.model_copy(update={"ignore_eos": ignore_eos})
    own = sparsetrace.open(run(f"own-{ignore_eos}", None, decoding))
    tokens = run.dense(f"tokens-{ignore_eos}", decoding=decoding)
    again = sparsetrace.open(run(f"again-{ignore_eos}", 0, replay(replay="steps", ignore_eos=ignore_eos), tokens))
    assert fed(own) == fed(again)
    for leaf in own.leaves:
        a, b = own.matrix(*leaf), again.matrix(*leaf)
        assert np.array_equal(a.token, b.token) and np.array_equal(a.mask, b.mask)
        assert np.array_equal(a.patterns, b.patterns)


def test_order_of_the_prompt_file_does_not_matter(run, tiny, tmp_path, rng):
    lines = (run.folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(rng.permutation(lines)))
    prompts = run.splitted("permuted", tmp_path / "prompts.jsonl")
    tokens = run.dense("permuted-tokens", prompts)
    found = sparsetrace.open(run("permuted", 0.3, replay(), tokens, prompts))
    plain = sparsetrace.open(run("plain", 0.3, replay(), run.tokens))
    assert fed(found) == fed(plain) and found.manifest["given"] == plain.manifest["given"]
    hashes = [
        {file["path"]: file["sha256"] for file in ds.manifest["files"] if "matrix" in file} for ds in (found, plain)
    ]
    assert hashes[0] == hashes[1]


def test_texts_are_captured_as_they_are(run, tiny, tmp_path, rng):
    """A text of the context's length too; nothing is generated."""
    path = tiny.prompts(tmp_path / "texts.jsonl", rng, [5, 127, 2, 8])
    texts = run.splitted("texts", path, texts=True)
    operands = []
    for mode in ("forced", "steps"):
        decoding = Decoding(tokens_from="text", prefill="half", replay=mode)
        folder = run(f"text-{mode}", 0.3, decoding, prompts=texts)
        ds = sparsetrace.open(folder)
        prompts = ds.sequence_table["prompt_ids"].to_pylist()
        assert sorted(map(len, prompts)) == [3, 6, 9, 128]
        assert ds.token_table["token_id"].to_pylist() == [token_id for ids in prompts for token_id in ids]
        assert len(ds.tokens) == sum(len(ids) // 2 for ids in prompts)
        assert ds.sequence_table["output_ids"].to_pylist() == [[]] * 4
        assert [str(fault) for fault in verify(folder)] == []
        assert recompute(folder, run.model.folder, 4, CPU) == []
        assert ds.manifest["given"] is None
        operands.append({leaf: ds.matrix(*leaf).dense() for leaf in ds.leaves})
    # the same positions are masked; they are added up in another order
    for leaf, x in operands[0].items():
        assert (np.abs(x - operands[1][leaf]) <= 1e-3 * np.abs(x).max()).mean() > 0.99


@pytest.mark.parametrize("tokens_from", ["dense", "text"])
def test_statistics_and_schedules_know_forced_tokens(run, tmp_path, tokens_from):
    """Unions over a batch are of decode tokens, of which there are none."""
    decoding = Decoding(tokens_from=tokens_from, prefill="half", **OWN.sampling.model_dump())
    tokens = run.tokens if tokens_from == "dense" else None
    ds = sparsetrace.open(run(f"statistics-{tokens_from}", 0.3, decoding, tokens))
    tables = statistics(ds, tmp_path)
    rows = tables["sparsity"].to_pylist()
    counted = {phase: sum(row["rows"] for row in rows if row["phase"] == phase) for phase in ("prefill", "forced")}
    captured = ds.fed()["phase"].to_pylist()
    assert counted == {phase: 14 * 2 * captured.count(phase) for phase in ("prefill", "forced")}
    assert {row["over"] for row in tables["unions"].to_pylist()} == {"window"}
    assert sorted(token for batch in ds.batches(3) for token in batch) == ds.tokens.tolist()
    assert sorted(token for step in ds.replay() for token in step.token) == ds.tokens.tolist()


def test_a_killed_run_goes_on_to_the_same_bytes(run, tmp_path):
    batching = Batching(max_new_tokens=6, batch_size=1)
    prompts = run.splitted("single", batching=batching)
    whole = run.dense("whole", prompts, batching=batching) / "00000"
    out = tmp_path / "00000" / "manifest.json"
    words = [sys.executable, "-m", "sparsetrace", "dense-tokens", run.model.folder, "--prompts", prompts, "--out", out]
    words += ["--temperature", 0.8, "--seed", 3, "--max-new-tokens", 6, "--batch-size", 1, "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"])}
    with subprocess.Popen([str(word) for word in words], env=env, start_new_session=True) as process:
        while not list(out.parent.glob("group-*.json")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    left = {file: file.stat().st_mtime_ns for file in out.parent.glob("group-*.json")}
    assert left
    again = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    assert again.returncode == 0 and f"{out.parent}: tokens of 7 groups" in again.stdout, again.stderr
    assert {file: file.stat().st_mtime_ns for file in left} == left
    # what the kill left half-written is overwritten or stays beside, unread
    found = {name: data for name, data in contents(out.parent).items() if not name.endswith(".partial")}
    assert found == contents(whole)
    assert not [name for name in found if "block" in name] and json.loads(found["manifest.json"])["capture"] is None


def test_tokens_alone_are_no_dump_to_be_packed(run, tmp_path):
    manifest = run.tokens / "00000" / "manifest.json"
    with pytest.raises(InputError, match="must be a dump of operands, got tokens alone") as error:
        pack(manifest, tmp_path / "workload", tmp_path / "00000.json")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()) and list(manifest.parent.glob("group-*.parquet"))


def refused(run, tmp_path, tokens, decoding=None, prompts=None, batching=BATCHING) -> str:
    with pytest.raises(InputError) as error:
        out = tmp_path / "dump" / "manifest.json"
        asked = Job(run.model, prompts or run.split, 0, out, decoding or replay(), batching, CPU, dense_tokens=tokens)
        generate(asked)
    assert "\n" not in str(error.value) and not (tmp_path / "dump" / "group-00000.json").exists()
    return str(error.value)


def test_tokens_go_with_tokens_from_dense(run, tmp_path):
    message = "generate: tokens must be given with tokens_from dense, and with it alone, got"
    assert f"{message} none with dense" in refused(run, tmp_path, None)
    tokens = run.tokens / "00000" / "manifest.json"
    assert f"{message} {tokens} with own" in refused(run, tmp_path, tokens, OWN)
    text = Decoding(tokens_from="text", prefill="all")
    assert f"{message} {tokens} with text" in refused(run, tmp_path, tokens, text)


def test_tokens_of_something_else_are_refused(run, tiny, tmp_path, rng):
    first = run.tokens / "00000" / "manifest.json"
    other = tiny.model(tmp_path / "other", rng)
    theirs = run.dense("theirs", model=other) / "00000" / "manifest.json"
    assert "must be a dump of the same model under method dense, got" in refused(run, tmp_path, theirs)
    assert "tokens must be those of the same split, got another prompt for sequence 0" in refused(
        run, tmp_path, run.tokens / "00001" / "manifest.json"
    )
    prompts = run.splitted("others", tiny.prompts(tmp_path / "p.jsonl", rng, LENGTHS))
    assert "must be those of the same split" in refused(run, tmp_path, first, prompts=prompts)
    fewer = Batching(max_new_tokens=2, batch_size=2, shards=2)
    short = run.splitted("short", batching=fewer)
    whole = run.dense("whole", decoding=OWN.model_copy(update={"ignore_eos": True})) / "00000" / "manifest.json"
    assert "must be 1 to max_new_tokens (2) behind" in refused(run, tmp_path, whole, prompts=short, batching=fewer)
    sparse = tmp_path / "sparse" / "manifest.json"
    generate(Job(run.model, run.split, 0, sparse, OWN, BATCHING, CPU, run.folder / "0.3" / "thresholds.parquet"))
    assert "of checkpoint under teal" in refused(run, tmp_path, sparse)
    text = tmp_path / "text" / "manifest.json"
    alone = Decoding(tokens_from="text", prefill="all")
    generate(Job(run.model, run.split, 0, text, alone, BATCHING, CPU, capture=None))
    assert "must be 1 to max_new_tokens (6) behind each prompt, got 0 behind" in refused(run, tmp_path, text)
    lost = shutil.copytree(first.parent, tmp_path / "lost")
    (lost / "group-00001.sequences.parquet").unlink()
    assert "tokens must be a whole dump, got" in refused(run, tmp_path, lost / "manifest.json")


def test_verify_finds_a_token_that_was_not_given(run, tmp_path):
    folder = shutil.copytree(run("verified", 0.3, replay(), run.tokens), tmp_path / "workload")
    table = pq.read_table(folder / "sequences.parquet")
    ids = table["output_ids"].to_pylist()
    ids[2][-1] ^= 1
    column = table.column_names.index("output_ids")
    changed = table.set_column(column, table.schema.field(column), pa.array(ids, pa.list_(pa.int32())))
    pq.write_table(changed, folder / "sequences.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    for file in manifest["files"]:
        file |= {"bytes": (folder / file["path"]).stat().st_size, "sha256": sha256_file(folder / file["path"])}
        if "footer_sha256" in file:
            file["footer_sha256"] = footer_sha256(folder / file["path"])
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
    (fault,) = verify(folder)
    assert str(fault).startswith("sequences.parquet: must hold the tokens given, of hash ")
