"""CATS: `up` computes, and `down` reads, only the neurons with |silu(gate)| > t, with one t per layer.

`gate` and `up` capture their full input; `up` has an `out_mask`; `down` captures silu(gate) * up under that mask.
Source: Lee et al., CATS: Contextually-Aware Thresholding for Sparsity, arXiv:2404.08763. Choices: t is the exact
quantile of |silu(gate)| over the calibration text, where the code takes an edge of a 20,000-bin histogram between -2
and 2; what is strictly above is kept, as in its code (`post_act.abs() <= threshold` is dropped), where the paper writes
>=.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sparsetrace.methods.base import MatrixRule, Method, Score, Sparsity
from sparsetrace.methods.gated import refuse_without_gate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from sparsetrace.formats.architecture import ModelConfig
    from sparsetrace.formats.sites import Site


class Cats(Method):
    """Threshold on the activation function, per layer."""

    name: ClassVar[str] = "cats"
    score: ClassVar[Score | None] = "gate"
    out_masks: ClassVar[tuple[str, ...]] = ("up",)

    sparsity: Sparsity = Field(description="target fraction of feed-forward neurons dropped, 0 <= s < 1")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.sparsity:g}"

    def needs_threshold(self, matrix: str) -> bool:
        return matrix in ("up", "down")

    def target(self, layer: int, matrix: str) -> float | None:
        return self.sparsity if self.needs_threshold(matrix) else None

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
        from sparsetrace_kernels.torch_ops import keep_above

        assert rule.threshold_bits is not None
        return keep_above(active_BTN, rule.threshold_bits) if rule.threshold_bits else None
