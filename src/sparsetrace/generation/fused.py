"""The decoder as a sequence of sparsetrace's kernels: what the Triton backend runs.

The same weights, rules and rounding as `model.Decoder` under `patch.install`, which is its oracle. Whatever makes a
site's vector (residual add and RMSNorm, attention, SiLU * up) also masks and captures it, on one of the two paths of
`sparsetrace.generation.execution`.
"""

# Shape suffixes: B slots, T positions of a slot, n = B T rows, K input features, N output features, P parts of a site
# (matrices that read one operand), R rows of the ring, E half a head, G kv heads, D head dim.

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.execution import (
    AttentionArguments,
    ExecutionPath,
    Kept,
    KernelSite,
    MaskedDense,
    SparseList,
    kernel_site,
)
from sparsetrace.methods import MatrixRule, Method
from sparsetrace.model.decoder import Block, Decoder, KVCache, attended, rotary_factors
from sparsetrace.model.patch import Patch
from sparsetrace_kernels.configs import TuningTable
from sparsetrace_kernels.decode_attention import choose_splits
from sparsetrace_kernels.list_gemv import MAX_SECTIONS
from sparsetrace_kernels.partials import new_partials
from sparsetrace_kernels.rotate_rows import launch_rotate_rows

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


class FusedDecoder:
    """Token ids to hidden states, as `Decoder`, with every site's input masked and captured on the path.

    Args:
        model: whose weights are used; it is not altered.
        patch: the installed method, for its rules.
        positions: length of the cache.
        table: measured kernel configurations; None takes the heuristic's.

    Attributes:
        partials: memory for partial sums, shared by all kernels of the decoder's stream.
        probe: sees every product, in eager mode; for tests.

    Raises:
        InputError: the kernels cannot run the model under the method.
    """

    def __init__(self, model: Decoder, patch: Patch, positions: int, table: TuningTable | None) -> None:
        if reason := unsupported(model.config, patch.method, patch.rules):
            raise InputError(f"generate: engine must be torch here, got triton: {reason}")
        self.model = model
        self.config = model.config
        self.probe: Probe | None = None
        device = model.embedding.device
        self._sites = {key: kernel_site(module, patch.method, table) for key, module in patch.modules.items()}
        # the last norm is followed by no multiply of ours: nothing is captured, and what is kept of it is not used
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        self._last = KernelSite(None, "last", model.norm.weight[:, None], [slice(0, 1)], nothing, None, "")
        self.partials = new_partials(device)
        self.extend(positions)
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._one, self._many = SparseList(self.partials, hopper), MaskedDense(hopper)

    def extend(self, positions: int) -> None:
        """Make the rotary factors of caches of so many positions."""
        self._rotary = rotary_factors(self.config, torch.arange(positions, device=self.model.embedding.device))

    def capture_into(self, recorder: Recorder | None) -> None:
        """Capture into a recorder's ring from now on; None captures nothing."""
        for (layer, name), site in self._sites.items():
            site.ring = None if recorder is None else recorder.region(layer, name)

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
        path: ExecutionPath = self._one if one else self._many
        bias = self._bias(positions_BT, cache) if T > 1 else None
        positions_n = positions_BT.reshape(-1)
        residual_nC = functional.embedding(tokens_BT.reshape(-1), self.model.embedding)
        delta_nC: Tensor | None = None
        for block in self.model.layers:
            assert isinstance(block, Block)
            layer = block.layer
            site = self._sites[layer, "attn_in"]
            norm = block.attn_norm
            residual_nC, x_nK, kept = path.norm(residual_nC, delta_nC, norm.weight, norm.eps, site, rows_n)
            qkv_nN = self._multiply(path, site, x_nK, kept)
            site = self._sites[layer, "attn_out"]
            if bias is None:
                x_nK, kept = path.attend(self._attention(layer, qkv_nN, positions_n, cache), site, rows_n)
            else:
                x_nK = self._attend_many(layer, qkv_nN, positions_n, bias, cache)
                kept = self._many.mask(x_nK, site, rows_n)
            delta_nC = self._multiply(path, site, x_nK, kept)
            site = self._sites[layer, "mlp_in"]
            norm = block.mlp_norm
            residual_nC, x_nK, kept = path.norm(residual_nC, delta_nC, norm.weight, norm.eps, site, rows_n)
            gate_up_nN = self._multiply(path, site, x_nK, kept)
            site = self._sites[layer, "mlp_mid"]
            x_nK, kept = path.gate(gate_up_nN, site, rows_n)
            delta_nC = self._multiply(path, site, x_nK, kept)
        norm = self.model.norm
        _, hidden_nC, _ = path.norm(residual_nC, delta_nC, norm.weight, norm.eps, self._last, rows_n)
        return hidden_nC.view(B, T, -1)

    def _multiply(self, path: ExecutionPath, site: KernelSite, x_nK: Tensor, kept: Kept) -> Tensor:
        y_nN = path.multiply(kept, site)
        if self.probe is not None:
            self.probe(site.layer, site.name, x_nK, y_nN)
        return y_nN

    def _attention(self, layer: int, qkv_BN: Tensor, positions_B: Tensor, cache: KVCache) -> AttentionArguments:
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
