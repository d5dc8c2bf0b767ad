"""What sparsifying one layer does to its output, while every layer before it runs dense."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsetrace.calibration.histogram import Histograms
from sparsetrace.calibration.layer_inputs import block_inputs
from sparsetrace.calibration.target import Target, threshold_row
from sparsetrace.methods import MatrixRule, ThresholdMethod
from sparsetrace.model.decoder import Block, Decoder
from sparsetrace.model.patch import install_block

# Shape suffixes: B sequences, T positions, C channels.

# Positions of a sequence that are sparsified, and those that the error is taken on; both from the end.
SPARSIFIED_SHARE, ERROR_SHARE = 0.5, 0.25


class BlockTrial:
    """One layer with a method installed, its inputs in the dense model, and its dense output.

    Args:
        decoder: the dense model; its layer is altered.
        passes: token ids and positions of the text that the error is taken on.
        layer: which.
        method: whose masks are tried.
        histograms: that thresholds are looked up in.
    """

    def __init__(
        self,
        decoder: Decoder,
        passes: Iterable[tuple[Tensor, Tensor]],
        layer: int,
        method: ThresholdMethod,
        histograms: Histograms,
    ) -> None:
        self.layer = layer
        self.method = method
        self.histograms = histograms
        self.inputs = list(block_inputs(decoder, passes, layer))
        block = decoder.layers[layer]
        assert isinstance(block, Block)
        self.block = block
        self.dense_outputs = [
            block(*inputs)[:, _tail(inputs[0].shape[1], ERROR_SHARE)].float() for inputs in self.inputs
        ]
        dense = {matrix: 0.0 for site in block.sites for matrix in site.matrices}
        self.patch = install_block(block, method, self._rules(dense))

    def error(self, sparsities: dict[str, float]) -> float:
        """Mean, over sequences and channels, of the norm of the output's error over positions.

        Args:
            sparsities: target of each matrix.
        """
        self.patch.set_rules(self._rules(sparsities))
        total, count = 0.0, 0
        for inputs, dense_BTC in zip(self.inputs, self.dense_outputs, strict=True):
            B, T, _ = inputs[0].shape
            sparsified_T = torch.zeros(T, dtype=torch.bool, device=dense_BTC.device)
            sparsified_T[_tail(T, SPARSIFIED_SHARE)] = True
            self.patch.sparsified_BT = sparsified_T.expand(B, T)
            y_BTC = self.block(*inputs)[:, _tail(T, ERROR_SHARE)].float()
            norms_BC = (y_BTC - dense_BTC).norm(dim=1)
            total += float(norms_BC.double().sum())
            count += norms_BC.numel()
        return total / count

    def _rules(self, sparsities: dict[str, float]) -> list[MatrixRule]:
        rows = [
            threshold_row(self.histograms, self.method, self.layer, matrix, Target(sparsity))
            for matrix, sparsity in sparsities.items()
        ]
        return [MatrixRule(row["layer"], row["matrix"], row["threshold_bits"]) for row in rows]


def _tail(length: int, share: float) -> slice:
    """The last positions of a sequence."""
    return slice(length - int(length * share), length)
