"""Nothing dropped: the captured vector is the full input."""

from typing import ClassVar

from sparsetrace.methods.base import MatrixRule, Method


class Dense(Method):
    """No parameters."""

    name: ClassVar[str] = "dense"

    @property
    def label(self) -> str:
        return self.name

    def exceeds(self, rule: MatrixRule) -> int | None:
        return 0
