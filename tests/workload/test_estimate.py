"""Estimates of rows, bytes and time against what a tiny model's runs really write, and against the definition."""

import pytest
from run_testing import CPU, invoke, make_run, study
from safetensors.numpy import load_file

import sparsetrace
from sparsetrace.calibration.thresholds import read_thresholds
from sparsetrace.core.settings import Batching, Capture, Decoding, Packing, PromptSet
from sparsetrace.formats.sites import Site, by_leaf
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.plan import feed_of
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.methods import Teal
from sparsetrace.tools.estimate import Operands, Shape, estimate, feeds, sizes


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A function that makes a workload under a capture setting, from one tiny model and prompt set."""
    return make_run(tiny, tmp_path_factory.mktemp("runs"))


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
    monkeypatch.setattr("sparsetrace.tools.estimate.prompt_lengths", lambda one: ([8] * 6, []))
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
