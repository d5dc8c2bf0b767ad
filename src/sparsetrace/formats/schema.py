"""Words, number formats and Arrow schemas that every part shares; imports no torch.

The workload format is specified in docs/format.md; the schemas here are its constants, never inferred from data.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import pyarrow as pa

from sparsetrace.core.files import InputError
from sparsetrace.formats.names import MATRICES as MATRICES
from sparsetrace.formats.names import SITE_OF as SITE_OF
from sparsetrace.formats.names import SITES as SITES
from sparsetrace.formats.names import Parts as Parts

PHASES: Final = ("prefill", "decode", "forced")

# Written into a workload's manifest. A revision is a change within a version that has not been released yet; a reader
# refuses what it does not know by both.
WORKLOAD_VERSION: Final = 2
WORKLOAD_REVISION: Final = 0
# (version, revision) of the workloads that can be read; version 1 had no revisions.
READABLE_WORKLOADS: Final = ((1, 0), (2, 0))
# Version of the format that first described a data file: files of matrices within layers have not changed since 1.
LAYER_FILE_VERSION: Final = 1
MODEL_FILE_VERSION: Final = 2
DUMP_VERSION: Final = 3
MODEL_VERSION: Final = 2
# A row group: inputs (rows x width) that it is made to hold, and the fewest and most rows that it may have. To read one
# row costs its row group: 3 ms at every width from 128 to 4,096; twice as many inputs or rows, 5 ms for 0.1 % of bytes.
ROW_GROUP_INPUTS: Final = 1 << 21
ROW_GROUP_ROWS: Final = (512, 8192)
# How a row's operand is written: bitmask and byte planes, or plain lists.
ENCODINGS: Final = ("split", "open")
# How much of an operand is captured: all, its mask and row figures, or the row figures alone.
LEVELS: Final = ("full", "masks", "stats")


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One floating-point format as bit patterns.

    Args:
        name: torch's and Parquet's name for it.
        bits: unsigned integer type of a pattern.
        infinity: pattern of +inf; magnitudes at or above it are Inf or NaN.
        count_shift: calibration counts `magnitude >> count_shift`, 16 bits at most.
        rotate_left: bits by which a pattern is rotated before it is cut into byte planes.
    """

    name: str
    bits: np.dtype
    infinity: int
    count_shift: int
    rotate_left: int

    @property
    def sign(self) -> int:
        """Pattern with only the sign bit set."""
        return int(1 << (8 * self.bits.itemsize - 1))

    @property
    def planes(self) -> tuple[str, ...]:
        """Names of the columns that hold a value's bytes, lowest byte first."""
        return (
            ("values_lo", "values_hi")
            if self.bits.itemsize == 2
            else ("values_b0", "values_b1", "values_b2", "values_b3")
        )

    @property
    def float_type(self) -> np.dtype:
        """In which numpy holds the values exactly: float16 for float16, float32 for bfloat16 and float32."""
        return np.dtype(np.float16 if self.name == "float16" else np.float32)

    def to_float(self, patterns: np.ndarray) -> np.ndarray:
        """Values of bit patterns, exactly, as `float_type`."""
        if self.name == "bfloat16":
            return (patterns.astype(np.uint32) << 16).view(np.float32)
        return patterns.view(self.float_type)

    def magnitudes(self, patterns: np.ndarray) -> np.ndarray:
        """float32 |x| of bit patterns without their signs, exactly.

        numpy widens halves one at a time; shifted, they are floats that are too small by a power of two.
        """
        if self.name == "float16":
            shifted = patterns.astype(np.uint32)
            shifted <<= 13
            widened = shifted.view(np.float32)
            widened *= np.float32(2.0**112)
            return widened
        return self.to_float(patterns)

    def from_float(self, values: np.ndarray) -> np.ndarray:
        """Bit patterns of finite values, rounded to nearest even: the inverse of `to_float` on its own values."""
        if self.name == "bfloat16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(self.bits)
        return np.ascontiguousarray(values, self.float_type).view(self.bits)

    def floor_bits(self, value: float) -> int:
        """Pattern of the largest finite number of the format at or below a value of at least 0."""
        largest = self.infinity - 1
        if value >= float(self.to_float(np.array([largest], self.bits))[0]):
            return largest
        bits = int(self.from_float(np.array([value], np.float32))[0])
        # rounded to nearest, it may lie above
        return bits - (float(self.to_float(np.array([bits], self.bits))[0]) > value)

    def to_planes(self, patterns: np.ndarray) -> list[np.ndarray]:
        """Bytes of each pattern, rotated as the format says: one uint8 array per plane."""
        if self.rotate_left:
            rotated = patterns << self.rotate_left
            rotated |= patterns >> (8 * self.bits.itemsize - self.rotate_left)
            patterns = rotated
        planes = (patterns if i == 0 else patterns >> 8 * i for i in range(self.bits.itemsize))
        return [plane.astype(np.uint8) for plane in planes]

    def from_planes(self, planes: list[np.ndarray]) -> np.ndarray:
        """The inverse of `to_planes`."""
        patterns = planes[-1].astype(self.bits)
        for plane in planes[-2::-1]:
            patterns <<= 8
            patterns |= plane
        if self.rotate_left:
            # in place: new memory costs more than the shift
            wrapped = patterns << (8 * self.bits.itemsize - self.rotate_left)
            patterns >>= self.rotate_left
            patterns |= wrapped
        return patterns


FORMATS: Final = {
    "float16": NumberFormat("float16", np.dtype("<u2"), 0x7C00, count_shift=0, rotate_left=0),
    # Rotated by one, the exponent fills the high byte and the sign joins the mantissa: measured smaller under zstd.
    "bfloat16": NumberFormat("bfloat16", np.dtype("<u2"), 0x7F80, count_shift=0, rotate_left=1),
    "float32": NumberFormat("float32", np.dtype("<u4"), 0x7F80_0000, count_shift=16, rotate_left=0),
}


def mask_bytes(features: int) -> int:
    """Bytes of one row's bitmask."""
    return -(-features // 8)


def row_group_rows(features: int) -> int:
    """Rows of a full row group: the narrower the matrix the more, since a row group costs the same besides its rows.

    Args:
        features: inputs of the matrix.

    Returns:
        A power of two.
    """
    fewest, most = ROW_GROUP_ROWS
    rows: int = 1 << max(1, ROW_GROUP_INPUTS // features).bit_length() - 1
    return min(max(rows, fewest), most)


def index_type(features: int) -> np.dtype:
    """Type of an input's number in the open encoding."""
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
    """Parquet encoding of each column of `data_schema`; a column that is not named is PLAIN, `matrix` a dictionary.

    Lengths and ascending integers as differences: two bytes a row instead of twenty, and bytes that lie together. Row
    figures as byte planes: their exponents hardly vary, which takes two thirds of a byte a row off.
    """
    encodings = dict.fromkeys(("layer", "token", "sequence", "position", "expert", "nnz"), "DELTA_BINARY_PACKED")
    encodings |= dict.fromkeys(("absmax", "l2"), "BYTE_STREAM_SPLIT")
    for field in schema:
        if pa.types.is_binary(field.type):
            encodings[field.name] = "DELTA_LENGTH_BYTE_ARRAY"
    if "indices" in schema.names:
        encodings["indices.list.element"] = "DELTA_BINARY_PACKED"
    return encodings


# Every position fed through the model; rows with equal (group, step) were multiplied together.
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

# One prompt with its continuation. `output_ids` ends with the last sampled token, which is never fed.
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

# What the split hands to generation: a shard is a list of groups, a group a list of sequences.
PROMPTS: Final = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        *(
            SEQUENCES.field(name)
            for name in ("sequence", "base", "group", "slot", "source", "source_index", "prompt", "prompt_ids")
        ),
    ]
)

# One row per layer and matrix: what the method was told, and what calibration predicts.
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

# `calibrated_sparsity` was counted on the calibration text, `achieved_sparsity` on this workload's own rows.
# The layer is null where the matrix belongs to the model as a whole.
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
        # The runtime tensor holds all matrices of the site side by side; this one's columns start at `weight_column`.
        pa.field("weight", pa.string(), nullable=False),
        pa.field("weight_column", pa.int32(), nullable=False),
        pa.field("weight_sha256", pa.string(), nullable=False),
        pa.field("source_weight", pa.string(), nullable=False),
    ]
)


# Masks of a model whose weights a method masked; one row per input, a row group per layer and matrix.
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


def refuse_unknown_format(manifest: dict[str, Any], where: str) -> None:
    """Refuse a workload of a format that this version does not know.

    Args:
        manifest: of the workload.
        where: for the message, `<step>: <place>`.

    Raises:
        InputError: it is no workload, or one of another version or revision.
    """
    if manifest.get("format") != "sparsetrace-workload":
        raise InputError(f"{where} must be a sparsetrace workload, got another manifest.json")
    version, revision = manifest.get("version"), manifest.get("revision", 0)
    if (version, revision) not in READABLE_WORKLOADS:
        known = " or ".join(f"{v} revision {r}" for v, r in READABLE_WORKLOADS)
        raise InputError(
            f"{where} must have format version {known}, got {version} revision {revision}: "
            "install the sparsetrace that knows it"
        )


def leaf(layer: int | None, matrix: str) -> str:
    """Folder of one layer and matrix below `data/`; no `key=value`, which `pyarrow.parquet.read_table` trips over."""
    return f"model/{matrix}" if layer is None else f"L{layer:02d}/{matrix}"


def part_name(shard: int, cut: int | None = None) -> str:
    """File name of one shard's rows, or of one cut of a long shard's; names ascend as the tokens do."""
    return f"part-{shard:05d}.parquet" if cut is None else f"part-{shard:05d}-{cut:03d}.parquet"
