"""Magnitude. Needs the weights alone, so it streams.

Units: the squared L2 norm of everything a unit owns. Single weights: the smallest of each weight go, or of each
N:M group: one threshold per weight, none across weights, as in the baseline of SparseGPT (2301.00774) and Wanda
(2306.11695).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from loram.families.sparsity import Sparsity
from loram.pruning.lowest import lowest_elements
from loram.pruning.score import Score
from loram.pruning.threshold import smallest
from loram.pruning.weight_score import Tiles, WeightScore


def element(weight: Tensor, _: Tensor) -> Tensor:
    """w²."""
    return weight.square()


def masks(tiles: Tiles, size: int, sparsity: Sparsity) -> Iterator[Tensor]:
    """What goes of a weight of `size` elements: exactly floor(ratio · size) elements, or M − N of every group."""
    if sparsity.group:
        for tile in tiles():
            yield lowest_elements(tile.float().abs_(), sparsity)
    else:
        yield from smallest(tiles, sparsity.removed(size))


MAGNITUDE = Score("magnitude", "weights", element)
MAGNITUDE_MASK = WeightScore("magnitude", "weights", masks=masks)
