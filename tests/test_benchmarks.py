"""What the benchmark scripts are built of, on a CPU: checkpoints, limits, the CSV and the tables made of it."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_tables  # noqa: E402  # a folder of scripts, not a package
import limits  # noqa: E402
import node  # noqa: E402
import peers  # noqa: E402
import random_checkpoint  # noqa: E402
import record  # noqa: E402
import startup  # noqa: E402
import trained_checkpoint  # noqa: E402


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In shards so small that some hold one tensor."""
    out = tmp_path_factory.mktemp("random") / "checkpoint"
    random_checkpoint.write_checkpoint(out, "small", "float16", seed=3, num_prompts=100, shard_bytes=40_000)
    return out


def test_checkpoint_converts_runs_and_names_every_id(checkpoint, tmp_path):
    from sparsetrace.core.settings import Conversion
    from sparsetrace.model.convert import convert

    model = convert(checkpoint, tmp_path / "model", Conversion())
    assert model.config == random_checkpoint.SHAPES["small"] and (model.bos, model.eos) == (1, frozenset({2}))
    tokenizer = model.tokenizer()
    # a model of random weights chooses any id
    assert all(isinstance(tokenizer.piece(i), str) for i in range(model.config.vocab_size))
    assert tokenizer.decode(tokenizer.encode("A text, as it is.", "test")[1:]) == "A text, as it is."
    prompts = [json.loads(line)["prompt"] for line in (checkpoint / "prompts.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == 100
    ids = tokenizer.encode((checkpoint / "calibration.txt").read_text(), "test")
    assert len(ids) > 32_768

    decoder = model.load(torch.device("cpu"))
    T = 64
    hidden = decoder(torch.tensor([ids[:T]]), torch.arange(T)[None])
    logits = decoder.logits(hidden)
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2
    o = decoder.layers[1].attn_out.weight
    assert o.float().std().item() == pytest.approx(o.shape[0] ** -0.5, rel=0.05)
    assert torch.equal(decoder.norm.weight, torch.ones_like(decoder.norm.weight))


def test_trained_checkpoint_is_of_the_shape_asked_for_and_is_taken_through_the_pipeline(tmp_path, monkeypatch, capsys):
    """A tiny one, trained for two steps, from its command line to a dump that `pack.py` measures alone."""
    import pack as packing

    folder, size = tmp_path / "trained-128", ("--hidden", "128", "--layers", "1", "--steps", "2")
    monkeypatch.setattr(sys, "argv", ["trained_checkpoint.py", str(folder), *size, "--step-tokens", "512"])
    trained_checkpoint.main()
    assert "0.00 M tokens" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (128, 352, 1)

    monkeypatch.setattr(packing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(packing, "REPEATS", 1)
    arguments = ["--source", "--checkpoint", str(folder), "--length", "short", "--encoding", "split", "--limit", "2"]
    arguments += ["--dtype", "bfloat16", "--sparsity", "0.75"]
    monkeypatch.setattr(sys, "argv", ["pack.py", "--work", str(tmp_path / "work"), *arguments])
    (tmp_path / "results").mkdir()
    packing.main()
    for name in packing.COLUMNS:
        rows = list(csv.DictReader((tmp_path / "results" / name).open()))
        settings = [(row["source"], row["dtype"], row["sparsity"]) for row in rows]
        assert settings == [("trained-128", "bfloat16", "0.75")]
    assert not (tmp_path / "work" / "demo").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "100"], "--hidden must be a multiple of 128, got 100"),
        (["--step-tokens", "500"], "--step-tokens must be a multiple of 512, got 500"),
    ],
)
def test_trained_checkpoint_refuses_what_it_cannot_train(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["trained_checkpoint.py", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit, match="2"):
        trained_checkpoint.main()
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_checkpoint_is_the_same_for_one_seed(checkpoint, tmp_path):
    same = tmp_path / "same"
    random_checkpoint.write_checkpoint(same, "small", "float16", seed=3, num_prompts=100, shard_bytes=40_000)
    assert files(same) == files(checkpoint)
    random_checkpoint.write_checkpoint(tmp_path / "other", "small", "float16", seed=4, num_prompts=100)
    from safetensors.torch import load_file

    def load(folder):
        return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}

    one, other = load(checkpoint), load(tmp_path / "other")
    assert set(one) == set(other)
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)
    # no two tensors are drawn alike
    heads = [tuple(tensor.flatten()[:8].tolist()) for name, tensor in one.items() if "norm" not in name]
    assert len(set(heads)) == len(heads)


def test_published_shapes():
    for name, size, vocabulary in (("llama-2-7b", 13.48e9, 32000), ("llama-3-8b", 16.06e9, 128256)):
        config = random_checkpoint.SHAPES[name]
        wanted = list(random_checkpoint.tensors(config))
        assert sum(one.nbytes for one in wanted) == pytest.approx(size, rel=1e-3)
        assert config.vocab_size == vocabulary
        shards = random_checkpoint.shards_of(wanted, 2 << 30)
        assert [one for shard in shards for one in shard] == wanted
        assert all(sum(one.nbytes for one in shard) <= 2 << 30 for shard in shards)


def test_refuses_to_replace_other_files(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="must be new or hold an earlier result"):
        random_checkpoint.write_checkpoint(tmp_path, "small")


@pytest.mark.parametrize("way", limits.WRITE_WAYS)
def test_disk_limit_counts_what_it_wrote_and_leaves_nothing(tmp_path, monkeypatch, way):
    written, synced = [], []
    real_write, real_fsync = limits.os.write, limits.os.fsync
    monkeypatch.setattr(limits.os, "write", lambda fd, data: written.append(real_write(fd, data)) or written[-1])
    monkeypatch.setattr(limits.os, "fsync", lambda fd: synced.append(sum(written)) or real_fsync(fd))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    block = 4 * limits.PAGE_BYTES
    try:
        rate = limits.write_bandwidth(tmp_path, 2 * block + 1, block, way)
    except OSError:
        if way != "direct":
            raise
        pytest.skip("this file system has no O_DIRECT")
    assert rate == 3 * block / 2 / 1e9 and sum(written) == 3 * block
    assert synced == ([3 * block] * 3 if way == "synced_last" else [block, 2 * block, 3 * block])
    assert not list(tmp_path.iterdir())


def test_disk_limit_of_every_way(tmp_path):
    found = limits.disk_bandwidth(tmp_path, 1 << 20, 1 << 20)
    assert set(limits.WRITE_WAYS[:2]) <= set(found) and all(rate > 0 for rate in found.values())
    for arguments in ((1, 5000, "synced"), (1, 4096, "fast")):
        with pytest.raises(ValueError, match="write_bandwidth: (block_bytes|way) must be"):
            limits.write_bandwidth(tmp_path, *arguments)


@pytest.mark.gpu
def test_copy_limit():
    assert 0.1 < limits.copy_bandwidth(1 << 28, 1 << 26) < 2000


def test_rows_are_appended_under_one_head(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    where = record.where()
    assert list(where) == list(record.WHERE) and all(where.values())
    for number in (1, 2):
        record.append(path, [*record.WHERE, "number", "note"], [where | {"number": number}])
    rows = list(csv.DictReader(path.open()))
    assert [(row["number"], row["note"]) for row in rows] == [("1", ""), ("2", "")]
    assert rows[0]["commit"] == record.source_version(record.PACKAGE, record.KERNELS)


def test_version_names_sources_that_are_not_committed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, text in ((one, "a"), (two, "b")):
        folder.mkdir()
        (folder / "m.py").write_text(text)
    versions = {record.source_version(one), record.source_version(two), record.source_version(one, two)}
    assert len(versions) == 3 and all(version.startswith("sources-") for version in versions)


def test_pipeline_study_is_valid_and_fits_its_checkpoint(checkpoint, tmp_path):
    import yaml

    from sparsetrace.study.study import load_study

    for small in (True, False):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(node.study(checkpoint, small)))
        study = load_study(path)
        assert sorted(study.workloads()) == [("random", run, "teal-0.5") for run in ("batched", "single")]
        for name, batch in (("single", 1), ("batched", 4 if small else 64)):
            run = study.runs[name]
            assert run.batching.batch_size == batch
            # as many groups as shards, or more, so that no shard is empty
            assert run.prompt_set.limit >= batch * run.batching.shards


def test_shares_of_the_pipeline_are_of_the_sum_of_all_jobs(tmp_path):
    head = "s\th:m:s\tmax_rss\tmax_vms\n"
    for name, seconds, rss in (
        ("convert/random", 6.0, "100.5"),
        ("generate/random/single/teal-0.5/00000", 2.0, "30.0"),
        ("generate/random/single/teal-0.5/00001", 12.0, "-"),
    ):
        path = tmp_path / "logs" / f"{name}.bench.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{head}{seconds}\t0:00:00\t{rss}\t1\n")
    shard = "random/single/teal-0.5/0000"
    assert [tuple(row.get(name, "") for name in node.COLUMNS[6:]) for row in node.collect(tmp_path, 10.0)] == [
        ("generate", f"{shard}1", "12.00", "0.6000", ""),
        ("convert", "random", "6.00", "0.3000", "100.5"),
        ("generate", f"{shard}0", "2.00", "0.1000", "30.0"),
        ("snakemake", "", "10.00", "2.0000", ""),
    ]


@pytest.mark.parametrize("cause", ["signal", "limit"])
def test_a_run_is_cut_off(cause):
    before = signal.getsignal(signal.SIGTERM)
    limit, said = (0, "SIGTERM") if cause == "signal" else (1, "1 s have passed")
    with pytest.raises(node.CutOffError, match=said), node.limited(limit):
        if cause == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert signal.getsignal(signal.SIGTERM) is before and signal.alarm(0) == 0


def test_ending_a_run_ends_what_it_started():
    """Children that do not heed SIGTERM, of a process that does or does not."""
    for trap, code in (("trap '' TERM", signal.SIGKILL), ("trap - TERM", signal.SIGTERM)):
        line = f"(trap '' TERM; echo begun; sleep 1000) & {trap}; wait"
        process = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout.readline() == b"begun\n"
        node.end_group(process, grace=0.5)
        assert process.returncode == -code
        # the pipe closes when the last process that holds it is gone
        assert process.stdout.read() == b""


def test_pipeline_tells_what_starts_and_what_finishes(tmp_path, capsys):
    told = set()
    folder = tmp_path / "generate" / "random" / "single" / "teal-0.5"
    folder.mkdir(parents=True)
    (folder / "00000.log").touch()
    node.tell_news(tmp_path, told)
    node.tell_news(tmp_path, told)
    assert node.unfinished(tmp_path) == [folder / "00000.log"]
    table = folder / "00000.bench.tsv"
    table.touch()
    node.tell_news(tmp_path, told)
    table.write_text("s\th:m:s\tmax_rss\n2.5\t0:00:02\t7.0\n")
    node.tell_news(tmp_path, told)
    assert node.unfinished(tmp_path) == []
    job = "generate random single teal-0.5 00000"
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == [f"{job}: started", f"{job}: finished in 2.5 s"]


def test_startup_phases_are_those_of_the_command(checkpoint, tmp_path, monkeypatch):
    from sparsetrace.core.settings import Conversion
    from sparsetrace.model.convert import convert

    convert(checkpoint, tmp_path / "model", Conversion(), name="small")
    table = tmp_path / "startup.csv"
    monkeypatch.setattr(sys, "argv", ["startup.py", str(tmp_path / "model"), "--warm", "0", "--csv", str(table)])
    startup.main()
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["run"]) == ("small", "cold")
    phases = [float(row[name]) for name in startup.PHASES]
    assert all(seconds >= 0 for seconds in phases) and float(row["imports"]) > 0
    assert sum(phases) == pytest.approx(float(row["second_token"]), abs=0.01 * len(phases))


def test_a_peer_that_fails_is_one_line_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "generate.py").write_text("print('loading')\nraise ValueError('not for this torch')")
    rows = peers.rows_of({"gpt-fast": broken, "teal": tmp_path / "none", "simulate": None}, "small", 3, False, 100)
    assert [row["impl"] for row in rows] == ["simulate"]
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "gpt-fast: failed: ValueError: not for this torch"
    assert told[1] == "teal: failed: ModuleNotFoundError: No module named 'generate'"
    assert len(told) == 3 and told[2].startswith("simulate: ")
    row = rows[0]
    assert set(row) <= set(peers.COLUMNS) and row["sink"] == "disk" and row["tokens_per_s"] > 0
    # 2 layers of 7 matrices, each file larger than its vector
    config = peers.SHAPES["small"]
    vectors = 2 * 2 * (5 * config.hidden_size + config.num_attention_heads * config.head_dim + config.intermediate_size)
    assert row["bytes_per_token"] > vectors
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_peer_that_takes_too_long_is_ended(tmp_path, capsys):
    (tmp_path / "generate.py").write_text("import time\ntime.sleep(1000)")
    assert peers.rows_of({"gpt-fast": tmp_path}, "small", 3, False, 2) == []
    assert capsys.readouterr().out == "gpt-fast: failed: took more than 2 s\n"


def test_pages_hold_the_tables_of_the_committed_results():
    for page, marker, rows in gpu_tables.tables():
        assert f"<!-- {marker}:begin -->\n{rows}\n<!-- {marker}:end -->" in page.read_text(encoding="utf-8")
