"""Times the lookup of one random row by layer, matrix and token, warm, and the replay of a workload.

The looked-up matrix is synthetic, with half of its inputs kept; every reader fetches the same tokens and ends with the
dense row. Replay walks the masks of all 32 layers of an 8B model (hidden 4,096, inner 14,336), 8 sequences or 1 at a
time, in a process of its own, and reads from every mask.

`lookup.csv`:

| column | what |
|---|---|
| commit | with `+` if the tree differed from it |
| rows_in_leaf | tokens |
| inputs | inputs of the matrix |
| reader | sparsetrace, duckdb or polars |
| ms_p50, ms_p95 | wall time of one row |

`replay.csv`: commit, tokens, batch, masks, tokens_per_cpu_second (median of three walks), peak_mib (resident memory of
the process).
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import append
from synthetic import commit, make_workload

import sparsetrace

RESULTS = Path(__file__).parent / "results"
LOOKUPS = 300
# widths of a large model and of the demonstration model, whose row groups have the most rows
LOOKUP_WIDTHS = (4096, 192)
WIDTHS = dict.fromkeys(("q", "k", "v", "o", "gate", "up"), 4096) | {"down": 14336}


def decode(row: tuple[bytes, bytes, bytes], width: int) -> np.ndarray:
    """The three lines of docs/format.md."""
    mask, lo, hi = (np.frombuffer(part, np.uint8) for part in row)
    x = np.zeros(width, np.float16)
    keep = np.unpackbits(mask, count=width, bitorder="little").view(bool)
    x[keep] = (lo | hi.astype(np.uint16) << 8).view(np.float16)
    return x


def readers(folder: Path, width: int) -> dict[str, Callable[[int], np.ndarray]]:
    """Functions that fetch one row, by name of the reader."""
    import duckdb
    import polars

    ds = sparsetrace.open(folder)
    path = str(folder / "data" / "L00" / "q" / "*.parquet")
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    query = f"SELECT mask, values_lo, values_hi FROM read_parquet('{path}') WHERE token = ?"
    lazy = polars.scan_parquet(path)

    def by_polars(token: int) -> np.ndarray:
        found = lazy.filter(polars.col("token") == token).select("mask", "values_lo", "values_hi").collect()
        return decode(found.row(0), width)

    return {
        "sparsetrace": lambda token: ds[0, "q", token],
        "duckdb": lambda token: decode(connection.execute(query, [token]).fetchone(), width),
        "polars": by_polars,
    }


def lookup(work: Path, known: str, width: int) -> list[dict[str, object]]:
    """Rows of lookup.csv; the readers alternate, token by token."""
    sequences, length = 8, 12_600
    folder = work / f"lookup-{width}"
    if not (folder / "workload" / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_workload(folder, {(0, "q"): width}, sequences, length)
    found = readers(folder / "workload", width)
    rng = np.random.default_rng(1)
    tokens = sparsetrace.open(folder / "workload").tokens
    times: dict[str, list[float]] = {name: [] for name in found}
    for token in rng.choice(tokens, LOOKUPS).tolist():
        rows = []
        for name, fetch in found.items():
            began = time.perf_counter()
            rows.append(fetch(token))
            times[name].append(1e3 * (time.perf_counter() - began))
        assert all(np.array_equal(row, rows[0]) for row in rows)
    return [
        {
            "commit": known,
            "rows_in_leaf": len(tokens),
            "inputs": width,
            "reader": name,
            "ms_p50": f"{np.percentile(spent, 50):.3g}",
            "ms_p95": f"{np.percentile(spent, 95):.3g}",
        }
        for name, spent in times.items()
    ]


def walk(folder: Path) -> None:
    """Replay three times and print tokens per second of CPU time and the peak of memory, MiB."""
    ds = sparsetrace.open(folder)
    rates, touched = [], 0
    for _ in range(3):
        began, tokens = time.process_time(), 0
        for step in ds.replay():
            for rows in step:
                touched += int(rows.mask[0, 0])
            tokens += len(step.token)
        rates.append(tokens / (time.process_time() - began))
    assert touched
    print(statistics.median(rates), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def replay(work: Path, known: str) -> list[dict[str, object]]:
    """Rows of replay.csv."""
    found = []
    for sequences, length in ((8, 512), (1, 2048)):
        folder = work / f"replay-{sequences}"
        if not (folder / "workload" / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            leaves = {(layer, matrix): width for layer in range(32) for matrix, width in WIDTHS.items()}
            make_workload(folder, leaves, sequences, length, "masks")
        words = [sys.executable, __file__, "--walk", folder / "workload"]
        rate, peak = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        row = {"commit": known, "tokens": sequences * length, "batch": sequences, "masks": sequences * length * 224}
        found.append(row | {"tokens_per_cpu_second": f"{float(rate):.4g}", "peak_mib": f"{float(peak):.0f}"})
    return found


def note(name: str, rows: list[dict[str, object]]) -> None:
    """Append rows to a CSV, and print them."""
    append(RESULTS / name, list(rows[0]), rows)
    for row in rows:
        print(*row.values(), flush=True)


def main() -> None:
    """Run everything and append to the CSVs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the synthetic workloads, 3 GB")
    parser.add_argument("--walk", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.walk is not None:
        walk(arguments.walk)
        return
    if arguments.work is None:
        parser.error("--work must be given")
    known = commit()
    for width in LOOKUP_WIDTHS:
        note("lookup.csv", lookup(arguments.work, known, width))
    note("replay.csv", replay(arguments.work, known))


if __name__ == "__main__":
    main()
