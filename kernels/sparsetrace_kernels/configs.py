"""Choice of a kernel configuration: from a table for the kind of GPU, else by a deterministic heuristic.

The table is the user's own where `SPARSETRACE_TUNING` names one, else the committed one; `table_path` returns which, so
that a manifest can record its hash. Nothing is measured here, so the same table and the same shape give the same
configuration and the same bytes. `tune.tune` measures the engine's kernel, `list`, and makes a table; only the
committed tables have entries of `single`, which benchmarks launch.

Table file (JSON): `{"gpu", "torch", "triton", "entries": [{"op", "dtype", "k", "n", "sparsity", "config", "us"}]}`,
op `single` or `list`, sparsity the fraction dropped, config as `GemvConfig.encode` writes it, us microseconds a call.
"""

# Shape suffixes: K = input features, N = output features.

import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tuning"
# environment variable that names the user's own table, used in place of the committed one
OWN_TABLE = "SPARSETRACE_TUNING"
KERNELS = ("predicated", "compacting", "list")

# the compacting kernel holds a whole chunk in registers
MAX_CHUNK_K = 8192


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How one GEMV is divided among programs: it changes the order of summation and the speed, never a mask."""

    kernel: str  # one of KERNELS
    split: int  # programs along K (predicated: one for each tile, so block_k determines it)
    block_k: int  # weight rows in a tile
    block_n: int  # columns of a program
    num_warps: int
    num_stages: int = 1  # software pipelining depth of the gather
    use_dot: bool = False  # multiply on the tensor cores
    use_pdl: bool = False  # programmatic dependent launch (Hopper and later)

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"GemvConfig: kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        for name in ("block_k", "block_n", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"GemvConfig: {name} must be a power of two, got {value}")
        if self.block_k < 8 or (self.use_dot and (self.block_k < 16 or self.block_n < 16)):
            raise ValueError(
                "GemvConfig: blocks must be at least 8 rows, and 16 x 16 for a dot, "
                f"got {self.block_k} x {self.block_n}"
            )
        if self.block_n < 4 * self.num_warps:
            raise ValueError(
                f"GemvConfig: block_n must be at least 4 a warp, got {self.block_n} for {self.num_warps} warps"
            )
        if self.split < 1 or self.num_stages < 1:
            raise ValueError(
                f"GemvConfig: split and num_stages must be positive, got {self.split} and {self.num_stages}"
            )

    def encode(self) -> str:
        """Write the configuration as one word, which the ops take and tables hold."""
        return ":".join(str(int(v)) if isinstance(v, bool) else str(v) for v in astuple(self))


@functools.cache
def decode_config(text: str) -> GemvConfig:
    """Read what `GemvConfig.encode` wrote."""
    kernel, *numbers = text.split(":")
    if len(numbers) != len(fields(GemvConfig)) - 1 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"decode_config: text must be what GemvConfig.encode writes, got {text!r}")
    *sizes, use_dot, use_pdl = (int(n) for n in numbers)
    return GemvConfig(kernel, *sizes, use_dot=bool(use_dot), use_pdl=bool(use_pdl))


@dataclass(frozen=True)
class TuningTable:
    """A measured table: for (op, dtype, K, N), configurations by sparsity."""

    gpu: str
    entries: dict[tuple[str, str, int, int], dict[float, GemvConfig]]

    @classmethod
    def from_json(cls, text: str) -> "TuningTable":
        """Read a table file's text."""
        document = json.loads(text)
        entries: dict[tuple[str, str, int, int], dict[float, GemvConfig]] = {}
        for row in document["entries"]:
            by_sparsity = entries.setdefault((row["op"], row["dtype"], row["k"], row["n"]), {})
            by_sparsity[float(row["sparsity"])] = decode_config(row["config"])
        return cls(document["gpu"], entries)

    def find(self, op: str, dtype: torch.dtype, K: int, N: int, sparsity: float) -> GemvConfig | None:
        """Look up the nearest sparsity measured for a shape, the lower of two equally near; None for other shapes."""
        name = str(dtype).removeprefix("torch.")
        # both 16-bit types move the same bytes, so one stands in for the other
        for candidate in (name, "float16", "bfloat16"):
            by_sparsity = self.entries.get((op, candidate, K, N))
            if by_sparsity is not None:
                return by_sparsity[min(by_sparsity, key=lambda s: (abs(s - sparsity), s))]
        return None


def table_name(gpu: str) -> str:
    """File name of the table for a kind of GPU, named as by `torch.cuda.get_device_name`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def table_path(gpu: str) -> Path:
    """Path of the table for a kind of GPU: the user's own, else the committed one, which may not exist.

    Raises:
        ValueError: `SPARSETRACE_TUNING` names no file.
    """
    own = os.environ.get(OWN_TABLE)
    if not own:
        return TABLES / table_name(gpu)
    if not Path(own).is_file():
        raise ValueError(f"{OWN_TABLE} must name a table file, got {own}: write one with `sparsetrace tune`")
    return Path(own)


def active_table(gpu: str) -> TuningTable | None:
    """Load the table at `table_path`; None if there is none, so that the heuristic chooses.

    Raises:
        ValueError: the user's own table is not there, is no table, or was measured on another kind of GPU.
    """
    path = table_path(gpu)
    table = _read_table(path) if path.is_file() else None
    if table is not None and os.environ.get(OWN_TABLE) and table.gpu != gpu:
        raise ValueError(f"{OWN_TABLE} must name a table measured on {gpu}, got one of {table.gpu}: {path}")
    return table


def table_for(op: str, gpu: str) -> TuningTable | None:
    """Load the table that chooses for an op; None if the heuristic does.

    `list` takes `active_table`; `single`, which `tune` does not measure, takes the committed table.
    """
    if op != "single":
        return active_table(gpu)
    path = TABLES / table_name(gpu)
    return _read_table(path) if path.is_file() else None


@functools.cache
def _read_table(path: Path) -> TuningTable:
    try:
        return TuningTable.from_json(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a table that `sparsetrace tune` wrote, got {error!r}") from None


def heuristic_config(op: str, K: int, N: int, sparsity: float) -> GemvConfig:
    """Choose from shape and sparsity alone; the limits were measured on an H100."""
    if op == "list":
        if K * N >= 1 << 27:
            return GemvConfig("list", 1, 64, 128, num_warps=4, num_stages=5, use_dot=True)
        # about three programs on each of 132 SMs
        split = max(1, min(8, 400 * 64 // N))
        return GemvConfig("list", split, 32, 64, num_warps=1, num_stages=5)
    # where few rows are kept, loads by predicate cost more than compacting the rows first
    if sparsity >= 0.7:
        block_n = 128 if K * N >= 1 << 25 else 64
        return GemvConfig("compacting", -(-K // 512), 32, block_n, num_warps=1)
    block_n = 64 if K * N >= 1 << 25 else 32
    return GemvConfig("predicated", -(-K // 256), 256, block_n, num_warps=1)


def choose_config(
    op: str, K: int, N: int, dtype: torch.dtype, sparsity: float, table: TuningTable | None = None
) -> GemvConfig:
    """Choose the configuration of a GEMV.

    Args:
        op: `single` (`sparse_gemv`) or `list` (`list_gemv`).
        K: input features.
        N: output features, of all segments together.
        dtype: fp16 or bf16.
        sparsity: expected fraction dropped, in [0, 1]; it affects the speed only.
        table: measured table, such as `table_for` loads; None leaves the choice to the heuristic.

    Returns:
        a configuration, a pure function of the arguments.
    """
    if op not in ("single", "list"):
        raise ValueError(f"choose_config: op must be single or list, got {op!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"choose_config: sparsity must be in [0, 1], got {sparsity}")
    found = table.find(op, dtype, K, N, sparsity) if table is not None else None
    return found if found is not None else heuristic_config(op, K, N, sparsity)


def config_for(op: str, K: int, N: int, dtype: torch.dtype, config: str | None, device: torch.device) -> GemvConfig:
    """Decode an op's `config` argument, or choose for half the inputs dropped where it is None."""
    if device.type == "cuda":
        if config is not None:
            return decode_config(config)
        return choose_config(op, K, N, dtype, 0.5, table_for(op, torch.cuda.get_device_name(device)))
    chosen = decode_config(config) if config is not None else choose_config(op, K, N, dtype, 0.5)
    # Triton 3.7's interpreter has no dependent launch, and multiplies bf16 in tl.dot as integers
    return replace(chosen, use_pdl=False, use_dot=chosen.use_dot and dtype != torch.bfloat16)


def segment_ends(segments: Iterable[int], N: int) -> tuple[int, int]:
    """Return the two inner column bounds that the kernels take; N stands in for a bound that is missing."""
    ends = [*segments][:-1]
    if not ends:
        return N, N
    return ends[0], sum(ends) if len(ends) == 2 else N
