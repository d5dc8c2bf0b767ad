"""The optimiser of the embedded model's matrices."""

# Shape suffixes: K input features, N output features; R = min(K, N).

import math

import torch
from torch import nn

MOMENTUM = 0.95
# Coefficients of the quintic iteration that drives singular values towards 1. Source: Keller Jordan, "Muon", 2024.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon:
    """Momentum with orthogonalised updates: all singular values of an update are brought near 1.

    The iteration is X <- F X with F = a + b A + c A^2 and A = X X^T. F commutes with A, so the iteration runs on the
    R x R matrices A alone (A <- F A F), batched over all of the model's matrices, and X is multiplied once at the end
    by the product of the F: 58 ms a step instead of 99 ms with the iteration on X, on two shared cores of an AMD EPYC
    (Zen 5).

    Args:
        matrices: [K, N] each, with the same smaller side R.
    """

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the matrices from their gradients."""
        updates = []
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            update = matrix.grad.lerp(momentum, MOMENTUM)
            update = update.T if update.shape[0] > update.shape[1] else update
            updates.append(update / (update.norm() + 1e-7))
        a, b, c = QUINTIC
        gram_MRR = torch.stack([update @ update.T for update in updates])
        identity_RR = torch.eye(gram_MRR.shape[1], device=gram_MRR.device)
        product_MRR = identity_RR.expand_as(gram_MRR)
        for _ in range(ITERATIONS):
            factor_MRR = a * identity_RR + b * gram_MRR + c * gram_MRR @ gram_MRR
            product_MRR = factor_MRR @ product_MRR
            gram_MRR = factor_MRR @ gram_MRR @ factor_MRR
        for matrix, update, product_RR in zip(self.matrices, updates, product_MRR, strict=True):
            K, N = matrix.shape
            orthogonal = product_RR @ update
            # the outputs' root mean square is the same whatever the shape
            matrix.add_(orthogonal.T if K > N else orthogonal, alpha=-learning_rate * math.sqrt(max(1.0, N / K)))
