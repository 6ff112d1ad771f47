"""The triangular factor of an inverse second moment, from one Cholesky factorization instead of two.

With J the reversal, J·H·J = L·Lᵀ makes R = J·L·J an upper factor of H = R·Rᵀ, so that U = R⁻¹ is the upper
factor of H⁻¹ = Uᵀ·U: the one that `cholesky(cholesky_inverse(cholesky(H)), upper=True)` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loram.pruning.damping import DAMPING, damped_factor

LEAF = 128


def inverse_factor(moment: Tensor, what: str, damping: float = DAMPING) -> Tensor:
    """U (n, n), upper triangular, of (H + λ·mean(diag H)·I)⁻¹ = Uᵀ·U for a symmetric H (n, n).

    Damping, and MismatchError naming `what`, as in `damped_factor`.
    """
    found: Tensor = invert_lower(damped_factor(moment.flip(0, 1), what, damping)).flip(0, 1)
    return found


def invert_lower(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: matrix products do the work."""
    size = factor.shape[0]
    if size <= LEAF:
        eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
        leaf: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
        return leaf
    half = size // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half] = invert_lower(factor[:half, :half])
    inverse[half:, half:] = invert_lower(factor[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ (factor[half:, :half] @ inverse[:half, :half]))
    return inverse
