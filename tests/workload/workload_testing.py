"""Dumps of random operands, written value by value, and the dense operands as the oracle of all that is read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrace.formats.dump import array_prefix, block_name, group_name, write_block
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Site
from sparsetrace.formats.tables import SEQUENCES, TOKENS
from sparsetrace.formats.versions import DUMP_VERSION
from sparsetrace.packing.index import index
from sparsetrace.packing.pack import pack

# widths that are no multiple of 8, of 4, of anything
WIDTHS = {"attn_in": 37, "attn_out": 40, "mlp_in": 37, "mlp_mid": 67}
OUTPUTS = {"q": 24, "k": 12, "v": 12, "o": 37, "gate": 67, "up": 67, "down": 37}
LAYERS = 2
SITES = tuple(
    Site(name, layer, matrices, WIDTHS[name], tuple(OUTPUTS[matrix] for matrix in matrices))
    for layer in range(LAYERS)
    for name, matrices in (
        ("attn_in", ("q", "k", "v")),
        ("attn_out", ("o",)),
        ("mlp_in", ("gate", "up")),
        ("mlp_mid", ("down",)),
    )
)
MATRICES = tuple(OUTPUTS)
HEAD = Site("head_in", None, ("lm_head",), 37, (51,))
# (prompt tokens, decode tokens) of each sequence, by shard and group; the prompt's second half is captured
SHARDS = [[[(5, 6), (4, 3)], [(2, 9)]], [[(6, 2), (6, 4), (3, 5)]]]


@dataclass(frozen=True)
class Content:
    """What a dump holds.

    Args:
        dtype: number format.
        level: capture level.
        once: store the operand of a site once, under the name of its first matrix, instead of once for each matrix.
        seed: seed of the operands.
        sites: sites of the model, all of which are captured; no method decides about one without a layer.
        some: for each site that has rows for some tokens only, which, given a row of `schedule`.
        out_masks: layer and name of each matrix that has an output mask.
    """

    dtype: str
    level: str = "full"
    once: bool = False
    seed: int = 0
    sites: tuple[Site, ...] = SITES
    some: dict[tuple[int | None, str], Callable[[dict], bool]] = field(default_factory=dict)
    out_masks: tuple[tuple[int | None, str], ...] = ()


@dataclass
class Built:
    """A workload and what it was made from, everything in ascending order of the tokens.

    Args:
        folder: holds the dump and the workload.
        workload: folder of the workload; None until the dump is packed.
        dtype: number format.
        tokens: all captured tokens.
        dense: bit patterns [T, D] of each layer and matrix.
        fed: rows of `schedule`.
        thresholds: bit pattern of each layer and matrix; None where no method decides.
        tokens_of: tokens of the rows of each layer and matrix.
        out_masks: uint8 [T, ceil(N / 8)] of each layer and matrix that has output masks.
    """

    folder: Path
    workload: Path | None
    dtype: str
    tokens: np.ndarray
    dense: dict
    fed: list
    thresholds: dict
    tokens_of: dict
    out_masks: dict

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


def has_logits(row):
    """Whether the logits of a row of `schedule` are computed: of a prompt only those of its last position are."""
    prompts = [lengths for groups in SHARDS for group in groups for lengths in group]
    return row["phase"] == "decode" or row["position"] == prompts[row["sequence"]][0] - 1


def write_dump(folder, dtype, **content):
    """The dump of every shard under `folder/dump`, as the `Content` says; returns the `Built` without its workload."""
    content = Content(dtype, **content)
    fed = schedule()
    made = _Made(content, [row for row in fed if row["captured"]])
    for shard in range(len(SHARDS)):
        _write_shard(folder / "dump" / f"{shard:05d}", shard, fed, made)
    order = np.argsort([row["token"] for row in made.captured])
    dense, tokens_of, out_masks = {}, {}, {}
    for site in content.sites:
        mine = [i for i in order if made.has_row(site, made.captured[i])]
        for leaf in site.leaves:
            dense[leaf] = made.dense[leaf][mine]
            tokens_of[leaf] = np.array([made.captured[i]["token"] for i in mine], np.int64)
            if leaf in made.out_masks:
                out_masks[leaf] = made.out_masks[leaf][mine]
    tokens = np.array([made.captured[i]["token"] for i in order])
    return Built(folder, None, dtype, tokens, dense, fed, made.thresholds, tokens_of, out_masks)


class _Made:
    """Operands of every site for all captured rows, in the order of execution, even where the site has only some."""

    def __init__(self, content, captured):
        self.content = content
        self.captured = captured
        rng = np.random.default_rng(content.seed)
        number = FORMATS[content.dtype]
        self.dense, self.thresholds, self.out_masks = {}, {}, {}
        for site in content.sites:
            x = rng.standard_t(3, (len(captured), site.in_features)) * rng.lognormal(0, 1, site.in_features)
            # a row that keeps nothing, and one that keeps everything
            x[3], x[4] = 0, 1e3
            patterns, threshold = round_to(x, content.dtype), None
            if site.layer is not None:
                magnitudes = patterns & (number.sign - 1)
                threshold = int(np.sort(magnitudes.reshape(-1))[magnitudes.size // 2])
                patterns = np.where(magnitudes > threshold, patterns, 0).astype(number.bits)
            for leaf in site.leaves:
                self.dense[leaf], self.thresholds[leaf] = patterns, threshold
                if leaf in content.out_masks:
                    dropped = rng.random((len(captured), site.outputs(leaf[1]))) < 0.5
                    self.out_masks[leaf] = np.packbits(dropped, axis=1, bitorder="little")
        self.table = [self._row(site, matrix) for site in content.sites for matrix in site.matrices]

    def has_row(self, site, row):
        """Whether a site has a row for a captured row of the schedule."""
        return site.key not in self.content.some or self.content.some[site.key](row)

    def _row(self, site, matrix):
        number, bits = FORMATS[self.content.dtype], self.thresholds[site.layer, matrix]
        first = site.matrices[0]
        decided = bits is not None
        sparsity = 0.5 if decided else None
        name = "lm_head" if site.layer is None else f"layers.{site.layer}.{site.name}"
        return {
            "layer": site.layer,
            "matrix": matrix,
            "site": site.name,
            "held_by": first if self.content.once else matrix,
            "same_input_as": first if first != matrix else None,
            "in_features": site.in_features,
            "out_features": site.outputs(matrix),
            "dtype": self.content.dtype,
            "method": "teal" if decided else "dense",
            "parameters": json.dumps({"sparsity": 0.5} if decided else {}),
            "threshold": float(number.to_float(np.array([bits], number.bits))[0]) if decided else None,
            "threshold_bits": bits,
            "target_sparsity": sparsity,
            "calibrated_sparsity": sparsity,
            "weight": f"{name}.weight",
            "weight_column": site.columns[matrix].start,
            "weight_columns": site.width,
            "weight_sha256": "",
            "source_weight": f"model.layers.{site.layer}.{matrix}" if decided else "lm_head.weight",
        }


def _write_shard(folder, shard, fed, made):
    folder.mkdir(parents=True)
    groups = sorted({row["group"] for row in fed if row["shard"] == shard})
    rows = 0
    for group in groups:
        mine = [i for i, row in enumerate(made.captured) if row["group"] == group]
        rows += len(mine)
        # two blocks, cut in the middle of a step
        halves = [mine[: len(mine) // 2 + 1], mine[len(mine) // 2 + 1 :]]
        names = []
        for number, half in enumerate(halves):
            names.append(block_name(group, number))
            write_block(folder / names[-1], _block(made, half))
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
        "thresholds": [row["threshold_bits"] for row in made.table],
        "prompts": f"{shard}",
        "decoding": {"prefill": "half", "temperature": 0.0},
        "batching": {"batch_size": 3},
        "device": "cpu",
        "threads": 1,
        "versions": {"python": "3"},
        "key": f"{shard}",
        "dtype": made.content.dtype,
        "source": "made-up",
        "source_hash": "0" * 64,
        "matrices": made.table,
        "groups": groups,
        "rows": rows,
    }
    if made.content.level != "full":
        manifest["capture"] = {"level": made.content.level}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _block(made, numbers):
    """Arrays of a block of some captured rows, by their numbers."""
    rows = [made.captured[i] for i in numbers]
    arrays = {
        "rows.token": np.array([row["token"] for row in rows], np.int64),
        "rows.sequence": np.array([row["sequence"] for row in rows], np.int32),
        "rows.position": np.array([row["position"] for row in rows], np.int32),
    }
    dropped = {}
    for site in made.content.sites:
        places = [place for place, row in enumerate(rows) if made.has_row(site, row)]
        mine = [numbers[place] for place in places]
        for leaf in site.leaves:
            if leaf in made.out_masks:
                dropped[f"{array_prefix(*leaf)}.out_mask"] = made.out_masks[leaf][mine]
        for leaf in site.leaves[:1] if made.content.once else site.leaves:
            if len(places) < len(rows):
                arrays[f"{array_prefix(*leaf)}.rows"] = np.array(places, np.int32)
            arrays |= _operand(array_prefix(*leaf), made.dense[leaf][mine], made.content)
    return arrays | dropped


def _operand(prefix, x, content):
    number = FORMATS[content.dtype]
    values = number.to_float(x).astype(np.float64)
    norms = {
        f"{prefix}.absmax": np.abs(values).max(1, initial=0).astype(np.float32),
        f"{prefix}.l2": np.sqrt((values**2).sum(1)).astype(np.float32),
    }
    mask = np.packbits(x != 0, axis=1, bitorder="little")
    if content.level == "full":
        offsets = np.concatenate([[0], np.cumsum((x != 0).sum(1))]).astype(np.int64)
        return {f"{prefix}.offsets": offsets, f"{prefix}.values": x[x != 0], f"{prefix}.mask": mask}
    if content.level == "masks":
        return {f"{prefix}.mask": mask} | norms
    return {f"{prefix}.nnz": (x != 0).sum(1).astype(np.int32)} | norms


def pack_all(built, name="workload", **settings):
    """Pack every shard of a dump that stays as it is, and index; returns the workload's folder."""
    copy, parts = built.folder / f"{name}-dump", []
    shutil.copytree(built.folder / "dump", copy)
    for shard in range(len(SHARDS)):
        parts.append(built.folder / f"{name}-parts" / f"{shard:05d}.json")
        pack(copy / f"{shard:05d}" / "manifest.json", built.folder / name, parts[-1], **settings)
    index(parts, built.folder / name)
    return built.folder / name


def build(folder, dtype, level="full", name="workload", once=False, **settings):
    """A whole workload; the settings are `pack`'s."""
    built = write_dump(folder, dtype, level=level, once=once)
    built.workload = pack_all(built, name, **settings)
    return built


def tree(folder):
    """Bytes of every file below a folder, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain_rows(path, dtype):
    """Rows of a data file by token, decoded as docs/format.md says in plain Python.

    In place of the operand's columns they have `kept`, the indices of the kept inputs, and `values`, their bit
    patterns; each is None where it was not captured.
    """
    found = {}
    for row in pq.ParquetFile(path).read().to_pylist():
        kept = values = None
        if "mask" in row:
            bits = "".join(f"{byte:08b}"[::-1] for byte in row["mask"])
            kept = [i for i, bit in enumerate(bits) if bit == "1"]
        elif "indices" in row:
            kept = row.pop("indices")
        if planes := [name for name in row if name.startswith("values_")]:
            values = [int.from_bytes(bytes(pieces), "little") for pieces in zip(*map(row.pop, planes), strict=True)]
            if dtype == "bfloat16":
                values = [(value >> 1) | ((value & 1) << 15) for value in values]
        elif "values" in row:
            values = round_to(np.array(row.pop("values"), np.float64), dtype).tolist()
        found[row["token"]] = row | {"kept": kept, "values": values}
    return found


def dense_rows(path, dtype, width):
    """Dense bit patterns [D] by token of a data file in the encoding `split`, decoded as in `plain_rows`."""
    found = {}
    for token, row in plain_rows(path, dtype).items():
        assert len(row["mask"]) == -(-width // 8)
        assert all(i < width for i in row["kept"])
        assert row["nnz"] == len(row["kept"]) == len(row["values"])
        dense = np.zeros(width, FORMATS[dtype].bits)
        dense[row["kept"]] = row["values"]
        found[token] = dense
    return found
