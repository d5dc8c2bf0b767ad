"""The runtime model: `convert` writes it, and every step that runs or describes the model opens it.

torch is imported only where weights are loaded: `split` needs the tokenizer alone, and is done before torch would be
imported.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sparsetrace.core.checksum import Checksum
from sparsetrace.core.files import InputError, read_json, sha256_file
from sparsetrace.core.settings import Machine
from sparsetrace.formats.architecture import ModelConfig, weight_name
from sparsetrace.formats.sites import Leaf, Site, by_leaf, layer_sites, sites_from_json
from sparsetrace.formats.versions import MODEL_VERSION
from sparsetrace.model.read_tokenizer import build
from sparsetrace.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsetrace.model.decoder import Decoder

# Tensors copied to a GPU at the same time, and the pinned buffer that each copy passes through: a GPU reads pinned
# memory without the processor's help.
READERS, STAGED_BYTES = 8, 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimeModel:
    """A converted model's description.

    Args:
        folder: where it lies.
        config: architecture.
        model_hash: of the architecture, every weight and the tokenizer.
        source_hash: of the checkpoint's files.
        source: what data sets call the model.
        bos: id put before prompts, or None.
        eos: ids that end a sequence.
        tokenizer_files: sha256 of each.
        sites: the places where a vector is read, in the order of execution.
        tensors: name to {file, shape, sha256, xxh3, sources}; sources are the checkpoint's tensors that it was made of.
    """

    folder: Path
    config: ModelConfig
    model_hash: str
    source_hash: str
    source: str
    bos: int | None
    eos: frozenset[int]
    tokenizer_files: dict[str, str]
    sites: tuple[Site, ...]
    tensors: dict[str, dict[str, Any]]

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InputError: its file is missing, or not what `convert` wrote.
        """
        file = self.folder / "tokenizer.json"
        if not file.is_file() or sha256_file(file) != self.tokenizer_files[file.name]:
            raise InputError(f"model: {file} must be as config.json records it, got another or none: convert again")
        return Tokenizer(build(file), self.config.vocab_size, self.bos)

    def weight(self, site: Site) -> str:
        """Name of the runtime tensor that holds the matrices of a site side by side."""
        return weight_name(self.config, site)

    def source_weight(self, leaf: Leaf) -> str:
        """Name of a matrix in the checkpoint, where it is stored [out, in]."""
        site = by_leaf(self.sites)[leaf]
        sources: list[str] = self.tensors[self.weight(site)]["sources"]
        return sources[site.matrices.index(leaf[1])]

    def load(self, device: torch.device) -> Decoder:
        """The decoder with its weights on `device`.

        Raises:
            InputError: the folder records other sites than the decoder has, a file is broken or holds other bytes than
                were written, or the GPU is too small.
        """
        import torch

        from sparsetrace.model.decoder import Decoder

        with torch.device("meta"):
            model = Decoder(self.config)
        if self.sites != model.sites:
            raise InputError(f"model: {self.folder}: sites must be those of the decoder, got others: convert again")
        mapped = self._map()
        try:
            state, checksums = _place(mapped, device)
        except torch.OutOfMemoryError:
            size = sum(tensor.nbytes for tensor in mapped.values())
            raise InputError(
                f"model: {self.folder} must fit the memory of one GPU, got {size:,} bytes of weights: use a larger "
                "GPU, or `device: cpu`"
            ) from None
        if damaged := [name for name, entry in self.tensors.items() if checksums[name] != entry["xxh3"]]:
            raise self._damaged(damaged[0], f"other bytes in {len(damaged)} of {len(mapped)} tensors")
        if self.config.tie_word_embeddings:
            state["lm_head"] = state["embedding"]
        model.load_state_dict(state, assign=True)
        model.lm_head = model.embedding if self.config.tie_word_embeddings else model.lm_head
        return model.requires_grad_(False).eval()

    def _map(self) -> dict[str, Tensor]:
        """The tensors that config.json records, mapped."""
        mapped: dict[str, Tensor] = {}
        for file in sorted({entry["file"] for entry in self.tensors.values()}):
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    mapped |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            except (SafetensorError, OSError) as error:
                raise InputError(f"model: {self.folder / file} must be whole, got {error}: convert again") from None
        if mapped.keys() != self.tensors.keys():
            raise self._damaged(min(mapped.keys() ^ self.tensors.keys()), "it in one of the two only")
        for name, entry in self.tensors.items():
            shape, dtype = list(mapped[name].shape), mapped[name].dtype
            if shape != entry["shape"] or dtype != self.config.torch_dtype:
                raise self._damaged(name, f"{dtype} of shape {shape}")
        return mapped

    def _damaged(self, name: str, found: str) -> InputError:
        return InputError(
            f"model: {self.folder}: tensor {name} must be as config.json records it, got {found}: convert again"
        )


def _place(mapped: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Move tensors of mapped files to a device, with the checksum of each; on the host they stay mapped."""
    import torch

    if device.type != "cpu":
        return _copy(mapped, device)

    def checksum(tensor: Tensor) -> str:
        return str(Checksum(tensor.flatten().view(torch.uint8).numpy().data))

    with ThreadPoolExecutor(READERS) as pool:
        return mapped, dict(zip(mapped, pool.map(checksum, mapped.values()), strict=True))


def _copy(mapped: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torch

    own = local()

    def begin() -> None:
        own.staged = torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def copy(tensor: Tensor) -> tuple[Tensor, str]:
        checksum = Checksum()
        out = torch.empty_like(tensor, device=device)
        chunks = (each.flatten().view(torch.uint8).split(STAGED_BYTES) for each in (tensor, out))
        for source, target in zip(*chunks, strict=True):
            staged = own.staged[: len(source)]
            # numpy copies in this thread alone, torch would in many
            staged.numpy()[:] = source.numpy()
            target.copy_(staged)
            # what the GPU was given, before the buffer is used again
            checksum.update(staged.numpy().data)
        return out, str(checksum)

    with ThreadPoolExecutor(READERS, initializer=begin) as pool:
        copies = dict(zip(mapped, pool.map(copy, mapped.values()), strict=True))
    return {name: out for name, (out, _) in copies.items()}, {name: found for name, (_, found) in copies.items()}


def open_model(folder: Path) -> RuntimeModel:
    """Read a converted model's description; the weights stay on disk."""
    # workflow rules name the folder's config.json
    folder = folder.parent if folder.name == "config.json" else folder
    content = read_json(folder / "config.json", "model")
    if content.get("format") != "sparsetrace-model":
        raise InputError(
            f"model: {folder} must be a converted model, got another config.json: run `sparsetrace convert`"
        )
    if content["version"] != MODEL_VERSION:
        raise InputError(f"model: {folder} must have version {MODEL_VERSION}, got {content['version']}: convert again")
    return RuntimeModel(
        folder=folder,
        config=ModelConfig.from_json(content["architecture"]),
        model_hash=content["model_hash"],
        source_hash=content["source_hash"],
        source=content["source"],
        bos=content["bos"],
        eos=frozenset(content["eos"]),
        tokenizer_files=content["tokenizer"],
        sites=sites_from_json(content["sites"]),
        tensors=content["tensors"],
    )


def set_up_torch(machine: Machine) -> torch.device:
    """Set torch up for a step that runs the model, and return the device to run on."""
    import torch

    torch.set_num_threads(machine.threads)
    available = torch.cuda.is_available()
    if machine.device == "cuda" and not available:
        raise InputError("machine: device must be cpu or auto where torch sees no GPU, got cuda")
    return torch.device("cpu" if machine.device == "cpu" or not available else "cuda")


def describe(model: RuntimeModel) -> str:
    """The model in one line."""
    config = model.config
    first = [site for site in layer_sites(model.sites) if site.layer == 0]
    weights = sum(site.in_features * site.width for site in first)
    matrices = sum(len(site.matrices) for site in first)
    return (
        f"{model.source}: {config.num_hidden_layers} layers of {matrices} matrices with {weights / 1e6:.1f} M "
        f"weights, hidden {config.hidden_size}, {config.num_attention_heads} heads ({config.num_key_value_heads} kv), "
        f"{config.dtype}"
    )
