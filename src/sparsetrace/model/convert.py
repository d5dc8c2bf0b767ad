"""Step 1: a Hugging Face checkpoint becomes a runtime model.

| file | what |
|---|---|
| `config.json` | version, architecture, every tensor with file, shape and sha256, hash of the source; written last |
| `weights-00000.safetensors`, ... | `layers.N.<site>.weight` [in, out], the site's matrices side by side; the rest |
| `tokenizer.json` or `tokenizer.model` | copied, with the files that say how it is used |

The layout of the output files is known beforehand, so each tensor goes to its place as soon as it is made, several at a
time; memory holds no more than those.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from threading import local
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsetrace.core.files import (
    InputError,
    read_json,
    refuse_unexpected_files,
    sha256_file,
    sha256_json,
    sync,
    write_folder_beside,
    write_json,
)
from sparsetrace.core.settings import Conversion
from sparsetrace.formats.architecture import ModelConfig, RopeScaling, sites_of
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.formats.sites import Site, layer_sites
from sparsetrace.formats.versions import MODEL_VERSION
from sparsetrace.model.decoder import ACTIVATIONS
from sparsetrace.model.runtime import RuntimeModel, open_model
from sparsetrace.model.tokenizer import COMPANION_FILES, TOKENIZER_FILES, Tokenizer, begin_token

# An output file takes no further tensor when it reaches this.
FILE_BYTES = 1 << 30
# Bounds the memory of the step: of the tensors that are made at a time.
MADE_BYTES = 4 << 30
# Rows of a weight that are checked, cast and transposed at a time: they stay in the cache.
STRIP_ROWS = 256
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

OUTPUT_FILES = ("config.json", "weights-*.safetensors", *TOKENIZER_FILES, *COMPANION_FILES)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# What transformers takes where a config.json lacks the field, and where that is not the same as null.
DEFAULTS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096}}

# Fields that alter the forward pass and may only have these values.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "relu"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "layer_types": (None,),
}
READ_FIELDS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "sliding_window", "tie_word_embeddings", "torch_dtype", "dtype", "bos_token_id"),
    *("eos_token_id", "architectures", "model_type"),
}
# Fields that say nothing about inference in floating point: training, defaults of generation, housekeeping.
HARMLESS_FIELDS = {
    *("_name_or_path", "transformers_version", "initializer_range", "attention_dropout", "use_cache", "pad_token_id"),
    *("pretraining_tp", "max_sequence_length", "return_dict", "output_attentions", "output_hidden_states"),
    *("is_encoder_decoder", "use_bfloat16", "chunk_size_feed_forward", "problem_type", "id2label", "label2id"),
}


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
    raw = read_json(checkpoint / "config.json", "convert")
    config = read_config(raw, conversion, checkpoint)
    generation = checkpoint / "generation_config.json"
    ends = (
        raw
        if not generation.is_file()
        else raw | {k: v for k, v in read_json(generation, "convert").items() if k == "eos_token_id" and v is not None}
    )
    bos = begin_token(checkpoint, raw.get("bos_token_id"))
    eos = _ids(ends.get("eos_token_id"), checkpoint)
    Tokenizer(checkpoint, config.vocab_size, bos)

    source = _Source(checkpoint)
    plan = dict(_plan(config, source))
    source.refuse_unexpected({name for names in plan.values() for name in names}, config)
    refuse_unexpected_files(out, OUTPUT_FILES, "convert")
    with write_folder_beside(out) as partial:
        tensors, source_hash = _write_weights(partial, config, source, plan, report)
        for file in (*TOKENIZER_FILES, *COMPANION_FILES):
            if (checkpoint / file).is_file():
                shutil.copyfile(checkpoint / file, partial / file)
        architecture = dataclasses.asdict(config)
        tokenizer = {file: sha256_file(partial / file) for file in TOKENIZER_FILES if (partial / file).is_file()}
        content = {
            "format": "sparsetrace-model",
            "version": MODEL_VERSION,
            "source": name or checkpoint.resolve().name,
            "source_hash": source_hash,
            "model_hash": sha256_json([architecture, {key: t["sha256"] for key, t in tensors.items()}, tokenizer]),
            "architecture": architecture,
            "sites": [dataclasses.asdict(site) for site in sites_of(config)],
            "bos": bos,
            "eos": sorted(eos),
            "tensors": tensors,
        }
        write_json(partial / "config.json", content)
    return open_model(out)


def read_config(raw: dict[str, Any], conversion: Conversion, checkpoint: Path) -> ModelConfig:
    """Architecture from Hugging Face's config.json.

    Raises:
        InputError: names each field that is missing, unsupported or unknown.
    """
    where = f"convert: {checkpoint / 'config.json'}"
    if raw.get("model_type") not in ARCHITECTURES:
        raise InputError(
            f"{where}: model_type must be one of {', '.join(ARCHITECTURES)}, got {raw.get('model_type')!r}"
        )
    named = raw.get("architectures") or [ARCHITECTURES[raw["model_type"]]]
    if named != [ARCHITECTURES[raw["model_type"]]]:
        raise InputError(f"{where}: architectures must be [{ARCHITECTURES[raw['model_type']]}], got {named}")
    raw = DEFAULTS[raw["model_type"]] | raw
    known = READ_FIELDS | HARMLESS_FIELDS | set(REQUIRED_VALUES) | set(conversion.ignore_fields)
    if unknown := sorted(set(raw) - known):
        raise InputError(
            f"{where}: fields must be ones whose effect is known, got {', '.join(unknown)}: "
            "if they do not alter inference, list them in ignore_fields"
        )
    for name, allowed in REQUIRED_VALUES.items():
        if name in raw and raw[name] not in allowed and name not in conversion.ignore_fields:
            raise InputError(f"{where}: {name} must be {' or '.join(map(repr, allowed))}, got {raw[name]!r}")
    heads = _positive(raw, "num_attention_heads", where)
    hidden = _positive(raw, "hidden_size", where)
    kv_heads = heads if raw.get("num_key_value_heads") is None else _positive(raw, "num_key_value_heads", where)
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}"
        )
    head_dim = hidden // heads if raw.get("head_dim") is None else _positive(raw, "head_dim", where)
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {key: value for key, value in rope.items() if key != "rope_theta"}
    dtype = conversion.dtype
    if dtype == "auto":
        dtype = raw.get("torch_dtype") or raw.get("dtype") or "float32"
        if dtype not in FORMATS:
            raise InputError(f"{where}: torch_dtype must be one of {', '.join(FORMATS)}, got {dtype!r}: choose a dtype")
    # Mistral's window applies to every layer; Llama has none, whatever its config says.
    window = raw.get("sliding_window") if raw["model_type"] == "mistral" else None
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size", where),
        num_hidden_layers=_positive(raw, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(raw, "vocab_size", where),
        max_position_embeddings=_positive(raw, "max_position_embeddings", where),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(scaling, where),
        sliding_window=None if window is None else int(window),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
        hidden_act=raw["hidden_act"] if raw.get("hidden_act") in ACTIVATIONS else "silu",
    )


def _positive(raw: dict[str, Any], name: str, where: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value


def _rope_scaling(scaling: dict[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{where}: rope_scaling type must be default or llama3, got {kind!r}")
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [name for name in names if name not in scaling]:
        raise InputError(f"{where}: rope_scaling must hold {', '.join(names)}, got none for {', '.join(missing)}")
    return RopeScaling(**{name: scaling[name] for name in names})


def _ids(value: Any, checkpoint: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in ids):
        raise InputError(f"convert: {checkpoint}: eos_token_id must be an integer or a list of them, got {value!r}")
    return frozenset(ids)


class _Source:
    """The safetensors files of a checkpoint, opened lazily."""

    def __init__(self, checkpoint: Path) -> None:
        index = checkpoint / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index, "convert").get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"convert: {index}: weight_map must be an object, got {weight_map!r}")
            self.files = sorted({checkpoint / file for file in weight_map.values()})
        else:
            weight_map = None
            self.files = [checkpoint / "model.safetensors"]
        self.folder = checkpoint
        self.shapes: dict[str, list[int]] = {}
        self._file_of: dict[str, Any] = {}
        for file in self.files:
            if not file.is_file():
                raise InputError(f"convert: {file} must be a safetensors file, got nothing there")
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"convert: {file} must be a whole safetensors file, got {error}") from None
            for name in handle.keys():  # noqa: SIM118  # not a mapping
                if name in self._file_of:
                    raise InputError(f"convert: {file}: tensor {name} must be in one file only, got it twice")
                self._file_of[name] = handle
                self.shapes[name] = list(handle.get_slice(name).get_shape())
        if weight_map is not None and (absent := sorted(set(weight_map) - set(self._file_of))):
            raise InputError(f"convert: {index}: tensors must be in the files it names, got none for {_some(absent)}")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def strips(self, name: str, shape: list[int], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """First rows and strips of a tensor of a shape, cast; each is finite as stored and as cast."""
        if name not in self._file_of:
            raise InputError(f"convert: {self.folder}: tensor {name} must be there, got none of that name")
        if self.shapes[name] != shape:
            raise InputError(f"convert: {self.folder}: tensor {name} must have shape {shape}, got {self.shapes[name]}")
        stored = self._file_of[name].get_tensor(name)
        if not stored.is_floating_point() or stored.element_size() < 2:
            raise InputError(f"convert: {self.folder}: tensor {name} must be fp16, bf16 or fp32, got {stored.dtype}")
        for start in range(0, len(stored), STRIP_ROWS):
            strip = stored[start : start + STRIP_ROWS].to(dtype)
            if not _is_finite(strip):
                if not _is_finite(stored):
                    raise InputError(f"convert: {self.folder}: tensor {name} must be finite, got NaN or Inf")
                raise InputError(f"convert: {self.folder}: tensor {name} must fit {dtype}, got {stored.abs().max():g}")
            yield start, strip

    def refuse_unexpected(self, wanted: set[str], config: ModelConfig) -> None:
        """Every wanted tensor is there and no other."""
        if missing := sorted(wanted - set(self._file_of)):
            raise InputError(f"convert: {self.folder}: tensors must be complete, got none for {_some(missing)}")
        # A tied checkpoint may carry either name or both; rotary buffers were once saved and are recomputed.
        spare = {"model.embed_tokens.weight", "lm_head.weight"} if config.tie_word_embeddings else set()
        extra = sorted(name for name in set(self._file_of) - wanted - spare if not name.endswith("rotary_emb.inv_freq"))
        if extra:
            raise InputError(
                f"convert: {self.folder}: tensors must be those of the architecture, got also {_some(extra)}"
            )

    def digest(self, pool: ThreadPoolExecutor) -> str:
        """sha256 over the names and bytes of config and weights."""
        files = [self.folder / "config.json", *self.files]
        digests = zip(files, pool.map(sha256_file, files), strict=True)
        return sha256_json([[file.name, digest] for file, digest in digests])


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# Where the matrices of a layer are in a checkpoint.
SOURCE_MODULES = {matrix: f"self_attn.{matrix}_proj" for matrix in ("q", "k", "v", "o")} | {
    matrix: f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")
}


def _plan(config: ModelConfig, source: _Source) -> Iterator[tuple[str, list[str]]]:
    """Every runtime tensor with the checkpoint tensors it is made of."""
    # where they are tied, a checkpoint holds one of two names
    tied = config.tie_word_embeddings and "model.embed_tokens.weight" not in source
    yield "embedding", ["lm_head.weight" if tied else "model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"layers.{layer}.attn_norm.weight", [f"{prefix}.input_layernorm.weight"]
        yield f"layers.{layer}.mlp_norm.weight", [f"{prefix}.post_attention_layernorm.weight"]
        for site in (site for site in layer_sites(sites_of(config)) if site.layer == layer):
            sources = [f"{prefix}.{SOURCE_MODULES[matrix]}.weight" for matrix in site.matrices]
            yield f"layers.{layer}.{site.name}.weight", sources
    yield "norm.weight", ["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "lm_head", ["lm_head.weight"]


def _is_finite(x: Tensor) -> bool:
    # one pass, four times as fast as isfinite: both extremes are NaN if anything is
    return all(bool(extreme.isfinite()) for extreme in x.aminmax()) if x.numel() else True


def _shape(config: ModelConfig, name: str) -> list[int]:
    """Of a runtime tensor."""
    if site := _site(config, name):
        return [site.in_features, site.width]
    return [config.vocab_size, config.hidden_size] if name in ("embedding", "lm_head") else [config.hidden_size]


@cache
def _sites_by_tensor(config: ModelConfig) -> dict[str, Site]:
    return {f"layers.{site.layer}.{site.name}.weight": site for site in layer_sites(sites_of(config))}


def _site(config: ModelConfig, name: str) -> Site | None:
    """Whose matrices a runtime tensor holds, if it is a site's."""
    return _sites_by_tensor(config).get(name)


@dataclass(frozen=True, slots=True)
class _File:
    """A safetensors file, laid out as its library does it, to be filled in any order.

    Args:
        path: where it lies.
        header: what precedes the tensors.
        offsets: of each tensor, from the beginning of the file.
    """

    path: Path
    header: bytes
    offsets: dict[str, int]


def _lay_out(folder: Path, config: ModelConfig, names: list[str]) -> list[_File]:
    """Runtime tensors divided into files, in the order given."""
    divided: list[list[str]] = [[]]
    sizes = {name: math.prod(_shape(config, name)) * config.torch_dtype.itemsize for name in names}
    for name in names:
        if sum(sizes[other] for other in divided[-1]) >= FILE_BYTES:
            divided.append([])
        divided[-1].append(name)
    files = []
    for number, own in enumerate(divided):
        # all are of one type, so that names alone decide the order
        content: dict[str, Any] = {"__metadata__": {"format": "sparsetrace-model"}}
        starts, end = {}, 0
        for name in sorted(own):
            starts[name], end = end, end + sizes[name]
            content[name] = {
                "dtype": SAFETENSORS_DTYPES[config.dtype],
                "shape": _shape(config, name),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: len(header) + starts[name] for name in own}
        files.append(_File(folder / f"weights-{number:05d}.safetensors", header, offsets))
    return files


def _write_weights(
    folder: Path,
    config: ModelConfig,
    source: _Source,
    plan: dict[str, list[str]],
    report: Callable[[int, int, str], None] | None,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Write every runtime tensor, several at a time, and flush each file once it is full.

    Returns:
        What the model's config.json says of each tensor; the hash of the source.
    """
    files = _lay_out(folder, config, list(plan))
    file_of = {name: file for file in files for name in file.offsets}
    counts = sorted((math.prod(_shape(config, name)) for name in plan), reverse=True)
    # a thread's memory is that of the largest tensor it has made
    most = sum(total * config.torch_dtype.itemsize <= MADE_BYTES for total in accumulate(counts))
    own = local()

    def begin() -> None:
        # once for each thread: the system takes longer to find memory than the cores to fill it
        own.memory = torch.empty(counts[0], dtype=config.torch_dtype)

    def make(name: str) -> str:
        made = own.memory[: math.prod(_shape(config, name))]
        _make(made.view(_shape(config, name)), config, source, name, plan[name])
        data = made.view(torch.uint8).numpy().data
        _write_at(file_of[name].path, file_of[name].offsets[name], data)
        return hashlib.sha256(data).hexdigest()

    for file in files:
        file.path.touch()
        _write_at(file.path, 0, file.header)
    tensors: dict[str, dict[str, Any]] = {}
    flushed = []
    with (
        _threads_of_torch() as threads,
        ThreadPoolExecutor(min(threads, max(most, 1)), initializer=begin) as pool,
        ThreadPoolExecutor(1) as flusher,
    ):
        for name, digest in zip(plan, pool.map(make, plan), strict=True):
            file = file_of[name]
            shape = _shape(config, name)
            tensors[name] = {"file": file.path.name, "shape": shape, "sha256": digest, "sources": plan[name]}
            if name == list(file.offsets)[-1]:
                flushed.append(flusher.submit(sync, file.path))
            if report is not None:
                report(len(tensors), len(plan), name)
        # while the disk is busy with the last files
        source_hash = source.digest(pool)
        for done in flushed:
            done.result()
    return tensors, source_hash


@contextmanager
def _threads_of_torch() -> Iterator[int]:
    """Let threads of ours take the place of torch's own, one for one; yields how many those are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _write_at(path: Path, offset: int, data: bytes | memoryview) -> None:
    try:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
    except OSError as error:
        # a write's own error names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _make(out: Tensor, config: ModelConfig, source: _Source, name: str, parts: list[str]) -> None:
    """Fill a runtime tensor."""
    if site := _site(config, name):
        for (matrix, columns), part in zip(site.columns.items(), parts, strict=True):
            first = columns.start
            for start, strip_NK in source.strips(part, [site.outputs(matrix), len(out)], out.dtype):
                # two copies, of which torch does the first in blocks, take a third of the time of one
                out[:, first + start : first + start + len(strip_NK)] = strip_NK.T.contiguous()
    else:
        for start, strip in source.strips(parts[0], list(out.shape), out.dtype):
            out[start : start + len(strip)] = strip
