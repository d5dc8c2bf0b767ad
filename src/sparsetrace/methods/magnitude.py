"""Magnitude pruning of weights: keep the largest |w| of each matrix, or N of each M inputs of an output.

Source: the baseline of github.com/locuslab/wanda lib/prune.py. Choices: as there, unstructured weights are compared
within the whole matrix; the k = KN - floor(s KN) largest stay, where the code drops all at or below the value of rank
int(KN s), one more. N of N:M counts the weights kept, where the code's `prune_n` counts those dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparsetrace.methods.weight_base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(WeightMethod):
    """|w|."""

    name: ClassVar[str] = "magnitude"
    per_output: ClassVar[bool] = False

    def score(self, weight_KN: Tensor, norms_K: Tensor | None) -> Tensor:
        from sparsetrace_kernels.torch_ops import magnitude_bits

        return magnitude_bits(weight_KN)
