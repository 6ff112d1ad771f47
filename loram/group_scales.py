"""One scale for each group of an adapter's modules: attention and MLP, each by thirds of the large model's depth.

A scale multiplies a group's updates: s·B·A becomes s·(c·B)·A. It is folded into B, so the adapter stays a plain one.
What belongs to no group (embedding, output head) keeps its update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from loram.adapter import Adapter, LoraPair
from loram.families import Family

PARTS = ("attention", "mlp")
THIRDS = ("first", "middle", "last")
NAMES = tuple(f"{part}.{third}" for part in PARTS for third in THIRDS)

Scales = Mapping[str, float]
"""{group name: the number that its updates are multiplied by}; a group that is not named keeps 1."""


@dataclass(frozen=True)
class Groups:
    """The groups of a model of `layers` decoder layers."""

    family: Family
    layers: int

    def of(self, module: str) -> str | None:
        """The group of one of the large model's modules; None for what is outside the decoder layers."""
        weight, layer = self.family.find(module)
        if layer is None:
            return None
        channels = any(segment.axis == "mlp" for segment in (*weight.rows, *weight.columns))
        return f"{PARTS[channels]}.{THIRDS[layer * len(THIRDS) // self.layers]}"

    def present(self, adapter: Adapter) -> tuple[str, ...]:
        """The groups that an adapter of the large model has modules of, in the order of NAMES."""
        found = {self.of(module) for module in adapter.pairs}
        return tuple(name for name in NAMES if name in found)

    def scaled(self, adapter: Adapter, scales: Scales, to_large: Callable[[str], str] = str) -> Adapter:
        """The adapter with every B multiplied by its group's scale: in fp32, rounded once to B's dtype.

        `to_large` turns the adapter's module names into the large model's. With scales of 1 the bits stay.
        """

        def scale(module: str, pair: LoraPair) -> LoraPair:
            by = scales.get(self.of(to_large(module)) or "", 1.0)
            return pair if by == 1 else replace(pair, b=(pair.b.float() * by).to(pair.b.dtype))

        return adapter.map_pairs(scale)

    def norms(self, adapter: Adapter) -> dict[str, float]:
        """Frobenius norm of s·B over each group's modules, which a scale multiplies."""
        squares = dict.fromkeys(self.present(adapter), 0.0)
        for module, pair in adapter.pairs.items():
            name = self.of(module)
            if name is not None:
                squares[name] += (pair.scale * float(pair.b.double().norm())) ** 2
        return {name: math.sqrt(total) for name, total in squares.items()}
