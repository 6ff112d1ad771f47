"""Closed-form repair of a Linear whose input features were cut.

W′ = W·C[:,K]·(C[K,K] + λ·mean(diag C[K,K])·I)⁻¹ with C = Σ x·xᵀ over the Linear's input in the large
model: the least-squares weights for reproducing W·x from the kept features (FASP 2501.09412, SlimLLM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loram.pruning.damping import DAMPING, damped_factor


def refit_matrix(second_moment: Tensor, kept: Tensor, damping: float = DAMPING, what: str = "a weight") -> Tensor:
    """The (in, kept) matrix that W is multiplied with, fp64; features that were never active stay as they are.

    `second_moment` is (in, in), `kept` the sorted indices of the features that stay. Where the second moment is not
    positive definite, `damped_factor` damps it more, or raises MismatchError naming `what`.
    """
    some = second_moment[kept].double()
    inner = some[:, kept]
    if bool((inner.diagonal() == 0).all()):
        return selection(second_moment.shape[0], kept)
    factor = damped_factor(inner, what, damping)
    return torch.cholesky_solve(some, factor).T


def selection(size: int, kept: Tensor) -> Tensor:
    """The (size, kept) matrix that only gathers."""
    matrix = torch.zeros(size, kept.numel(), dtype=torch.float64)
    matrix[kept, torch.arange(kept.numel())] = 1
    return matrix


def refit(weight: Tensor, matrix: Tensor) -> Tensor:
    """W (out, in) times the refit matrix, in the weight's dtype: (out, kept)."""
    return (weight.float() @ matrix.float()).to(weight.dtype)
