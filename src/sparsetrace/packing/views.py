"""views.sql: DuckDB views and macros of a workload."""

from sparsetrace.formats.numbers import FORMATS


def duckdb_views(dtype: str, encoding: str = "split", level: str = "full", share_inputs: bool = False) -> str:
    """Text of views.sql, which is run with the workload folder as the working directory or as `file_search_path`.

    Args:
        dtype: number format of the operands.
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
    """SQL that decodes the value planes exactly: from the sign, exponent and fraction of value i."""
    planes = FORMATS[dtype].planes
    byte = [f"byte_at(hex({plane}), i)" for plane in planes]
    if dtype == "float16":
        sign, exponent = f"({byte[1]} >> 7)", f"(({byte[1]} >> 2) & 31)"
        fraction, width, smallest = f"(({byte[1]} & 3) * 256 + {byte[0]})", 10, 24
    elif dtype == "bfloat16":
        # rotated left by one bit: the exponent fills the high byte, and the sign is the lowest bit
        sign, exponent = f"({byte[0]} & 1)", byte[1]
        fraction, width, smallest = f"({byte[0]} >> 1)", 7, 133
    else:
        sign, exponent = f"({byte[3]} >> 7)", f"(({byte[3]} & 127) * 2 + ({byte[2]} >> 7))"
        fraction = f"(({byte[2]} & 127) * 65536 + {byte[1]} * 256 + {byte[0]})"
        width, smallest = 23, 149
    return f"""\
-- {dtype} values of a row, in the order of kept_inputs(mask)
CREATE OR REPLACE MACRO row_values({", ".join(planes)}) AS list_transform(
    range(octet_length({planes[0]})),
    lambda i: ((1 - 2 * {sign})
        * ({fraction} + CASE WHEN {exponent} = 0 THEN 0 ELSE {1 << width} END)
        * pow(2, greatest({exponent}, 1) - {smallest + 1}))::FLOAT);
"""


_VIEWS = """\
-- DuckDB views of a sparsetrace workload. Files are found below the working directory; to work in another folder,
-- first name the folder of this file: SET file_search_path = '/path/to/workload';
CREATE OR REPLACE VIEW tokens AS SELECT * FROM read_parquet('tokens.parquet');
CREATE OR REPLACE VIEW sequences AS SELECT * FROM read_parquet('sequences.parquet');
CREATE OR REPLACE VIEW matrices AS SELECT * FROM read_parquet('matrices.parquet');
{data}
-- counted sparsity by layer and matrix; the layer is null for matrices of the model as a whole
CREATE OR REPLACE VIEW sparsity AS
SELECT d.layer, d.matrix, count(*) AS rows, 1 - avg(d.nnz / m.in_features) AS sparsity
FROM data d JOIN matrices m ON m.layer IS NOT DISTINCT FROM d.layer AND m.matrix = d.matrix
GROUP BY ALL ORDER BY ALL;
"""

_STORED = "CREATE OR REPLACE VIEW data AS SELECT * FROM read_parquet('data/*/*/*.parquet');"

_SHARED = """\
CREATE OR REPLACE VIEW stored AS SELECT * FROM read_parquet('data/*/*/*.parquet');
-- matrices that read the same masked input are stored once; here each has its rows
CREATE OR REPLACE VIEW data AS
SELECT s.* REPLACE (m.matrix AS matrix)
FROM stored s JOIN matrices m
ON m.layer IS NOT DISTINCT FROM s.layer AND coalesce(m.shares_input_with, m.matrix) = s.matrix;"""

_MASKS = """\
-- A mask holds one bit per input, the lowest bit of each byte first; DuckDB's BIT counts from the highest.
CREATE OR REPLACE MACRO kept(mask, input) AS get_bit(mask::BIT, (8 * (input // 8) + 7 - input % 8)::INTEGER);
-- indices of the kept inputs, ascending
CREATE OR REPLACE MACRO kept_inputs(mask) AS
list_filter(range(8 * octet_length(mask)), lambda i: kept(mask, i) = 1);
-- number of inputs that both of two rows keep, and its share of those that either keeps
CREATE OR REPLACE MACRO overlap(mask_a, mask_b) AS bit_count(mask_a::BIT & mask_b::BIT);
CREATE OR REPLACE MACRO jaccard(mask_a, mask_b) AS
bit_count(mask_a::BIT & mask_b::BIT) / bit_count(mask_a::BIT | mask_b::BIT);
-- byte i, from 0, of a string of hexadecimal digits
CREATE OR REPLACE MACRO byte_at(digits, i) AS ('0x' || substr(digits, 2 * i + 1, 2))::BIGINT;
"""
