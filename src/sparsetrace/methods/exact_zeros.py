"""No zeros but those that the model itself makes: for ReLU models.

Nothing is dropped and nothing approximated. `down` reads relu(gate) * up, most of which is zero in a model trained with
ReLU; that sparsity is exact. Source: Mirzadeh et al., ReLU Strikes Back, arXiv:2310.04564. Choice: `up` has no
`out_mask`, although its outputs under a zero gate need not be computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparsetrace.core.files import InputError
from sparsetrace.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparsetrace.formats.architecture import ModelConfig
    from sparsetrace.formats.sites import Site


class ExactZeros(Method):
    """No parameters."""

    name: ClassVar[str] = "exact_zeros"

    @property
    def label(self) -> str:
        return self.name

    def refuse_model(self, config: ModelConfig, sites: Iterable[Site]) -> None:
        if config.hidden_act != "relu":
            raise InputError(
                f"method exact_zeros: hidden_act of the model must be relu, got {config.hidden_act}, which makes no "
                "exact zeros: use `dense`, which captures the same"
            )
