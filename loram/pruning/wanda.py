"""Wanda (2306.11695): |Wᵢⱼ|·‖Xⱼ‖₂.

Single weights: the lowest of each row go, the same number everywhere. Structures (Wanda-sp; 2312.11983): summed
over the columns of down and o.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loram.families.sparsity import Sparsity
from loram.masks import masked
from loram.pruning.lowest import lowest_elements
from loram.pruning.score import Score
from loram.pruning.weight_score import WeightScore

ROWS = 512


def element(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|W| (out, in) times the norm of each input feature (in,)."""
    return weight.abs() * input_norms


def prune(
    weights: Sequence[Tensor], input_norms: Tensor, sparsity: Sparsity, what: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """Each weight (out, in) with zeros where the bool mask, its companion, is True."""
    found = []
    for weight in weights:
        # By rows: the scores of a whole weight would take twice its memory.
        pieces = [lowest_elements(element(rows.float(), input_norms), sparsity) for rows in torch.split(weight, ROWS)]
        gone = torch.cat(pieces)
        found.append((masked(weight, ~gone), gone))
    return found


WANDA = Score("wanda", "inputs", element)
WANDA_MASK = WeightScore("wanda", "norms", prune=prune)
