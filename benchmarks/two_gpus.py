"""Two shards side by side on two GPUs of one host, against one shard alone.

    python benchmarks/two_gpus.py --csv benchmarks/results/two_gpus.csv

Makes a random Llama model of about 0.8 billion parameters, and runs `sparsetrace generate` as Snakemake does: one
process a shard, each of which claims a GPU by itself. A rate is that of the groups between the first and the last seal
that all shards were at work, so that start-up does not count; `wall` counts it too. Exits with status 1 if the shards
met on one GPU or were less than `LEAST` times as fast as one.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import WHERE, append, environment, where

ROOT = Path(__file__).parents[1]
LEAST = 1.8
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
SMALL = {"torch_dtype": "bfloat16"}


def sparsetrace(folder: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsetrace", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)


def finished(process: subprocess.Popen) -> None:
    if process.wait():
        sys.exit(f"two_gpus: {process.args} ended with status {process.returncode}")


def prepare(folder: Path, shape: dict, shards: int, groups: int, batch: int, new: int) -> None:
    """A converted model, thresholds and split prompts."""
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    tiny, rng = conftest.Tiny(), conftest.seeded("two_gpus")
    tiny.checkpoint(folder / "checkpoint", rng, **shape)
    (folder / "text.txt").write_text(tiny.words(rng, 8000))
    tiny.prompts(folder / "prompts.jsonl", rng, [32] * (shards * groups * batch))
    split = ("--max-new-tokens", new, "--batch-size", batch, "--shards", shards)
    for words in (
        ("convert", "checkpoint", "--out", "model"),
        (
            "calibrate",
            "model",
            "--text",
            "text.txt",
            "--out",
            "h.safetensors",
            "--tokens",
            4096,
            "--sequence-length",
            128,
        ),
        ("thresholds", "h.safetensors", "--method", "teal", "--set", "sparsity=0.5", "--out", "t.parquet"),
        ("split", "model", "--prompts", "prompts.jsonl", "--out", "split.parquet", *split),
    ):
        finished(sparsetrace(folder, *words))


def gpus_of(processes: list[subprocess.Popen]) -> dict[int, str]:
    """The GPU that each process computes on, as the driver says."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {}
    found = dict(line.split(", ") for line in lines if ", " in line)
    return {one.pid: found[str(one.pid)] for one in processes if str(one.pid) in found}


def generate(folder: Path, name: str, shards: list[int], batch: int, new: int) -> tuple[float, float, set[str]]:
    """Run shards at the same time.

    Returns:
        Tokens a second while all were at work, tokens a second of wall time, and the GPUs seen.
    """
    settings = ("--max-new-tokens", new, "--batch-size", batch, "--ignore-eos")
    started = time.time()
    dumps = [folder / name / f"{shard:05d}" for shard in shards]
    inputs = ("model", "--thresholds", "t.parquet", "--prompts", "split.parquet")
    processes = [
        sparsetrace(folder, "generate", *inputs, "--shard", shard, "--out", dump / "manifest.json", *settings)
        for shard, dump in zip(shards, dumps, strict=True)
    ]
    seen: dict[int, str] = {}
    while any(one.poll() is None for one in processes):
        seen |= gpus_of(processes)
        time.sleep(0.5)
    for one in processes:
        finished(one)
    wall = time.time() - started
    seals = [sorted(path.stat().st_mtime for path in dump.glob("group-?????.json")) for dump in dumps]
    first, last = max(times[0] for times in seals), min(times[-1] for times in seals)
    # a group of `batch` sequences makes new - 1 rows each
    rows = batch * (new - 1)
    counted = sum(sum(first < at <= last for at in times) for times in seals)
    return rows * counted / (last - first), rows * sum(map(len, seals)) / wall, set(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=40, help="of each shard")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script where there is no GPU")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    sys.path[:0] = [f"{ROOT}/src", f"{ROOT}/kernels"]
    batch, new = arguments.batch, arguments.new
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SMALL if arguments.small else SHAPE, 2, arguments.groups, batch, new)
        one = generate(folder, "one", [0], batch, new)
        two = generate(folder, "two", [0, 1], batch, new)
    ratio = two[0] / one[0]
    columns = (*WHERE, "shards_at_a_time", "gpus_seen", "tokens_per_s", "tokens_per_s_wall")
    rows = [
        {**where(), **dict(zip(columns[len(WHERE) :], values, strict=True))}
        for values in (
            (1, len(one[2]), round(one[0], 1), round(one[1], 1)),
            (2, len(two[2]), round(two[0], 1), round(two[1], 1)),
        )
    ]
    if arguments.csv:
        append(arguments.csv, columns, rows)
    for row in rows:
        print(*(f"{name}={row[name]}" for name in columns), flush=True)
    print(f"ratio {ratio:.3f}, of wall time {two[1] / one[1]:.3f}")
    if not arguments.small and (len(two[2]) != 2 or ratio < LEAST):
        sys.exit(f"two_gpus: two shards must take two GPUs and be {LEAST} times as fast, got {two[2]} and {ratio:.3f}")


if __name__ == "__main__":
    main()
