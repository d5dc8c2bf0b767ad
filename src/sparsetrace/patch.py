"""Installing a method in a model, and observing one, from outside: the only place where a model is altered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrace.files import InputError
from sparsetrace.methods import MatrixRule, Method
from sparsetrace.model import Block, Decoder, Projection
from sparsetrace.schema import SITES
from sparsetrace_kernels.reference import mask_operand

Record = Callable[[int, str, Tensor], None]


class Patch:
    """A method installed in a model; the engine sets the two attributes before each forward pass.

    Args:
        method: decides the masks.

    Attributes:
        sparsified_BT: which rows of the coming pass the method applies to; True for all, False for none.
        record: called as record(layer, matrix, operand [B, T, K]) with the tensor that the multiply consumes.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.sparsified_BT: Tensor | bool = False
        self.record: Record | None = None


class SparseProjection(nn.Module):
    """A `Projection` whose input is masked first, matrix by matrix.

    Args:
        dense: the projection it stands for.
        patch: shared by the whole model.
        rules: one per matrix of the site, in order.
    """

    def __init__(self, dense: Projection, patch: Patch, rules: list[MatrixRule]) -> None:
        super().__init__()
        self.dense = dense
        self.patch = patch
        self.parts: list[tuple[list[MatrixRule], slice]] = []
        for rule in rules:
            columns = dense.columns[rule.matrix]
            if self.parts and patch.method.same_mask(self.parts[-1][0][0], rule):
                # one masking and one multiply serve neighbours that read the same operand
                neighbours, reach = self.parts[-1]
                self.parts[-1] = ([*neighbours, rule], slice(reach.start, columns.stop))
            else:
                self.parts.append(([rule], columns))

    def forward(self, x_BTK: Tensor) -> Tensor:
        patch = self.patch
        if patch.sparsified_BT is False:
            y: Tensor = self.dense(x_BTK)
            return y
        parts_y = []
        for rules, columns in self.parts:
            keep = patch.method.keep(x_BTK, rules[0])
            operand_BTK = mask_operand(x_BTK, torch.ones_like(x_BTK, dtype=torch.bool) if keep is None else keep)
            if isinstance(patch.sparsified_BT, Tensor):
                operand_BTK = torch.where(patch.sparsified_BT[..., None], operand_BTK, x_BTK)
            if patch.record is not None:
                for rule in rules:
                    patch.record(rule.layer, rule.matrix, operand_BTK)
            parts_y.append(operand_BTK @ self.dense.weight[:, columns])
        return parts_y[0] if len(parts_y) == 1 else torch.cat(parts_y, dim=-1)


def install(model: Decoder, method: Method, rules: list[MatrixRule]) -> Patch:
    """Replace every projection of `model` by a sparse one.

    Args:
        model: is altered.
        method: decides the masks.
        rules: one per layer and matrix.

    Raises:
        InputError: a matrix has no rule, or a rule lacks the threshold that the method needs.
    """
    by_matrix = {(rule.layer, rule.matrix): rule for rule in rules}
    wanted = [(layer, matrix) for layer in range(len(model.layers)) for matrix in chain(*SITES.values())]
    if missing := [f"layer {layer} {matrix}" for layer, matrix in wanted if (layer, matrix) not in by_matrix]:
        raise InputError(f"thresholds: every matrix must have a row, got none for {', '.join(missing)}")
    if len(by_matrix) != len(wanted):
        raise InputError(f"thresholds: rows must be those of a model of {len(model.layers)} layers, got {len(rules)}")
    if method.needs_thresholds:
        bare = [f"layer {r.layer} {r.matrix}" for r in rules if r.threshold_bits is None]
        if bare:
            raise InputError(f"thresholds: method {method.name} needs a threshold, got none for {', '.join(bare)}")
    patch = Patch(method)
    for layer, site, projection in projections(model):
        site_rules = [by_matrix[layer, matrix] for matrix in SITES[site]]
        setattr(model.layers[layer], site, SparseProjection(projection, patch, site_rules))
    return patch


@contextmanager
def observe(model: Decoder, see: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """Within the block, call see(layer, site, x [B, T, K]) with each vector that enters a projection."""

    def hook(layer: int, site: str, projection: Projection) -> RemovableHandle:
        return projection.register_forward_pre_hook(lambda _, inputs: see(layer, site, inputs[0]))

    handles = [hook(*place) for place in projections(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def projections(model: Decoder) -> Iterator[tuple[int, str, Projection]]:
    """Every (layer, site, projection), in the order of execution."""
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for site in SITES:
            yield layer, site, getattr(block, site)
