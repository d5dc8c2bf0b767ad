"""TEAL: keep |x| > t, with t from the distribution of the site's activations.

Source: Liu et al., Training-Free Activation Sparsity in Large Language Models, arXiv:2408.14690. Choice: t is the exact
quantile of |x| (see `sparsetrace.histogram`), where TEAL's code reads a signed 10,000-bin histogram at 0.5 + s/2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sparsetrace.methods.base import MatrixRule, Method

if TYPE_CHECKING:
    from torch import Tensor


class Teal(Method):
    """Magnitude threshold per layer and matrix."""

    name: ClassVar[str] = "teal"
    needs_thresholds: ClassVar[bool] = True

    sparsity: float = Field(ge=0, lt=1, description="target fraction of inputs dropped, 0 <= s < 1")
    allocation: Literal["uniform"] = Field("uniform", description="how the target is spread over the matrices")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.sparsity:g}"

    def targets(self, matrix: str) -> float | None:
        return self.sparsity

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        # imported late: this module is read where torch is not installed
        from sparsetrace_kernels.reference import keep_above

        assert rule.threshold_bits is not None
        return keep_above(x, rule.threshold_bits)

    def same_mask(self, one: MatrixRule, other: MatrixRule) -> bool:
        return one.threshold_bits == other.threshold_bits
