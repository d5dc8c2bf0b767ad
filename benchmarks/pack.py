"""Size and speed of packing, on operands captured from real model runs that this script makes itself.

Each source is a checkpoint taken through the pipeline's own steps (convert, calibrate, thresholds, split, generate);
its dump is then packed and read back to dense by one thread, several times in alternation, in one process.

| source | what |
|---|---|
| `demo` | the embedded demonstration model, trained by `sparsetrace demo-checkpoint`: 192 inputs wide |
| `random-<hidden>` | a Llama of two layers with random weights, of realistic width |
| a folder given by `--checkpoint` | under its folder's name |
| `synthetic-4096` | not captured: 16,384 rows of one matrix, for the speed of files of ordinary length |

Appends rows to a CSV:

| column | what |
|---|---|
| commit | `+` where the tree differed from it |
| source, encoding, dtype, sparsity | what was packed; sparsity is the target |
| bytes_per_nonzero | of all data files, index columns and footers included |
| entropy_limit | bytes: empirical entropy of the kept patterns, plus that of the mask per kept value, by matrix |
| write_gbps_per_core, read_gbps_per_core | dense bytes (rows x inputs x bytes a value) per second of CPU time, median |
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from synthetic import commit, make_dump

import sparsetrace
from sparsetrace.pack import index, pack

RESULTS = Path(__file__).parent / "results" / "pack.csv"
COLUMNS = [
    *("commit", "source", "encoding", "dtype", "sparsity"),
    *("bytes_per_nonzero", "entropy_limit", "write_gbps_per_core", "read_gbps_per_core"),
]
REPEATS = 5


def step(*words: object) -> None:
    """One step of the pipeline, as a user would run it."""
    subprocess.run([sys.executable, "-m", "sparsetrace", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def random_llama(demo: Path, folder: Path, hidden: int) -> None:
    """A Hugging Face checkpoint of two wide layers with random weights, and the demonstration model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for file in demo.iterdir():
        if "token" in file.name or file.suffix in (".txt", ".jsonl"):
            shutil.copy(file, folder)
    config = json.loads((demo / "config.json").read_text())
    inner, heads, vocab = hidden * 11 // 4, hidden // 64, config["vocab_size"]
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "head_dim": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    generator = torch.Generator().manual_seed(0)

    def weight(out: int, inputs: int) -> torch.Tensor:
        # channels of unequal size, as trained ones have
        scale = torch.randn(inputs, generator=generator).mul(0.5).exp()
        return (torch.randn(out, inputs, generator=generator) * scale / inputs**0.5).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.randn(hidden, generator=generator).mul(0.3).exp().bfloat16()
        for name, out in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = weight(out, hidden)
        for name, out, inputs in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            tensors[f"{at}.mlp.{name}_proj.weight"] = weight(out, inputs)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def capture(checkpoint: Path, texts: Path, folder: Path, dtype: str, sparsity: float, limit: int) -> Path:
    """The dump of one run, prompts captured whole; returns its folder."""
    model, counts, table = folder / "model", folder / "histograms.safetensors", folder / "thresholds.parquet"
    step("convert", checkpoint, "--out", model, "--dtype", dtype)
    text, prompts = texts / "calibration.txt", folder / "prompts.parquet"
    step("calibrate", model, "--text", text, "--out", counts, "--tokens", 1024, "--sequence-length", 256)
    step("thresholds", counts, "--method", "teal", "--set", f"sparsity={sparsity}", "--out", table)
    batching = ("--max-new-tokens", 33, "--batch-size", 8)
    step(*("split", model, "--prompts", texts / "prompts.jsonl", "--out", prompts, "--limit", limit), *batching)
    dump = folder / "dump" / "00000"
    arguments = ("--thresholds", table, "--prompts", prompts, "--shard", 0, "--out", dump / "manifest.json")
    step("generate", model, *arguments, *batching, "--prefill", "all", "--ignore-eos")
    return dump


def entropy_limit(workload: sparsetrace.Workload) -> float:
    """Bytes per kept value that no code of single patterns and single mask bits can go below."""
    bits = nnz = 0.0
    for layer, matrix in workload.leaves:
        rows = workload.matrix(layer, matrix)
        counts = np.bincount(rows.patterns.astype(np.int64), minlength=1)
        kept, inputs = int(counts.sum()), len(rows) * rows.features
        for part in (counts[counts > 0], np.array([kept, inputs - kept])):
            part = part[part > 0].astype(np.float64)
            bits -= (part * np.log2(part / part.sum())).sum()
        nnz += kept
    return bits / 8 / nnz


def measure(dump: Path, folder: Path, encoding: str) -> dict[str, float]:
    """Pack and read back with one thread; dense bytes per second of CPU time."""
    pa.set_cpu_count(1)
    write, read, limits = [], [], []
    for repeat in range(REPEATS):
        copy = folder / "copy"
        shutil.copytree(dump, copy)
        out = folder / f"{encoding}-{repeat}"
        began = time.process_time()
        packed = pack(copy / "manifest.json", out / "workload", out / "00000.json", encoding=encoding)
        write.append(time.process_time() - began)
        index([out / "00000.json"], out / "workload")
        shutil.rmtree(copy)
        workload = sparsetrace.open(out / "workload")
        began = time.process_time()
        dense_bytes = 0
        for layer, matrix in workload.leaves:
            for rows in workload.blocks(layer, matrix):
                dense = rows.dense()
                # a bfloat16 is given back as float32; it counts as what it is in the model
                dense_bytes += dense.size * (4 if rows.dtype == "float32" else 2)
        read.append(time.process_time() - began)
        size = sum(file["bytes"] for file in packed["files"])
        nnz = sum(file["nnz"] for file in packed["files"])
        limits.append(entropy_limit(workload))
        shutil.rmtree(out)
    return {
        "bytes_per_nonzero": size / nnz,
        "entropy_limit": limits[0],
        "write_gbps_per_core": dense_bytes / 1e9 / statistics.median(write),
        "read_gbps_per_core": dense_bytes / 1e9 / statistics.median(read),
    }


def row(source: str, dtype: str, sparsity: float, encoding: str, dump: Path, folder: Path) -> dict[str, object]:
    """Measure one setting and print its row."""
    found = measure(dump, folder, encoding)
    line = {"commit": commit(), "source": source, "encoding": encoding, "dtype": dtype, "sparsity": sparsity}
    line |= {name: f"{value:.4g}" for name, value in found.items()}
    ratio = found["bytes_per_nonzero"] / found["entropy_limit"]
    print(*line.values(), f"({ratio:.3f} of the limit)", flush=True)
    return line


def main() -> None:
    """Run everything and append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and dumps, a few GB")
    parser.add_argument("--hidden", type=int, nargs="*", default=[1024, 2048], help="widths of the random models")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="more checkpoints")
    parser.add_argument("--limit", type=int, default=16, help="prompts")
    arguments = parser.parse_args()
    demo = arguments.work / "demo"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not demo.is_dir():
        step("demo-checkpoint", "--out", demo)
    sources = {"demo": demo} | {path.name: path for path in arguments.checkpoint}
    for hidden in arguments.hidden:
        sources[f"random-{hidden}"] = arguments.work / f"random-{hidden}"
        if not sources[f"random-{hidden}"].is_dir():
            random_llama(demo, sources[f"random-{hidden}"], hidden)
    rows = []
    for source, checkpoint in sources.items():
        settings = [("float16", 0.5), ("bfloat16", 0.5)]
        # a processor without float16 units takes minutes for each setting of a wide model
        settings += [] if source.startswith("random") else [("float16", 0.25), ("float16", 0.75)]
        for dtype, sparsity in settings:
            folder = arguments.work / f"{source}-{dtype}-{sparsity}"
            dump = folder / "dump" / "00000"
            if not (dump / "manifest.json").is_file():
                dump = capture(checkpoint, demo, folder, dtype, sparsity, arguments.limit)
            for encoding in ("split", "open") if sparsity == 0.5 else ("split",):
                rows.append(row(source, dtype, sparsity, encoding, dump, folder))
    folder = arguments.work / "synthetic-4096"
    if not (folder / "dump" / "manifest.json").is_file():
        make_dump(folder / "dump", {(0, "q"): 4096}, sequences=8, tokens=2048)
    rows += [row("synthetic-4096", "float16", 0.5, encoding, folder / "dump", folder) for encoding in ("split", "open")]
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
