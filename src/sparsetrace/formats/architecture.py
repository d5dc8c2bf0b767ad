"""The architecture of a decoder in numbers, for every step that describes a model, also without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sparsetrace.formats.sites import Site

if TYPE_CHECKING:
    import torch

# Activation functions of the MLP that the decoder has.
HIDDEN_ACTS: Final = ("silu", "relu")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of a decoder; names are those of Hugging Face's config.json.

    Args:
        sliding_window: number of positions that a query attends to, its own included; None for all earlier ones.
        qk_norm: whether queries and keys pass an RMSNorm, head by head, before the rotary embedding.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str
    hidden_act: str = "silu"
    qk_norm: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """The fields as a runtime model records and hashes them."""
        content = dataclasses.asdict(self)
        # added later: left out of models without it, whose hashes stay what they were
        if not self.qk_norm:
            del content["qk_norm"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`."""
        scaling = content["rope_scaling"]
        return cls(**content | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)})


def sites_of(config: ModelConfig) -> tuple[Site, ...]:
    """The sites of our own decoder, whose structure is Llama's."""
    attention, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sites = []
    for layer in range(config.num_hidden_layers):
        sites += [
            Site("attn_in", layer, ("q", "k", "v"), hidden, (attention, kv, kv)),
            Site("attn_out", layer, ("o",), attention, (hidden,)),
            Site("mlp_in", layer, ("gate", "up"), hidden, (inner, inner)),
            Site("mlp_mid", layer, ("down",), inner, (hidden,)),
        ]
    return (*sites, Site("head_in", None, ("lm_head",), hidden, (config.vocab_size,)))


def weight_name(config: ModelConfig, site: Site) -> str:
    """Name of the runtime tensor that holds the matrices of a site."""
    if site.layer is not None:
        return f"layers.{site.layer}.{site.name}.weight"
    # tied embeddings are one tensor
    return "embedding" if config.tie_word_embeddings else "lm_head"
