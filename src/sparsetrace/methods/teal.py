"""TEAL: keep |x| > t, with t from the distribution of the site's activations.

Source: Liu et al., Training-Free Activation Sparsity in Large Language Models, arXiv:2408.14690. Choice: t is the exact
quantile of |x| (see `sparsetrace.calibration.histogram`), where TEAL's code reads a signed 10,000-bin histogram at
0.5 + s/2; `sparsetrace import-teal` gives TEAL's own thresholds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparsetrace.methods.base import MatrixRule, Score
from sparsetrace.methods.threshold_base import ThresholdMethod

if TYPE_CHECKING:
    from torch import Tensor


class Teal(ThresholdMethod):
    """Magnitude threshold per layer and matrix."""

    name: ClassVar[str] = "teal"
    score: ClassVar[Score | None] = "input"

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        # imported late: this module is read where torch is not installed
        from sparsetrace_kernels.torch_ops import keep_above

        assert rule.threshold_bits is not None
        return keep_above(x, rule.threshold_bits)

    def exceeds(self, rule: MatrixRule) -> int | None:
        return rule.threshold_bits
