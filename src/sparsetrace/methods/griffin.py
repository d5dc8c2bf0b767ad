"""GRIFFIN: after a dense prefill, keep the feed-forward neurons that were most active in the sequence's own prompt.

With z_t = silu(gate) * up at the dense positions t, neuron j scores s_j = || (z_tj / ||z_t||)_t ||; the
k = D - floor(s D) neurons of largest s_j stay for the rest of the sequence. `gate` and `up` have the `out_mask`, and
`down` reads zero for every other neuron.
Source: Dong et al., Prompt-prompted Adaptive Structured Pruning, arXiv:2404.01365, and github.com/hdong920/GRIFFIN.
Choices: z has the model's dtype, norms and sums are float64, where the code computes everything in float16; k is
rounded as elsewhere in sparsetrace, where the code takes int(D k_factor); equal scores are kept from the lower index
on. With `decoding.prefill: half` the dense first part of a prompt selects, as in the code's mode for classification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sparsetrace.methods.base import MatrixRule, Method, Sparsity, kept_count
from sparsetrace.methods.gated import refuse_without_gate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparsetrace.formats.architecture import ModelConfig
    from sparsetrace.formats.sites import Site


class Griffin(Method):
    """One set of neurons per sequence and layer."""

    name: ClassVar[str] = "griffin"
    out_masks: ClassVar[tuple[str, ...]] = ("gate", "up")
    needs_dense_prefill: ClassVar[bool] = True
    outputs_by_sequence: ClassVar[bool] = True

    sparsity: Sparsity = Field(description="fraction of feed-forward neurons dropped, rounded down, 0 <= s < 1")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.sparsity:g}"

    def target(self, layer: int, matrix: str) -> float | None:
        return self.sparsity if matrix == "down" else None

    def most_kept(self, matrix: str, features: int) -> int | None:
        return kept_count(features, self.sparsity) if matrix == "down" else None

    def dropped_outputs(self, outputs: int) -> int | None:
        return outputs - kept_count(outputs, self.sparsity)

    def refuse_model(self, config: ModelConfig, sites: Iterable[Site]) -> None:
        refuse_without_gate(self.name, sites)

    def keep_outputs(
        self,
        active_BTN: Tensor,
        up_BTN: Tensor,
        rule: MatrixRule,
        dense_BT: Tensor | None,
        memory: dict[str, Tensor],
    ) -> Tensor | None:
        from sparsetrace.methods.select import keep_largest_sums

        N = active_BTN.shape[-1]
        k = kept_count(N, self.sparsity)
        if k == N:
            return None
        if dense_BT is not None:
            z_BTN = (active_BTN * up_BTN).double()
            # a position whose neurons are all zero says nothing, and neither does one that is not dense
            squares_BT1 = z_BTN.square().sum(-1, keepdim=True)
            shares_BTN = z_BTN.square() / squares_BT1.clamp(min=1e-300)
            sums_BN = (shares_BTN * dense_BT[..., None]).sum(1)
            memory["sums"] = memory["sums"] + sums_BN if "sums" in memory else sums_BN
            # the square of the score orders as the score does
            memory["keep"] = keep_largest_sums(memory["sums"], k)
        return memory["keep"][:, None, :]
