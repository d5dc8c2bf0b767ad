"""What a family of checkpoints is: where its config.json and its tensors differ from Llama's; imports no torch.

The families share one structure, that of `sparsetrace.model.decoder`. To add one, describe it in a file beside this one
and list it in `registry.py`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig, sites_of, weight_name
from sparsetrace.formats.sites import Site, layer_sites

# Fields of config.json that alter the forward pass, with the values that the decoder can run.
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "layer_types": (None,),
}
# Where a layer of the checkpoint has its matrices and its norms.
MATRICES = {matrix: f"self_attn.{matrix}_proj" for matrix in ("q", "k", "v", "o")} | {
    matrix: f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# Norms of one head's queries or keys; every other norm is as wide as the hidden state.
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class RuntimeTensor:
    """A tensor of the runtime model and where it comes from.

    Args:
        name: in the runtime model and in the decoder's state.
        shape: in the runtime model.
        sources: names of the checkpoint's tensors that it is made of.
        site: the site whose matrices it holds side by side, [in, out]; None where it is one tensor of the checkpoint,
            unchanged.
    """

    name: str
    shape: list[int]
    sources: list[str]
    site: Site | None = None


def no_window(raw: dict[str, Any], where: str) -> None:
    """Every token attends to all earlier ones, whatever config.json says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of a family describe and name what our decoder has.

    Args:
        model_type: of config.json.
        architecture: class name in `architectures` of config.json.
        defaults: what transformers takes where config.json lacks a field, if that differs from null.
        allowed_values: fields that alter the forward pass, with the values that the decoder can run.
        own_fields: fields that this family reads and others do not know.
        window: reads the sliding window; called with config.json's content and the place for messages.
        matrices: module of each matrix within a layer.
        norms: module of each norm within a layer.
        embedding, norm, head: tensors outside the layers.
        sites: the model's sites.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allowed_values: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: ALLOWED_VALUES)
    own_fields: frozenset[str] = frozenset()
    window: Callable[[dict[str, Any], str], int | None] = no_window
    matrices: Mapping[str, str] = field(default_factory=lambda: MATRICES)
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    sites: Callable[[ModelConfig], tuple[Site, ...]] = sites_of

    def tensors(self, config: ModelConfig) -> Iterator[RuntimeTensor]:
        """Every tensor of the runtime model, in the order of execution."""
        hidden, vocabulary = config.hidden_size, config.vocab_size
        sites = layer_sites(self.sites(config))
        yield RuntimeTensor("embedding", [vocabulary, hidden], [self.embedding])
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for norm, module in self.norms.items():
                width = config.head_dim if norm in QK_NORMS else hidden
                yield RuntimeTensor(f"layers.{layer}.{norm}.weight", [width], [f"{prefix}.{module}.weight"])
            for site in (site for site in sites if site.layer == layer):
                sources = [f"{prefix}.{self.matrices[matrix]}.weight" for matrix in site.matrices]
                yield RuntimeTensor(weight_name(config, site), [site.in_features, site.width], sources, site)
        yield RuntimeTensor("norm.weight", [hidden], [self.norm])
        if not config.tie_word_embeddings:
            yield RuntimeTensor("lm_head", [vocabulary, hidden], [self.head])


def positive_integer(raw: dict[str, Any], name: str, where: str) -> int:
    """A field of config.json that must hold a positive integer."""
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value


def positive_number(raw: dict[str, Any], name: str, where: str) -> float:
    """A field of config.json that must hold a positive number that a float can hold."""
    value = raw.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise InputError(f"{where}: {name} must be a positive number, got {value!r:.80}")


def truth_value(raw: dict[str, Any], name: str, where: str) -> bool:
    """A field of config.json that must hold true or false; false where it is absent or null."""
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise InputError(f"{where}: {name} must be true or false, got {value!r}")
    return bool(value)
