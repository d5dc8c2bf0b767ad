"""Peak memory of packing, on dumps far larger than that; each is packed by a process of its own.

| dump | what |
|---|---|
| `wide` | 2 GB and more: rows of 4096 and of 11008 inputs, half of each kept, in blocks of 2,048 rows |
| `long` | row statistics alone (level `stats`) of 50 million tokens in one shard, 16 sequences decoded together |

Appends rows to a CSV: commit, dump, dump_bytes, tokens, threads, peak_rss_mib.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from synthetic import commit, make_dump

from sparsetrace.formats.dump import block_name, group_name, write_block
from sparsetrace.formats.tables import SEQUENCES, TOKENS

RESULTS = Path(__file__).parent / "results" / "pack_memory.csv"
COLUMNS = ["commit", "dump", "dump_bytes", "tokens", "threads", "peak_rss_mib"]
PACK = """
import sys
from pathlib import Path
from sparsetrace.packing.pack import pack
dump, out, threads = sys.argv[1:]
packed = pack(Path(dump), Path(out) / "workload", Path(out) / "parts" / "00000.json", threads=int(threads))
# not ru_maxrss, which starts at the value of the parent process
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(packed["manifest"]["rows"], int(peak.split()[1]) / 1024)
"""


def wide(folder: Path) -> None:
    """Rows of a large model's widths."""
    make_dump(folder, {(0, "q"): 4096, (0, "o"): 4096, (0, "down"): 11008}, sequences=16, tokens=6144)


def long(folder: Path, groups: int = 48, steps: int = 65536, sequences: int = 16) -> None:
    """Many tokens, whose order and whose file's footer grow with their number."""
    make_dump(folder, {(0, "q"): 8}, sequences=1, tokens=8, level="masks")
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in folder.glob("group-*"):
        file.unlink()
    rows = steps * sequences
    ones = np.ones(rows, np.float32)
    step, slot = np.repeat(np.arange(steps), sequences), np.tile(np.arange(sequences), steps)
    for group in range(groups):
        sequence = group * sequences + slot
        arrays = {
            "rows.token": sequence * steps + step,
            "rows.sequence": sequence.astype(np.int32),
            "rows.position": step.astype(np.int32),
        }
        arrays |= {"L00.q.nnz": ones.astype(np.int32), "L00.q.absmax": ones, "L00.q.l2": ones}
        write_block(folder / block_name(group, 0), arrays)
        (folder / f"{group_name(group)}.json").write_text(json.dumps({"blocks": [block_name(group, 0)]}))
        for table, schema in (("tokens", TOKENS), ("sequences", SEQUENCES)):
            pq.write_table(schema.empty_table(), folder / f"{group_name(group)}.{table}.parquet")
    manifest |= {"groups": list(range(groups)), "rows": groups * rows, "capture": {"level": "stats"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(name: str, dump: Path, threads: int, folder: Path) -> dict[str, object]:
    """Pack a hard-linked copy of a dump in a new process."""
    copy, out = folder / "copy", folder / "out"
    shutil.copytree(dump, copy, copy_function=os.link)
    size = sum(file.stat().st_size for file in copy.iterdir())
    words = [sys.executable, "-c", PACK, copy / "manifest.json", out, str(threads)]
    rows, peak = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    for used in (copy, out):
        shutil.rmtree(used)
    row = {"commit": commit(), "dump": name, "dump_bytes": size, "tokens": rows, "threads": threads}
    row["peak_rss_mib"] = round(float(peak))
    print(*row.values(), flush=True)
    return row


def main() -> None:
    """Make the dumps, pack them, remove them, append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder on a disk with 10 GB free; a temporary one by default")
    arguments = parser.parse_args()
    rows = []
    for make in (wide, long):
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            make(Path(folder) / "dump")
            threads = (1, 4)
            rows += [measure(make.__name__, Path(folder) / "dump", count, Path(folder)) for count in threads]
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
