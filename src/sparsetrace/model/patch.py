"""Installing a method in a model, and observing a model, from outside: no other module alters one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.formats.sites import Leaf, Parts, Site, SiteKey, by_leaf, layer_sites
from sparsetrace.methods import MatrixRule, Method, operand_parts
from sparsetrace.model.decoder import ACTIVATIONS, Block, Decoder, Projection
from sparsetrace_kernels.torch_ops import mask_operand

Record = Callable[[int, str, Tensor], None]


class Patch:
    """A method installed in a model; the engine sets the attributes before each forward pass.

    Args:
        method: decides the masks.
        config: of the model.
        sites: the sites that the method decides about, those within layers.

    Attributes:
        sparsified_BT: rows of the coming pass that the method applies to; True for all, False for none.
        dense_BT: rows that belong to a sequence and run dense; None for none. For methods that look at a sequence's
            prompt before they decide.
        record: called as record(layer, matrix, operand [B, T, K]) with the tensor that the multiply consumes.
        record_outputs: called as record_outputs(layer, matrix, dropped bool [B, T, N]) with the outputs that are not
            computed, for the matrices that the method names.
        modules: the sparse projections, by (layer, site).
    """

    def __init__(self, method: Method, config: ModelConfig, sites: tuple[Site, ...]) -> None:
        self.method = method
        self.config = config
        self.sites = sites
        self.sparsified_BT: Tensor | bool = False
        self.dense_BT: Tensor | None = None
        self.record: Record | None = None
        self.record_outputs: Record | None = None
        self.modules: dict[SiteKey, SparseProjection] = {}
        self._memory: dict[int, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Begin a new group of sequences: drop what the method remembers of the last one."""
        self._memory = {}

    def memory(self, layer: int) -> dict[str, Tensor]:
        """What the method remembers of the group's sequences in one layer; the method writes into it."""
        return self._memory.setdefault(layer, {})

    @property
    def rules(self) -> list[MatrixRule]:
        """The rules of all matrices, in the order of execution."""
        return [rule for module in self.modules.values() for rule in module.rules.values()]

    @property
    def parts(self) -> Parts:
        """The matrices of each site, grouped: those of one group read the same operand."""
        return operand_parts(self.method, self.sites, self.rules)

    def set_rules(self, rules: list[MatrixRule]) -> None:
        """Replace the rules of every site that `rules` name; a site's rules come together."""
        for module in self.modules.values():
            own = [rule for rule in rules if (rule.layer, rule.matrix) in module.dense.site.leaves]
            if own:
                module.set_rules([replace(rule, scale=module.rules[rule.matrix].scale) for rule in own])

    def put(self, model: Decoder, *, sparse: bool = True) -> None:
        """Put the sparse projections into the model that they were made for, or the dense ones back."""
        for module in self.modules.values():
            site = module.dense.site
            assert site.layer is not None
            setattr(model.layers[site.layer], site.name, module if sparse else module.dense)


class SparseProjection(nn.Module):
    """A `Projection` whose input is masked first, matrix by matrix.

    Args:
        dense: the projection that it replaces.
        patch: the patch that it belongs to, shared by the whole model.
        rules: one per matrix of the site, in order.

    Attributes:
        rules: by matrix.
        parts: neighbouring matrices that read the same operand, as their rules and their columns of the merged weight.
    """

    def __init__(self, dense: Projection, patch: Patch, rules: list[MatrixRule]) -> None:
        super().__init__()
        self.dense = dense
        self.patch = patch
        scales = {rule.matrix: patch.method.scale(dense.matrix(rule.matrix)) for rule in rules}
        self.set_rules([replace(rule, scale=scales[rule.matrix]) for rule in rules])

    def set_rules(self, rules: list[MatrixRule]) -> None:
        """Replace the rules, one per matrix of the site, in order."""
        self.rules = {rule.matrix: rule for rule in rules}
        columns = self.dense.columns
        # neighbours that read the same operand share one masking and one multiply
        self.parts = [
            (part, slice(columns[part[0].matrix].start, columns[part[-1].matrix].stop))
            for part in self.patch.method.parts(rules)
        ]

    def forward(self, x_BTK: Tensor) -> Tensor:
        patch = self.patch
        if patch.sparsified_BT is False:
            y: Tensor = self.dense(x_BTK)
            if patch.method.needs_dense_prefill and patch.dense_BT is not None and "up" in self.rules:
                self._keep_outputs(y)
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
            parts_y.append(self.dense.product(operand_BTK, columns))
        y = parts_y[0] if len(parts_y) == 1 else torch.cat(parts_y, dim=-1)
        if patch.method.out_masks and "up" in self.rules:
            y = self._drop_outputs(y)
        return y

    def _keep_outputs(self, y_BTN: Tensor) -> Tensor | None:
        """Which outputs the method keeps; None for all. Lets the method look at dense positions too."""
        gate_BTN, up_BTN = (y_BTN[..., self.dense.columns[matrix]] for matrix in ("gate", "up"))
        active_BTN = ACTIVATIONS[self.patch.config.hidden_act](gate_BTN)
        rule = self.rules["up"]
        memory = self.patch.memory(rule.layer)
        return self.patch.method.keep_outputs(active_BTN, up_BTN, rule, self.patch.dense_BT, memory)

    def _drop_outputs(self, y_BTN: Tensor) -> Tensor:
        """Set the outputs to zero that the method does not compute, and record which."""
        patch = self.patch
        keep = self._keep_outputs(y_BTN)
        outputs = {matrix: y_BTN[..., columns] for matrix, columns in self.dense.columns.items()}
        dropped = torch.zeros_like(outputs["up"], dtype=torch.bool)
        if keep is not None:
            dropped = dropped | ~keep
            if isinstance(patch.sparsified_BT, Tensor):
                dropped &= patch.sparsified_BT[..., None]
        for matrix in patch.method.out_masks:
            if patch.record_outputs is not None:
                patch.record_outputs(self.rules[matrix].layer, matrix, dropped)
            outputs[matrix] = outputs[matrix].masked_fill(dropped, 0)
        return y_BTN if keep is None else torch.cat(list(outputs.values()), dim=-1)


def install(model: Decoder, method: Method, rules: list[MatrixRule]) -> Patch:
    """Replace every projection of `model` by a sparse one.

    Args:
        model: the model to alter.
        method: decides the masks.
        rules: one per layer and matrix.

    Raises:
        InputError: a matrix has no rule, a rule lacks a threshold that the method needs, or the method does not fit the
            model.
    """
    by_matrix: dict[Leaf, MatrixRule] = {(rule.layer, rule.matrix): rule for rule in rules}
    sites = layer_sites(model.sites)
    wanted = by_leaf(sites)
    if missing := [f"layer {layer} {matrix}" for layer, matrix in wanted if (layer, matrix) not in by_matrix]:
        raise InputError(f"thresholds: every matrix must have a row, got none for {', '.join(missing)}")
    if len(by_matrix) != len(wanted):
        raise InputError(f"thresholds: rows must be those of a model of {len(model.layers)} layers, got {len(rules)}")
    bare = [
        f"layer {rule.layer} {rule.matrix}"
        for rule in rules
        if method.needs_threshold(rule.matrix) and rule.threshold_bits is None
    ]
    if bare:
        raise InputError(f"thresholds: method {method.name} needs a threshold, got none for {', '.join(bare)}")
    method.refuse_model(model.config, model.sites)
    patch = Patch(method, model.config, sites)
    for layer, site, projection in projections(model):
        site_rules = [by_matrix[leaf] for leaf in projection.site.leaves]
        patch.modules[layer, site] = SparseProjection(projection, patch, site_rules)
    patch.put(model)
    return patch


def install_block(block: Block, method: Method, rules: list[MatrixRule]) -> Patch:
    """Install a method in a single layer; `rules` are those of its matrices."""
    patch = Patch(method, block.config, block.sites)
    by_matrix = {rule.matrix: rule for rule in rules}
    for site in block.sites:
        module = SparseProjection(getattr(block, site.name), patch, [by_matrix[matrix] for matrix in site.matrices])
        patch.modules[site.key] = module
        setattr(block, site.name, module)
    return patch


@contextmanager
def observe(
    model: Decoder,
    see: Callable[[int, str, Tensor], None],
    see_output: Callable[[int, str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Within the `with` block, see what enters every projection, and what leaves it.

    Args:
        model: gets hooks, which are removed at the end of the block.
        see: called as see(layer, site, x [B, T, K]) with what enters.
        see_output: called as see_output(layer, site, y [B, T, N]) with what leaves, all matrices of the site side by
            side; None for no such calls.
    """

    def hook(layer: int, site: str, projection: Projection) -> Iterator[RemovableHandle]:
        yield projection.register_forward_pre_hook(lambda _, inputs: see(layer, site, inputs[0]))
        if see_output is not None:
            yield projection.register_forward_hook(lambda _module, _inputs, y: see_output(layer, site, y))

    handles = [handle for place in projections(model) for handle in hook(*place)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def projections(model: Decoder) -> Iterator[tuple[int, str, Projection]]:
    """Every projection with its layer and the name of its site, in the order of execution."""
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for site in block.sites:
            yield layer, site.name, getattr(block, site.name)
