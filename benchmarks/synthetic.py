"""Dumps and workloads of random rows in the shapes of large models, for benchmarks of packing and reading."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.formats.dump import array_prefix, block_name, group_name, write_block
from sparsetrace.formats.numbers import mask_bytes
from sparsetrace.formats.tables import SEQUENCES, TOKENS
from sparsetrace.formats.versions import DUMP_VERSION
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack

# Elements drawn at random for each width; longer dumps repeat them.
DRAWN = 1 << 26


def commit() -> str:
    """Short hash of HEAD, with `+` if files changed or are new since; `+` alone before the first commit."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "--verify", "--quiet", "HEAD") + ("+" if git("status", "--porcelain") else "")


def make_workload(
    folder: Path, leaves: dict[tuple[int, str], int], sequences: int, tokens: int, level: str = "full"
) -> Path:
    """Write a workload below `folder` and return its folder; the other arguments are those of `make_dump`."""
    dump = make_dump(folder / "dump", leaves, sequences, tokens, level)
    pack(dump / "manifest.json", folder / "workload", folder / "00000.json")
    index([folder / "00000.json"], folder / "workload")
    return folder / "workload"


def make_dump(dump: Path, leaves: dict[tuple[int, str], int], sequences: int, tokens: int, level: str = "full") -> Path:
    """Write a float16 dump of one group that was decoded step by step, with half the inputs of each row kept.

    Args:
        dump: folder to write to; returned.
        leaves: number of inputs of each layer and matrix.
        sequences: number of sequences decoded together.
        tokens: number of tokens of each sequence.
        level: `full` or `masks`.
    """
    dump.mkdir(parents=True)
    rng = np.random.default_rng(0)
    block_rows = 2048
    rows = sequences * tokens
    # repeated, but at a distance that is longer than a row group
    distinct = {width: min(-(-rows // block_rows), DRAWN // (width * block_rows)) for width in set(leaves.values())}
    sources = {width: [_rows(rng, block_rows, width) for _ in range(count)] for width, count in distinct.items()}
    names = []
    for start in range(0, rows, block_rows):
        number = np.arange(start, min(start + block_rows, rows))
        step, slot = number // sequences, number % sequences
        arrays = {
            "rows.token": slot * (tokens + 1) + step,
            "rows.sequence": slot.astype(np.int32),
            "rows.position": step.astype(np.int32),
        }
        for (layer, matrix), width in leaves.items():
            offsets, values, mask = sources[width][len(names) % distinct[width]]
            name, count = array_prefix(layer, matrix), len(number)
            if level == "full":
                arrays |= {f"{name}.offsets": offsets[: count + 1], f"{name}.values": values[: offsets[count]]}
            else:
                arrays |= {f"{name}.absmax": np.ones(count, np.float32), f"{name}.l2": np.ones(count, np.float32)}
            arrays[f"{name}.mask"] = mask[:count]
        names.append(block_name(0, len(names)))
        write_block(dump / names[-1], arrays)
    _tables(dump, sequences, tokens)
    (dump / f"{group_name(0)}.json").write_text(json.dumps({"key": "", "blocks": names, "rows": rows}))
    matrices = [_matrix(layer, matrix, width) for (layer, matrix), width in leaves.items()]
    empty = dict.fromkeys(("model_hash", "source", "source_hash", "label", "method", "parameters", "calibration"), "")
    empty |= {"decoding": {}, "batching": {}, "device": "", "threads": 1, "versions": {}}
    manifest = {
        "version": DUMP_VERSION,
        "dtype": "float16",
        "groups": [0],
        "rows": rows,
        "capture": {"level": level},
    } | empty
    (dump / "manifest.json").write_text(json.dumps(manifest | {"matrices": matrices}))
    return dump


def _rows(rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = (rng.standard_t(5, (rows, width)) * rng.lognormal(0, 0.5, width)).astype(np.float16)
    keep = np.abs(x) > np.quantile(np.abs(x[:64]), 0.5)
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return offsets, x[keep].view(np.uint16), np.packbits(keep, axis=1, bitorder="little")


def _tables(dump: Path, sequences: int, tokens: int) -> None:
    position, sequence = np.tile(np.arange(tokens), sequences), np.repeat(np.arange(sequences), tokens)
    zeros, flags = np.zeros(len(position), np.int64), np.ones(len(position), bool)
    columns = {"token": sequence * (tokens + 1) + position, "sequence": sequence, "position": position}
    columns |= {"token_id": zeros, "text": [""] * len(position), "phase": ["decode"] * len(position)}
    columns |= {"captured": flags, "sparsified": flags, "group": zeros, "step": position, "slot": sequence}
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in TOKENS]
    pq.write_table(pa.table(arrays, schema=TOKENS), dump / f"{group_name(0)}.tokens.parquet")
    text = {"source": "", "source_index": 0, "prompt": "", "output": "", "prompt_ids": [], "output_ids": []}
    rows = [
        {"sequence": s, "base": s * (tokens + 1), "group": 0, "slot": s, "stopped": False, "repeated_4gram_share": 0.0}
        | text
        for s in range(sequences)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SEQUENCES), dump / f"{group_name(0)}.sequences.parquet")


def _matrix(layer: int, matrix: str, width: int) -> dict[str, object]:
    assert mask_bytes(width) * 8 == width
    numbers = dict.fromkeys(("threshold", "threshold_bits", "target_sparsity", "calibrated_sparsity"))
    return {
        **{"layer": layer, "matrix": matrix, "held_by": matrix, "site": matrix},
        **{"in_features": width, "out_features": 1},
        **{"dtype": "float16", "method": "", "parameters": "", "weight": "", "weight_column": 0, "weight_columns": 0},
        **{"weight_sha256": "", "source_weight": "", **numbers},
    }
