"""Time from the start of `sparsetrace dense-tokens` to its second token, for one prompt at batch 1.

    python benchmarks/startup.py results/llama/model

The first run compiles kernels and reads the weights from the disk; the second finds both in caches. Appends to
`results/startup.csv`: gpu, torch, triton, commit, model, run (cold or warm), seconds of the whole process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import append, environment, where

RESULTS = Path(__file__).parent / "results" / "startup.csv"
COLUMNS = ("gpu", "torch", "triton", "commit", "model", "run", "seconds")


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "sparsetrace"]
    source = json.loads((arguments.model / "config.json").read_text())["source"]
    with tempfile.TemporaryDirectory() as folder:
        prompts, split = Path(folder) / "prompts.jsonl", Path(folder) / "split.parquet"
        prompts.write_text('{"prompt": "Once upon a time"}\n')
        batching = ["--batch-size", "1", "--max-new-tokens", "2"]
        split_words = ["split", str(arguments.model), "--prompts", str(prompts), "--out", str(split), *batching]
        subprocess.run([*command, *split_words], check=True, env=environment())
        for run in ("cold", "warm"):
            out = Path(folder) / run / "manifest.json"
            words = ["dense-tokens", str(arguments.model), "--prompts", str(split), "--out", str(out), *batching]
            began = time.perf_counter()
            subprocess.run([*command, *words], check=True, env=environment())
            row = {**where(), "model": source, "run": run, "seconds": round(time.perf_counter() - began, 2)}
            append(arguments.csv, COLUMNS, [row])
            print(run, row["seconds"], flush=True)


if __name__ == "__main__":
    main()
