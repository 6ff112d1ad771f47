"""The Cholesky factor of a second moment, which calibration text may leave singular: damped, and where need be more."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from loram.errors import MismatchError

logger = logging.getLogger(__name__)

DAMPING = 0.01
ATTEMPTS = 4


def damped_factor(moment: Tensor, what: str, damping: float = DAMPING) -> Tensor:
    """The lower L of H + λ·mean(diag H)·I = L·Lᵀ for a symmetric H (n, n), whose diagonal is overwritten.

    Where that is not positive definite, λ grows tenfold with a warning; after three times MismatchError names
    `what`. Features that were never active count as independent of all others.
    """
    diagonal = moment.diagonal().clone()
    mean = diagonal.mean()
    for attempt in range(ATTEMPTS if bool(mean > 0) else 0):
        strength = damping * 10**attempt
        moment.diagonal().copy_(diagonal + (strength * mean + (diagonal == 0) * mean))
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not int(failed):
            found: Tensor = factor
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
