"""Capture levels and samples, recomputing, and estimates, on a tiny model run through the whole pipeline.

The oracle of a lower level or a sample is the full workload of the same run: what is kept must be equal bit for bit.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import sparsetrace
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.cli import main as cli
from sparsetrace.core.files import InputError, sha256_file, sha256_json
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine, Packing, PromptSet
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.row_statistics import row_norms
from sparsetrace.formats.sites import Site, by_leaf
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.plan import feed_of
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.methods import Teal
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack
from sparsetrace.study.study import parse_study
from sparsetrace.tools.estimate import Operands, Shape, estimate, feeds, sizes
from sparsetrace.tools.recompute import recompute
from sparsetrace.workload.verify import verify

BATCHING = Batching(max_new_tokens=6, batch_size=3, shards=2)
DECODING = Decoding(prefill="half", ignore_eos=True)
CPU = Machine(device="cpu")
LENGTHS = [3, 9, 4, 5, 7, 2, 6]
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A function that takes one tiny model and prompt set to a workload, under a capture setting."""
    folder = tmp_path_factory.mktemp("levels")
    rng = tiny.rng("capture levels")
    model = tiny.model(folder, rng)
    table = tiny.thresholds(folder, model, rng)
    prompts = tiny.prompts(folder / "prompts.jsonl", rng, LENGTHS)
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), BATCHING)
    write_split(groups, BATCHING.shards, folder / "split.parquet")

    def make(name, capture=None, **packing):
        parts = []
        for shard in range(BATCHING.shards):
            dump = folder / name / "dump" / f"{shard:05d}" / "manifest.json"
            kept = capture or Capture()
            generate(Job(model, folder / "split.parquet", shard, dump, DECODING, BATCHING, CPU, table, kept))
            parts.append(folder / name / "parts" / f"{shard:05d}.json")
            pack(dump, folder / name / "workload", parts[-1], **packing)
        index(parts, folder / name / "workload")
        return folder / name / "workload"

    make.folder, make.model = folder, model
    make.full = make("full")
    return make


def test_levels_and_samples_equal_the_full_run(run):
    full = sparsetrace.open(run.full)
    for name, capture in {
        "masks": Capture(level="masks"),
        "stats": Capture(level="stats"),
        "sample": Capture(layers=(1,), matrices=("k", "down"), every=3),
    }.items():
        folder = run(name, capture)
        ds = sparsetrace.open(folder)
        assert [str(fault) for fault in verify(folder)] == []
        assert ds.manifest["capture"] == capture.model_dump(mode="json")
        wanted = full if name != "sample" else full.select(position=slice(0, None, 3), layer=1, matrix=["k", "down"])
        assert ds.leaves == wanted.leaves
        assert np.array_equal(ds.tokens, wanted.tokens)
        # what is generated does not change
        assert ds.sequence_table.equals(full.sequence_table)
        for leaf in ds.leaves:
            assert ds.figures(*leaf).equals(wanted.figures(*leaf))
            if name != "stats":
                assert np.array_equal(ds.matrix(*leaf).mask, wanted.matrix(*leaf).mask)
            if name == "sample":
                assert np.array_equal(ds.matrix(*leaf).patterns, wanted.matrix(*leaf).patterns)


def test_shared_inputs_are_stored_once(run):
    full, shared = sparsetrace.open(run.full), run("shared", share_inputs=True)
    ds = sparsetrace.open(shared)
    assert [str(fault) for fault in verify(shared)] == []
    others = {(row["layer"], row["matrix"]): row["shares_input_with"] for row in ds.matrix_table.to_pylist()}
    assert others == {(layer, m): {"k": "q", "v": "q", "up": "gate"}.get(m) for layer in (0, 1) for m in MATRICES}
    for leaf in full.leaves:
        assert np.array_equal(ds.matrix(*leaf).dense(), full.matrix(*leaf).dense())
    sizes = [sum(f["bytes"] for f in w.manifest["files"] if "matrix" in f) for w in (ds, full)]
    assert sizes[0] < 0.7 * sizes[1]
    assert all(row["shares_input_with"] is None for row in full.matrix_table.to_pylist())


def test_a_layer_that_the_model_lacks(run):
    with pytest.raises(InputError, match="capture: layers must be 0 to 1, got 7"):
        run("beyond", Capture(layers=(7,)))


def test_recomputed_sequences_are_bitwise_equal(run):
    assert recompute(run.full, run.model.folder, 5, CPU) == []
    assert recompute(run("masks", Capture(level="masks")), run.model.folder, 1, CPU) == []
    assert recompute(run("stats", Capture(level="stats")), run.model.folder, 1, CPU) == []


def test_lm_head_gives_the_tokens_that_were_written(run):
    """The operand of `lm_head` times its weight is what greedy decoding chose the next token by."""
    folder = run("head", Capture(matrices=(*MATRICES, "lm_head")))
    assert [str(fault) for fault in verify(folder)] == []
    assert recompute(folder, run.model.folder, 5, CPU) == []
    full = sparsetrace.open(run.full)
    for model in (run.model.folder, run.folder / "checkpoint"):
        ds = sparsetrace.open(folder, model=model)
        assert ds.leaves == [*full.leaves, (None, "lm_head")]
        assert ds.sequence_table.equals(full.sequence_table)
        for row in ds.sequence_table.to_pylist():
            first = row["base"] + len(row["prompt_ids"]) - 1
            tokens = range(first, first + len(row["output_ids"]))
            written = [int(ds.product(None, "lm_head", token).argmax()) for token in tokens if token in ds.tokens]
            assert written == row["output_ids"][-len(written) :]
            assert len(written) >= len(row["output_ids"]) - 1
    assert np.array_equal(ds.matrix(0, "q").patterns, full.matrix(0, "q").patterns)


def unnoticed_flip(table) -> tuple[int, int]:
    """A row and a value in it whose lowest bit changes neither the row's largest magnitude nor its rounded norm."""
    planes = [table[f"values_b{i}"].to_pylist() for i in range(4)]
    for row in range(table.num_rows):
        patterns = sum(
            np.frombuffer(plane[row], np.uint8).astype(np.uint32) << (8 * i) for i, plane in enumerate(planes)
        )
        figures = row_norms(patterns, np.array([0, len(patterns)]), FORMATS["float32"])
        for value in range(len(patterns)):
            flipped = patterns.copy()
            flipped[value] ^= 1
            if row_norms(flipped, np.array([0, len(patterns)]), FORMATS["float32"]) == figures:
                return row, value
    raise AssertionError("every value shows in its row's figures")


def test_a_changed_value_is_found_by_recomputing(run, tmp_path):
    """The lowest bit of one kept value: no rule of the format can know."""
    folder = shutil.copytree(run.full, tmp_path / "workload")
    part = folder / "data/L01/up/part-00000.parquet"
    table = pq.read_table(part, partitioning=None)
    rows = table["values_b0"].to_pylist()
    row, value = unnoticed_flip(table)
    rows[row] = rows[row][:value] + bytes([rows[row][value] ^ 1]) + rows[row][value + 1 :]
    i = table.column_names.index("values_b0")
    pq.write_table(table.set_column(i, table.schema.field(i), pa.array(rows, pa.binary())), part)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    for file in manifest["files"]:
        file |= {"bytes": (folder / file["path"]).stat().st_size, "sha256": sha256_file(folder / file["path"])}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": sha256_json(manifest)}))
    assert verify(folder) == []
    token = table["token"][row].as_py()
    (fault,) = recompute(folder, run.model.folder, 1, CPU)
    assert str(fault) == f"data/L01/up: token {token} must be the same when run again, got another"


def test_recompute_refuses_another_model(run, tiny, tmp_path):
    other = tiny.model(tmp_path, tiny.rng("other"))
    with pytest.raises(InputError, match="must be the workload's model"):
        recompute(run.full, other.folder, 1, CPU)
    with pytest.raises(InputError, match="must hold every layer and matrix to be recomputed"):
        recompute(run("sample", Capture(every=2, layers=(1,))), run.model.folder, 1, CPU)


@pytest.mark.parametrize(
    ("tokens_from", "prefill"),
    [
        *((kind, part) for kind in ("own", "dense") for part in ("none", "half", "all")),
        ("text", "half"),
        ("text", "all"),
    ],
)
@pytest.mark.parametrize("every", [1, 2, 5])
def test_captured_positions(tokens_from, prefill, every):
    for length in range(1, 12):
        first = {"none": length, "half": length - length // 2, "all": 0}[prefill]
        # behind a text there is nothing
        wanted = [p for p in range(first, length + (0 if tokens_from == "text" else 5)) if p % every == 0]
        for replay in ("forced", "steps"):
            decoding = Decoding(prefill=prefill, tokens_from=tokens_from, replay=replay)
            assert feed_of(length, 6, decoding).captured(every) == len(wanted)


def study(run, tmp_path, **changes):
    content = {
        "results": str(tmp_path / "results"),
        "models": {"tiny": {"checkpoint": str(run.folder / "checkpoint"), "calibration_text": "x.txt"}},
        "runs": {
            "one": {
                "prompts": str(run.folder / "prompts.jsonl"),
                "batching": BATCHING.model_dump(),
                "decoding": DECODING.model_dump(),
                "methods": [{"name": "teal", "sparsity": 0.5}],
                **changes,
            }
        },
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    return parse_study(content, "study"), path


def test_estimate_is_near_what_is_written(run, tmp_path, monkeypatch):
    # words of the tiny tokenizer are three or four characters with their blank
    monkeypatch.setattr("sparsetrace.tools.estimate.CHARACTERS_PER_TOKEN", 4)
    (found,) = estimate(study(run, tmp_path)[0], CPU)
    ds = sparsetrace.open(run.full)
    assert found.name == "tiny/one/teal-0.5"
    assert found.sizes.rows == 14 * found.sizes.tokens
    assert found.sizes.tokens == pytest.approx(len(ds.tokens), rel=0.25)
    dense = sum(len(ds.tokens) * ds.features(*leaf) * 4 for leaf in ds.leaves)
    assert 0.3 * dense * 7 / 10 < found.sizes.dump_bytes < dense * 7 / 10
    assert found.seconds > 0
    (sample,) = estimate(study(run, tmp_path, capture={"level": "stats", "layers": [1]})[0], CPU)
    assert sample.sizes.rows == found.sizes.rows // 2
    assert sample.sizes.workload_bytes < found.sizes.workload_bytes / 4


TIMES = [
    # id, decoding, rows of each pass of a group of one prompt of 8 tokens, with 4 new ones
    ("own", {}, [8, 1, 1, 1]),
    ("forced", {"tokens_from": "dense"}, [16, 8, 1, 1, 1]),
    ("steps", {"tokens_from": "dense", "replay": "steps"}, [8, 1, 1, 1] * 2),
    ("text", {"tokens_from": "text", "prefill": "half"}, [8]),
    ("text-steps", {"tokens_from": "text", "prefill": "half", "replay": "steps"}, [4, 1, 1, 1, 1]),
    ("text-steps-all", {"tokens_from": "text", "prefill": "all", "replay": "steps"}, [1] * 8),
]


@pytest.mark.parametrize(("decoding", "passes"), [pytest.param(*case[1:], id=case[0]) for case in TIMES])
def test_estimated_time_is_that_of_the_passes(run, tmp_path, monkeypatch, decoding, passes):
    """A row takes a second; what is fed at once counts up to a power of two. The dense run counts once."""
    layers = 2
    monkeypatch.setattr("sparsetrace.tools.estimate._model_pass_seconds", lambda shape, rows, machine: layers * rows)
    monkeypatch.setattr("sparsetrace.tools.estimate.prompt_lengths", lambda one, checkpoint: ([8] * 6, []))
    monkeypatch.setattr("sparsetrace.tools.estimate.PACK_BYTES_PER_SECOND", float("inf"))
    methods = [{"name": "teal", "sparsity": [0.3, 0.6]}]
    batching = {"max_new_tokens": 4, "batch_size": 3}
    first, second = estimate(study(run, tmp_path, decoding=decoding, batching=batching, methods=methods)[0], CPU)
    groups, batch = 2, 3
    assert first.seconds == layers * groups * batch * sum(passes)
    dense = layers * groups * batch * sum([8, 1, 1, 1]) if decoding.get("tokens_from") == "dense" else 0
    assert second.seconds == first.seconds - dense
    told = [any("dense model's own run" in note for note in one.notes) for one in (first, second)]
    assert told == [bool(dense), False]


@pytest.mark.parametrize("encoding", ["split", "open"])
@pytest.mark.parametrize("share_inputs", [False, True])
def test_estimated_bytes_of_what_is_stored(encoding, share_inputs):
    """Against the definition: rows that have files, each with its index, and its operand as the encoding has it."""
    names = {"attn_in": ("q", "k", "v"), "attn_out": ("o",), "mlp_in": ("gate", "up"), "mlp_mid": ("down",)}
    sites = [Site(name, la, ms, 4096, (1,) * len(ms)) for la in range(2) for name, ms in names.items()]
    shape = Shape(tuple(sites), "float16")
    packing = Packing(encoding=encoding, share_inputs=share_inputs)
    operand = 2048 * (1.62 + (0.65 if encoding == "open" else 0.25))
    for matrices, stored in (((), 4 if share_inputs else 7), (("k", "v", "up"), 2 if share_inputs else 3)):
        capture = Capture(matrices=matrices)
        operands = Operands(Teal(sparsity=0.5), lambda leaf: 0.5, capture, packing)
        made = sizes(shape, feeds([8], Decoding(), Batching(max_new_tokens=6)), operands)
        assert made.tokens == 5
        assert made.workload_bytes == pytest.approx(5 * 2 * stored * (operand + 12), abs=1)


def test_estimated_bytes_of_the_dump_are_those_of_its_blocks(run, tmp_path, tiny, rng):
    """Each operand counts once, however many matrices read it; against the sizes of a real dump's arrays."""
    model = run.model
    batching = Batching(max_new_tokens=6, batch_size=5)
    prompts = tiny.prompts(tmp_path / "prompts.jsonl", rng, [12, 9, 7, 11, 5])
    sequences, _ = split(prompts, model.tokenizer(), 128, PromptSet(), batching)
    write_split(sequences, 1, tmp_path / "split.parquet")
    lengths = [len(sequence.prompt_ids) for group in sequences for sequence in group]
    decoding = Decoding(prefill="all", ignore_eos=True)
    for matrices in ((), ("q", "v", "up", "lm_head")):
        out = tmp_path / "-".join(["dump", *matrices]) / "manifest.json"
        capture = Capture(matrices=matrices)
        table = run.folder / "thresholds.parquet"
        job = Job(model, tmp_path / "split.parquet", 0, out, decoding, batching, CPU, table, capture)
        generate(job)
        arrays = [array for path in out.parent.glob("*.safetensors") for array in load_file(path).values()]
        written = sum(array.nbytes for array in arrays)
        thresholds = read_thresholds(table, model)
        # what is kept of each matrix: measured here, since the prompts are not the calibration text
        kept: dict[tuple, list[int]] = {}
        for path in out.parent.glob("*.safetensors"):
            for name, array in load_file(path).items():
                if name.endswith(".offsets"):
                    leaf = name.removesuffix(".offsets").split(".")
                    key = (None if leaf[0] == "model" else int(leaf[0][1:]), leaf[1])
                    sums = kept.setdefault(key, [0, 0])
                    sums[0] += int(array[-1])
                    sums[1] += len(array) - 1
        widths = {leaf: site.in_features for leaf, site in by_leaf(model.sites).items()}
        sparsity = {leaf: 1 - nnz / (rows * widths[leaf]) for leaf, (nnz, rows) in kept.items()}
        bits = {(rule.layer, rule.matrix): rule.threshold_bits for rule in thresholds.rules}
        operands = Operands(thresholds.method, sparsity.get, capture, Packing(), bits)
        fed = feeds(lengths, decoding, batching)
        made = sizes(Shape(model.sites, model.config.dtype), fed, operands)
        # an offset more than rows for each operand of a block, and the places of rows of the head
        assert made.dump_bytes == pytest.approx(written, rel=0.02)


def test_a_token_of_a_7b_model_takes_what_the_readme_says():
    """0.84 MB at half sparsity in float16: what q, k and v read is held once, and what gate and up read."""
    hidden, inner = 4096, 11008
    layer = [("attn_in", ("q", "k", "v"), hidden), ("attn_out", ("o",), hidden)]
    layer += [("mlp_in", ("gate", "up"), hidden), ("mlp_mid", ("down",), inner)]
    sites = [Site(name, la, ms, width, (1,) * len(ms)) for la in range(32) for name, ms, width in layer]
    operands = Operands(Teal(sparsity=0.5), lambda leaf: 0.5, Capture(), Packing())
    made = sizes(Shape(tuple(sites), "float16"), feeds([100], Decoding(), Batching(max_new_tokens=1001)), operands)
    assert made.tokens == 1000
    assert made.dump_bytes / made.tokens == pytest.approx(0.840e6, rel=0.005)


def test_estimate_adds_up_the_workloads(run, tmp_path, monkeypatch):
    """Each fits the disk, all together do not; dumps go as they are packed, so that the largest counts alone."""
    methods = [{"name": "teal", "sparsity": [0.5, 0.6]}]
    content, path = study(run, tmp_path, methods=methods)
    rows = estimate(content, CPU)
    kept, dump = sum(row.sizes.workload_bytes for row in rows), max(row.sizes.dump_bytes for row in rows)
    for free, warned in ((kept + dump, False), (kept + dump - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("usage", (), {"free": free}))
        code, text = invoke("estimate", path, "--device", "cpu")
        assert code == 0
        assert ("all 2 workloads, with the largest dump beside them: needs " in text) == warned
        assert f"{sum(row.sizes.rows for row in rows):,}" in text


def test_estimate_says_when_the_disk_is_too_small(run, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    (found,) = estimate(study(run, tmp_path)[0], CPU)
    assert any("but" in note and "GB free" in note for note in found.notes)


def test_generation_warns_when_the_disk_is_too_small(run, monkeypatch):
    usage = type("usage", (), {"free": 10})
    words = [run.model.folder, "--thresholds", run.folder / "thresholds.parquet", "--device", "cpu"]
    words += ["--prompts", run.folder / "split.parquet", "--out", run.folder / "small" / "manifest.json"]
    words += ["--max-new-tokens", 6, "--batch-size", 3]
    assert "warning" not in invoke("generate", *words)[1]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, text = invoke("generate", *words)
    assert code == 0
    assert "warning: the dump of shard 0 needs " in text
    assert "has 1e-08 GB free" in text


def invoke(*words):
    result = CliRunner().invoke(cli.cli, [str(word) for word in words])
    return result.exit_code, result.output


def test_commands(run, tmp_path):
    for words in ((), ("--recompute", 1, "--model", run.model.folder)):
        code, text = invoke("verify", run.full, *words)
        assert (code, text.splitlines()[-1]) == (0, f"{run.full}: no fault found")
    broken = shutil.copytree(run.full, tmp_path / "broken")
    (broken / "data/L00/q/part-00001.parquet").unlink()
    code, text = invoke("verify", broken)
    assert code == 1
    assert "error: data/L00/q/part-00001.parquet: must be there, got nothing" in text

    code, text = invoke("stats", run.full, "--out", tmp_path / "stats", "--phase", "decode", "--layer", 1)
    assert code == 0
    assert "Jaccard of neighbouring tokens" in text
    assert {row["layer"] for row in pq.read_table(tmp_path / "stats" / "overlap.parquet").to_pylist()} == {1}

    # of one position no two tokens are neighbours
    code, text = invoke("stats", run.full, "--out", tmp_path / "stats", "--position", 5)
    assert code == 0
    assert "Jaccard of neighbouring tokens" not in text

    words = ("--matrix", "q", "--matrix", "down", "--position", "2:6", "--out", tmp_path / "out", "--twin", 3)
    code, text = invoke("export", run.full, "--format", "npy", *words)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"L{layer:02d}.{matrix}.npy" for layer in (0, 1) for matrix in ("down", "q")
    ]
    part = sparsetrace.open(run.full).select(position=slice(2, 6)).twin(3)
    assert np.array_equal(np.load(tmp_path / "out" / "L01.down.npy"), part.matrix(1, "down").dense())

    code, text = invoke("estimate", study(run, tmp_path)[1], "--device", "cpu")
    assert code == 0
    assert "tiny/one/teal-0.5" in text


def refused(*words):
    return str(CliRunner().invoke(cli.cli, [str(word) for word in words]).exception)


def test_commands_refuse(run, tmp_path):
    sample = run("sampled", Capture(layers=(1,)))
    to = ("--out", tmp_path / "none")
    message = f"export: the selection must hold a layer and matrix that {sample} captured, got none"
    assert refused("export", sample, "--format", "npy", "--layer", 0, *to) == message
    assert refused("export", run.full, "--format", "csv", *to).startswith("export: --format must be one of mtx, smtx,")
    # before the long search, not after it
    assert refused("verify", tmp_path, "--recompute", 1).startswith("verify: --model must be given with --recompute")
    assert not (tmp_path / "none").exists()
