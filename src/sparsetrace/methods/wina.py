"""WINA: keep where |x_j| * ||W_:,j|| is large, with the norm over the outputs that input j feeds.

Source: Chen et al., WINA: Weight Informed Neuron Activation, arXiv:2505.19427, and github.com/microsoft/wina. Choices:
the paper scores every matrix by its own norms, which is done here; its code does so for `k` and `gate` alone and takes
1 for the others, whose columns an orthogonal transform of the checkpoint has normalised before. Norms are computed in
float64 and rounded to float32, the product in float32. The code keeps int(D (1 - s)) inputs of the last 99 % of a
prompt by `topk` and by default; here it is D - floor(s D), and `decoding.prefill` decides about prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sparsetrace.methods.base import MatrixRule, Score, kept_count
from sparsetrace.methods.threshold_base import ThresholdMethod

if TYPE_CHECKING:
    from torch import Tensor


class Wina(ThresholdMethod):
    """Top-k of each token, or a threshold for each matrix."""

    name: ClassVar[str] = "wina"
    score: ClassVar[Score | None] = "scaled"

    select: Literal["topk", "threshold"] = Field(
        "topk", description="topk: the same number of inputs for every token; threshold: calibrated, per matrix"
    )

    @model_validator(mode="before")
    @classmethod
    def _topk_is_uniform(cls, values: Any) -> Any:
        topk = isinstance(values, dict) and values.get("select", "topk") == "topk"
        if topk and values.get("allocation", "uniform") != "uniform":
            raise ValueError(f"allocation must be uniform with select topk, got {values['allocation']!r}")
        return values

    @classmethod
    def with_thresholds(cls, sparsity: float) -> Self:
        return cls(sparsity=sparsity, select="threshold")

    @property
    def label(self) -> str:
        label = super().label
        return label if self.select == "topk" else label.replace(self.name, f"{self.name}-threshold", 1)

    @property
    def needs_thresholds(self) -> bool:
        return self.select == "threshold"

    @staticmethod
    def scale(weight_KN: Tensor) -> Tensor | None:
        return weight_KN.double().norm(dim=-1).float()

    def most_kept(self, matrix: str, features: int) -> int | None:
        if self.select == "threshold":
            return None
        assert self.sparsity is not None
        return kept_count(features, self.sparsity)

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        from sparsetrace.methods.select import keep_largest
        from sparsetrace_kernels.torch_ops import keep_above, magnitude_bits

        assert rule.scale is not None
        if self.select == "topk":
            assert self.sparsity is not None
            k = kept_count(x.shape[-1], self.sparsity)
            if k == x.shape[-1]:
                return None
            return keep_largest(magnitude_bits(x.float().abs() * rule.scale), k)
        assert rule.threshold_bits is not None
        # threshold 0 drops nothing, not even an input whose weights are all zero
        return keep_above(x.float().abs() * rule.scale, rule.threshold_bits) if rule.threshold_bits else None

    def exceeds(self, rule: MatrixRule) -> int | None:
        return rule.threshold_bits if self.select == "threshold" else None

    def same_mask(self, one: MatrixRule, other: MatrixRule) -> bool:
        if self.select == "topk":
            return self.sparsity == 0
        return one.threshold_bits == 0 == other.threshold_bits
