"""One tiny model and prompt set, taken through the whole pipeline under different capture settings."""

import json

from click.testing import CliRunner

from sparsetrace.cli import main as cli
from sparsetrace.core.settings import Batching, Capture, Decoding, Machine, PromptSet
from sparsetrace.generation.generate import generate
from sparsetrace.generation.job import Job
from sparsetrace.generation.prompts import split, write_split
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack
from sparsetrace.study.study import parse_study

BATCHING = Batching(max_new_tokens=6, batch_size=3, shards=2)
DECODING = Decoding(prefill="half", ignore_eos=True)
CPU = Machine(device="cpu")
LENGTHS = [3, 9, 4, 5, 7, 2, 6]
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def make_run(tiny, folder):
    """A function that makes a workload under a capture setting; it also holds folder, model and the full workload."""
    rng = tiny.rng("capture levels")
    model = tiny.model(folder, rng)
    table = tiny.thresholds(folder, model, rng)
    prompts = tiny.prompts(folder / "prompts.jsonl", rng, LENGTHS)
    groups, _ = split(prompts, model.tokenizer(), 128, PromptSet(), BATCHING)
    write_split(groups, BATCHING.shards, folder / "split.parquet")

    def make(name, capture=None, **packing):
        parts = []
        for shard in range(BATCHING.shards):
            dump = folder / name / "dump" / f"{shard:05d}" / "manifest.json"
            kept = capture or Capture()
            generate(Job(model, folder / "split.parquet", shard, dump, DECODING, BATCHING, CPU, table, kept))
            parts.append(folder / name / "parts" / f"{shard:05d}.json")
            pack(dump, folder / name / "workload", parts[-1], **packing)
        index(parts, folder / name / "workload")
        return folder / name / "workload"

    make.folder, make.model = folder, model
    make.full = make("full")
    return make


def study(run, tmp_path, **changes):
    """A study of the run's model and prompts, and its file."""
    content = {
        "results": str(tmp_path / "results"),
        "models": {"tiny": {"checkpoint": str(run.folder / "checkpoint"), "calibration_text": "x.txt"}},
        "runs": {
            "one": {
                "prompts": str(run.folder / "prompts.jsonl"),
                "batching": BATCHING.model_dump(),
                "decoding": DECODING.model_dump(),
                "methods": [{"name": "teal", "sparsity": 0.5}],
                **changes,
            }
        },
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    return parse_study(content, "study"), path


def invoke(*words):
    """Exit status and output of a command."""
    result = CliRunner().invoke(cli.cli, [str(word) for word in words])
    return result.exit_code, result.output
