"""Size and speed of packing, measured on operands that this script captures from real model runs.

Each source is a checkpoint that goes through the pipeline's steps (convert, calibrate, thresholds, split, generate), on
a GPU if there is one. Its dump is then packed, and read back to dense rows in the model's type, several times in
alternation by one thread of one process. For a trained model of realistic width alone:

    python benchmarks/trained_checkpoint.py /scratch/trained-1024
    python benchmarks/pack.py --work /scratch/pack --source --checkpoint /scratch/trained-1024 \
        --length long --encoding split

| source | what |
|---|---|
| `demo` | the embedded demonstration model, which `sparsetrace demo-checkpoint` trains: 192 inputs wide |
| `random-<hidden>` | a Llama of two layers with random weights, of realistic width |
| a folder given by `--checkpoint` | named like the folder; uses its own texts if it has them, as those of \
`trained_checkpoint.py` do, else those of the demonstration model |
| `<trained model>-long` | the same with 192 sampled tokens after each prompt: longer files, other text |
| `synthetic-4096` | not captured: 16,384 random rows of one matrix, for the speed of files of ordinary length |

Appends rows to three CSV files. `pack.csv`:

| column | what |
|---|---|
| commit | `+` where the working tree differed from it |
| source, encoding, dtype, sparsity | what was packed; sparsity is the target |
| bytes_per_nonzero | bytes of all data files, index columns and footers included, per kept value |
| entropy_limit | bytes per kept value: empirical entropy of the kept patterns, plus that of the mask, by matrix |
| write_gbps_per_core, read_gbps_per_core | dense bytes (rows x inputs x bytes a value) per second of CPU time, median |

`pack_bytes.csv` breaks the bytes of encoding `split` down, in bytes per nonzero: values, mask, figures (nnz, absmax,
l2), index (the other columns) and footer; page headers count to their column. `pack_floor.csv` gives upper bounds on
the speed of `split`: arrow_write_gbps is pyarrow's writer alone, from finished columns into memory, and zstd_gbps is
zstd alone on the planes and masks; medians of the same run.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# imported here, so that no reading is timed together with it
import torch
from record import append
from synthetic import commit, make_dump

import sparsetrace
from sparsetrace.formats.columns import operand_columns
from sparsetrace.formats.schema import ENCODINGS
from sparsetrace.packing.data_file import ZSTD_LEVEL, writer_settings
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack

RESULTS = Path(__file__).parent / "results"
SETTING = ("commit", "source", "dtype", "sparsity", "tokens")
COLUMNS = {
    "pack.csv": [
        *("commit", "source", "encoding", "dtype", "sparsity"),
        *("bytes_per_nonzero", "entropy_limit", "write_gbps_per_core", "read_gbps_per_core"),
    ],
    "pack_bytes.csv": [*SETTING, "entropy_limit", "values", "mask", "figures", "index", "footer"],
    "pack_floor.csv": [*SETTING, "write_gbps", "arrow_write_gbps", "zstd_gbps"],
}
REPEATS = 5
SYNTHETIC = "synthetic-4096"
SOURCES = ["demo", "random-1024", "random-2048", "random-4096", SYNTHETIC]
DTYPES = ["float16", "bfloat16"]
LENGTHS = ["short", "long"]


def step(*words: object) -> None:
    """One step of the pipeline, as a user would run it."""
    subprocess.run([sys.executable, "-m", "sparsetrace", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def made(source: str, work: Path) -> Path:
    """The checkpoint of `demo` or `random-<hidden>`, which is made if it is not there yet."""
    folder = work / source
    if not folder.is_dir():
        if source == "demo":
            step("demo-checkpoint", "--out", folder)
        else:
            random_llama(made("demo", work), folder, int(source.removeprefix("random-")))
    return folder


def random_llama(demo: Path, folder: Path, hidden: int) -> None:
    """A Hugging Face checkpoint of two wide layers with random weights, and the demonstration model's tokenizer."""
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
        # channels of unequal magnitude, as in trained weights
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


def prepare(checkpoint: Path, texts: Path, folder: Path, dtype: str) -> None:
    """The runtime model and its histograms."""
    step("convert", checkpoint, "--out", folder / "model", "--dtype", dtype)
    arguments = ("--text", texts / "calibration.txt", "--tokens", 1024, "--sequence-length", 256)
    step("calibrate", folder / "model", *arguments, "--out", folder / "histograms.safetensors")


def capture(folder: Path, texts: Path, sparsity: float, limit: int, long: bool) -> Path:
    """Generate the dump of one run that captures whole prompts; returns its folder."""
    model, own = folder / "model", folder / f"{sparsity}{'-long' if long else ''}"
    own.mkdir(exist_ok=True)
    table, prompts, dump = own / "thresholds.parquet", own / "prompts.parquet", own / "dump" / "00000"
    method = ("--method", "teal", "--set", f"sparsity={sparsity}")
    step("thresholds", folder / "histograms.safetensors", *method, "--out", table)
    batching = ("--max-new-tokens", 193 if long else 33, "--batch-size", 16 if long else 8)
    chosen = () if long else ("--limit", limit)
    step("split", model, "--prompts", texts / "prompts.jsonl", "--out", prompts, *chosen, *batching)
    arguments = ("--thresholds", table, "--prompts", prompts, "--shard", 0, "--out", dump / "manifest.json")
    # greedy text of such length would repeat itself
    sampled = ("--temperature", 1) if long else ()
    step("generate", model, *arguments, *batching, "--prefill", "all", "--ignore-eos", *sampled)
    return dump


def entropy_limit(workload: sparsetrace.Workload) -> float:
    """Lower bound, in bytes per kept value, of any code of single patterns and single mask bits."""
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


def bytes_by_kind(workload: Path, files: list[dict[str, object]]) -> dict[str, float]:
    """Bytes of all data files by kind: the columns of pack_bytes.csv."""
    found = dict.fromkeys(("values", "mask", "figures", "index", "footer"), 0)
    for file in files:
        metadata = pq.read_metadata(workload / str(file["path"]))
        columns = 0
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                name = column.path_in_schema.split(".")[0]
                kind = "figures" if name in ("nnz", "absmax", "l2") else "mask" if name == "mask" else "index"
                kind = "values" if name.startswith("values") else kind
                found[kind] += column.total_compressed_size
                columns += column.total_compressed_size
        found["footer"] += int(str(file["bytes"])) - columns
    return found


def floor(workload: Path, files: list[dict[str, object]]) -> tuple[float, float]:
    """Seconds of CPU time that pyarrow's writer alone, and zstd alone, take for the content of the data files."""
    tables = []
    codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    planes = []
    for path in (workload / str(file["path"]) for file in files):
        table = pq.read_table(path, partitioning=None).combine_chunks()
        group_rows = pq.read_metadata(path).row_group(0).num_rows
        tables.append((table, group_rows))
        for name in operand_columns(table.column_names):
            column = table[name].chunk(0)
            if column.null_count:
                continue
            offsets = np.frombuffer(column.buffers()[1], np.int32)[: len(column) + 1]
            edges = [*offsets[::group_rows].tolist(), int(offsets[-1])]
            planes += [column.buffers()[2].slice(a, b - a) for a, b in pairwise(edges) if b > a]
    write, compress = [], []
    for _ in range(REPEATS):
        began = time.process_time()
        for table, group_rows in tables:
            with pq.ParquetWriter(pa.BufferOutputStream(), table.schema, **writer_settings(table.schema)) as writer:
                writer.write_table(table, row_group_size=group_rows)
        write.append(time.process_time() - began)
        began = time.process_time()
        for plane in planes:
            codec.compress(plane)
        compress.append(time.process_time() - began)
    return statistics.median(write), statistics.median(compress)


def measure(dump: Path, folder: Path, encoding: str) -> dict[str, float]:
    """Pack and read back with one thread: sizes, and dense bytes per second of CPU time."""
    pa.set_cpu_count(1)
    write, read = [], []
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
                # in the model's type; numpy has no bfloat16
                dense_bytes += (rows.torch() if rows.dtype == "bfloat16" else rows.dense()).nbytes
        read.append(time.process_time() - began)
        size = sum(file["bytes"] for file in packed["files"])
        nnz = sum(file["nnz"] for file in packed["files"])
        if repeat < REPEATS - 1:
            shutil.rmtree(out)
    found = {
        "bytes_per_nonzero": size / nnz,
        "entropy_limit": entropy_limit(workload),
        "write_gbps_per_core": dense_bytes / 1e9 / statistics.median(write),
        "read_gbps_per_core": dense_bytes / 1e9 / statistics.median(read),
        "tokens": len(workload.tokens),
    }
    if encoding == "split":
        alone = zip(("arrow_write_gbps", "zstd_gbps"), floor(out / "workload", packed["files"]), strict=True)
        found |= {name: dense_bytes / 1e9 / seconds for name, seconds in alone}
        found |= {name: count / nnz for name, count in bytes_by_kind(out / "workload", packed["files"]).items()}
        found["write_gbps"] = found["write_gbps_per_core"]
    shutil.rmtree(out)
    return found


def row(known: str, source: str, dtype: str, sparsity: float, encoding: str, dump: Path, folder: Path) -> None:
    """Measure one setting, append it to the CSVs and print it."""
    found = measure(dump, folder, encoding)
    line = {"commit": known, "source": source, "encoding": encoding, "dtype": dtype, "sparsity": sparsity}
    line |= {name: value if isinstance(value, int) else f"{value:.4g}" for name, value in found.items()}
    ratio = found["bytes_per_nonzero"] / found["entropy_limit"]
    print(*line.values(), f"({ratio:.3f} of the limit)", flush=True)
    for name, columns in COLUMNS.items():
        if name == "pack.csv" or encoding == "split":
            append(RESULTS / name, columns, [{column: line[column] for column in columns}])


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and dumps, a few GB")
    parser.add_argument("--source", nargs="*", default=SOURCES, help="by their names above; may be none")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="more checkpoints")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--length", nargs="+", choices=LENGTHS, default=LENGTHS, help="of the runs of trained models")
    parser.add_argument(
        "--encoding", nargs="+", choices=ENCODINGS, default=ENCODINGS, help="open: of short runs at 50 %%"
    )
    parser.add_argument("--limit", type=int, default=16, help="prompts of a short run; a long one has all")
    arguments = parser.parse_args()
    known = re.compile(rf"demo|random-\d+|{SYNTHETIC}")
    if unknown := [source for source in arguments.source if not known.fullmatch(source)]:
        parser.error(f"--source must be demo, random-<hidden> or {SYNTHETIC}, got {', '.join(unknown)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    # before the CSVs, which are in the tree, differ
    known = commit()
    checkpoints = {path.name: path for path in arguments.checkpoint}
    for source in arguments.source:
        if source != SYNTHETIC:
            checkpoints[source] = made(source, arguments.work)
    for source, checkpoint in checkpoints.items():
        texts = checkpoint if (checkpoint / "prompts.jsonl").is_file() else made("demo", arguments.work)
        for dtype in arguments.dtype:
            folder = arguments.work / f"{source}-{dtype}"
            if not (folder / "histograms.safetensors").is_file():
                prepare(checkpoint, texts, folder, dtype)
            # without float16 units a processor takes minutes for each setting of a wide model
            lengths = ["short"] if source.startswith("random") else arguments.length
            for sparsity, length in product(arguments.sparsity, lengths):
                dump = folder / (f"{sparsity}-long" if length == "long" else f"{sparsity}") / "dump" / "00000"
                if not (dump / "manifest.json").is_file():
                    dump = capture(folder, texts, sparsity, arguments.limit, length == "long")
                name = f"{source}-long" if length == "long" else source
                for encoding in arguments.encoding:
                    if encoding == "split" or (sparsity == 0.5 and length == "short"):
                        row(known, name, dtype, sparsity, encoding, dump, folder)
    if SYNTHETIC in arguments.source:
        folder = arguments.work / SYNTHETIC
        if not (folder / "dump" / "manifest.json").is_file():
            make_dump(folder / "dump", {(0, "q"): 4096}, sequences=8, tokens=2048)
        for encoding in arguments.encoding:
            row(known, SYNTHETIC, "float16", 0.5, encoding, folder / "dump", folder)


if __name__ == "__main__":
    main()
