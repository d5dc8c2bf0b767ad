"""What a workload folder says of itself to people and to SQL: the data card and the DuckDB views."""

import json
from itertools import pairwise
from typing import Any

import pyarrow as pa

from sparsetrace.formats.names import MATRICES
from sparsetrace.formats.numbers import FORMATS


def data_card(manifest: dict[str, Any], matrices: pa.Table) -> str:
    """README.md of a workload, with the front matter that data hubs read."""
    decoding, batching = manifest["decoding"], manifest["batching"]
    rows = {
        "model": f"{manifest['source']} ({manifest['dtype']}, hash `{manifest['model_hash'][:12]}`)",
        "method": f"{manifest['label']} {manifest['parameters'] or ''}".strip(),
        "tokens captured": f"{manifest['tokens']:,}",
        "rows (layer x matrix x token)": f"{manifest['rows']:,}",
        "nonzeros": f"{manifest['nnz']:,}",
        "decoding": ", ".join(f"{key} {value}" for key, value in decoding.items()),
        **({"tokens given": f"hash `{manifest['given'][:12]}`"} if manifest.get("given") else {}),
        "batching": ", ".join(f"{key} {value}" for key, value in batching.items()),
        "captured": ", ".join(f"{key} {value}" for key, value in manifest["capture"].items() if value),
        "written": f"encoding {manifest['encoding']}, shared inputs {'once' if manifest['share_inputs'] else 'each'}",
        "made with": f"sparsetrace {manifest['versions']['sparsetrace']} on {manifest['device']}",
    }
    by_matrix = matrices.group_by("matrix").aggregate(
        [("target_sparsity", "mean"), ("calibrated_sparsity", "mean"), ("achieved_sparsity", "mean")]
    )
    means = {row["matrix"]: row for row in by_matrix.to_pylist()}

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = [
        "---",
        # as JSON, which is YAML: a name may hold what YAML takes for its own, such as a colon
        f"pretty_name: {json.dumps(manifest['source'] + ' ' + manifest['label'], ensure_ascii=False)}",
        "license: other",
        "license_name: that-of-the-model-and-the-prompts",
        f"size_categories: [{_size_category(manifest['rows'])}]",
        "task_categories: [other]",
        "tags: [sparsetrace, activation-sparsity, sparse-workload, parquet]",
        "configs:",
        "- config_name: data",
        "  data_files: data/*/*/*.parquet",
        "  default: true",
        *(
            line
            for table in ("tokens", "sequences", "matrices")
            for line in (f"- config_name: {table}", f"  data_files: {table}.parquet")
        ),
        "---",
        "",
        f"# Sparse workload: {manifest['source']}, {manifest['label']}",
        "",
        "The exact operand of every matrix multiply, for every layer, matrix and captured token, after activation",
        f"sparsification. Format: sparsetrace workload version {manifest['version']}. Read it with",
        "`sparsetrace.open(path)`, or as plain Parquet (`views.sql` for DuckDB).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "Mean sparsity over the layers: what was asked for, what that drops of the calibration text, and what was",
        "counted in this data set.",
        "",
        "| matrix | target | calibrated | achieved |",
        "|---|---|---|---|",
        *(
            f"| {m} | {share(means[m]['target_sparsity_mean'])} | {share(means[m]['calibrated_sparsity_mean'])} "
            f"| {share(means[m]['achieved_sparsity_mean'])} |"
            for m in MATRICES
            if m in means
        ),
        "",
    ]
    return "\n".join(lines)


def _size_category(rows: int) -> str:
    """The class of a row count, in the words of the Hugging Face hub."""
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    bounds += [(10**9, "1B"), (10**10, "10B"), (10**11, "100B"), (10**12, "1T")]
    if rows < bounds[0][0]:
        return "n<1K"
    for (_, low), (high, name) in pairwise(bounds):
        if rows < high:
            return f"{low}<n<{name}"
    return "n>1T"


def duckdb_views(dtype: str, encoding: str = "split", level: str = "full", share_inputs: bool = False) -> str:
    """views.sql: views and macros of a workload; run it with the workload folder as the working directory.

    Args:
        dtype: of the workload.
        encoding: one of `schema.ENCODINGS`.
        level: one of `schema.LEVELS`.
        share_inputs: whether some matrices have no files of their own.
    """
    text = _VIEWS.format(data=_SHARED if share_inputs else _STORED)
    if encoding == "split" and level != "stats":
        text += _MASKS
        if level == "full":
            text += _values_macro(dtype)
    return text


def _values_macro(dtype: str) -> str:
    """SQL that decodes the value planes, exactly: sign, exponent and fraction from the bytes of value i."""
    planes = FORMATS[dtype].planes
    byte = [f"byte_at(hex({plane}), i)" for plane in planes]
    if dtype == "float16":
        sign, exponent = f"({byte[1]} >> 7)", f"(({byte[1]} >> 2) & 31)"
        fraction, width, smallest = f"(({byte[1]} & 3) * 256 + {byte[0]})", 10, 24
    elif dtype == "bfloat16":
        # rotated left by one: the exponent fills the high byte, the sign is the lowest bit
        sign, exponent = f"({byte[0]} & 1)", byte[1]
        fraction, width, smallest = f"({byte[0]} >> 1)", 7, 133
    else:
        sign, exponent = f"({byte[3]} >> 7)", f"(({byte[3]} & 127) * 2 + ({byte[2]} >> 7))"
        fraction = f"(({byte[2]} & 127) * 65536 + {byte[1]} * 256 + {byte[0]})"
        width, smallest = 23, 149
    return f"""\
-- the {dtype} values of a row, in the order of kept_inputs(mask)
CREATE OR REPLACE MACRO row_values({", ".join(planes)}) AS list_transform(
    range(octet_length({planes[0]})),
    lambda i: ((1 - 2 * {sign})
        * ({fraction} + CASE WHEN {exponent} = 0 THEN 0 ELSE {1 << width} END)
        * pow(2, greatest({exponent}, 1) - {smallest + 1}))::FLOAT);
"""


_VIEWS = """\
-- DuckDB views of a sparsetrace workload; run with this folder as the working directory.
CREATE OR REPLACE VIEW tokens AS SELECT * FROM read_parquet('tokens.parquet');
CREATE OR REPLACE VIEW sequences AS SELECT * FROM read_parquet('sequences.parquet');
CREATE OR REPLACE VIEW matrices AS SELECT * FROM read_parquet('matrices.parquet');
{data}
-- sparsity by layer and matrix, counted
CREATE OR REPLACE VIEW sparsity AS
SELECT d.layer, d.matrix, count(*) AS rows, 1 - avg(d.nnz / m.in_features) AS sparsity
FROM data d JOIN matrices m ON m.layer = d.layer AND m.matrix = d.matrix
GROUP BY ALL ORDER BY ALL;
"""

_STORED = "CREATE OR REPLACE VIEW data AS SELECT * FROM read_parquet('data/*/*/*.parquet');"

_SHARED = """\
CREATE OR REPLACE VIEW stored AS SELECT * FROM read_parquet('data/*/*/*.parquet');
-- matrices that read one masked input are stored once; here each has its rows
CREATE OR REPLACE VIEW data AS
SELECT s.* REPLACE (m.matrix AS matrix)
FROM stored s JOIN matrices m ON m.layer = s.layer AND coalesce(m.shares_input_with, m.matrix) = s.matrix;"""

_MASKS = """\
-- The mask holds one bit per input, lowest bit of each byte first; a BIT counts the highest first.
CREATE OR REPLACE MACRO kept(mask, input) AS get_bit(mask::BIT, (8 * (input // 8) + 7 - input % 8)::INTEGER);
-- input numbers of the kept values, ascending
CREATE OR REPLACE MACRO kept_inputs(mask) AS
list_filter(range(8 * octet_length(mask)), lambda i: kept(mask, i) = 1);
-- inputs that two rows both keep, and their share of those that either keeps
CREATE OR REPLACE MACRO overlap(mask_a, mask_b) AS bit_count(mask_a::BIT & mask_b::BIT);
CREATE OR REPLACE MACRO jaccard(mask_a, mask_b) AS
bit_count(mask_a::BIT & mask_b::BIT) / bit_count(mask_a::BIT | mask_b::BIT);
-- byte i, from 0, of hexadecimal digits
CREATE OR REPLACE MACRO byte_at(digits, i) AS ('0x' || substr(digits, 2 * i + 1, 2))::BIGINT;
"""
