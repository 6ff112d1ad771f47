"""Wanda for structures (Wanda-sp; 2306.11695, 2312.11983): Σᵢ |Wᵢⱼ|·‖Xⱼ‖₂ over the columns of down and o."""

from __future__ import annotations

from torch import Tensor

from loram.pruning.score import Score


def element(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|W| (out, in) times the norm of each input feature (in,)."""
    return weight.abs() * input_norms


WANDA = Score("wanda", "inputs", element)
