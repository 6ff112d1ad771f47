"""Magnitude: the squared L2 norm of everything a unit owns. Needs the weights alone, so it streams."""

from __future__ import annotations

from torch import Tensor

from loram.pruning.score import Score


def element(weight: Tensor, _: Tensor) -> Tensor:
    """w²."""
    return weight.square()


MAGNITUDE = Score("magnitude", "weights", element)
