"""Which safetensors files of a Hugging Face folder hold its weights, and in what number format; without torch.

safetensors is imported only where a file is opened: the study names its files where it is not installed.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from sparsetrace.core.files import InputError, read_json
from sparsetrace.formats.dtypes import STORED_DTYPES

WHOLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that transformers loads: the whole file where there is one, whatever an index says, else its shards.

    Returns:
        Their paths, which need not exist; the index's map from tensor to file name, None where no index is used.

    Raises:
        InputError: the index is no map from tensors to names of files in the folder.
    """
    index = folder / INDEX
    if (folder / WHOLE_FILE).is_file() or not index.is_file():
        return [folder / WHOLE_FILE], None
    weight_map = read_json(index, "convert").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"convert: {index}: weight_map must be an object that names files, got {weight_map!r:.80}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise InputError(f"convert: {index}: weight_map must name files of its folder, got {name!r}")
    return sorted({folder / name for name in weight_map.values()}), weight_map


def open_weights(file: Path, framework: str) -> Any:
    """Open a safetensors file.

    Raises:
        InputError: it is missing or broken.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(f"convert: {file} must be a safetensors file, got nothing there")
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise InputError(f"convert: {file} must be a whole safetensors file, got {error}") from None


def stored_dtype(folder: Path) -> str:
    """The one number format in which a checkpoint's tensors are stored.

    Raises:
        InputError: there are several, or the decoder has none of that format.
    """
    counts: Counter[str] = Counter()
    for file in weight_files(folder)[0]:
        opened = open_weights(file, "np")
        # rotary buffers were once saved, in float32 whatever the weights were
        names = [name for name in opened.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
        counts.update(opened.get_slice(name).get_dtype() for name in names)
    if len(counts) != 1 or not set(counts) <= set(STORED_DTYPES):
        found = " and ".join(f"{count} of {name}" for name, count in counts.most_common()) or "none"
        raise InputError(
            f"convert: {folder}: tensors must be of one type, one of {', '.join(STORED_DTYPES)}, where config.json "
            f"names no dtype, got {found}: choose a dtype"
        )
    return STORED_DTYPES[counts.most_common()[0][0]]
