"""First-order Taylor (LLM-Pruner's param_first, 2305.11627): Σ |w·∂L/∂w| over the coupled group."""

from __future__ import annotations

from torch import Tensor

from loram.pruning.score import Score


def element(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w·g|, both (out, in)."""
    return (weight * gradient).abs()


TAYLOR = Score("taylor", "gradients", element)
