"""An axis that was cut: which of its units were kept, in the large model's numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loram.errors import PruningMapError
from loram.families import AXES


@dataclass(frozen=True)
class Axis:
    """One axis that was cut: its size in the large model and the sorted kept indices (int64)."""

    name: str
    size: int
    kept: Tensor

    def __post_init__(self) -> None:
        kept = self.kept
        if kept.dtype != torch.int64 or kept.dim() != 1:
            raise PruningMapError(
                f"axis {self.name}: kept indices are {kept.dtype} of shape {tuple(kept.shape)}; expected int64, 1-D"
            )
        if not kept.numel():
            raise PruningMapError(f"axis {self.name}: nothing is kept; at least one unit must stay")
        if int(kept[0]) < 0 or int(kept[-1]) >= self.size or bool((kept[1:] <= kept[:-1]).any()):
            raise PruningMapError(f"axis {self.name}: kept indices must be sorted, unique and in 0…{self.size - 1}")

    def compose(self, inner: Axis) -> Axis:
        """This cut followed by `inner`, whose units are this cut's kept ones."""
        if inner.size != self.kept.numel():
            raise PruningMapError(
                f"axis {self.name}: {self.kept.numel()} units are kept, the second map expects {inner.size}"
            )
        return Axis(self.name, self.size, self.kept[inner.kept])


def axis_name(layer: int, unit: str) -> str:
    """`layers.3.mlp`."""
    return f"layers.{layer}.{unit}"


def parse_axis(name: str) -> tuple[int, str]:
    """(layer, unit) of an axis name; PruningMapError for any other name."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit() or parts[2] not in AXES:
        raise PruningMapError(f"{name!r} is no axis; expected layers.N.{' or layers.N.'.join(AXES)}")
    return int(parts[1]), parts[2]
