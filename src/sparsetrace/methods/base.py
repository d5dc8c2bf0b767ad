"""What every method is: parameters that config can check, and a function from x to a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MatrixRule:
    """What calibration settled for one layer and matrix.

    Args:
        layer: layer number.
        matrix: one of `q k v o gate up down`.
        threshold_bits: magnitude as bit pattern in the model's dtype, kept strictly above; None where not calibrated.
    """

    layer: int
    matrix: str
    threshold_bits: int | None


class Method(BaseModel):
    """Parameters of one method setting; subclasses add fields and `keep`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    # True where `keep` reads `MatrixRule.threshold_bits`, so that generation refuses to start without them.
    needs_thresholds: ClassVar[bool]

    @property
    def label(self) -> str:
        """Default folder name of this setting, unique among settings that differ."""
        raise NotImplementedError

    def targets(self, matrix: str) -> float | None:
        """Target sparsity of a matrix, None where the method has none."""
        raise NotImplementedError

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        """Which inputs stay.

        Args:
            x: [..., K] the site's vectors, already rounded to the model's dtype.
            rule: of the matrix that is about to read x.

        Returns:
            [..., K] bool, or None where everything stays. A kept zero is not stored: the mask of the data set is
            that of the operand's nonzeros.
        """
        raise NotImplementedError

    def same_mask(self, one: MatrixRule, other: MatrixRule) -> bool:
        """Whether two matrices of one site keep the same inputs whatever x is, so that one masking serves both."""
        raise NotImplementedError
