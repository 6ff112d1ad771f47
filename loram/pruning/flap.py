"""FLAP (2312.11983): a unit that hardly fluctuates can be replaced by its mean.

The score is Var(Xⱼ)·‖W·ⱼ‖² over the columns of o and down, summed per unit. What was cut is replaced by its mean,
which is a bias of o or down; in the small model only, as recovery puts the units themselves back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loram.pruning.score import Score


def element(weight: Tensor, variances: Tensor) -> Tensor:
    """w² (out, in) times the variance of each input feature (in,)."""
    return weight.square() * variances


def compensation(weight: Tensor, small: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """The bias (out,), fp32, that makes small·x[kept] + bias equal weight·x for the mean input (in,).

    Where `small` (out, kept) is the weight's own columns, that is the sum of the others times their means; where it was
    refitted to centered inputs, it is the constant of the affine fit.
    """
    mean = mean.to(torch.float64)
    return (weight.double() @ mean - small.double() @ mean[kept]).float()


FLAP = Score("flap", "variances", element)
