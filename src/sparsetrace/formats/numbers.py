"""Floating-point formats as bit patterns: exact magnitudes, conversions and byte planes."""

from dataclasses import dataclass
from typing import Final

import numpy as np


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One floating-point format as bit patterns.

    Args:
        name: torch's and Parquet's name for it.
        bits: unsigned integer type of a pattern.
        infinity: pattern of +inf; magnitudes at or above it are Inf or NaN.
        count_shift: calibration counts `magnitude >> count_shift`, 16 bits at most.
        rotate_left: bits by which a pattern is rotated before it is split into byte planes.
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
        """numpy type that holds the values exactly: float16 for float16, float32 for bfloat16 and float32."""
        return np.dtype(np.float16 if self.name == "float16" else np.float32)

    def to_float(self, patterns: np.ndarray) -> np.ndarray:
        """Values of bit patterns, exactly, as `float_type`."""
        if self.name == "bfloat16":
            return (patterns.astype(np.uint32) << 16).view(np.float32)
        return patterns.view(self.float_type)

    def magnitudes(self, patterns: np.ndarray) -> np.ndarray:
        """float32 |x| of bit patterns without their signs, exactly.

        Half precision is widened by a shift and a multiplication with a power of two: numpy's own conversion takes one
        value at a time.
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
        """Pattern of the largest finite number of the format that is at most `value`, which must not be negative."""
        largest = self.infinity - 1
        if value >= float(self.to_float(np.array([largest], self.bits))[0]):
            return largest
        bits = int(self.from_float(np.array([value], np.float32))[0])
        # rounding to nearest may have gone up
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
            # in place: allocating costs more than the shift
            wrapped = patterns << (8 * self.bits.itemsize - self.rotate_left)
            patterns >>= self.rotate_left
            patterns |= wrapped
        return patterns


FORMATS: Final = {
    "float16": NumberFormat("float16", np.dtype("<u2"), 0x7C00, count_shift=0, rotate_left=0),
    # Rotated by one bit, the exponent fills the high byte and the sign joins the fraction: zstd compresses that better.
    "bfloat16": NumberFormat("bfloat16", np.dtype("<u2"), 0x7F80, count_shift=0, rotate_left=1),
    "float32": NumberFormat("float32", np.dtype("<u4"), 0x7F80_0000, count_shift=16, rotate_left=0),
}


def mask_bytes(features: int) -> int:
    """Bytes of a bitmask over so many inputs or outputs."""
    return -(-features // 8)
