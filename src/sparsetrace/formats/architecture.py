"""The architecture of a decoder in numbers, which steps that never run a model read too: without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsetrace.formats.sites import Site

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of a decoder; names are those of Hugging Face's config.json."""

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

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def sites_of(config: ModelConfig) -> tuple[Site, ...]:
    """The sites of a decoder of Llama's structure, which all families of our own engines share."""
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
