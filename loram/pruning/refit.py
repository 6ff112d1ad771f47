"""Closed-form repair of a Linear whose input features were cut.

W′ = W·C[:,K]·(C[K,K] + λ·mean(diag C[K,K])·I)⁻¹ with C = Σ x·xᵀ over the Linear's input in the large
model: the least-squares weights for reproducing W·x from the kept features (FASP 2501.09412, SlimLLM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loram.pruning.damping import DAMPING, damped_factor

STRIP = 1024


def refit_matrix(second_moment: Tensor, kept: Tensor, damping: float = DAMPING, what: str = "a weight") -> Tensor:
    """The (in, kept) matrix that W is multiplied with, fp64; features that were never active stay as they are.

    `second_moment` is (in, in), `kept` the sorted indices of the features that stay. Where the second moment is not
    positive definite, `damped_factor` damps it more, or raises MismatchError naming `what`.
    """
    inner = second_moment[kept][:, kept].double()
    if bool((inner.diagonal() == 0).all()):
        return selection(second_moment, kept)
    factor = damped_factor(inner, what, damping)
    matrix = factor.new_empty(second_moment.shape[0], kept.numel())
    for start in range(0, len(matrix), STRIP):
        # By strips: solvers copy the right-hand side, which is twice the moment's size in fp64.
        strip = second_moment[start : start + STRIP, kept].double()
        matrix[start : start + STRIP] = torch.cholesky_solve(strip.T, factor).T
    return matrix


def selection(second_moment: Tensor, kept: Tensor) -> Tensor:
    """The (in, kept) matrix that only gathers."""
    matrix = torch.zeros(len(second_moment), kept.numel(), dtype=torch.float64, device=second_moment.device)
    matrix[kept, torch.arange(kept.numel())] = 1
    return matrix


def refit(weight: Tensor, matrix: Tensor) -> Tensor:
    """W (out, in) times the refit matrix, in the weight's dtype: (out, kept)."""
    return (weight.float() @ matrix.float()).to(weight.dtype)
