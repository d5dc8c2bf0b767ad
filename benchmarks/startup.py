"""Time from the start of `sparsetrace dense-tokens` to its second token, for one prompt at batch 1.

    PYTHONPATH=src:kernels python benchmarks/startup.py results/llama/model

The first run compiles every kernel, into a folder of its own, and may find weights on the disk alone; the runs after it
find both in caches. Appends to `results/startup.csv`, seconds each:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| model, gb | name and size of the weights |
| run | `cold` or `warm` |
| second_token | from the start of the process until the model has chosen its second token: the sum of the next seven |
| interpreter | Python, and the command line's own modules |
| claim | a GPU for this process alone |
| imports | torch, and the modules of the step |
| prepare | prompts, the driver's context |
| load | weights to the GPU |
| engine | memory of the engine |
| tokens | the prompt and two tokens; where it is cold, kernels are compiled |
| end | files, and the end of the process |
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from record import WHERE, append, environment, where

RESULTS = Path(__file__).parent / "results" / "startup.csv"
PHASES = ("interpreter", "claim", "imports", "prepare", "load", "engine", "tokens")
COLUMNS = (*WHERE, "model", "gb", "run", "second_token", *PHASES, "end")


def run_marked(out: Path, words: list[str]) -> None:
    """Run the command line in this process, and write when each phase ended, on the system's monotonic clock."""
    from sparsetrace.cli import gpu
    from sparsetrace.cli import main as cli

    ends: dict[str, float] = {"interpreter": time.monotonic()}

    def mark(name: str) -> None:
        ends[name] = time.monotonic()
        out.write_text(json.dumps(ends))

    def marked(function: Callable[..., Any], before: str | None, after: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                mark(before)
            result = function(*args, **kwargs)
            mark(after)
            return result

        return run

    claimed = gpu.claimed

    @contextmanager
    def marked_claim(*args: Any) -> Iterator[str | None]:
        with claimed(*args) as device:
            mark("claim")
            # as the command does next: torch must see the claimed device alone
            from sparsetrace.generation.engine import Engine
            from sparsetrace.model.runtime import RuntimeModel

            mark("imports")
            RuntimeModel.load = marked(RuntimeModel.load, "prepare", "load")
            Engine.__init__ = marked(Engine.__init__, None, "engine")
            Engine.run = marked(Engine.run, None, "tokens")
            yield device

    gpu.claimed = marked_claim
    sys.argv[1:] = words
    cli.main()


def measure(words: list[str], marks: Path, caches: Path) -> dict[str, float]:
    """Seconds of each phase of one run of the command."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--marks", str(marks), "--", *words]
    subprocess.run(command, check=True, env=environment() | {"TRITON_CACHE_DIR": str(caches)})
    ended = time.monotonic()
    ends = json.loads(marks.read_text())
    edges = [began, *(ends[phase] for phase in PHASES), ended]
    seconds = {name: to - since for name, (since, to) in zip((*PHASES, "end"), pairwise(edges), strict=True)}
    return {"second_token": ends[PHASES[-1]] - began, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a converted model")
    parser.add_argument("--warm", type=int, default=2, help="runs after the cold one")
    parser.add_argument("--kernels", type=Path, help="Triton's cache of an earlier run, which stands for the cold one")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    source = json.loads((arguments.model / "config.json").read_text())["source"]
    size = sum(path.stat().st_size for path in arguments.model.glob("*.safetensors"))
    row = where() | {"model": source, "gb": f"{size / 1e9:.2f}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts, split = folder / "prompts.jsonl", folder / "split.parquet"
        prompts.write_text('{"prompt": "Once upon a time"}\n')
        batching = ["--batch-size", "1", "--max-new-tokens", "2"]
        split_words = ["split", str(arguments.model), "--prompts", str(prompts), "--out", str(split), *batching]
        subprocess.run([sys.executable, "-m", "sparsetrace", *split_words], check=True, env=environment())
        kernels = arguments.kernels or folder / "kernels"
        for number in range(1 if arguments.kernels else 0, 1 + arguments.warm):
            out = folder / str(number) / "manifest.json"
            words = ["dense-tokens", str(arguments.model), "--prompts", str(split), "--out", str(out), *batching]
            seconds = measure(words, folder / "marks.json", kernels)
            run = "warm" if number else "cold"
            append(arguments.csv, COLUMNS, [row | {"run": run} | {k: f"{v:.2f}" for k, v in seconds.items()}])
            print(run, *(f"{name} {value:.2f}" for name, value in seconds.items()), flush=True)


if __name__ == "__main__":
    # what `measure` starts
    if sys.argv[1:2] == ["--marks"]:
        run_marked(Path(sys.argv[2]), sys.argv[4:])
    else:
        main()
