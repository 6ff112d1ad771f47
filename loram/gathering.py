"""cut(large) for units that need no arithmetic to choose: rows and columns are gathered as bits. No torch.

The same bytes as `loram.cutting` writes for the same units, in a third of the time: importing torch takes longer
than copying a gigabyte.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from loram.artifact import write_json
from loram.drawing import Indices, expand
from loram.errors import MismatchError
from loram.families import FAMILIES, Family, Geometry
from loram.shards import ShardWriter, TensorPlan, index_of, plan_header, plan_shards
from loram.stored import IN_FLIGHT, INDEX, StoredModel, finite_numbers, tile_bounds

Kept = tuple[Indices | None, Indices | None]
"""Rows and columns that stay; None where all do."""


@dataclass(frozen=True)
class Cut:
    """The kept units of the axes that are cut, {(layer, axis): indices}, in a model of a family."""

    family: Family
    geometry: Geometry
    units: Mapping[tuple[int, str], Indices]

    def tensors(self, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], Kept]]:
        """Every small tensor: name, shape, and what stays of the large one's rows and columns."""
        for name, dimensions, layer in self.family.tensors(config):
            here = {axis: kept for (number, axis), kept in self.units.items() if number == layer}
            kept = [expand(self.geometry, segments, here) for segments in dimensions]
            whole = [sum(self.geometry.size(s.count) * self.geometry.size(s.width) for s in d) for d in dimensions]
            shape = tuple(n if k is None else k.size for n, k in zip(whole, kept, strict=True))
            yield name, shape, (kept[0], kept[1] if len(kept) > 1 else None)

    def map_bytes(self) -> bytes:
        """The pruning map's file, byte for byte what PruningMap writes for these axes."""
        named = {f"layers.{layer}.{axis}": kept for (layer, axis), kept in self.units.items()}
        metadata = {
            "schema": "1",
            "family": next(key for key, family in FAMILIES.items() if family is self.family),
            "sizes": json.dumps({name: self.geometry.size(name.rpartition(".")[2]) for name in sorted(named)}),
            "geometry": json.dumps(asdict(self.geometry)),
        }
        plans = [TensorPlan(f"axis.{name}", "I64", named[name].shape) for name in sorted(named)]
        return plan_header(plans, metadata) + b"".join(named[name].tobytes() for name in sorted(named))


def write_gathered(
    model: StoredModel,
    cut: Cut,
    out: Path,
    *,
    shard_bytes: int = 4 * 2**30,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write the small checkpoint's shards and index; returns their sha256 by file name."""
    kept: dict[str, Kept] = {}
    plans = []
    for name, shape, here in cut.tensors(model.config):
        kept[name] = here
        plans.append(TensorPlan(name, model.entry(name).code, shape))
    shards = plan_shards(plans, shard_bytes)
    digests: dict[str, str] = {}
    gather = Gather(model)
    for shard, group in shards.items():
        with ShardWriter(out / shard, plan_header(group)) as writer:
            for plan in group:
                for rows in gather.tensor(plan.name, *kept[plan.name]):
                    writer.write(rows)
                    advance(rows.nbytes)
        digests[shard] = writer.sha256
    if len(shards) > 1:
        write_json(out / INDEX, index_of(shards))
    return digests


class Gather:
    """Rows and columns of a model's tensors, in buffers used in turns: the last ones may still be hashed."""

    def __init__(self, model: StoredModel) -> None:
        self.model = model
        # Twice as many, since a piece whose rows and columns are both cut takes two.
        self._buffers = deque(numpy.empty(0, numpy.uint8) for _ in range(2 * (IN_FLIGHT + 1)))

    def tensor(self, name: str, rows: Indices | None, columns: Indices | None) -> Iterator[NDArray[Any]]:
        """The kept part of a tensor as unsigned integers, piece by piece; MismatchError at NaN and Inf."""
        entry = self.model.entry(name)
        for start, stop in tile_bounds(entry.shape[0], entry.row_bytes):
            numbers = self.model.numbers(name, start, stop)
            if rows is not None:
                low, high = numpy.searchsorted(rows, (start, stop))
                numbers = self._take(numbers, rows[low:high] - start, 0)
            if columns is not None:
                numbers = self._take(numbers, columns, 1)
            if not finite_numbers(numbers, entry.code):
                raise MismatchError(
                    f"{self.model.folder}: {name} holds NaN or Inf; the checkpoint is damaged: fetch it again"
                )
            yield numbers

    def _take(self, numbers: NDArray[Any], indices: Indices, axis: int) -> NDArray[Any]:
        shape = (*numbers.shape[:axis], indices.size, *numbers.shape[axis + 1 :])
        size = math.prod(shape) * numbers.itemsize
        self._buffers.rotate()
        if self._buffers[0].size < size:
            self._buffers[0] = numpy.empty(size, numpy.uint8)
        out = self._buffers[0][:size].view(numbers.dtype).reshape(shape)
        return numbers.take(indices, axis, out=out, mode="clip")  # any other mode would buffer the output
