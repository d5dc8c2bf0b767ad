"""Wanda pruning of weights: keep the largest |w_kn| * ||x_k|| of each output, with the norm over a calibration text.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695, and
github.com/locuslab/wanda. Choices: as in its code, layers are pruned in order, and the inputs of each come from the
pruned layers before it; norms are summed in float64 and rounded to float32, the product in float32. Equal scores are
kept from the lower input on, where the code's stable sort drops those first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparsetrace.methods.weight_base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(WeightMethod):
    """|w| times the norm of its input."""

    name: ClassVar[str] = "wanda"
    needs_norms: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def score(self, weight_KN: Tensor, norms_K: Tensor | None) -> Tensor:
        from sparsetrace_kernels.torch_ops import magnitude_bits

        assert norms_K is not None
        return magnitude_bits(weight_KN.float().abs() * norms_K.float()[:, None])
