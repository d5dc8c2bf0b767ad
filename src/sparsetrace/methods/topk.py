"""Top-k: keep the k = D - floor(s D) inputs of largest magnitude, for each token and matrix.

The counterpart of TEAL's threshold with exact sparsity. Choice: equal magnitudes are kept from the lower index on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sparsetrace.methods.base import MatrixRule, Method, Sparsity, kept_count

if TYPE_CHECKING:
    from torch import Tensor


class TopK(Method):
    """The same number of inputs for every token."""

    name: ClassVar[str] = "topk"

    sparsity: Sparsity = Field(description="fraction of inputs dropped, rounded down to whole inputs, 0 <= s < 1")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.sparsity:g}"

    def target(self, layer: int, matrix: str) -> float | None:
        return self.sparsity

    def most_kept(self, matrix: str, features: int) -> int | None:
        return kept_count(features, self.sparsity)

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        from sparsetrace.methods.select import keep_largest
        from sparsetrace_kernels.torch_ops import magnitude_bits

        k = kept_count(x.shape[-1], self.sparsity)
        return None if k == x.shape[-1] else keep_largest(magnitude_bits(x), k)
