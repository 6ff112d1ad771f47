"""Which units or layers stay: the best by score, or random ones. Counts are given; indices come back sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor

from loram.drawing import random_units
from loram.families import AXES, Geometry
from loram.families.widths import Widths
from loram.pruning_map import Axis, axis_name


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, sorted; among equals the first stay."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def drawn(size: int, count: int, generator: numpy.random.Generator) -> Tensor:
    """Random units as a tensor."""
    return torch.from_numpy(random_units(size, count, generator))


def layer_axes(
    layer: int, widths: Widths, geometry: Geometry, scores: Mapping[str, Tensor] | numpy.random.Generator
) -> dict[str, Axis]:
    """The axes of one layer that are cut, chosen by scores {unit: (size,)} or by a random generator."""
    axes: dict[str, Axis] = {}
    for unit in AXES:
        size, count = geometry.size(unit), getattr(widths, unit)[layer]
        kept = drawn(size, count, scores) if isinstance(scores, numpy.random.Generator) else best(scores[unit], count)
        if count < size:
            name = axis_name(layer, unit)
            axes[name] = Axis(name, size, kept)
    return axes


def layers_left(influences: Sequence[float], candidates: range, dropped: int, count: int) -> tuple[int, ...]:
    """The layers of `count` that stay when `dropped` candidates of least influence go; among equals the first stay."""
    stay = best(torch.tensor([influences[layer] for layer in candidates]).double(), len(candidates) - dropped)
    kept = {candidates[place] for place in stay.tolist()}
    return tuple(layer for layer in range(count) if layer in kept or layer not in candidates)
