"""The decoder as a sequence of sparsetrace's kernels: what the Triton engine runs.

The same weights, rules and rounding as `model.Decoder` under `patch.install`, which is its oracle. Whatever makes a
site's vector (residual add and RMSNorm, attention, SiLU * up) also masks and captures it, in two ways:

| | made for | the producer leaves | the multiply |
|---|---|---|---|
| `_One` | one row: single-stream decoding | a list of the kept inputs | gathers their weight rows |
| `_Many` | many rows: batches, prompts, given text | the masked operand | dense |
"""

# Shape suffixes: B slots, T positions of a slot, n = B T rows, K input features, N output features, P parts of a site
# (matrices that read one operand), R rows of the ring, E half a head, G kv heads, D head dim.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.formats.sites import SiteKey
from sparsetrace.generation.capture import Recorder
from sparsetrace.methods import MatrixRule, Method
from sparsetrace.model.decoder import Block, Decoder, KVCache, attended, rotary_factors
from sparsetrace.model.patch import Patch, SparseProjection
from sparsetrace_kernels.add_rmsnorm import add_rmsnorm
from sparsetrace_kernels.configs import TuningTable, choose_config
from sparsetrace_kernels.decode_attention import choose_splits, decode_attention, decode_attention_list
from sparsetrace_kernels.list_gemv import MAX_SECTIONS, list_gemv
from sparsetrace_kernels.masked_rows import launch_add_rmsnorm_rows, launch_mask_rows, launch_silu_mul_rows
from sparsetrace_kernels.partials import new_partials
from sparsetrace_kernels.rotate_rows import launch_rotate_rows
from sparsetrace_kernels.silu_mul import silu_mul

# Called as probe(layer, site, x [n, K] as the producer stored it, y [n, N]).
Probe = Callable[[int | None, str, Tensor, Tensor], None]


def unsupported(config: ModelConfig, method: Method, rules: list[MatrixRule]) -> str | None:
    """Why the kernels cannot run a model under a method, in words; None where they can."""
    if config.dtype == "float32":
        return "the kernels are for 16-bit types, and the model is float32"
    if config.hidden_act != "silu":
        return f"the kernels compute silu, and the model uses {config.hidden_act}"
    if config.qk_norm:
        return "the kernels have no norms of queries and keys, and the model has them"
    if config.num_attention_heads > MAX_SECTIONS:
        return f"the kernels take {MAX_SECTIONS} heads at most, and the model has {config.num_attention_heads}"
    if any(method.exceeds(rule) is None for rule in rules):
        return f"method {method.name} decides by more than a threshold of the input"
    return None


@dataclass(slots=True)
class _Site:
    """What the kernels need of one layer's site.

    Args:
        weight: [K, N], input-major.
        columns: of the weight, for each part.
        thresholds: int32 [P], bit patterns.
        scale: float32 [P, K], or None.
        config: of the multiply of one row, `GemvConfig.encode`.
        ring: where the operands are captured, [R, P, K]; None where they are not.
    """

    layer: int | None
    name: str
    weight: Tensor
    columns: list[slice]
    thresholds: Tensor
    scale: Tensor | None
    config: str
    ring: Tensor | None = None

    @property
    def segments(self) -> list[int]:
        """Outputs of each part."""
        return [columns.stop - columns.start for columns in self.columns]


class FusedDecoder:
    """Token ids to hidden states, as `Decoder`, with every site's input masked and captured on the way.

    Args:
        model: whose weights are used; it is not altered.
        patch: the installed method, for its rules.
        positions: that the cache has.
        table: measured kernel configurations; None takes the heuristic's.

    Attributes:
        partials: words for partial sums, that all kernels of the decoder's stream share.
        probe: sees every product, in eager mode; for tests.

    Raises:
        InputError: the kernels cannot run the model under the method.
    """

    def __init__(self, model: Decoder, patch: Patch, positions: int, table: TuningTable | None) -> None:
        rules = [rule for module in patch.modules.values() for rule in module.rules.values()]
        if reason := unsupported(model.config, patch.method, rules):
            raise InputError(f"generate: engine must be torch here, got triton: {reason}")
        self.model = model
        self.config = model.config
        self.probe: Probe | None = None
        device = model.embedding.device
        self._sites = {key: _site(key, module, patch.method, table) for key, module in patch.modules.items()}
        # the last norm is followed by no multiply of ours: nothing is captured, and what is kept of it is not used
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        self._last = _Site(len(model.layers), "last", model.norm.weight[:, None], [slice(0, 1)], nothing, None, "")
        self.partials = new_partials(device)
        self.extend(positions)
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._one, self._many = _One(self.partials, hopper), _Many(hopper)

    def extend(self, positions: int) -> None:
        """Serve caches of so many positions."""
        self._rotary = rotary_factors(self.config, torch.arange(positions, device=self.model.embedding.device))

    def use(self, recorder: Recorder | None) -> None:
        """Capture into a recorder's ring from now on; into none if None."""
        for (layer, name), site in self._sites.items():
            site.ring = None if recorder is None else recorder.ring(layer, name)

    @torch.inference_mode()
    def __call__(self, tokens_BT: Tensor, positions_BT: Tensor, cache: KVCache, rows_n: Tensor, one: bool) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens_BT: int64 ids.
            positions_BT: int64; a slot attends to all its earlier positions.
            cache: holds the earlier positions and receives these.
            rows_n: int64, the ring row of each; beyond the ring it is masked and not captured. `DENSE` is for many
                rows only, and leaves the row unmasked.
            one: multiply the one row by lists.

        Returns:
            [B, T, C] in the model's dtype.
        """
        B, T = tokens_BT.shape
        way: _Way = self._one if one else self._many
        bias = self._bias(positions_BT, cache) if T > 1 else None
        positions_n = positions_BT.reshape(-1)
        residual_nC = functional.embedding(tokens_BT.reshape(-1), self.model.embedding)
        delta_nC: Tensor | None = None
        for block in self.model.layers:
            assert isinstance(block, Block)
            layer = block.layer
            site = self._sites[layer, "attn_in"]
            norm = block.attn_norm
            residual_nC, x_nK, kept = way.norm(residual_nC, delta_nC, norm.weight, norm.eps, site, rows_n)
            qkv_nN = self._multiply(way, site, x_nK, kept)
            site = self._sites[layer, "attn_out"]
            if bias is None:
                x_nK, kept = way.attend(self._attention(layer, qkv_nN, positions_n, cache), site, rows_n)
            else:
                x_nK = self._attend_many(layer, qkv_nN, positions_n, bias, cache)
                kept = self._many.mask(x_nK, site, rows_n)
            delta_nC = self._multiply(way, site, x_nK, kept)
            site = self._sites[layer, "mlp_in"]
            norm = block.mlp_norm
            residual_nC, x_nK, kept = way.norm(residual_nC, delta_nC, norm.weight, norm.eps, site, rows_n)
            gate_up_nN = self._multiply(way, site, x_nK, kept)
            site = self._sites[layer, "mlp_mid"]
            x_nK, kept = way.gate(gate_up_nN, site, rows_n)
            delta_nC = self._multiply(way, site, x_nK, kept)
        norm = self.model.norm
        _, hidden_nC, _ = way.norm(residual_nC, delta_nC, norm.weight, norm.eps, self._last, rows_n)
        return hidden_nC.view(B, T, -1)

    def _multiply(self, way: "_Way", site: _Site, x_nK: Tensor, kept: "_Kept") -> Tensor:
        y_nN = way.multiply(kept, site)
        if self.probe is not None:
            self.probe(site.layer, site.name, x_nK, y_nN)
        return y_nN

    def _attention(self, layer: int, qkv_BN: Tensor, positions_B: Tensor, cache: KVCache) -> "_Attention":
        """What attention of one new position of each slot takes."""
        return (
            qkv_BN,
            *self._rotary,
            positions_B,
            cache.k_LBSGD[layer],
            cache.v_LBSGD[layer],
            self.partials,
            self.config.sliding_window or 0,
            choose_splits(len(positions_B), self.config.num_attention_heads),
        )

    def _attend_many(
        self, layer: int, qkv_nN: Tensor, positions_n: Tensor, bias_B1TS: Tensor, cache: KVCache
    ) -> Tensor:
        """Attention of many new positions of each slot."""
        keys, values = cache.k_LBSGD[layer], cache.v_LBSGD[layer]
        q_nK = launch_rotate_rows(qkv_nN, *self._rotary, positions_n, keys, values)
        B, _, G, D = keys.shape
        groups = self.config.num_attention_heads // G
        if groups > 1:
            # torch's attention with a bias does not share heads on a GPU but for the slow way
            keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
        y_BHTD = functional.scaled_dot_product_attention(
            q_nK.view(B, -1, groups * G, D).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=bias_B1TS,
        )
        return y_BHTD.transpose(1, 2).reshape(len(q_nK), -1)

    def _bias(self, positions_BT: Tensor, cache: KVCache) -> Tensor:
        """[B, 1, T, S]: 0 where a query attends, minus infinity elsewhere; made once for all layers."""
        mask = attended(self.config, positions_BT, cache)
        return torch.zeros(mask.shape, dtype=self.config.torch_dtype, device=mask.device).masked_fill_(
            ~mask, -torch.inf
        )


# What a producer leaves for the multiply.
_Kept = tuple[Tensor, ...]
# The arguments of `decode_attention`, but for `use_pdl`.
_Attention = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]


class _Way(Protocol):
    """How rows are masked, captured and multiplied; x is the producer's vector as stored, before masking."""

    def norm(
        self, residual_nC: Tensor, delta_nC: Tensor | None, weight_C: Tensor, eps: float, site: _Site, rows_n: Tensor
    ) -> tuple[Tensor, Tensor, _Kept]:
        """The new residual stream, x, and what is kept of it."""

    def attend(self, attention: _Attention, site: _Site, rows_n: Tensor) -> tuple[Tensor, _Kept]:
        """Attention of one new position of each slot, and what is kept of it."""

    def gate(self, gate_up_nN: Tensor, site: _Site, rows_n: Tensor) -> tuple[Tensor, _Kept]:
        """SiLU(gate) * up, and what is kept of it."""

    def multiply(self, kept: _Kept, site: _Site) -> Tensor:
        """[n, N]."""


class _One:
    """One row: lists of kept inputs."""

    def __init__(self, partials_W: Tensor, pdl: bool) -> None:
        self._partials = partials_W
        self._pdl = pdl

    def norm(
        self, residual_nC: Tensor, delta_nC: Tensor | None, weight_C: Tensor, eps: float, site: _Site, rows_n: Tensor
    ) -> tuple[Tensor, Tensor, _Kept]:
        delta_C = None if delta_nC is None else delta_nC[0]
        total_C, x_C, *lists = add_rmsnorm(residual_nC[0], delta_C, weight_C, eps, *self._take(site, rows_n))
        return total_C[None], x_C[None], tuple(lists)

    def attend(self, attention: _Attention, site: _Site, rows_n: Tensor) -> tuple[Tensor, _Kept]:
        thresholds, scale, ring, _, slot, pdl = self._take(site, rows_n)
        y_nK, *lists = decode_attention_list(*attention, thresholds, scale, ring, slot, pdl)
        return y_nK, tuple(lists)

    def gate(self, gate_up_nN: Tensor, site: _Site, rows_n: Tensor) -> tuple[Tensor, _Kept]:
        x_K, *lists = silu_mul(gate_up_nN[0], *self._take(site, rows_n))
        return x_K[None], tuple(lists)

    def multiply(self, kept: _Kept, site: _Site) -> Tensor:
        list_PIL, counts_PI = kept
        return list_gemv(list_PIL, counts_PI, site.weight, self._partials, site.segments, site.config)[None]

    def _take(
        self, site: _Site, rows_n: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, Tensor | None, bool]:
        slot = None if site.ring is None else rows_n
        return site.thresholds, site.scale, site.ring, None, slot, self._pdl


class _Many:
    """Many rows: masked operands, one for each part; launched without the dispatcher, which prompts would wait for."""

    def __init__(self, pdl: bool) -> None:
        self._pdl = pdl

    def norm(
        self, residual_nC: Tensor, delta_nC: Tensor | None, weight_C: Tensor, eps: float, site: _Site, rows_n: Tensor
    ) -> tuple[Tensor, Tensor, _Kept]:
        total_nC, x_nC, operand_PnC = launch_add_rmsnorm_rows(
            residual_nC, delta_nC, weight_C, eps, site.thresholds, site.scale, rows_n, site.ring
        )
        return total_nC, x_nC, (operand_PnC,)

    def attend(self, attention: _Attention, site: _Site, rows_n: Tensor) -> tuple[Tensor, _Kept]:
        y_nK = decode_attention(*attention, self._pdl)
        return y_nK, self.mask(y_nK, site, rows_n)

    def mask(self, x_nK: Tensor, site: _Site, rows_n: Tensor) -> _Kept:
        """What is kept of vectors in memory."""
        return (launch_mask_rows(x_nK, site.thresholds, site.scale, rows_n, site.ring),)

    def gate(self, gate_up_nN: Tensor, site: _Site, rows_n: Tensor) -> tuple[Tensor, _Kept]:
        x_nK, operand_nK = launch_silu_mul_rows(gate_up_nN, site.thresholds, site.scale, rows_n, site.ring)
        return x_nK, (operand_nK[None],)

    def multiply(self, kept: _Kept, site: _Site) -> Tensor:
        (operand_PnK,) = kept
        if len(operand_PnK) == 1:
            return operand_PnK[0] @ site.weight
        parts = [
            operand_nK @ site.weight[:, columns] for operand_nK, columns in zip(operand_PnK, site.columns, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def _site(key: SiteKey, module: SparseProjection, method: Method, table: TuningTable | None) -> _Site:
    weight_KN = module.dense.weight
    device, (K, N) = weight_KN.device, weight_KN.shape
    # rules of one part are alike, but for what is expected of them
    rules = [neighbours[0] for neighbours, _ in module.parts]
    bits = [method.exceeds(rule) for rule in rules]
    scale_PK = None
    if any(rule.scale is not None for rule in rules):
        # a threshold of zero drops nothing, not even an input that is scaled to zero
        ones_K = torch.ones(K, device=device)
        scale_PK = torch.stack(
            [
                rule.scale if rule.scale is not None and bound else ones_K
                for rule, bound in zip(rules, bits, strict=True)
            ]
        )
    # half where nothing is known
    expected = [
        0.5 if rule.expected is None and bound else rule.expected or 0.0
        for rule, bound in zip(rules, bits, strict=True)
    ]
    return _Site(
        layer=key[0],
        name=key[1],
        weight=weight_KN,
        columns=[columns for _, columns in module.parts],
        thresholds=torch.tensor(bits, dtype=torch.int32, device=device),
        scale=scale_PK,
        config=choose_config("list", K, N, weight_KN.dtype, sum(expected) / len(expected), table).encode(),
    )
