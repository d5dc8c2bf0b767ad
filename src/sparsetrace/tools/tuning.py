"""A tuning table for the user's GPU and models: which shapes it covers, and where it is written.

`sparsetrace_kernels.tune` measures, and `sparsetrace_kernels.configs` chooses by the table.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from sparsetrace.core.files import InputError, write_beside
from sparsetrace.formats.architecture import ModelConfig, sites_of
from sparsetrace.formats.sites import layer_sites
from sparsetrace.model.runtime import RuntimeModel
from sparsetrace_kernels import tune as tuner
from sparsetrace_kernels.configs import active_table, table_name

DTYPES = ("float16", "bfloat16")


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (K, N) of each site's multiply; the weights of its matrices lie side by side."""
    return {site.name: (site.in_features, site.width) for site in layer_sites(sites_of(config)) if site.layer == 0}


def parse_shape(text: str) -> tuple[int, int]:
    """Read (K, N) from text such as `4096x11008`, inputs x outputs."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise InputError(f"tune: --shape must be INPUTSxOUTPUTS, such as 4096x11008, got {text}")
    return int(found[1]), int(found[2])


def choose_dtype(models: Iterable[RuntimeModel], asked: str | None) -> str:
    """Choose the type to measure in: `asked`, else that of the first model, else float16.

    One 16-bit type is enough, since a table's entries for one stand in for the other.

    Raises:
        InputError: the first model is in float32, which the kernels do not take, and no dtype was asked for.
    """
    if asked is not None:
        return asked
    for model in models:
        if model.config.dtype not in DTYPES:
            raise InputError(
                f"tune: dtype must be one of {', '.join(DTYPES)}, got {model.config.dtype} of {model.folder}: "
                "convert it to one of them, or give --dtype"
            )
        return model.config.dtype
    return DTYPES[0]


def gpu_name(where: str) -> str:
    """Name of this machine's GPU, as tables hold it.

    Raises:
        InputError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise InputError(f"{where}: a CUDA GPU must be there, got none: run it on the machine that generates")
    return torch.cuda.get_device_name()


def refuse_own_table() -> None:
    """Refuse a table named by `SPARSETRACE_TUNING` that does not fit this machine's GPU.

    Raises:
        InputError: it is not there, is no table, or was measured on another kind of GPU.
    """
    if torch.cuda.is_available():
        try:
            active_table(torch.cuda.get_device_name())
        except ValueError as error:
            raise InputError(str(error)) from None


def tune(
    shapes: Iterable[tuple[int, int]],
    dtype: str,
    out: Path | None,
    folder: Path,
    report: Callable[[int, int, str], None] | None = None,
) -> tuple[Path, int]:
    """Measure configurations of the engine's kernel and write a table, completely or not at all.

    Args:
        shapes: (K, N); each distinct shape is measured once.
        dtype: one of `DTYPES`.
        out: table file; None names it after the GPU, in `folder`.
        folder: of the user's tables.
        report: called with (steps done, steps in all, the last step).

    Returns:
        The file and the number of its entries.

    Raises:
        InputError: no GPU, or no shape.
    """
    gpu = gpu_name("tune")
    distinct = list(dict.fromkeys(shapes))
    if not distinct:
        raise InputError("tune: a model or --shape must be given, got neither")
    path = folder / table_name(gpu) if out is None else out
    # before minutes of measuring, so that a folder that cannot be made fails at once
    path.parent.mkdir(parents=True, exist_ok=True)
    document = tuner.tune(distinct, [getattr(torch, dtype)], report=report)
    with write_beside(path) as partial:
        partial.write_text(tuner.format_table(document), encoding="utf-8")
    return path, len(document["entries"])
