"""Step 1: a Hugging Face checkpoint becomes a runtime model.

| file | what |
|---|---|
| `config.json` | version, architecture, sites, tensors with file, shape and hashes, hash of the source; written last |
| `weights-00000.safetensors`, ... | `layers.N.<site>.weight` [in, out], the site's matrices side by side; the rest |
| `tokenizer.json` | the checkpoint's tokenizer as transformers applies it; the files it came from lie beside it |
"""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrace.core.files import (
    InputError,
    read_json,
    refuse_unexpected_files,
    sha256_file,
    sha256_json,
    write_folder_beside,
    write_json,
)
from sparsetrace.core.settings import Conversion
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.formats.sites import Site
from sparsetrace.formats.versions import MODEL_VERSION
from sparsetrace.model.checkpoint import Checkpoint
from sparsetrace.model.families.base import RuntimeTensor
from sparsetrace.model.read_config import read_config
from sparsetrace.model.read_tokenizer import begin_token, build, read_tokenizer
from sparsetrace.model.runtime import RuntimeModel, open_model
from sparsetrace.model.tokenizer import COMPANION_FILES, TOKENIZER_FILES, Tokenizer
from sparsetrace.model.write_weights import write_weights

OUTPUT_FILES = ("config.json", "weights-*.safetensors", *TOKENIZER_FILES, *COMPANION_FILES)


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """A checkpoint whose description, tokenizer and tensor names have been checked; no tensor has been read.

    Args:
        config: architecture, in the dtype that the model will have.
        sites: of the model.
        tokenizer: of the checkpoint.
        eos: ids that end a sequence.
        tensors: of the runtime model.
        source: the weights.
    """

    config: ModelConfig
    sites: tuple[Site, ...]
    tokenizer: Tokenizer
    eos: frozenset[int]
    tensors: list[RuntimeTensor]
    source: Checkpoint


def open_checkpoint(checkpoint: Path, conversion: Conversion) -> OpenedCheckpoint:
    """Check what can be known of a checkpoint without reading its weights.

    Raises:
        InputError: names what is missing, unexpected or not supported.
    """
    raw = read_json(checkpoint / "config.json", "convert")
    family, config = read_config(raw, conversion, checkpoint)
    applied = read_tokenizer(checkpoint, family.model_type)
    # config.json's is for generation without a prompt, and often none that the tokenizer puts before a text
    bos = begin_token(applied, checkpoint)
    if not _is_id(raw.get("bos_token_id", 0)) and raw["bos_token_id"] is not None:
        raise InputError(f"convert: {checkpoint}: bos_token_id must be an integer, got {raw['bos_token_id']!r}")
    eos = _end_tokens(checkpoint, raw)
    source = Checkpoint(checkpoint)
    spare = set()
    if config.tie_word_embeddings:
        # a checkpoint may hold the one table under either name, or under both
        spare = {family.embedding, family.head}
        if spare <= set(source.shapes):
            shape = [config.vocab_size, config.hidden_size]
            source.refuse_other_values(family.embedding, family.head, shape, config.torch_dtype)
        if family.embedding not in source:
            family = dataclasses.replace(family, embedding=family.head)
    tensors = list(family.tensors(config))
    source.refuse_unexpected({name for tensor in tensors for name in tensor.sources}, spare)
    tokenizer = Tokenizer(applied, config.vocab_size, bos)
    return OpenedCheckpoint(config, tuple(family.sites(config)), tokenizer, eos, tensors, source)


def convert(
    checkpoint: Path,
    out: Path,
    conversion: Conversion,
    report: Callable[[int, int, str], None] | None = None,
    name: str | None = None,
) -> RuntimeModel:
    """Convert a checkpoint folder.

    Args:
        checkpoint: Hugging Face folder: config.json, safetensors in one file or shards, tokenizer.
        out: folder of the runtime model; written beside and renamed.
        conversion: dtype and accepted fields.
        report: called with (tensors done, tensors in all, name).
        name: what data sets call the model; the checkpoint's folder name if not given.

    Raises:
        InputError: names what is missing, unexpected, misshapen, not finite or not supported; nothing is left of `out`.
    """
    opened = open_checkpoint(checkpoint, conversion)
    refuse_unexpected_files(out, OUTPUT_FILES, "convert")
    with write_folder_beside(out) as partial:
        entries, source_hash = write_weights(partial, opened.tensors, opened.config.dtype, opened.source, report)
        for file in (*TOKENIZER_FILES, *COMPANION_FILES):
            if (checkpoint / file).is_file():
                shutil.copyfile(checkpoint / file, partial / file)
        applied = partial / "tokenizer.json"
        # the file as it came is kept where it is what is applied
        if not applied.is_file() or build(applied).to_str() != opened.tokenizer.backend.to_str():
            opened.tokenizer.backend.save(str(applied))
        architecture = opened.config.to_json()
        hashes = {file: sha256_file(partial / file) for file in TOKENIZER_FILES if (partial / file).is_file()}
        content = {
            "format": "sparsetrace-model",
            "version": MODEL_VERSION,
            "source": name or _folder_name(checkpoint),
            "source_hash": source_hash,
            "model_hash": sha256_json([architecture, {key: t["sha256"] for key, t in entries.items()}, hashes]),
            "architecture": architecture,
            "sites": [dataclasses.asdict(site) for site in opened.sites],
            "bos": opened.tokenizer.bos,
            "eos": sorted(opened.eos),
            "tokenizer": hashes,
            "tensors": entries,
        }
        write_json(partial / "config.json", content)
    return open_model(out)


def _folder_name(checkpoint: Path) -> str:
    """Name of the folder that the user gave, which may be a link to a folder that is named by a commit."""
    folder = checkpoint.absolute()
    return (folder.resolve() if folder.name == ".." else folder).name


def _end_tokens(checkpoint: Path, raw: dict[str, Any]) -> frozenset[int]:
    """Ids that end a sequence: those of generation_config.json if it names any, else those of config.json."""
    value = raw.get("eos_token_id")
    generation = checkpoint / "generation_config.json"
    if generation.is_file() and (own := read_json(generation, "convert").get("eos_token_id")) is not None:
        value = own
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(map(_is_id, ids)):
        raise InputError(f"convert: {checkpoint}: eos_token_id must be an integer or a list of them, got {value!r}")
    return frozenset(ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
