"""Nothing dropped: the captured vector is the full input."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparsetrace.methods.base import MatrixRule, Method

if TYPE_CHECKING:
    from torch import Tensor


class Dense(Method):
    """No parameters."""

    name: ClassVar[str] = "dense"
    needs_thresholds: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return self.name

    def targets(self, matrix: str) -> float | None:
        return None

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        return None

    def same_mask(self, one: MatrixRule, other: MatrixRule) -> bool:
        return True
