"""Random units: which heads and channels stay where nothing is scored. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy
from numpy.typing import NDArray

from loram.families import AXES, Geometry
from loram.families.widths import Widths

Indices = NDArray[numpy.int64]


def random_units(size: int, count: int, generator: numpy.random.Generator) -> Indices:
    """`count` of `size` indices, sorted, every subset equally likely."""
    return numpy.sort(generator.permutation(size)[:count]).astype(numpy.int64)


def draw(layers: Iterable[int], widths: Widths, geometry: Geometry, seed: int) -> dict[tuple[int, str], Indices]:
    """{(layer, axis): kept units} of every axis that is cut, in the order and with the numbers of the general way."""
    generator = numpy.random.default_rng(seed)
    found = {}
    for layer in layers:
        for unit in AXES:
            size, count = geometry.size(unit), getattr(widths, unit)[layer]
            kept = random_units(size, count, generator)
            if count < size:
                found[layer, unit] = kept
    return found


def expand(geometry: Geometry, segments: Any, units: dict[str, Indices]) -> Indices | None:
    """Indices that stay along a dimension whose axes keep `units`; None where no axis cuts it."""
    if not any(segment.axis in units for segment in segments):
        return None
    pieces, offset = [], 0
    for segment in segments:
        count, width = geometry.size(segment.count), geometry.size(segment.width)
        kept = units[segment.axis] if segment.axis in units else numpy.arange(count)
        pieces.append((offset + kept[:, None] * width + numpy.arange(width)).reshape(-1))
        offset += count * width
    return numpy.concatenate(pieces)
