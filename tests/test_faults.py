"""What users and machines do wrong: one clear line, a status that is not 0, and earlier results as they were.

The oracle is the disk: after each fault every file that was there has its bytes, and nothing new has a final name.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

import sparsetrace.cli.main
import sparsetrace.generation.selection
import sparsetrace.model.runtime
from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.core.checksum import Checksum
from sparsetrace.core.settings import Batching, Calibration, Capture, Conversion, Decoding, Machine, PromptSet
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.model.convert import convert
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import _Shard, pack
from sparsetrace.tools.recompute import recompute

CALIBRATE = ["--tokens", "200", "--sequence-length", "20", "--device", "cpu"]
SPLIT = ["--max-new-tokens", "4", "--batch-size", "2"]
GENERATE = [*SPLIT, "--ignore-eos", "--device", "cpu"]

# Of the file system that gets full.
SMALL_BYTES = 6 * 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """Good inputs and results of every step up to the dump."""
    folder = tmp_path_factory.mktemp("faults")
    rng = tiny.rng("faults")
    model = tiny.model(folder, rng)
    table = tiny.thresholds(folder, model, rng)
    prompts = tiny.prompts(folder / "prompts.jsonl", rng, [3, 9, 5, 7])
    batching = Batching(max_new_tokens=4, batch_size=2)
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), batching)
    write_split(groups, 1, folder / "split.parquet")
    decoding, machine = Decoding(ignore_eos=True), Machine(device="cpu")
    out = folder / "dump" / "manifest.json"
    generate(Job(model, folder / "split.parquet", 0, out, decoding, batching, machine, table))
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command that must fail; returns the one line after what it told of its progress."""

    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["sparsetrace", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            sparsetrace.cli.main.main()
        *progress, line = capsys.readouterr().err.splitlines()
        assert end.value.code not in (0, None) and line.startswith("error: ")
        assert all(re.match(r"\w+: [\d,]+ of [\d,]+ |warning: ", told) for told in progress), progress
        return line

    return run


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def untouched(whole, tmp_path):
    """Good inputs and results stay as they were, and `tmp_path / "new"` stays empty."""
    before = files(whole)
    yield
    assert files(whole) == before
    assert files(tmp_path / "new") == {}


def mounted(folder: Path, options: str) -> None:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few pages."""
    mounted(tmp_path / "small", f"size={SMALL_BYTES}")
    yield tmp_path / "small"
    subprocess.run(["umount", "--lazy", tmp_path / "small"], check=True)


@pytest.fixture
def read_only(tmp_path):
    """A file system without write permission."""
    mounted(tmp_path / "fixed", f"ro,size={SMALL_BYTES}")
    yield tmp_path / "fixed"
    subprocess.run(["umount", "--lazy", tmp_path / "fixed"], check=True)


def steps(whole: Path, out: Path) -> dict[str, list]:
    """Every step's command, writing below `out`."""
    model, dump = whole / "model", whole / "dump" / "manifest.json"
    return {
        "convert": [whole / "checkpoint", "--out", out / "model"],
        "calibrate": [model, "--text", whole / "text.txt", "--out", out / "h.safetensors", *CALIBRATE],
        "thresholds": [
            *(whole / "histograms.safetensors", "--method", "teal", "--set", "sparsity=0.5"),
            *("--out", out / "t.parquet"),
        ],
        "split": [model, "--prompts", whole / "prompts.jsonl", "--out", out / "split.parquet", *SPLIT],
        "generate": [
            *(model, "--thresholds", whole / "thresholds.parquet", "--prompts", whole / "split.parquet"),
            *("--out", out / "dump" / "manifest.json", *GENERATE),
        ],
        "pack": [dump, "--workload", out / "workload", "--out", out / "00000.json"],
    }


STEPS = ["convert", "calibrate", "thresholds", "split", "generate", "pack"]


@pytest.mark.parametrize("step", STEPS)
def test_full_disk(step, whole, small_disk, command, untouched):
    filler = small_disk / "filler"
    if step in ("thresholds", "split"):
        # their results are small
        filler.write_bytes(bytes(SMALL_BYTES))
    before = files(small_disk)
    line = command(step, *steps(whole, small_disk)[step])
    assert "No space left on device: free some space, then run the same command again" in line
    left = files(small_disk)
    # groups that were sealed, and leaves in the journal, are whole and are taken up again
    final = [name for name in left if name not in before and not Path(name).name.startswith(".")]
    if step in ("generate", "pack"):
        assert not {"dump/manifest.json", "00000.json"} & set(final)
    else:
        assert final == []
    assert not [name for name in left if name.endswith(".partial")]


def test_a_full_disk_that_was_cleared_lets_the_run_go_on(whole, small_disk, command, monkeypatch):
    words = steps(whole, small_disk)["generate"]
    (small_disk / "filler").write_bytes(bytes(12 << 10))
    assert "No space left" in command("generate", *words)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    monkeypatch.setattr(sys, "argv", ["sparsetrace", "generate", *map(str, words)])
    sparsetrace.cli.main.main()
    assert files(small_disk / "dump") == files(whole / "dump")


@pytest.mark.parametrize("step", STEPS)
def test_read_only_output(step, whole, read_only, command, untouched):
    assert "Read-only file system: choose another folder" in command(step, *steps(whole, read_only)[step])


def damaged(whole: Path, tmp_path: Path, name: str = "checkpoint") -> Path:
    """A copy of a checkpoint or model, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (whole / name).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1], ids=lambda kept: f"{kept}-bytes")
def test_truncated_checkpoint(kept, whole, tmp_path, command, untouched):
    checkpoint = damaged(whole, tmp_path)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    line = command("convert", checkpoint, "--out", tmp_path / "new" / "model")
    assert f"{weights} must be a whole safetensors file" in line


def test_unreadable_checkpoint(whole, tmp_path, command, untouched):
    checkpoint = damaged(whole, tmp_path)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()
    line = command("convert", checkpoint, "--out", tmp_path / "new" / "model")
    assert "model.safetensors must be a safetensors file" in line


@pytest.mark.parametrize("step", ["calibrate", "generate"])
def test_truncated_model(step, whole, tmp_path, command, untouched):
    model = damaged(whole, tmp_path, "model")
    weights = model / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = command(step, model, *steps(whole, tmp_path / "new")[step][1:])
    assert f"{weights} must be whole" in line and "convert again" in line


@pytest.mark.parametrize("step", ["calibrate", "split"])
def test_wrong_tokenizer(step, whole, tmp_path, command, untouched):
    model = damaged(whole, tmp_path, "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 96
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    # recorded anew, or the file would be refused as damaged
    content = json.loads((model / "config.json").read_text())
    content["tokenizer"]["tokenizer.json"] = hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    (model / "config.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("w3 more " * 200)
    source = "--text" if step == "calibrate" else "--prompts"
    words = steps(whole, tmp_path / "new")[step]
    words[0], words[words.index(source) + 1] = model, tmp_path / "text.txt"
    line = command(step, *words)
    assert "token ids must be below the model's vocabulary of 96, got 96: the tokenizer belongs to another" in line


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt", "empty.json"])
def test_empty_prompt_set(name, whole, tmp_path, command, untouched):
    prompts = tmp_path / name
    prompts.write_text("[]" if name.endswith("json") else "\n")
    line = command("split", whole / "model", "--prompts", prompts, "--out", tmp_path / "new" / "p.parquet", *SPLIT)
    assert f"{prompts} must hold at least one document, got none" in line


def test_prompt_longer_than_the_context(whole, tiny, rng, tmp_path, command, untouched):
    prompts = tiny.prompts(tmp_path / "long.jsonl", rng, [3, 124])
    line = command("split", whole / "model", "--prompts", prompts, "--out", tmp_path / "new" / "p.parquet", *SPLIT)
    assert "prompt 1 must fit the context of 128 with 4 new tokens, got 125 tokens: shorten it" in line


@pytest.fixture
def others(whole, tiny, rng, tmp_path):
    """Another model of the same shape, and the same model in another dtype."""
    (tmp_path / "other").mkdir()
    tiny.model(tmp_path / "other", rng)
    convert(whole / "checkpoint", tmp_path / "half" / "model", Conversion(dtype="bfloat16"))
    return {"model": tmp_path / "other" / "model", "dtype": tmp_path / "half" / "model"}


@pytest.mark.parametrize("other", ["model", "dtype"])
def test_thresholds_of_another_model(other, others, whole, tmp_path, command, untouched):
    line = command("generate", others[other], *steps(whole, tmp_path / "new")["generate"][1:])
    assert f"{whole / 'thresholds.parquet'} must be" in line and "model" in line


@pytest.mark.parametrize("other", ["model", "dtype"])
def test_histograms_of_another_model(other, others, whole, tmp_path, command, untouched):
    histograms, mine = tmp_path / "h.safetensors", whole / "histograms.safetensors"
    words = ["--text", whole / "text.txt", "--layer", "0", "--method", "teal", "--device", "cpu"]
    words = [others[other], "--histograms", mine, *words, "--out", tmp_path / "new" / "table.parquet"]
    assert f"{mine} must be of this model, got another's" in command("allocate", *words)
    # nor are they added to those of another
    model = sparsetrace.model.runtime.open_model(others[other])
    settings = Calibration(tokens=200, sequence_length=20)
    calibrate(CalibrationJob(model, whole / "text.txt", histograms, settings, Machine(device="cpu")))
    line = command("calibrate", "--merge", mine, histograms, "--out", tmp_path / "new" / "h.safetensors")
    assert "must be" in line and str(histograms) in line


def test_histograms_of_another_layout(whole, tmp_path, command, untouched):
    arrays = load_file(whole / "histograms.safetensors")
    name = next(name for name in arrays if name.startswith("L"))
    save_file(arrays | {name: arrays[name][: len(arrays[name]) // 2]}, tmp_path / "h.safetensors")
    words = ["--method", "teal", "--set", "sparsity=0.5", "--out", tmp_path / "new" / "t.parquet"]
    assert f"{tmp_path / 'h.safetensors'} must be" in command("thresholds", tmp_path / "h.safetensors", *words)


@pytest.mark.parametrize("sparsity", ["1", "1.0", "-0.1", "50", ".nan", ".inf", "half"])
def test_sparsity_outside_its_range(sparsity, whole, tmp_path, command, untouched):
    words = ["--method", "teal", "--set", f"sparsity={sparsity}", "--out", tmp_path / "new" / "t.parquet"]
    line = command("thresholds", whole / "histograms.safetensors", *words)
    assert "sparsity" in line and sparsity.strip(".") in line.lower()


def test_dump_that_lost_a_block(whole, tmp_path, command):
    dump = damaged(whole, tmp_path, "dump")
    block = next(dump.glob("*.block-*"))
    block.write_bytes(block.read_bytes()[:-1])
    words = ["--workload", tmp_path / "workload", "--out", tmp_path / "parts" / "00000.json"]
    line = command("pack", dump / "manifest.json", *words)
    assert f"{block} must have" in line and "generate it again" in line
    assert not (tmp_path / "parts" / "00000.json").exists()


def test_a_journal_cut_off_by_a_full_disk_is_taken_up_twice(whole, tmp_path, monkeypatch):
    plain, calls = _Shard._write_files, []

    def failing(shard, job, *rest):
        calls.append(job.operand.matrices)
        if len(calls) in (4, 7):
            with (tmp_path / "again" / ".00000.json.journal").open("a") as journal:
                journal.write('{"path": "da')
            raise OSError(28, "No space left on device")
        return plain(shard, job, *rest)

    def run(name: str) -> None:
        # the blocks go with the first packing that ends
        dump = tmp_path / f"dump-{name}"
        if not dump.exists():
            shutil.copytree(whole / "dump", dump)
        pack(dump / "manifest.json", tmp_path / name / "workload", tmp_path / name / "00000.json")

    run("plain")
    monkeypatch.setattr(_Shard, "_write_files", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            run("again")
    run("again")
    # two failed, and no finished one was done again; matrices that read one operand are written together
    assert {len(matrices) for matrices in calls} == {1, 2, 3}
    assert len(calls) == 2 * 4 + 2
    assert files(tmp_path / "again") == files(tmp_path / "plain")


def test_activation_that_is_not_finite(whole, tmp_path, command, untouched):
    model = damaged(whole, tmp_path, "model")
    tensors = load_file(model / "weights-00000.safetensors")
    tensors["layers.1.mlp_norm.weight"] = np.full_like(tensors["layers.1.mlp_norm.weight"], np.inf)
    save_file(tensors, model / "weights-00000.safetensors")
    # recorded anew, or the file would be refused as damaged
    content = json.loads((model / "config.json").read_text())
    content["tensors"]["layers.1.mlp_norm.weight"]["xxh3"] = str(Checksum(tensors["layers.1.mlp_norm.weight"].data))
    (model / "config.json").write_text(json.dumps(content))
    line = command("calibrate", model, *steps(whole, tmp_path / "new")["calibrate"][1:])
    assert "layer 1, site mlp_in, token" in line


@pytest.fixture
def small_gpu(monkeypatch):
    """An engine that runs out of memory late in a group, as long as more than `batch` sequences are run at once."""

    def limit(batch: int) -> list[int]:
        plain, tried = Engine.run, []

        def run(engine, group, recorder, given=None):
            tried.append(engine.setup.batching.batch_size)
            result = plain(engine, group, recorder, given)
            if engine.setup.batching.batch_size > batch:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result

        monkeypatch.setattr(Engine, "run", run)
        return tried

    return limit


def test_a_group_that_does_not_fit_the_gpu_starts_again_at_half_its_batch(whole, tiny, rng, tmp_path, small_gpu):
    model = sparsetrace.model.runtime.open_model(whole / "model")
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", rng, [3, 9, 5, 7, 4, 6, 8])
    batching, decoding = Batching(max_new_tokens=4, batch_size=5), Decoding(ignore_eos=True)
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), batching)
    write_split(groups, 1, tmp_path / "split.parquet")

    def run(name: str) -> tuple[dict, list[dict], list[dict]]:
        out = tmp_path / name / "manifest.json"
        words = (model, tmp_path / "split.parquet", 0, out, decoding, batching, Machine(device="cpu"))
        manifest = generate(Job(*words, thresholds=whole / "thresholds.parquet"))
        tables = [pq.read_table(path).to_pylist() for path in sorted(out.parent.glob("*.tokens.parquet"))]
        pack(out, tmp_path / name / "workload", tmp_path / name / "00000.json")
        index([tmp_path / name / "00000.json"], tmp_path / name / "workload")
        return (
            manifest,
            [row for table in tables for row in table],
            sparsetrace.open(tmp_path / name / "workload").manifest,
        )

    plain, fed, _ = run("plain")
    tried = small_gpu(2)
    manifest, again, workload = run("halved")
    # 5, then 3, then 2 at a time
    assert tried == [5, 3, 2, 2, 2, 5, 3, 2]
    assert manifest["smaller_batches"] == workload["smaller_batches"] == {"0": 2, "1": 2}
    assert plain["smaller_batches"] == {} and manifest["rows"] == plain["rows"] == workload["tokens"]
    assert [(row["token"], row["phase"]) for row in again] == [(row["token"], row["phase"]) for row in fed]
    together: dict[tuple[int, int], set[int]] = {}
    for row in again:
        together.setdefault((row["group"], row["step"]), set()).add(row["sequence"])
    assert max(map(len, together.values())) == 2
    # and what is run again is run at the batch that the manifest names
    assert recompute(tmp_path / "halved" / "workload", whole / "model", 7, Machine(device="cpu")) == []
    assert tried[8:] == [2, 2, 2, 2]


@pytest.mark.gpu
def test_a_real_lack_of_memory_halves_the_batch(tiny, tmp_path, rng, monkeypatch):
    """A cache of 525 MB at batch 64 where torch may take 450 MB more: the group runs in smaller batches, whole."""
    monkeypatch.setattr(sparsetrace.generation.selection, "GPU_BLOCK_BYTES", 1 << 20)
    shape = {"head_dim": 64, "num_key_value_heads": 4, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    model = tiny.model(tmp_path, rng, **shape)
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", rng, [3] * 64)
    batching = Batching(max_new_tokens=4000, batch_size=64)
    groups, _ = split(prompts, model.tokenizer(), 4096, PromptSet(), batching)
    write_split(groups, 1, tmp_path / "split.parquet")
    settings = (Decoding(ignore_eos=True), batching, Machine(device="cuda"))
    job = Job(model, tmp_path / "split.parquet", 0, tmp_path / "dump" / "manifest.json", *settings)
    # what earlier tests left in reference cycles would be freed during the run, and make room
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (450 << 20)) / total)
    try:
        manifest = generate(replace(job, capture=Capture(every=1000)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert manifest["smaller_batches"]["0"] in (8, 16, 32) and manifest["engine"] == "triton"
    assert manifest["rows"] == 64 * 4


def test_a_group_that_does_not_fit_at_batch_1_is_refused(whole, tmp_path, command, small_gpu, untouched):
    small_gpu(0)
    line = command("generate", *steps(whole, tmp_path / "new")["generate"])
    assert "group 0 must fit the GPU's memory" in line and "lower max_new_tokens" in line
    for path in (tmp_path / "new" / "dump").iterdir():
        path.unlink()


def test_a_model_that_does_not_fit_the_gpu_is_refused(whole, tmp_path, command, monkeypatch, untouched):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sparsetrace.model.runtime, "_place", full)
    line = command("generate", *steps(whole, tmp_path / "new")["generate"])
    assert "must fit the memory of one GPU, got" in line and "bytes of weights: use a larger GPU" in line


def test_interrupt_before_the_program_starts_its_work_is_one_line(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    program = (
        "from sparsetrace.cli import main as cli, tools; "
        f"tools.check_config.callback = lambda config: exec({code!r}); cli.main()"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(sparsetrace.cli.main.__file__).parents[2]), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", program, "check-config", "x"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 130 and run.stderr.strip().startswith("error: interrupted: nothing half-written")
