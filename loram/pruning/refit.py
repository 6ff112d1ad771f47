"""Closed-form repair of a Linear whose input features were cut.

W′ = W·C[:,K]·(C[K,K] + λ·mean(diag C[K,K])·I)⁻¹ with C = Σ x·xᵀ over the Linear's input in the large
model: the least-squares weights for reproducing W·x from the kept features (FASP 2501.09412, SlimLLM).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01


def refit_matrix(second_moment: Tensor, kept: Tensor, damping: float = DAMPING) -> Tensor:
    """The (in, kept) matrix that W is multiplied with, fp64; features that were never active stay as they are.

    `second_moment` is (in, in), `kept` the sorted indices of the features that stay.
    """
    moment = second_moment.double()
    inner = moment[kept][:, kept]
    scale = inner.diagonal().mean()
    if not scale > 0:
        return selection(moment.shape[0], kept)
    inner.diagonal().add_(damping * scale)
    factor = torch.linalg.cholesky(inner)
    return torch.cholesky_solve(moment[kept], factor).T


def selection(size: int, kept: Tensor) -> Tensor:
    """The (size, kept) matrix that only gathers."""
    matrix = torch.zeros(size, kept.numel(), dtype=torch.float64)
    matrix[kept, torch.arange(kept.numel())] = 1
    return matrix


def refit(weight: Tensor, matrix: Tensor) -> Tensor:
    """W (out, in) times the refit matrix, in the weight's dtype: (out, kept)."""
    return (weight.float() @ matrix.float()).to(weight.dtype)
