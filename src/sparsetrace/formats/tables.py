"""Arrow schemas of all tables but the data files, never inferred from data; docs/format.md describes the columns."""

from typing import Final

import pyarrow as pa

from sparsetrace.core.files import sha256_json

PHASES: Final = ("prefill", "decode", "forced")

# Every position that was fed through the model. Rows with equal (group, step) were multiplied together.
TOKENS: Final = pa.schema(
    [
        pa.field("token", pa.int64(), nullable=False),
        pa.field("sequence", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("captured", pa.bool_(), nullable=False),
        pa.field("sparsified", pa.bool_(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
    ]
)

# Prompts and their continuations. `output_ids` ends with the last sampled token, which is never fed.
SEQUENCES: Final = pa.schema(
    [
        pa.field("sequence", pa.int32(), nullable=False),
        pa.field("base", pa.int64(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("output", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("output_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("stopped", pa.bool_(), nullable=False),
        pa.field("repeated_4gram_share", pa.float32(), nullable=False),
    ]
)

# Input of generation, written by the split: a shard is a list of groups, a group a list of sequences.
PROMPTS: Final = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        *(
            SEQUENCES.field(name)
            for name in ("sequence", "base", "group", "slot", "source", "source_index", "prompt", "prompt_ids")
        ),
    ]
)

# What the method is told about each layer and matrix, and what calibration predicts.
THRESHOLDS: Final = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("matrix", pa.string(), nullable=False),
        pa.field("target_sparsity", pa.float64()),
        pa.field("calibrated_sparsity", pa.float64()),
        pa.field("dropped", pa.int64()),
        pa.field("counted", pa.int64()),
        pa.field("threshold", pa.float64()),
        pa.field("threshold_bits", pa.int64()),
    ]
)

# One row per captured matrix, in the order of execution. `calibrated_sparsity` was counted on the calibration text,
# `achieved_sparsity` on the workload's own rows. The layer is null where the matrix belongs to the model as a whole.
MATRIX_TABLE: Final = pa.schema(
    [
        pa.field("layer", pa.int16()),
        pa.field("matrix", pa.string(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("shares_input_with", pa.string()),
        pa.field("in_features", pa.int32(), nullable=False),
        pa.field("out_features", pa.int32(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("parameters", pa.string(), nullable=False),
        pa.field("threshold", pa.float64()),
        pa.field("threshold_bits", pa.int64()),
        pa.field("target_sparsity", pa.float64()),
        pa.field("calibrated_sparsity", pa.float64()),
        pa.field("achieved_sparsity", pa.float64()),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("nnz", pa.int64(), nullable=False),
        # the runtime tensor [in, out] holds all matrices of the site side by side: it has `weight_columns` columns, of
        # which this one's begin at `weight_column`
        pa.field("weight", pa.string(), nullable=False),
        pa.field("weight_column", pa.int32(), nullable=False),
        pa.field("weight_columns", pa.int32(), nullable=False),
        pa.field("weight_sha256", pa.string(), nullable=False),
        pa.field("source_weight", pa.string(), nullable=False),
    ]
)

# Which weights a weight-side method kept: one row per input, a row group per layer and matrix.
WEIGHT_MASKS: Final = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("matrix", pa.string(), nullable=False),
        pa.field("input", pa.int32(), nullable=False, metadata={"orientation": "row of the weight [in, out]"}),
        pa.field("nnz", pa.int32(), nullable=False),
        pa.field(
            "mask",
            pa.binary(),
            nullable=False,
            metadata={"decode": "bit j of byte i is output 8*i + j (numpy.unpackbits bitorder='little')"},
        ),
    ]
)


def teacher_forced_hash(sequences: pa.Table) -> str:
    """Hash of every prompt and the tokens after it: equal in workloads that were fed the same teacher-forced tokens.

    Args:
        sequences: a `SEQUENCES` table.
    """
    columns = ["sequence", "prompt_ids", "output_ids"]
    rows = sequences.select(columns).sort_by("sequence").to_pylist()
    return sha256_json([[row[name] for name in columns] for row in rows])
