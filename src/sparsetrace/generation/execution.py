"""How the rows at a site are masked, captured and multiplied by kernels: two execution paths.

| path | made for | the producer leaves | the multiply |
|---|---|---|---|
| `SparseList` | one row: single-stream decoding | a list of the kept inputs | gathers their weight rows |
| `MaskedDense` | many rows: batches, prompts, given text | the masked operand | dense |
"""

# Shape suffixes: n rows, K input features, N output features, C hidden, P parts of a site (matrices that read one
# operand), I sections of a list, L entries of a section, R rows of the ring.

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsetrace.methods import Method
from sparsetrace.model.patch import SparseProjection
from sparsetrace_kernels.add_rmsnorm import add_rmsnorm
from sparsetrace_kernels.configs import TuningTable, choose_config
from sparsetrace_kernels.decode_attention import decode_attention, decode_attention_list
from sparsetrace_kernels.list_gemv import list_gemv
from sparsetrace_kernels.masked_rows import launch_add_rmsnorm_rows, launch_mask_rows, launch_silu_mul_rows
from sparsetrace_kernels.silu_mul import silu_mul


@dataclass(slots=True)
class KernelSite:
    """What the kernels need to know of one site.

    Args:
        weight: [K, N], input-major.
        columns: of the weight, for each part.
        thresholds: int32 [P], bit patterns.
        scale: float32 [P, K], or None.
        config: of the multiply of one row, `GemvConfig.encode`.
        ring: where the operands are captured, [R, P, K]; None where they are not.
    """

    layer: int | None
    name: str
    weight: Tensor
    columns: list[slice]
    thresholds: Tensor
    scale: Tensor | None
    config: str
    ring: Tensor | None = None

    @property
    def segments(self) -> list[int]:
        """Outputs of each part."""
        return [columns.stop - columns.start for columns in self.columns]


# What a producer leaves for the multiply.
Kept = tuple[Tensor, ...]
# The arguments of `decode_attention`, but for `use_pdl`.
AttentionArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]


class ExecutionPath(Protocol):
    """How rows are masked, captured and multiplied; x is the producer's vector as stored, before masking."""

    def norm(
        self,
        residual_nC: Tensor,
        delta_nC: Tensor | None,
        weight_C: Tensor,
        eps: float,
        site: KernelSite,
        rows_n: Tensor,
    ) -> tuple[Tensor, Tensor, Kept]:
        """The new residual stream, x, and what is kept of it."""

    def attend(self, attention: AttentionArguments, site: KernelSite, rows_n: Tensor) -> tuple[Tensor, Kept]:
        """Attention of one new position of each slot, and what is kept of it."""

    def gate(self, gate_up_nN: Tensor, site: KernelSite, rows_n: Tensor) -> tuple[Tensor, Kept]:
        """SiLU(gate) * up, and what is kept of it."""

    def multiply(self, kept: Kept, site: KernelSite) -> Tensor:
        """[n, N]."""


class SparseList(ExecutionPath):
    """One row, multiplied by a list of its kept inputs."""

    def __init__(self, partials_W: Tensor, pdl: bool) -> None:
        self._partials = partials_W
        self._pdl = pdl

    def norm(
        self,
        residual_nC: Tensor,
        delta_nC: Tensor | None,
        weight_C: Tensor,
        eps: float,
        site: KernelSite,
        rows_n: Tensor,
    ) -> tuple[Tensor, Tensor, Kept]:
        delta_C = None if delta_nC is None else delta_nC[0]
        total_C, x_C, *lists = add_rmsnorm(residual_nC[0], delta_C, weight_C, eps, *self._take(site, rows_n))
        return total_C[None], x_C[None], tuple(lists)

    def attend(self, attention: AttentionArguments, site: KernelSite, rows_n: Tensor) -> tuple[Tensor, Kept]:
        thresholds, scale, ring, _, slot, pdl = self._take(site, rows_n)
        y_nK, *lists = decode_attention_list(*attention, thresholds, scale, ring, slot, pdl)
        return y_nK, tuple(lists)

    def gate(self, gate_up_nN: Tensor, site: KernelSite, rows_n: Tensor) -> tuple[Tensor, Kept]:
        x_K, *lists = silu_mul(gate_up_nN[0], *self._take(site, rows_n))
        return x_K[None], tuple(lists)

    def multiply(self, kept: Kept, site: KernelSite) -> Tensor:
        list_PIL, counts_PI = kept
        return list_gemv(list_PIL, counts_PI, site.weight, self._partials, site.segments, site.config)[None]

    def _take(
        self, site: KernelSite, rows_n: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, Tensor | None, bool]:
        slot = None if site.ring is None else rows_n
        return site.thresholds, site.scale, site.ring, None, slot, self._pdl


class MaskedDense(ExecutionPath):
    """Many rows, multiplied as masked operands, one for each part.

    Kernels are launched without torch's dispatcher, whose overhead prompts would wait for.
    """

    def __init__(self, pdl: bool) -> None:
        self._pdl = pdl

    def norm(
        self,
        residual_nC: Tensor,
        delta_nC: Tensor | None,
        weight_C: Tensor,
        eps: float,
        site: KernelSite,
        rows_n: Tensor,
    ) -> tuple[Tensor, Tensor, Kept]:
        total_nC, x_nC, operand_PnC = launch_add_rmsnorm_rows(
            residual_nC, delta_nC, weight_C, eps, site.thresholds, site.scale, rows_n, site.ring
        )
        return total_nC, x_nC, (operand_PnC,)

    def attend(self, attention: AttentionArguments, site: KernelSite, rows_n: Tensor) -> tuple[Tensor, Kept]:
        y_nK = decode_attention(*attention, self._pdl)
        return y_nK, self.mask(y_nK, site, rows_n)

    def mask(self, x_nK: Tensor, site: KernelSite, rows_n: Tensor) -> Kept:
        """The masked operands of vectors in memory."""
        return (launch_mask_rows(x_nK, site.thresholds, site.scale, rows_n, site.ring),)

    def gate(self, gate_up_nN: Tensor, site: KernelSite, rows_n: Tensor) -> tuple[Tensor, Kept]:
        x_nK, operand_nK = launch_silu_mul_rows(gate_up_nN, site.thresholds, site.scale, rows_n, site.ring)
        return x_nK, (operand_nK[None],)

    def multiply(self, kept: Kept, site: KernelSite) -> Tensor:
        (operand_PnK,) = kept
        if len(operand_PnK) == 1:
            return operand_PnK[0] @ site.weight
        parts = [
            operand_nK @ site.weight[:, columns] for operand_nK, columns in zip(operand_PnK, site.columns, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def kernel_site(module: SparseProjection, method: Method, table: TuningTable | None) -> KernelSite:
    """What the kernels need to know of an installed site.

    Args:
        module: with the rules of the site's matrices.
        method: decides by a threshold of the input alone.
        table: measured kernel configurations; None takes the heuristic's.
    """
    weight_KN = module.dense.merged()
    device, (K, N) = weight_KN.device, weight_KN.shape
    # rules of one part are alike, but for what is expected of them
    rules = [neighbours[0] for neighbours, _ in module.parts]
    bits = [method.exceeds(rule) for rule in rules]
    scale_PK = None
    if any(rule.scale is not None for rule in rules):
        # a threshold of zero drops nothing, not even an input that is scaled to zero
        ones_K = torch.ones(K, device=device)
        scale_PK = torch.stack(
            [
                rule.scale if rule.scale is not None and bound else ones_K
                for rule, bound in zip(rules, bits, strict=True)
            ]
        )
    # half, where nothing is known
    expected = [
        0.5 if rule.expected is None and bound else rule.expected or 0.0
        for rule, bound in zip(rules, bits, strict=True)
    ]
    site = module.dense.site
    return KernelSite(
        layer=site.layer,
        name=site.name,
        weight=weight_KN,
        columns=[columns for _, columns in module.parts],
        thresholds=torch.tensor(bits, dtype=torch.int32, device=device),
        scale=scale_PK,
        config=choose_config("list", K, N, weight_KN.dtype, sum(expected) / len(expected), table).encode(),
    )
