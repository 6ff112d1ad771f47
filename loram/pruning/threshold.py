"""The smallest magnitudes of a whole weight, in exact number, from tiles: no tile outlives the next.

A float's bits without the sign, read as a whole number, are ordered as its magnitude is. So two bytes at a
time are counted, from the highest down: one pass over a 16-bit weight, two over a 32-bit one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loram.pruning.weight_score import Tiles

DIGIT = 16
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitudes(tile: Tensor) -> Tensor:
    """|w| as whole numbers of the same order."""
    bits = tile.contiguous().view(INTEGERS[tile.element_size()])
    return bits & torch.iinfo(bits.dtype).max


def nth_magnitude(tiles: Tiles, count: int) -> tuple[int, int]:
    """The `count`-th smallest magnitude, and how many equal to it are among the `count` smallest."""
    known, left, shift = 0, count, None
    while shift is None or shift > 0:
        histogram = torch.zeros(2**DIGIT, dtype=torch.int64)
        for tile in tiles():
            keys = magnitudes(tile).reshape(-1)
            top = keys.element_size() * 8 - DIGIT
            step = top if shift is None else shift - DIGIT
            if step < top:
                keys = keys[keys >> (step + DIGIT) == known]
            histogram += torch.bincount((keys >> step).int() & (2**DIGIT - 1), minlength=2**DIGIT)
        total = histogram.cumsum(0)
        digit = int(torch.searchsorted(total, left))
        left -= int(total[digit - 1]) if digit else 0
        known, shift = known << DIGIT | digit, step
    return known, left


def smallest(tiles: Tiles, count: int) -> Iterator[Tensor]:
    """A bool mask of what goes, tile by tile: the `count` smallest |w| of all, among equals the first."""
    limit, ties = nth_magnitude(tiles, count) if count else (0, 0)
    for tile in tiles():
        keys = magnitudes(tile)
        gone, equal = keys < limit, keys == limit
        places = equal.reshape(-1).nonzero()[:ties, 0]
        gone.reshape(-1)[places] = True
        ties -= places.numel()
        yield gone
