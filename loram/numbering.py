"""Layer numbers when whole layers were dropped: the small model's layer n is the large model's layer kept[n].

Pure data: names of modules and tensors. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from loram.errors import PruningMapError


@dataclass(frozen=True)
class Numbering:
    """The kept decoder layers (sorted numbers of the large model) of `count`, and how layers' names begin."""

    kept: tuple[int, ...]
    count: int
    prefix: str

    def __post_init__(self) -> None:
        kept = self.kept
        if not kept:
            raise PruningMapError("no decoder layer is kept; at least one must stay")
        if kept[0] < 0 or kept[-1] >= self.count or any(b <= a for a, b in pairwise(kept)):
            raise PruningMapError(f"kept layers must be sorted, unique and in 0…{self.count - 1}, not {list(kept)}")

    @property
    def whole(self) -> bool:
        """Whether no layer was dropped."""
        return len(self.kept) == self.count

    @property
    def dropped(self) -> tuple[int, ...]:
        """The large model's layers that the small one does not have."""
        return tuple(sorted(set(range(self.count)) - set(self.kept)))

    def small(self, layer: int) -> int | None:
        """The small model's number of a large layer; None where it was dropped."""
        return self.kept.index(layer) if layer in self.kept else None

    def to_large(self, name: str) -> str:
        """The large model's name of a small module or tensor; PruningMapError for a layer that is not there."""
        match = self._match(name)
        if match is None:
            return name
        number = int(match[1])
        if number >= len(self.kept):
            raise PruningMapError(f"{name} is of layer {number}, and the small model has {len(self.kept)} layers")
        return f"{self.prefix}{self.kept[number]}{match[2]}"

    def to_small(self, name: str) -> str | None:
        """The small model's name of a large module or tensor; None where its layer was dropped."""
        match = self._match(name)
        if match is None:
            return name
        number = self.small(int(match[1]))
        return None if number is None else f"{self.prefix}{number}{match[2]}"

    def _match(self, name: str) -> re.Match[str] | None:
        return re.fullmatch(re.escape(self.prefix) + r"(\d+)(\..+)", name)
