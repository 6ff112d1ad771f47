"""What a score is, and how its element-wise importance becomes one number per unit of an axis.

Importance is summed over all elements of a unit's rows and columns and over the weights coupled by the
axis (gate + up + down; q + k + v + o). A query head's share goes to the kv head it belongs to,
h // (H/K): LLM-Pruner credits h mod K, which is a bug under grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loram.families import Dimension, Family, Geometry, Weight

OF_INPUTS = ("inputs", "variances")
"""Needs of scores that look at o and down alone."""
Tiles = Callable[[Weight], Iterable[tuple[int, Tensor]]]
"""A weight's rows in pieces: (first row, rows)."""
Companion = Callable[[Weight, int, int], Tensor]
"""What is multiplied with rows [start, stop) of a weight: input norms (in,) or a gradient (rows, in)."""


def nothing(weight: Weight, start: int, stop: int) -> Tensor:
    """The companion of a score that needs the weights alone."""
    return torch.empty(0)


@dataclass(frozen=True)
class Score:
    """An importance. `element(weight rows, companion rows)` gives one number ≥ 0 per element.

    `needs`: 'weights', 'gradients', or of the inputs of o and down the norms ('inputs') or the 'variances'.
    """

    name: str
    needs: str
    element: Callable[[Tensor, Tensor], Tensor]


def unit_scores(
    score: Score, family: Family, geometry: Geometry, tiles: Tiles, companion: Companion
) -> dict[str, Tensor]:
    """Importance per unit of each axis of one layer: {'kv_heads': (K,), 'mlp': (C,)}, fp64."""
    totals: dict[str, Tensor] = {}
    for weight in family.outputs if score.needs in OF_INPUTS else family.linears:
        rows: list[Tensor] = []
        columns: Tensor | None = None
        for start, tile in tiles(weight):
            element = score.element(tile.float(), companion(weight, start, start + tile.shape[0])).double()
            rows.append(element.sum(1))
            columns = element.sum(0) if columns is None else columns + element.sum(0)
        assert columns is not None
        for segments, values in ((weight.rows, torch.cat(rows)), (weight.columns, columns)):
            for axis, sums in fold(values, segments, geometry).items():
                totals[axis] = totals[axis] + sums if axis in totals else sums
    return {axis: total.cpu() for axis, total in totals.items()}


def fold(values: Tensor, segments: Dimension, geometry: Geometry) -> Mapping[str, Tensor]:
    """Numbers along one dimension, summed per unit of the axes that cut it."""
    found: dict[str, Tensor] = {}
    offset = 0
    for segment in segments:
        count, width = geometry.size(segment.count), geometry.size(segment.width)
        if segment.axis:
            sums = values[offset : offset + count * width].reshape(count, width).sum(1)
            found[segment.axis] = found[segment.axis] + sums if segment.axis in found else sums
        offset += count * width
    return found
