"""What the tests share: poisoned memory, a fresh seed in each run, and tiny models with their data.

`SPARSETRACE_SEED=<number in the report's header>` repeats a run with the same random inputs.
"""

import json
import os
import secrets
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

# in the environment, so that parallel test processes share it
SEED = int(os.environ.get("SPARSETRACE_SEED") or secrets.randbelow(1 << 31))
os.environ["SPARSETRACE_SEED"] = str(SEED)
VOCABULARY = 96
# Site of each matrix, for dumps written by hand.
SITES = dict.fromkeys("qkv", "attn_in") | {"o": "attn_out", "gate": "mlp_in", "up": "mlp_in", "down": "mlp_mid"}

# workers of pytest-xdist ignore Ctrl-C, and the programs that a test starts would inherit that
if "PYTEST_XDIST_WORKER" in os.environ:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tiny matrices gain nothing from threads, which on a busy machine wait for each other in spin locks
torch.set_num_threads(1)


def pytest_report_header(config):
    return f"SPARSETRACE_SEED={SEED}"


# Test files that take minutes: started first, so that parallel processes finish at about the same time.
LONGEST = ("test_workflow.py", "test_slurm.py", "test_engine.py", "test_demo.py", "test_kill.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def poisoned_empty():
    """Fill new tensors with NaN, or the value of all bits set, so that an unwritten output is noticed."""
    plain_empty, plain_empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        # detached: torch.compile asks for leaves that require a gradient
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: poison(plain_empty(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(plain_empty_like(*args, **kwargs)))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_rings():
    """Tiny models need no ring of a GiB: parallel tests would run out of memory, and poisoning it takes long."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("BLOCK_BYTES", "GPU_BLOCK_BYTES"):
            patch.setattr(f"sparsetrace.generation.selection.{limit}", 32 << 20)
        yield


@pytest.fixture(scope="session")
def device():
    # with its index, as the tensors report it
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request):
    from sparsetrace.core.settings import Machine

    return Machine(device=request.param)


@pytest.fixture
def rng(request):
    """A test's own random numbers, by which torch's are seeded too."""
    return seeded(request.node.nodeid)


def seeded(name: str) -> np.random.Generator:
    generator = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    torch.manual_seed(int(generator.integers(1 << 31)))
    return generator


@pytest.fixture(scope="session")
def tiny():
    return Tiny()


class Tiny:
    """Makers of tiny inputs; widths divide nothing, and hidden size differs from heads x head_dim."""

    vocabulary = VOCABULARY
    # random numbers of a fixture that several tests share
    rng = staticmethod(seeded)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 36,
        "intermediate_size": 43,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    # changes to `config` that make it one of Qwen3
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

    def tokenizer(self, folder: Path, begin: bool = True) -> Path:
        """A tokenizer of one token a word: `w3` .. `w95`, after <unk>, <s> and </s>; it puts <s> before a text."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if begin:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    def weights(self, rng, config: dict) -> dict[str, torch.Tensor]:
        """Random weights under Hugging Face's names, of a scale at which every activation matters."""
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        q = config["num_attention_heads"] * config["head_dim"]
        kv = config["num_key_value_heads"] * config["head_dim"]

        def normal(*shape):
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5 * 1.5

        def norm(width=hidden):
            return 1 + torch.randn(width, generator=generator) / 4

        tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator)}
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            tensors |= {
                f"{prefix}.input_layernorm.weight": norm(),
                f"{prefix}.post_attention_layernorm.weight": norm(),
                f"{prefix}.self_attn.q_proj.weight": normal(q, hidden),
                f"{prefix}.self_attn.k_proj.weight": normal(kv, hidden),
                f"{prefix}.self_attn.v_proj.weight": normal(kv, hidden),
                f"{prefix}.self_attn.o_proj.weight": normal(hidden, q),
                f"{prefix}.mlp.gate_proj.weight": normal(inner, hidden),
                f"{prefix}.mlp.up_proj.weight": normal(inner, hidden),
                f"{prefix}.mlp.down_proj.weight": normal(hidden, inner),
            }
            if config["model_type"] == "qwen3":
                tensors |= {f"{prefix}.self_attn.{x}_norm.weight": norm(config["head_dim"]) for x in "qk"}
        tensors["model.norm.weight"] = norm()
        if not config["tie_word_embeddings"]:
            tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
        dtype = getattr(torch, config["torch_dtype"])
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def write(self, folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
        """A Hugging Face folder with its weights in one file."""
        self.tokenizer(folder, begin=config.get("bos_token_id") is not None)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def checkpoint(self, folder: Path, rng, **changes) -> Path:
        """A random checkpoint in Hugging Face form."""
        config = self.config | changes
        return self.write(folder, config, self.weights(rng, config))

    def model(self, folder: Path, rng, **changes):
        """A random converted model."""
        from sparsetrace.core.settings import Conversion
        from sparsetrace.model.convert import convert

        return convert(self.checkpoint(folder / "checkpoint", rng, **changes), folder / "model", Conversion())

    def words(self, rng, count: int) -> str:
        """Text of `count` tokens."""
        return " ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, count))

    def prompts(self, path: Path, rng, lengths: list[int]) -> Path:
        """A prompt set; a begin token comes on top of each length."""
        path.write_text("".join(json.dumps({"prompt": self.words(rng, length)}) + "\n" for length in lengths))
        return path

    def thresholds(self, folder: Path, model, rng, sparsity: float = 0.5, tokens: int = 600):
        """A threshold table calibrated on random text."""
        from sparsetrace.calibration.calibrate import CalibrationJob, calibrate
        from sparsetrace.calibration.derive import derive_thresholds
        from sparsetrace.core.settings import Calibration, Machine
        from sparsetrace.methods import Teal

        (folder / "text.txt").write_text(self.words(rng, 2 * tokens))
        calibration = Calibration(tokens=tokens, sequence_length=20)
        histograms = folder / "histograms.safetensors"
        calibrate(CalibrationJob(model, folder / "text.txt", histograms, calibration, Machine(device="cpu")))
        method = Teal(sparsity=sparsity)
        derive_thresholds(method.label, method, histograms, folder / "thresholds.parquet")
        return folder / "thresholds.parquet"

    def rules(self, model, rng, scale: float = 0.5):
        """Rules whose thresholds differ from matrix to matrix, but for q and k of layer 0, which share one."""
        from sparsetrace.formats.sites import by_leaf, layer_sites
        from sparsetrace.methods import MatrixRule

        values = {leaf: float(rng.uniform(0.2, 1.2) * scale) for leaf in by_leaf(layer_sites(model.sites))}
        values[0, "k"] = values[0, "q"]
        dtype = model.config.torch_dtype
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        return [
            MatrixRule(layer, matrix, int(torch.tensor(value, dtype=dtype).view(integers)))
            for (layer, matrix), value in values.items()
        ]

    def workload(self, folder: Path, model, rng, lengths, decoding, batching, machine=None, sparsity=0.5) -> Path:
        """The whole way from prompts to a workload folder."""
        from sparsetrace.core.settings import Machine, PromptSet
        from sparsetrace.generation.generate import generate
        from sparsetrace.generation.job import Job
        from sparsetrace.generation.prompts import split, write_split
        from sparsetrace.packing.index import index
        from sparsetrace.packing.pack import pack

        folder.mkdir(parents=True, exist_ok=True)
        table = self.thresholds(folder, model, rng, sparsity)
        prompts = self.prompts(folder / "prompts.jsonl", rng, lengths)
        groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), batching)
        write_split(groups, batching.shards, folder / "split.parquet")
        parts = []
        for shard in range(batching.shards):
            dump = folder / "dump" / f"{shard:05d}" / "manifest.json"
            on = machine or Machine(device="cpu")
            generate(Job(model, folder / "split.parquet", shard, dump, decoding, batching, on, table))
            parts.append(folder / "parts" / f"{shard:05d}.json")
            pack(dump, folder / "workload", parts[-1])
        index(parts, folder / "workload")
        return folder / "workload"

    def dump(self, folder: Path, dtype: str, groups: dict[int, list[dict[tuple[int, str], np.ndarray]]], token) -> Path:
        """A dump written by hand, with the safetensors library.

        Args:
            folder: of the dump.
            dtype: of the patterns.
            groups: for each group its blocks, each the dense bit patterns [T, K] by (layer, matrix).
            token: for each (group, block) the token numbers [T].
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from sparsetrace.formats.tables import SEQUENCES, TOKENS
        from sparsetrace.formats.versions import DUMP_VERSION

        folder.mkdir(parents=True, exist_ok=True)
        rows = 0
        for group, blocks in groups.items():
            names, tokens = [], []
            for number, block in enumerate(blocks):
                numbers = np.asarray(token[group, number], np.int64)
                arrays = {
                    "rows.token": numbers,
                    "rows.sequence": np.full(len(numbers), group, np.int32),
                    "rows.position": np.arange(len(numbers), dtype=np.int32),
                }
                for (layer, matrix), patterns in block.items():
                    keep = patterns != 0
                    stem = f"L{layer:02d}.{matrix}"
                    arrays[f"{stem}.offsets"] = np.append(0, keep.sum(1).cumsum()).astype(np.int64)
                    arrays[f"{stem}.values"] = patterns[keep]
                    arrays[f"{stem}.mask"] = np.packbits(keep, axis=1, bitorder="little")
                names.append(f"group-{group:05d}.block-{number:03d}.safetensors")
                save_numpy(arrays, folder / names[-1])
                tokens.extend(numbers.tolist())
                rows += len(numbers)
            fed = [
                {
                    "token": number,
                    "sequence": group,
                    "position": i,
                    "token_id": 3,
                    "text": "w3",
                    "phase": "decode",
                    "captured": True,
                    "sparsified": True,
                    "group": group,
                    "step": i,
                    "slot": 0,
                }
                for i, number in enumerate(sorted(tokens))
            ]
            pq.write_table(pa.Table.from_pylist(fed, schema=TOKENS), folder / f"group-{group:05d}.tokens.parquet")
            sequence = {
                "sequence": group,
                "base": min(tokens, default=0),
                "group": group,
                "slot": 0,
                "source": "hand",
                "source_index": group,
                "prompt": "w3",
                "output": "w4",
                "prompt_ids": [1, 3],
                "output_ids": [4],
                "stopped": False,
                "repeated_4gram_share": 0.0,
            }
            table = pa.Table.from_pylist([sequence], schema=SEQUENCES)
            pq.write_table(table, folder / f"group-{group:05d}.sequences.parquet")
            seal = {"key": "hand", "blocks": names, "rows": len(tokens)}
            (folder / f"group-{group:05d}.json").write_text(json.dumps(seal))
        first = next(block for blocks in groups.values() for block in blocks)
        manifest = {
            "version": DUMP_VERSION,
            "sparsetrace": "0.1.0",
            "model_hash": "0" * 64,
            "label": "teal-0.5",
            "method": "teal",
            "parameters": {"sparsity": 0.5, "allocation": "uniform"},
            "calibration": {"tokens": 1},
            "thresholds": [0] * len(first),
            "prompts": "1" * 64,
            "decoding": {"prefill": "none"},
            "batching": {"max_new_tokens": 4, "batch_size": 1},
            "device": "cpu",
            "threads": 1,
            "versions": {"torch": "none"},
            "key": "hand",
            "dtype": dtype,
            "source": "hand",
            "source_hash": "2" * 64,
            "matrices": [self._matrix(layer, matrix, x.shape[1], dtype) for (layer, matrix), x in first.items()],
            "groups": list(groups),
            "rows": rows,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder / "manifest.json"

    def _matrix(self, layer: int, matrix: str, width: int, dtype: str) -> dict:
        return {
            "layer": layer,
            "matrix": matrix,
            "held_by": matrix,
            "site": SITES[matrix],
            "in_features": width,
            "out_features": 5,
            "dtype": dtype,
            "method": "teal",
            "parameters": "{}",
            "threshold": 0.0,
            "threshold_bits": 0,
            "target_sparsity": 0.5,
            "calibrated_sparsity": 0.5,
            "weight": f"layers.{layer}.{SITES[matrix]}.weight",
            "weight_column": 0,
            "weight_columns": 1,
            "weight_sha256": "3" * 64,
            "source_weight": "x",
        }
