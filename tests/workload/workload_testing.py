"""Dumps of random operands, written value by value, and the dense operands as the oracle of all that is read."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.formats.dump import block_name, group_name, write_block
from sparsetrace.formats.names import MATRICES, SITE_OF, SITES
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.tables import SEQUENCES, TOKENS
from sparsetrace.formats.versions import DUMP_VERSION
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack

# widths that are no multiple of 8, of 4, of anything
WIDTHS = {"attn_in": 37, "attn_out": 40, "mlp_in": 37, "mlp_mid": 67}
OUTPUTS = {"q": 24, "k": 12, "v": 12, "o": 37, "gate": 67, "up": 67, "down": 37}
LAYERS = 2
# (prompt tokens, decode tokens) of each sequence, by shard and group; the prompt's second half is captured
SHARDS = [[[(5, 6), (4, 3)], [(2, 9)]], [[(6, 2), (6, 4), (3, 5)]]]


@dataclass
class Built:
    """A workload and what it was made from: `dense[layer, matrix]` are bit patterns [T, D], ascending by token."""

    folder: Path
    workload: Path
    dtype: str
    tokens: np.ndarray
    dense: dict
    fed: list
    thresholds: dict

    def values(self, layer, matrix):
        return FORMATS[self.dtype].to_float(self.dense[layer, matrix])


def round_to(x, dtype):
    """float32 values rounded to a format, as bit patterns, by torch."""
    import torch

    rounded = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(getattr(torch, dtype))
    integer = torch.int32 if dtype == "float32" else torch.int16
    return rounded.view(integer).numpy().view(FORMATS[dtype].bits)


def schedule():
    """Rows of `tables.TOKENS` in the order of execution, without token ids and texts; base = 100 * sequence."""
    fed, sequence, group = [], 0, 0
    for shard, groups in enumerate(SHARDS):
        for lengths in groups:
            numbers = range(sequence, sequence + len(lengths))
            for slot, (prompt, _) in enumerate(lengths):
                for position in range(prompt):
                    captured = position >= prompt - prompt // 2
                    fed.append((shard, group, 0, slot, numbers[slot], position, "prefill", captured))
            for step in range(max(decode for _, decode in lengths)):
                for slot, (prompt, decode) in enumerate(lengths):
                    if step < decode:
                        fed.append((shard, group, step + 1, slot, numbers[slot], prompt + step, "decode", True))
            sequence, group = sequence + len(lengths), group + 1
    names = ("shard", "group", "step", "slot", "sequence", "position", "phase", "captured")
    rows = [dict(zip(names, row, strict=True)) for row in fed]
    return [row | {"token": 100 * row["sequence"] + row["position"]} for row in rows]


def write_dump(folder, dtype, seed=0, level="full", matrices=MATRICES, once=False):
    """The dump of every shard under `folder/dump`, and the `Built` without its workload.

    With `once`, what the matrices of a site read is there under the name of the first.
    """
    rng = np.random.default_rng(seed)
    number = FORMATS[dtype]
    fed = schedule()
    captured = [row for row in fed if row["captured"]]
    dense, thresholds = {}, {}
    for layer in range(LAYERS):
        for site in SITES:
            x = rng.standard_t(3, (len(captured), WIDTHS[site])) * rng.lognormal(0, 1, WIDTHS[site])
            # a row that keeps nothing, and one that keeps everything
            x[3], x[4] = 0, 1e3
            patterns = round_to(x, dtype)
            magnitudes = patterns & (number.sign - 1)
            threshold = int(np.sort(magnitudes.reshape(-1))[magnitudes.size // 2])
            patterns = np.where(magnitudes > threshold, patterns, 0).astype(number.bits)
            for matrix in SITES[site]:
                dense[layer, matrix], thresholds[layer, matrix] = patterns, threshold
    table = [
        {
            "layer": layer,
            "matrix": matrix,
            "site": SITE_OF[matrix],
            "held_by": next(m for m in SITES[SITE_OF[matrix]] if m in matrices) if once else matrix,
            "same_input_as": SITES[SITE_OF[matrix]][0] if SITES[SITE_OF[matrix]][0] != matrix else None,
            "in_features": WIDTHS[SITE_OF[matrix]],
            "out_features": OUTPUTS[matrix],
            "dtype": dtype,
            "method": "teal",
            "parameters": json.dumps({"sparsity": 0.5}),
            "threshold": float(number.to_float(np.array([thresholds[layer, matrix]], number.bits))[0]),
            "threshold_bits": thresholds[layer, matrix],
            "target_sparsity": 0.5,
            "calibrated_sparsity": 0.5,
            "weight": f"layers.{layer}.{SITE_OF[matrix]}.weight",
            "weight_column": sum(OUTPUTS[m] for m in SITES[SITE_OF[matrix]][: SITES[SITE_OF[matrix]].index(matrix)]),
            "weight_sha256": "",
            "source_weight": f"model.layers.{layer}.{matrix}",
        }
        for layer in range(LAYERS)
        for matrix in matrices
    ]
    for shard in range(len(SHARDS)):
        _write_shard(folder / "dump" / f"{shard:05d}", shard, fed, captured, dense, table, dtype, level)
    order = np.argsort([row["token"] for row in captured])
    tokens = np.array([captured[i]["token"] for i in order])
    return Built(folder, None, dtype, tokens, {k: v[order] for k, v in dense.items()}, fed, thresholds)


def _write_shard(folder, shard, fed, captured, dense, table, dtype, level):
    folder.mkdir(parents=True)
    groups = sorted({row["group"] for row in fed if row["shard"] == shard})
    rows = 0
    for group in groups:
        mine = [i for i, row in enumerate(captured) if row["group"] == group]
        rows += len(mine)
        # two blocks, cut in the middle of a step
        halves = [mine[: len(mine) // 2 + 1], mine[len(mine) // 2 + 1 :]]
        names = []
        for number, part in enumerate(halves):
            names.append(block_name(group, number))
            write_block(folder / names[-1], _block([captured[i] for i in part], part, dense, table, dtype, level))
        own = [row for row in fed if row["group"] == group]
        columns = {name: [row[name] for row in own] for name in ("token", "sequence", "position", "phase", "captured")}
        columns |= {name: [row[name] for row in own] for name in ("group", "step", "slot")}
        columns |= {"sparsified": columns["captured"], "token_id": [7] * len(own), "text": ["a"] * len(own)}
        arrays = {name: pa.array(columns[name], TOKENS.field(name).type) for name in TOKENS.names}
        stem = folder / group_name(group)
        pq.write_table(pa.table(arrays, schema=TOKENS).sort_by("token"), stem.with_suffix(".tokens.parquet"))
        phases = {s: [row["phase"] for row in own if row["sequence"] == s] for s in {row["sequence"] for row in own}}
        sequences = [
            {
                **{"sequence": s, "base": 100 * s, "group": group, "slot": 0, "source": "test", "source_index": s},
                **{"prompt": "a", "output": "b", "stopped": False, "repeated_4gram_share": 0.0},
                # the last id is never fed
                **{"prompt_ids": [7] * phases[s].count("prefill"), "output_ids": [7] * phases[s].count("decode") + [2]},
            }
            for s in sorted(phases)
        ]
        pq.write_table(pa.Table.from_pylist(sequences, schema=SEQUENCES), stem.with_suffix(".sequences.parquet"))
        stem.with_suffix(".json").write_text(json.dumps({"key": "k", "blocks": names, "rows": len(mine)}))
    manifest = {
        "version": DUMP_VERSION,
        "sparsetrace": "0",
        "model_hash": "0" * 64,
        "label": "teal-0.5",
        "method": "teal",
        "parameters": {"sparsity": 0.5},
        "calibration": {"text_hash": "0"},
        "thresholds": [row["threshold_bits"] for row in table],
        "prompts": f"{shard}",
        "decoding": {"prefill": "half", "temperature": 0.0},
        "batching": {"batch_size": 3},
        "device": "cpu",
        "threads": 1,
        "versions": {"python": "3"},
        "key": f"{shard}",
        "dtype": dtype,
        "source": "made-up",
        "source_hash": "0" * 64,
        "matrices": table,
        "groups": groups,
        "rows": rows,
    }
    if level != "full":
        manifest["capture"] = {"level": level}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _block(rows, places, dense, table, dtype, level):
    number = FORMATS[dtype]
    arrays = {
        "rows.token": np.array([row["token"] for row in rows], np.int64),
        "rows.sequence": np.array([row["sequence"] for row in rows], np.int32),
        "rows.position": np.array([row["position"] for row in rows], np.int32),
    }
    for matrix in (row for row in table if row["held_by"] == row["matrix"]):
        name = f"L{matrix['layer']:02d}.{matrix['matrix']}"
        x = dense[matrix["layer"], matrix["matrix"]][places]
        values = number.to_float(x).astype(np.float64)
        figures = {
            f"{name}.absmax": np.abs(values).max(1, initial=0).astype(np.float32),
            f"{name}.l2": np.sqrt((values**2).sum(1)).astype(np.float32),
        }
        mask = np.packbits(x != 0, axis=1, bitorder="little")
        if level == "full":
            arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum((x != 0).sum(1))]).astype(np.int64)
            arrays[f"{name}.values"] = x[x != 0]
            arrays[f"{name}.mask"] = mask
        elif level == "masks":
            arrays |= {f"{name}.mask": mask} | figures
        else:
            arrays |= {f"{name}.nnz": (x != 0).sum(1).astype(np.int32)} | figures
    return arrays


def pack_all(built, name="workload", **settings):
    """Pack every shard of a dump that stays as it is, and index; returns the workload's folder."""
    import shutil

    copy, parts = built.folder / f"{name}-dump", []
    shutil.copytree(built.folder / "dump", copy)
    for shard in range(len(SHARDS)):
        parts.append(built.folder / f"{name}-parts" / f"{shard:05d}.json")
        pack(copy / f"{shard:05d}" / "manifest.json", built.folder / name, parts[-1], **settings)
    index(parts, built.folder / name)
    return built.folder / name


def build(folder, dtype, level="full", name="workload", once=False, **settings):
    """A whole workload."""
    built = write_dump(folder, dtype, level=level, once=once)
    built.workload = pack_all(built, name, **settings)
    return built
