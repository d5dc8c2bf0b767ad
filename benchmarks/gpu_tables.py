"""Put the committed results of the GPU benchmarks into README.md and docs/gpu.md, between their markers.

    python benchmarks/gpu_tables.py

| marker | page | from |
|---|---|---|
| `decode-short` | README.md | `decode.csv`: the Llama-2-7B shape in float16 on an H100 |
| `decode` | docs/gpu.md | `decode.csv`: all of it |
| `gemv` | docs/gpu.md | `gemv.csv`: geometric means over `shapes.SHAPES` |
| `step` | docs/gpu.md | `gemv.csv` and `profile.csv`: where a step of the Llama-2-7B shape spends its time |
"""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import random_checkpoint
from readme import README, put
from shapes import SHAPES

from sparsetrace.formats.architecture import sites_of
from sparsetrace.formats.sites import layer_sites

RESULTS = Path(__file__).parent / "results"
PAGE = README.parent / "docs" / "gpu.md"
H100 = "NVIDIA H100 80GB HBM3"
GEMV_SPARSITIES = ("0.25", "0.5", "0.75", "0.9")
MODEL = "llama-2-7b"
# what is captured in the runs that count
CAPTURE = {"dense": "none", "teal": "none", "single": "fused", "list": "producer"}

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Rows of a committed CSV."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def short(gpu: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`."""
    return gpu.split()[1]


def decode_key(row: Row) -> tuple[str, ...]:
    return row["gpu"], row["model"], row["dtype"], row["mode"], row["batch"]


def decode_table(key_columns: Iterable[str], chosen: Iterable[Row]) -> str:
    """One row for each way to decode: tokens a second by sink, and what bounds the disk's."""
    by_key: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in chosen:
        if row["impl"] == "triton":
            by_key[decode_key(row)][row["sink"]] = row
    lines = []
    for key, sinks in by_key.items():
        gpu, model, dtype, mode, batch = key
        what = {("decode", "1"): "one sequence", ("decode", "64"): "64 sequences"}.get((mode, batch))
        names = {"gpu": short(gpu), "shape": f"{model}, {dtype}", "what": what or f"given text, {batch} x 512 at once"}
        disk = sinks["disk"]
        bound = float(disk["limit_tokens_per_s"])
        limit = "decoding" if disk["limit"] == "no capture" else f"the {disk['limit']}: {bound:,.0f}"
        rates = [f"{float(sinks[sink]['tokens_per_s']):,.0f}" for sink in ("none", "memory", "disk")]
        share = f"{float(disk['tokens_per_s']) / bound:.1%}"
        lines.append([*(names[column] for column in key_columns), *rates, limit, share])
    heads = {"what": "", "gpu": "GPU", "shape": "shape"}
    columns = [*(heads[column] for column in key_columns), "without capture", "captured, to host memory"]
    return markdown([*columns, "captured, to the disk", "what bounds the disk's", "share of it"], lines)


def gemv_table(rows: list[Row]) -> str:
    """Speed over TEAL's kernel, geometric mean, and over dense torch, the least."""
    times: dict[tuple[str, str, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        shape = int(row["k"]), int(row["n"])
        if row["dtype"] == "float16" and shape in SHAPES and row["capture"] == CAPTURE[row["impl"]]:
            times[row["gpu"], row["impl"], row["sparsity"]][shape] = float(row["us_p50"])
    lines = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        for impl in ("single", "list"):
            cells = []
            for sparsity in GEMV_SPARSITIES:
                own = times[gpu, impl, sparsity]
                teal, dense = times[gpu, "teal", sparsity], times[gpu, "dense", "0.0"]
                over_teal = statistics.geometric_mean([teal[shape] / own[shape] for shape in SHAPES])
                over_dense = min(dense[shape] / own[shape] for shape in SHAPES)
                cells.append(f"{over_teal:.2f} ({over_dense:.2f})")
            lines.append([short(gpu), impl, *cells])
    return markdown(["GPU", "kernel", *(f"{float(sparsity):.0%}" for sparsity in GEMV_SPARSITIES)], lines)


def step_table(gemv: list[Row], profile: list[Row]) -> str:
    """Where the time of one step goes, beside the time of reading the bytes it needs."""
    config = random_checkpoint.SHAPES[MODEL]
    gemv = [row for row in gemv if row["gpu"] == H100 and row["dtype"] == "float16"]
    profile = [row for row in profile if row["gpu"] == H100 and row["batch"] == "1" and row["dtype"] == "float16"]
    whole = next(float(row["us_per_step"]) for row in profile if row["kernel"] == "(step)")
    # the largest dense one tells the bandwidth best
    row = max((row for row in gemv if row["impl"] == "dense"), key=lambda row: int(row["k"]) * int(row["n"]))
    K, N = int(row["k"]), int(row["n"])
    bytes_per_us = 2 * (K * N + K + N) / float(row["us_p50"]) / float(row["roofline_share"])
    lines, spent, floors = [], 0.0, 0.0

    def add(name: str, us: float, num_bytes: int) -> None:
        nonlocal spent, floors
        floor = num_bytes / bytes_per_us
        spent, floors = spent + us, floors + floor
        lines.append([name, f"{us:,.0f}", f"{floor:,.0f}", f"{us - floor:,.0f}"])

    layers = config.num_hidden_layers
    sites = [site for site in layer_sites(sites_of(config)) if site.layer == 0]
    for site in sites:
        K, N = site.in_features, site.width
        row = next(
            row for row in gemv if (row["k"], row["n"], row["impl"], row["sparsity"]) == (str(K), str(N), "list", "0.5")
        )
        add(f"{layers} x {', '.join(site.matrices)} ({K:,} x {N:,})", layers * float(row["us_p50"]), layers * K * N)
    head = next(float(row["us_per_step"]) for row in profile if row["kernel"].startswith("nvjet"))
    add("the head, by torch", head, 2 * config.hidden_size * config.vocab_size)
    rest = f"{whole - spent:,.0f}"
    lines.append([f"the other kernels, of which {layers * len(sites)} make lists", rest, "0", rest])
    lines.append(["the step", f"{whole:,.0f}", f"{floors:,.0f}", f"{whole - floors:,.0f}"])
    return markdown(["", "us", f"reading at {bytes_per_us / 1e3:,.0f} GB/s", "more than that"], lines)


def tables() -> list[tuple[Path, str, str]]:
    """Page, marker and table of each."""
    decode, gemv = read("decode.csv"), read("gemv.csv")
    seven = [row for row in decode if (row["gpu"], row["model"], row["dtype"]) == (H100, MODEL, "float16")]
    return [
        (README, "decode-short", decode_table(["what"], seven)),
        (PAGE, "decode", decode_table(["gpu", "shape", "what"], decode)),
        (PAGE, "gemv", gemv_table(gemv)),
        (PAGE, "step", step_table(gemv, read("profile.csv"))),
    ]


if __name__ == "__main__":
    for page, marker, rows in tables():
        put(page, marker, rows)
