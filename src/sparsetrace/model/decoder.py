"""The decoder of all families that `convert` takes; knows nothing of sparsity or files.

The matrices that read the same vector are one `Projection`, named after its site; a method is installed by replacing
it (`sparsetrace.model.patch`). Numerics follow Hugging Face transformers' modeling_llama, modeling_mistral and
modeling_qwen3, the oracles of the tests.
"""

# Shape suffixes: B batch, T tokens of this call, S key positions, C hidden, H query heads, G kv heads, D head dim,
# K input features, N output features, V vocabulary.

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsetrace.formats.architecture import HIDDEN_ACTS, ModelConfig, sites_of
from sparsetrace.formats.sites import Site

# config.json and torch give them the same names
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(functional, name) for name in HIDDEN_ACTS}


def multiply(x_BTK: Tensor, weight_KN: Tensor) -> Tensor:
    """x @ W, summed in float32 and rounded once to the dtype of both.

    On a CPU, 16-bit operands are widened to float32 first, which is exact: on processors without 16-bit multiplication
    torch takes fifty times as long.
    """
    if x_BTK.device.type == "cpu" and x_BTK.dtype != torch.float32:
        return (x_BTK.float() @ weight_KN.float()).to(x_BTK.dtype)
    return x_BTK @ weight_KN


class Projection(nn.Module):
    """y = x @ W for all matrices of a site, side by side; the only reader of their merged weight.

    Args:
        site: names the matrices and their widths.
        dtype: of the weights.

    Attributes:
        columns: columns of each matrix in the merged weight.
    """

    def __init__(self, site: Site, dtype: torch.dtype) -> None:
        super().__init__()
        self.site = site
        self.columns = site.columns
        # input-major: a dropped input skips one contiguous row
        self.weight = nn.Parameter(torch.empty(site.in_features, site.width, dtype=dtype))

    def forward(self, x_BTK: Tensor) -> Tensor:
        return self.product(x_BTK)

    def product(self, x_BTK: Tensor, columns: slice | None = None) -> Tensor:
        """x @ W for a range of columns; for all of them if None."""
        return multiply(x_BTK, self.weight if columns is None else self.weight[:, columns])

    def matrix(self, name: str) -> Tensor:
        """The [K, N] weight of one matrix, a view."""
        return self.weight[:, self.columns[name]]

    def merged(self) -> Tensor:
        """The [K, N] weight of all matrices side by side, which kernels multiply by themselves."""
        return self.weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 up to the multiplication by the weight.

    Args:
        config: of the model.
        width: of the vectors.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=config.torch_dtype))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVCache:
    """Keys and values of a batch, of fixed shape; positions not yet written are zero, and masked in attention.

    Args:
        config: of the model.
        batch: number of slots, one sequence each.
        length: positions per slot.
        device: where the cache lies.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device) -> None:
        shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
        self.k_LBSGD = torch.zeros(shape, dtype=config.torch_dtype, device=device)
        self.v_LBSGD = torch.zeros(shape, dtype=config.torch_dtype, device=device)
        self.slots_B1 = torch.arange(batch, device=device)[:, None]

    def first(self, length: int) -> "KVCache":
        """A view of the first `length` positions of every slot."""
        view = copy(self)
        view.k_LBSGD, view.v_LBSGD = self.k_LBSGD[:, :, :length], self.v_LBSGD[:, :, :length]
        return view

    def update(self, layer: int, positions_BT: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values at `positions_BT`, and return all of the layer's, [B, S, G, D]."""
        self.k_LBSGD[layer, self.slots_B1, positions_BT] = k_BTGD
        self.v_LBSGD[layer, self.slots_B1, positions_BT] = v_BTGD
        return self.k_LBSGD[layer], self.v_LBSGD[layer]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[D/2] float32 rotary frequencies, scaled as Llama 3.1 does where the config says so."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    context = scaling.original_max_position_embeddings
    smooth = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    low = wavelength > context / scaling.low_freq_factor
    high = wavelength < context / scaling.high_freq_factor
    return torch.where(low, frequency / scaling.factor, torch.where(high, frequency, blended))


def rotate(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """Rotary embedding, halves convention."""
    low, high = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos_BT1D + torch.cat((-high, low), dim=-1) * sin_BT1D


class Block(nn.Module):
    """One decoder layer; each `Projection` is the attribute named after its site."""

    def __init__(self, config: ModelConfig, layer: int, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.sites = sites
        projections = {site.name: Projection(site, config.torch_dtype) for site in sites}
        self.attn_norm = RMSNorm(config, config.hidden_size)
        self.attn_in = projections["attn_in"]
        self.attn_out = projections["attn_out"]
        self.qkv_widths = projections["attn_in"].site.out_features
        # of each head's queries and keys
        self.q_norm = RMSNorm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_dim) if config.qk_norm else None
        self.mlp_norm = RMSNorm(config, config.hidden_size)
        self.mlp_in = projections["mlp_in"]
        self.mlp_mid = projections["mlp_mid"]
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BTC: Tensor, context: "Context", cache: KVCache | None) -> Tensor:
        y_BTK = self._attend(self.attn_in(self.attn_norm(x_BTC)), context, cache)
        x_BTC = x_BTC + self.attn_out(y_BTK)
        gate, up = self.mlp_in(self.mlp_norm(x_BTC)).chunk(2, dim=-1)
        return x_BTC + self.mlp_mid(self.activation(gate) * up)

    def _attend(self, qkv_BTN: Tensor, context: "Context", cache: KVCache | None) -> Tensor:
        """Attention of one layer: from q, k and v side by side to what enters the output projection, [B, T, K]."""
        B, T, _ = qkv_BTN.shape
        each = qkv_BTN.split(self.qkv_widths, dim=-1)
        q_BTHD, k_BTGD, v_BTGD = (x_BTN.reshape(B, T, -1, self.config.head_dim) for x_BTN in each)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        q_BTHD, k_BTGD = rotate(q_BTHD, *context.rotary), rotate(k_BTGD, *context.rotary)
        if cache is not None:
            k_BTGD, v_BTGD = cache.update(self.layer, context.positions, k_BTGD, v_BTGD)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        y_BHTD = functional.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, enable_gqa=True)
        return y_BHTD.transpose(1, 2).reshape(B, T, -1)


@dataclass(frozen=True, slots=True)
class Context:
    """What all layers of a forward pass share.

    Args:
        positions: int64 [B, T].
        rotary: cosines and sines of the positions, [B, T, 1, D] in the model's dtype.
        mask: bool [B, 1, T, S], from `attended`.
    """

    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor


def context_of(config: ModelConfig, positions_BT: Tensor, cache: KVCache | None) -> Context:
    """Rotary factors and attention mask of a forward pass; without a cache, its tokens attend to one another."""
    cos_BTE, sin_BTE = rotary_factors(config, positions_BT)
    rotary = cos_BTE.repeat(1, 1, 2)[:, :, None], sin_BTE.repeat(1, 1, 2)[:, :, None]
    return Context(positions_BT, rotary, attended(config, positions_BT, cache))


def attended(config: ModelConfig, positions_BT: Tensor, cache: KVCache | None) -> Tensor:
    """bool [B, 1, T, S]: which keys each query attends to; without a cache, the keys are those of the same pass."""
    device = positions_BT.device
    keys_S = torch.arange(cache.k_LBSGD.shape[2], device=device) if cache else positions_BT[:, None, :]
    distance_BTS = positions_BT[:, :, None] - keys_S
    mask_BTS = distance_BTS >= 0
    if config.sliding_window is not None:
        mask_BTS &= distance_BTS < config.sliding_window
    return mask_BTS[:, None]


def rotary_factors(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position, [..., D / 2] in the model's dtype."""
    # computed anew rather than kept in a buffer: a model built on the `meta` device has no values
    angle = positions[..., None].float() * inverse_frequencies(config).to(positions.device)
    return angle.cos().to(config.torch_dtype), angle.sin().to(config.torch_dtype)


def _table(config: ModelConfig) -> nn.Parameter:
    """[V, C]; not made by `empty_like`, which on the `meta` device spends a second on importing sympy."""
    return nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=config.torch_dtype))


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    Attributes:
        sites: the places where a vector is read, in the order of execution.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sites = sites_of(config)
        self.embedding = _table(config)
        self.layers = nn.ModuleList(
            Block(config, layer, tuple(site for site in self.sites if site.layer == layer))
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config, config.hidden_size)
        # where embeddings are tied, one parameter under two names
        self.lm_head = self.embedding if config.tie_word_embeddings else _table(config)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens_BT: int64 ids.
            positions_BT: int64 position of each token, which attends to the positions up to its own.
            cache: holds the earlier positions and receives these; None where the T tokens are all there is.

        Returns:
            [B, T, C] in the model's dtype.
        """
        context = context_of(self.config, positions_BT, cache)
        x_BTC = functional.embedding(tokens_BT, self.embedding)
        for layer in self.layers:
            x_BTC = layer(x_BTC, context, cache)
        hidden: Tensor = self.norm(x_BTC)
        return hidden

    def logits(self, hidden_C: Tensor) -> Tensor:
        """[..., V] float32 logits of hidden states [..., C]."""
        return multiply(hidden_C, self.lm_head.T).float()
