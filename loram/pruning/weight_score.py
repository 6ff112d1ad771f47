"""What decides which single weights go: from the weights alone, tile by tile, or from what a Linear reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from loram.families.sparsity import Sparsity

Tiles = Callable[[], Iterable[Tensor]]
"""The rows of a weight in pieces, each overwritten by the next; may be read several times."""
Masks = Callable[[Tiles, int, Sparsity], Iterator[Tensor]]
"""What goes of a weight of so many elements, bool, piece by piece."""
Solver = Callable[[Sequence[Tensor], Tensor, Sparsity, str], list[tuple[Tensor, Tensor]]]
"""(new weight, what went) of each of the weights (out, in) that read one input; the text names it for errors."""


@dataclass(frozen=True)
class WeightScore:
    """An importance of single weights.

    `needs`: 'weights' (then `masks`), 'norms' ‖x‖₂ of the input's features (in,), or its 'moments' Σ x·xᵀ (in, in)
    (then `prune`). `updates`: whether weights that stay are changed.
    """

    name: str
    needs: str
    masks: Masks | None = None
    prune: Solver | None = None
    updates: bool = False
