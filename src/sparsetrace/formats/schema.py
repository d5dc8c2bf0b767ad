"""The data files of a workload: their paths, the size of their row groups, and their Arrow schema, never inferred.

docs/format.md is the specification.
"""

from functools import cache
from typing import Final

import numpy as np
import pyarrow as pa

from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.versions import LAYER_FILE_VERSION, MODEL_FILE_VERSION

# Target size of a row group, in inputs (rows x width), and the limits of its rows. Reading a single row costs a whole
# row group: 3 ms at every width from 128 to 4,096. Twice the inputs or rows would save 0.1 % of bytes and take 5 ms.
ROW_GROUP_INPUTS: Final = 1 << 21
ROW_GROUP_ROWS: Final = (512, 8192)
# How a row's operand is written: bitmask and byte planes, or plain lists.
ENCODINGS: Final = ("split", "open")
# How much of an operand is captured: everything, its mask and row statistics, or the row statistics alone.
LEVELS: Final = ("full", "masks", "stats")
# Columns with statistics: index and row statistics. On masks and planes they would take space and select nothing.
INDEXED: Final = ("layer", "matrix", "token", "sequence", "position", "nnz", "absmax", "l2")


def row_group_rows(features: int) -> int:
    """Rows of a full row group, a power of two; more for a narrow matrix, since each row group has a fixed cost.

    Args:
        features: inputs of the matrix.
    """
    fewest, most = ROW_GROUP_ROWS
    rows: int = 1 << max(1, ROW_GROUP_INPUTS // features).bit_length() - 1
    return min(max(rows, fewest), most)


def index_type(features: int) -> np.dtype:
    """Integer type of an input's index in the open encoding."""
    return np.dtype(np.uint16 if features <= 1 << 16 else np.uint32)


@cache
def data_schema(
    dtype: str, encoding: str = "split", level: str = "full", features: int = 1, in_layer: bool = True
) -> pa.Schema:
    """Schema of a data file, `data/L07/q/part-00003.parquet` or `data/model/lm_head/part-00003.parquet`.

    Args:
        dtype: of the operands.
        encoding: one of `ENCODINGS`.
        level: one of `LEVELS`.
        features: inputs of the matrix; they decide the width of an index in the open encoding.
        in_layer: whether the matrix belongs to a layer; the column `layer` of one that does not is null.
    """
    number = FORMATS[dtype]
    recipe = "pattern = sum(plane[i] << 8*i)"
    if number.rotate_left:
        recipe += f", rotated right by {number.rotate_left} bit within {8 * number.bits.itemsize} bits"
    plane = {"decode": f"{recipe}; a {dtype} each, in the order of the mask's set bits"}
    mask = {"decode": "bit j of byte i is input 8*i + j (numpy.unpackbits bitorder='little')"}
    fields = [
        pa.field("layer", pa.int16(), nullable=not in_layer),
        pa.field("matrix", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("token", pa.int64(), nullable=False),
        pa.field("sequence", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("expert", pa.int16()),
        pa.field("nnz", pa.int32(), nullable=False),
        pa.field("absmax", pa.float32(), nullable=False),
        pa.field("l2", pa.float32(), nullable=False),
    ]
    version = LAYER_FILE_VERSION if in_layer else MODEL_FILE_VERSION
    metadata = {"sparsetrace_version": str(version), "dtype": dtype}
    if level != "stats" and encoding == "split":
        fields += [pa.field("mask", pa.binary(), nullable=False, metadata=mask)]
        fields += [pa.field("out_mask", pa.binary(), metadata=mask)]
        if level == "full":
            fields += [pa.field(name, pa.binary(), nullable=False, metadata=plane) for name in number.planes]
    elif level != "stats":
        index = pa.field("element", pa.from_numpy_dtype(index_type(features)), nullable=False)
        value = pa.field("element", pa.from_numpy_dtype(number.float_type), nullable=False)
        fields += [pa.field("indices", pa.list_(index), nullable=False)]
        fields += [pa.field("out_mask", pa.binary(), metadata=mask)]
        if level == "full":
            fields += [pa.field("values", pa.list_(value), nullable=False)]
        metadata |= {"encoding": encoding}
    if level != "full":
        metadata |= {"level": level}
    return pa.schema(fields, metadata=metadata)


def column_encodings(schema: pa.Schema) -> dict[str, str]:
    """Parquet encoding of each column of `data_schema`; columns not named are PLAIN, and `matrix` is a dictionary.

    Delta encoding stores lengths and ascending integers in two bytes a row instead of twenty. Splitting absmax and l2
    into byte streams saves two thirds of a byte a row, since their exponents hardly vary.
    """
    encodings = dict.fromkeys(("layer", "token", "sequence", "position", "expert", "nnz"), "DELTA_BINARY_PACKED")
    encodings |= dict.fromkeys(("absmax", "l2"), "BYTE_STREAM_SPLIT")
    for field in schema:
        if pa.types.is_binary(field.type):
            encodings[field.name] = "DELTA_LENGTH_BYTE_ARRAY"
    if "indices" in schema.names:
        encodings["indices.list.element"] = "DELTA_BINARY_PACKED"
    return encodings


def leaf(layer: int | None, matrix: str) -> str:
    """Folder of a matrix below `data/`; no `key=value`, which `pyarrow.parquet.read_table` takes for a column."""
    return f"model/{matrix}" if layer is None else f"L{layer:02d}/{matrix}"


def part_name(shard: int, cut: int | None = None) -> str:
    """File name of one shard's rows, or of one cut of a long shard's; names sort in the order of the tokens."""
    return f"part-{shard:05d}.parquet" if cut is None else f"part-{shard:05d}-{cut:03d}.parquet"
