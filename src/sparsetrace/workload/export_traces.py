"""Export as memory traces of the weight rows that a product x W must read if it skips dropped inputs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.workload.export_operands import Operands

# Addresses are computed as int64, so that those of a trace must lie below.
ADDRESSES = 1 << 63
# Lines of a trace formatted at once.
TRACE_LINES = 1 << 16


def refuse_layout(operands: Operands) -> None:
    """Refuse a layout whose rows overlap, or whose addresses are too large.

    Raises:
        InputError: names what does not fit.
    """
    layout, row_bytes = operands.layout, operands.row_bytes
    if layout.stride is not None and layout.stride < row_bytes:
        raise InputError(f"export: stride must be at least the {row_bytes} bytes of a row, got {layout.stride}")
    if layout.base + operands.features * (layout.stride or row_bytes) + layout.line > ADDRESSES:
        raise InputError(f"export: base must leave the weight below address {ADDRESSES:#x}, got {layout.base:#x}")


def _bundles(operands: Operands) -> Iterator[np.ndarray]:
    """int64: bundles of weight rows that the tokens of each block touch, token by token, each once a token."""
    for rows in operands.blocks(values=False):
        bundle = rows.indices().astype(np.int64) // operands.layout.bundle
        token = np.repeat(np.arange(len(rows)), rows.nnz)
        # inputs ascend within a token, so equal bundles are neighbours
        new = np.ones(len(bundle), bool)
        new[1:] = (np.diff(bundle) != 0) | (np.diff(token) != 0)
        yield bundle[new]


def _span(operands: Operands, bundle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte and length of each bundle; the last bundle of the weight may hold fewer rows."""
    stride = operands.row_bytes if operands.layout.stride is None else operands.layout.stride
    first = bundle * operands.layout.bundle
    last = np.minimum(first + operands.layout.bundle, operands.features) - 1
    return operands.layout.base + first * stride, (last - first) * stride + operands.row_bytes


def _lines(operands: Operands) -> Iterator[np.ndarray]:
    """int64: addresses of the lines that are read, in order, aligned to the line."""
    line = operands.layout.line
    for bundle in _bundles(operands):
        address, length = _span(operands, bundle)
        first, last = address // line, (address + length - 1) // line
        counts = last - first + 1
        ends = np.cumsum(counts)
        for start, stop in _pieces(ends):
            some = counts[start:stop]
            within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
            yield (np.repeat(first[start:stop], some) + within) * line


def _pieces(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive bundles that make `TRACE_LINES` lines at most, or one bundle.

    Args:
        ends: int64, lines up to the end of each bundle.
    """
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + TRACE_LINES, side="right")))
        yield start, stop
        start = stop


def write_ramulator(operands: Operands, path: Path) -> None:
    """A load of each line that is read."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        for addresses in _lines(operands):
            file.write("".join(f"LD 0x{address:x}\n" for address in addresses.tolist()))


def write_dramsim3(operands: Operands, path: Path) -> None:
    """A read of each line, with the cycle at which it is issued."""
    cycle = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        for addresses in _lines(operands):
            times = range(cycle, cycle + len(addresses) * operands.layout.cycles, operands.layout.cycles or 1)
            stamped = times if operands.layout.cycles else [0] * len(addresses)
            file.write("".join(f"0x{a:x} READ {t}\n" for a, t in zip(addresses.tolist(), stamped, strict=True)))
            cycle += len(addresses) * operands.layout.cycles


def write_libcachesim(operands: Operands, path: Path) -> None:
    """A request for each bundle of weight rows that a token touches."""
    time = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write("time,object,size\n")
        for rows in _bundles(operands):
            _, size = _span(operands, rows)
            lines = zip(range(time, time + len(rows)), rows.tolist(), size.tolist(), strict=True)
            file.write("".join(f"{at},{name},{length}\n" for at, name, length in lines))
            time += len(rows)
