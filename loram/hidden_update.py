"""What a mask hides of an update: the part of s·B·A that lies on pruned entries, ‖s·BA ∘ (1−M)‖ beside ‖s·BA‖.

A masked update is s·(B·A) ∘ M, and recovery adds s·B·A whole to the large weights (2502.13533: the identity on A and
B). What lies outside the mask was never seen by the small model in training; this says how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loram.adapter import Adapter
from loram.checkpoint import tile_bounds
from loram.masks import Masks
from loram.merging import TileDelta


@dataclass(frozen=True)
class HiddenUpdate:
    """Frobenius norms over all modules that have a mask: of s·B·A, and of what of it lies on pruned entries.

    `masked`: whether the update was masked in training; if not, the small model did see what lies there.
    """

    masked: bool
    modules: int
    norm: float
    hidden_norm: float

    @property
    def share(self) -> float:
        """Of the norm, what lies on pruned entries; √(share of pruned entries) where the mask means nothing to it."""
        return self.hidden_norm / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """`masked`, `modules`, `norm`, `hidden_norm`, `hidden_share`."""
        return {
            "masked": self.masked,
            "modules": self.modules,
            "norm": self.norm,
            "hidden_norm": self.hidden_norm,
            "hidden_share": self.share,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> HiddenUpdate:
        """What a manifest recorded."""
        return HiddenUpdate(*(body[key] for key in ("masked", "modules", "norm", "hidden_norm")))

    def __str__(self) -> str:
        """In words, for people."""
        size = f"{self.share:.0%} of the update's norm ({self.hidden_norm:.4g} of {self.norm:.4g})"
        if self.masked:
            return f"the mask hid {size} from training: it lies on pruned entries"
        return f"{size} lies on pruned entries; training was not masked"


def hidden_update(adapter: Adapter, mask_of: Masks, masked: bool) -> HiddenUpdate | None:
    """The norms, tile by tile; `mask_of` gives a module's keep-mask (out, in). None where no module has one."""
    modules, total, hidden = 0, 0.0, 0.0
    for module, pair in adapter.pairs.items():
        mask = None if pair.embedding else mask_of(module)
        if mask is None:
            continue
        modules += 1
        delta = TileDelta.of(pair)
        out, width = pair.weight_shape
        for start, stop in tile_bounds(out, 4 * width):
            rows = delta.rows(start, stop, torch.empty(stop - start, width))
            total += squares(rows)
            hidden += squares(rows.mul_(~mask[start:stop]))
    return HiddenUpdate(masked, modules, math.sqrt(total), math.sqrt(hidden)) if modules else None


def squares(values: Tensor) -> float:
    """Σx², summed in fp64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
