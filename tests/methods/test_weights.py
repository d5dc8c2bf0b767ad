"""Weight-side methods against formulas in numpy float64, on a model pruned layer by layer by hand."""

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import sparsetrace
from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.weight_masks import PruneJob, prune
from sparsetrace.calibration.windows import calibration_windows
from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Calibration, Decoding, Machine, PromptSet
from sparsetrace.formats.sites import by_leaf
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.methods import WEIGHT_METHODS, Magnitude, Teal, Wanda
from sparsetrace.model.patch import observe
from sparsetrace.model.runtime import open_model
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack
from sparsetrace.study.options import parse_weight_method
from sparsetrace.study.study import parse_study

CPU = Machine(device="cpu")
EVEN = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
SETTINGS = Calibration(tokens=300, sequence_length=17)
CASES = {
    "magnitude": Magnitude(sparsity=0.35),
    "magnitude-2:4": Magnitude(pattern="2:4"),
    "wanda": Wanda(sparsity=0.35),
    "wanda-2:4": Wanda(pattern="2:4"),
    "wanda-4:8": Wanda(pattern="4:8"),
}


def largest(score, k):
    keep = np.zeros(len(score), bool)
    keep[sorted(range(len(score)), key=lambda j: (-score[j], j))[:k]] = True
    return keep


def expected_mask(name, weight_KN, norms_K):
    """The mask of one matrix, output by output; weight in float64."""
    K, N = weight_KN.shape
    score = np.abs(weight_KN)
    if name.startswith("wanda"):
        score = (score * norms_K.astype(np.float32).astype(np.float64)[:, None]).astype(np.float32)
    if ":" in name:
        n, m = map(int, name.split("-")[1].split(":"))
        groups = score.T.reshape(N, K // m, m)
        return np.array([[largest(group, n) for group in row] for row in groups]).reshape(N, K).T
    if name == "magnitude":
        return largest(score.ravel(), K * N - int(0.35 * K * N)).reshape(K, N)
    return np.array([largest(column, K - int(0.35 * K)) for column in score.T]).T


@pytest.fixture
def made(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng, torch_dtype="bfloat16", **EVEN)
    text = tmp_path / "text.txt"
    text.write_text(tiny.words(rng, 500))
    return model, text


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_numpy(made, tmp_path, name):
    """Layer by layer: norms of what enters the unpruned layer behind the pruned ones before it."""
    model, text = made
    pruned = prune(PruneJob(model, text, tmp_path / "pruned", CASES[name], SETTINGS, CPU))
    found = pruned.load(torch.device("cpu"))
    decoder = model.load(torch.device("cpu"))
    windows = torch.from_numpy(calibration_windows(model.tokenizer(), text, SETTINGS, 128))
    table = pq.read_table(tmp_path / "pruned" / "weight_masks.parquet")
    for layer in range(2):
        seen = {}

        def see(at, site, x, seen=seen, layer=layer):
            if at == layer:
                seen[site] = x.double().flatten(0, 1).numpy()

        with torch.inference_mode(), observe(decoder, see):
            decoder(windows, torch.arange(17).expand_as(windows))
        matrices = [(matrix, site.name) for (at, matrix), site in by_leaf(model.sites).items() if at == layer]
        assert len(matrices) == 7
        for matrix, site in matrices:
            projection, other = (getattr(m.layers[layer], site) for m in (decoder, found))
            weight = projection.weight[:, projection.columns[matrix]]
            mask = expected_mask(name, weight.double().numpy(), np.linalg.norm(seen[site], axis=0))
            rows = table.filter((pc.field("layer") == layer) & (pc.field("matrix") == matrix))
            packed = np.frombuffer(b"".join(rows["mask"].to_pylist()), np.uint8).reshape(len(rows), -1)
            stored = np.unpackbits(packed, axis=1, count=mask.shape[1], bitorder="little")
            assert rows["input"].to_pylist() == list(range(len(mask)))
            assert np.array_equal(stored.astype(bool), mask), (layer, matrix)
            assert rows["nnz"].to_pylist() == mask.sum(1).tolist()
            weight.masked_fill_(~torch.from_numpy(mask), 0)
            assert torch.equal(other.weight[:, other.columns[matrix]], weight)
    for parameter in ("embedding", "lm_head"):
        assert torch.equal(getattr(found, parameter), getattr(decoder, parameter))


def test_counts_are_exact(made, tmp_path):
    model, text = made
    for name, method in CASES.items():
        prune(PruneJob(model, text, tmp_path / name, method, SETTINGS, CPU))
        for row in (
            pq.read_table(tmp_path / name / "weight_masks.parquet")
            .group_by(["layer", "matrix"])
            .aggregate([("nnz", "sum")])
            .to_pylist()
        ):
            site = by_leaf(model.sites)[row["layer"], row["matrix"]]
            K, N = site.in_features, site.outputs(row["matrix"])
            expected = K * N // 2 if ":" in name else (K - int(0.35 * K)) * N
            if name == "magnitude":
                expected = K * N - int(0.35 * K * N)
            assert row["nnz_sum"] == expected


def test_zero_sparsity_is_the_dense_model(made, tmp_path):
    model, text = made
    for method in (Magnitude(sparsity=0), Wanda(sparsity=0), Magnitude(pattern="4:4")):
        job = PruneJob(model, text, tmp_path / "pruned", method, SETTINGS, CPU)
        assert prune(job).model_hash == model.model_hash


def test_goes_with_an_activation_method_into_a_workload(made, tiny, tmp_path, rng):
    """The pruned model is used like any other; the masks lie in the data set, and the operands are its own."""
    model, text = made
    pruned = prune(PruneJob(model, text, tmp_path / "pruned", Wanda(pattern="2:4"), SETTINGS, CPU))
    assert pruned.model_hash != model.model_hash
    assert open_model(tmp_path / "pruned" / "config.json").model_hash == pruned.model_hash
    with pytest.raises(InputError, match="must be calibrated on this model"):
        calibrate(CalibrationJob(model, text, tmp_path / "h", SETTINGS, CPU))
        derive_thresholds("x", Teal(sparsity=0.5), tmp_path / "h", tmp_path / "x.parquet")
        generate(Job(pruned, tmp_path, 0, tmp_path / "d/m", Decoding(), Batching(), CPU, tmp_path / "x.parquet"))
    calibrate(CalibrationJob(pruned, text, tmp_path / "h", SETTINGS, CPU))
    derive_thresholds("teal-0.5", Teal(sparsity=0.5), tmp_path / "h", tmp_path / "t.parquet")
    batching = Batching(max_new_tokens=4, batch_size=2)
    groups, _ = split(tiny.prompts(tmp_path / "p.jsonl", rng, [4, 6]), model.tokenizer(), 128, PromptSet(), batching)
    write_split(groups, 1, tmp_path / "split.parquet")
    dump = tmp_path / "dump" / "manifest.json"
    prompts, decoding = tmp_path / "split.parquet", Decoding(ignore_eos=True)
    generate(Job(pruned, prompts, 0, dump, decoding, batching, CPU, tmp_path / "t.parquet"))
    pack(dump, tmp_path / "w", tmp_path / "00000.json")
    index([tmp_path / "00000.json"], tmp_path / "w", weight_masks=tmp_path / "pruned" / "weight_masks.parquet")
    workload = sparsetrace.open(tmp_path / "w", model=tmp_path / "pruned")
    for layer, matrix in ((0, "q"), (1, "k"), (1, "down")):
        mask = workload.weight_mask(layer, matrix)
        weight = workload.weight(layer, matrix)
        assert mask.shape == weight.shape
        assert mask.mean() == 0.5
        assert not weight[~mask].any()
        x = workload[layer, matrix, workload.tokens[0]]
        assert np.allclose(
            workload.product(layer, matrix, workload.tokens[0]), x.astype(np.float64) @ weight, rtol=1e-5
        )
    schema = pq.read_schema(tmp_path / "w" / "weight_masks.parquet")
    assert schema.field("input").metadata[b"orientation"] == b"row of the weight [in, out]"
    assert json.loads(schema.metadata[b"sparsetrace"])["method"] == "wanda"
    index([tmp_path / "00000.json"], tmp_path / "w")
    assert sparsetrace.open(tmp_path / "w").weight_mask(0, "q") is None


def test_refuses(made, tiny, tmp_path, rng):
    model, text = made
    with pytest.raises(InputError, match="--text must be given for method wanda, which reads activations"):
        prune(PruneJob(model, None, tmp_path / "x", Wanda(sparsity=0.5), SETTINGS, CPU))
    with pytest.raises(InputError, match="must be a pruned model or not exist"):
        prune(PruneJob(model, text, tmp_path / "model", Wanda(sparsity=0.5), SETTINGS, CPU))
    with pytest.raises(
        InputError, match="inputs of every matrix must be a multiple of 32 for 16:32, got 48 at mlp_mid"
    ):
        prune(PruneJob(model, text, tmp_path / "x", Magnitude(pattern="16:32"), SETTINGS, CPU))
    prune(PruneJob(model, None, tmp_path / "no-text", Magnitude(sparsity=0.5), SETTINGS, CPU))
    assert not (tmp_path / "x").exists()
    for entry, message in (
        ({"name": "wonder"}, "name must be one of magnitude, wanda, got 'wonder'"),
        ({"name": "wanda"}, "either sparsity or pattern must be given"),
        ({"name": "wanda", "sparsity": 0.5, "pattern": "2:4"}, "either sparsity or pattern must be given"),
        ({"name": "wanda", "sparsity": 1}, "less than 1"),
        ({"name": "wanda", "pattern": 124}, 'pattern must be N:M in quotes, such as "2:4", got 124'),
        ({"name": "wanda", "sparsity": 0.5, "x": 1}, "wanda: keys must be among name, sparsity, pattern, got x"),
    ):
        study = {
            "models": {"m": {"checkpoint": "c", "calibration_text": "t", "prune": entry}},
            "runs": {"r": {"prompts": "p", "methods": [{"name": "dense"}]}},
        }
        with pytest.raises(InputError, match=message):
            parse_study(study, "test")


def test_a_study_uses_the_pruned_model():
    entry = {"name": "wanda", "pattern": "2:4"}
    models = {
        name: {"checkpoint": "c", "calibration_text": "t"} | extra
        for name, extra in (("plain", {}), ("sparse", {"prune": entry}))
    }
    study = parse_study({"models": models, "runs": {"r": {"prompts": "p", "methods": [{"name": "dense"}]}}}, "test")
    assert study.runtime_model("plain") == "results/plain/model/config.json"
    assert study.runtime_model("sparse") == "results/sparse/pruned/config.json"
    assert study.weight_masks("sparse") == ["results/sparse/pruned/weight_masks.parquet"]
    assert study.weight_masks("plain") == []
    assert (
        parse_weight_method("wanda", ['pattern="2:4"']) == study.models["sparse"].prune.method == Wanda(pattern="2:4")
    )
    assert study.models["sparse"].model_dump(mode="json")["prune"] == entry
    assert type(study.models["sparse"]).model_validate(study.models["sparse"].model_dump()) == study.models["sparse"]
    assert set(WEIGHT_METHODS) == {"magnitude", "wanda"}
