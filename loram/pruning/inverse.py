"""The triangular factor of an inverse second moment, from one Cholesky factorization instead of two.

With J the reversal, J·H·J = L·Lᵀ makes R = J·L·J an upper factor of H = R·Rᵀ, so that U = R⁻¹ is the upper
factor of H⁻¹ = Uᵀ·U: the one that `cholesky(cholesky_inverse(cholesky(H)), upper=True)` gives.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from loram.errors import MismatchError

logger = logging.getLogger(__name__)

DAMPING = 0.01
ATTEMPTS = 4
LEAF = 128


def inverse_factor(moment: Tensor, what: str, damping: float = DAMPING) -> Tensor:
    """U (n, n), upper triangular, of (H + λ·mean(diag H)·I)⁻¹ = Uᵀ·U for a symmetric H (n, n).

    Where that is not positive definite, λ grows tenfold with a warning; after three times MismatchError names
    `what`. Features that were never active count as independent of all others.
    """
    mean = moment.diagonal().mean()
    for attempt in range(ATTEMPTS if bool(mean > 0) else 0):
        strength = damping * 10**attempt
        flipped = moment.flip(0, 1)
        flipped.diagonal().add_(strength * mean + (flipped.diagonal() == 0) * mean)
        factor, failed = torch.linalg.cholesky_ex(flipped)
        if not int(failed):
            found: Tensor = invert_lower(factor).flip(0, 1)
            return found
        logger.warning(
            "the second moment of the input of %s is not positive definite with damping %g; trying %g",
            what,
            strength,
            strength * 10,
        )
    raise MismatchError(
        f"the second moment of the input of {what} is not positive definite, whatever the damping; the inputs are "
        "zero, NaN or Inf: calibrate with other text (--calibration), or check the model's weights"
    )


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
