"""Base class of the methods: parameters that config checks, what a method needs from calibration, and its masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from sparsetrace.formats.sites import Leaf, Parts, Site, layer_sites

if TYPE_CHECKING:
    from torch import Tensor

    from sparsetrace.formats.architecture import ModelConfig

Sparsity = Annotated[float, Field(ge=0, lt=1)]
# What a method's thresholds are quantiles of: |x| at the site, which calibration always counts; float32 |x| * scale of
# each matrix; or the model's activation function of `gate`. The last two are counted where a study's methods ask.
Score = Literal["input", "scaled", "gate"]


@dataclass(frozen=True, slots=True)
class MatrixRule:
    """What calibration settled for one layer and matrix.

    Args:
        layer: layer number.
        matrix: name of the matrix.
        threshold_bits: bit pattern of the threshold of the score, kept strictly above: in the model's dtype, or in
            float32 where the method's score is `scaled`; None where there is no threshold.
        scale: float32 [K], what |x| is multiplied with before it is compared; `Method.scale` of the weight, set when
            the method is installed.
        expected: share of inputs dropped, which chooses kernel configurations and nothing else; None where unknown.
    """

    layer: int
    matrix: str
    threshold_bits: int | None
    scale: Tensor | None = field(default=None, compare=False)
    expected: float | None = field(default=None, compare=False)


class Method(BaseModel):
    """Parameters of one method setting; a subclass adds fields and overrides what it does.

    Most methods override only `label`, `target` and `keep`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    # What thresholds are quantiles of; None for a method that never has any.
    score: ClassVar[Score | None] = None
    # Matrices of which the method says which outputs are not computed (`keep_outputs`).
    out_masks: ClassVar[tuple[str, ...]] = ()
    # Whether `keep_outputs` must see a sequence's dense positions before it can decide.
    needs_dense_prefill: ClassVar[bool] = False
    # Whether one set of outputs serves a whole sequence.
    outputs_by_sequence: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Default folder name of this setting, unique among settings that differ."""
        raise NotImplementedError

    @property
    def needs_thresholds(self) -> bool:
        """Whether any matrix needs a threshold."""
        return self.score is not None

    def needs_threshold(self, matrix: str) -> bool:
        """Whether the rule of a matrix must have a threshold; a method is not installed without."""
        return self.needs_thresholds

    def target(self, layer: int, matrix: str) -> float | None:
        """Target sparsity of a matrix's input, None where the method has none or an allocation decides."""
        return None

    def histogram(self, site: Site, matrix: str) -> str:
        """Name of the distribution, among those of the site's layer, that a matrix's threshold is a quantile of."""
        match self.score:
            case "scaled":
                return f"{self.name}.{matrix}"
            case "gate":
                return self.name
            case _:
                return site.name

    def needs(self, sites: Iterable[Site]) -> tuple[Leaf, ...]:
        """Layer and name of the distributions that calibration must have counted, in the order of execution."""
        return tuple(
            dict.fromkeys(
                (site.layer, self.histogram(site, matrix))
                for site in layer_sites(sites)
                for matrix in site.matrices
                if self.needs_threshold(matrix)
            )
        )

    def refuse_model(self, config: ModelConfig, sites: Iterable[Site]) -> None:
        """Refuse a model that the method does not fit.

        Raises:
            InputError: names what does not fit.
        """

    @staticmethod
    def scale(weight_KN: Tensor) -> Tensor | None:
        """What a matrix's |x| is multiplied with, float32 [K]; None for nothing."""
        return None

    def keep(self, x: Tensor, rule: MatrixRule) -> Tensor | None:
        """Which inputs stay.

        Args:
            x: [..., K] the site's vectors, already rounded to the model's dtype.
            rule: of the matrix that is about to read x.

        Returns:
            [..., K] bool, or None where everything stays. A kept zero is not stored: the mask of the data set is
            that of the operand's nonzeros.
        """
        return None

    def exceeds(self, rule: MatrixRule) -> int | None:
        """The bit pattern that |x|, times the rule's `scale` where it has one, must exceed to be kept.

        Returns:
            None where no such pattern decides, so that the sparse kernels cannot run the method; 0 where everything
            stays.
        """
        return None

    def most_kept(self, matrix: str, features: int) -> int | None:
        """How many inputs a row of a matrix keeps, zeros among them; None where the number varies.

        `verify` checks data by this and the next two: it knows the operand, but not what it was chosen from.
        """
        return None

    def most_of_neighbours(self) -> tuple[int, int] | None:
        """(N, M) where at most N of each M neighbouring inputs are kept."""
        return None

    def dropped_outputs(self, outputs: int) -> int | None:
        """How many outputs of each matrix in `out_masks` every row leaves out; None where the number varies."""
        return None

    def same_mask(self, one: MatrixRule, other: MatrixRule) -> bool:
        """Whether two matrices of one site keep the same inputs whatever x is, so that they share one operand."""
        return True

    def parts(self, rules: list[MatrixRule]) -> list[list[MatrixRule]]:
        """The rules of a site's matrices, in order, grouped: neighbours that read the same operand form one part."""
        parts: list[list[MatrixRule]] = []
        for rule in rules:
            if parts and self.same_mask(parts[-1][0], rule):
                parts[-1].append(rule)
            else:
                parts.append([rule])
        return parts

    def keep_outputs(
        self,
        active_BTN: Tensor,
        up_BTN: Tensor,
        rule: MatrixRule,
        dense_BT: Tensor | None,
        memory: dict[str, Tensor],
    ) -> Tensor | None:
        """Which outputs of the matrices in `out_masks` are computed.

        Args:
            active_BTN: activation function of the outputs of `gate` in this pass, in the model's dtype.
            up_BTN: outputs of `up`, likewise.
            rule: of `up`.
            dense_BT: bool, positions of sequences that run dense in this pass; None where there are none.
            memory: what the method remembers of this layer, by slot; empty when a group of sequences begins.

        Returns:
            bool, broadcast to [B, T, N], for the positions that are sparsified; None where everything is computed.
        """
        return None


def operand_parts(method: Method, sites: Iterable[Site], rules: list[MatrixRule]) -> Parts:
    """Which matrices of each site read one operand.

    Args:
        method: decides about the sites within layers; the matrices of any other site read the vector as it is.
        sites: of the model, or some of them.
        rules: of at least the matrices of these sites that lie within layers.
    """
    by_matrix: dict[Leaf, MatrixRule] = {(rule.layer, rule.matrix): rule for rule in rules}
    return {
        site.key: [list(site.matrices)]
        if site.layer is None
        else [[rule.matrix for rule in part] for part in method.parts([by_matrix[leaf] for leaf in site.leaves])]
        for site in sites
    }


def kept_count(features: int, sparsity: float) -> int:
    """How many of `features` stay: all but the whole part of sparsity * features."""
    # repr: the sparsity that the user wrote, not its nearest binary fraction
    return features - int(Fraction(repr(sparsity)) * features)
