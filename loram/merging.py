"""W + s·B·A, streamed: shard by shard, tile by tile, so that peak memory is a few tensors.

The delta is computed in fp32 and added in fp32, and the sum is cast once to the weight's dtype: bit for
bit what PEFT's merge does. That needs tiles of at least 128 rows (see loram.checkpoint.ROWS), since a
product of few rows takes another path through the BLAS. Where the BLAS rounds a product and its sum as it rounds
the two one after the other, they are one step, a third cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.adapter import Adapter, LoraPair
from loram.artifact import write_json
from loram.checkpoint import FLOATS, INDEX, Checkpoint, TensorEntry, all_finite, read_metadata
from loram.errors import AdapterError, CheckpointError, KindError, MismatchError
from loram.quantization.loading import quantization_of
from loram.shards import ShardWriter, TensorPlan, index_of, plan_header
from loram.stored import IN_FLIGHT


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """KindError for a base in few bits."""
    method = quantization_of(config)
    if method is not None:
        raise KindError(f"{folder} is quantized ({method}); merging would round the update away: give the 16-bit one")


@dataclass(frozen=True)
class TileDelta:
    """One module's scaled update, by rows, in fp32: factors are converted once."""

    left: Tensor
    right: Tensor
    scale: float
    transposed: bool

    @staticmethod
    def of(pair: LoraPair) -> TileDelta:
        """Factors of ΔW = s·B·A; an embedding's update is its transpose."""
        left, scale = pair.b.float(), pair.scale
        if (
            scale >= 1 and math.frexp(scale)[0] == 0.5 and not pair.embedding
        ):  # a power of two rounds no bit, short of underflow
            left, scale = left * scale, 1.0
        return TileDelta(left, pair.a.float(), scale, pair.embedding)

    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows [start, stop) of ΔW, fp32, in `out` (or beside it, for an embedding)."""
        if self.transposed:
            return (self.left @ self.right[:, start:stop]).mul_(self.scale).T
        torch.mm(self.left[start:stop], self.right, out=out)
        return out if self.scale == 1 else out.mul_(self.scale)

    def add_to(self, total: Tensor, start: int, scratch: Scratch) -> Tensor:
        """Add rows [start, start + len(total)) of ΔW to the weight's own, fp32, in their place."""
        left = self.left[start : start + len(total)]
        if self.transposed or self.scale != 1 or not sums_exactly(len(total), *self.right.shape):
            delta = scratch.take("delta", total.shape, torch.float32)
            return total.add_(self.rows(start, start + len(total), delta))
        return torch.addmm(total, left, self.right, out=total)


@cache
def sums_exactly(rows: int, rank: int, width: int) -> bool:
    """Whether W + B·A in one call of the BLAS has the bits of the product and then the sum, for this shape.

    It does where the kernel adds W to the finished product. One that begins with W rounds otherwise, and how a shape
    is computed is known to the BLAS alone: it is tried, once.
    """
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (rows, rank), (rank, width))
    )
    apart = torch.mm(left, right).add_(weight)
    return torch.equal(apart, torch.addmm(weight, left, right, out=weight))


class Scratch:
    """Buffers that tiles use again: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._turn = 0

    def take(self, use: str, shape: torch.Size, dtype: torch.dtype, *, written: bool = False) -> Tensor:
        """A tensor of this shape for a use, with whatever was in it.

        Several in turns for what is `written`: the last ones may still be hashed.
        """
        if written:
            self._turn = (self._turn + 1) % (IN_FLIGHT + 1)
        size = shape.numel()
        key = use, self._turn if written else -1
        if key not in self._buffers or self._buffers[key].numel() < size or self._buffers[key].dtype != dtype:
            self._buffers[key] = torch.empty(size, dtype=dtype)
        return self._buffers[key][:size].view(shape)


def check_mergeable(checkpoint: Checkpoint, adapter: Adapter, tied: bool) -> None:
    """Refuse a base or an adapter for which W + s·B·A is not the adapter's effect."""
    refuse_quantized(checkpoint.folder, checkpoint.config)
    for module, pair in adapter.pairs.items():
        entry = checkpoint.entries.get(f"{module}.weight")
        if tied and module in ("lm_head", "model.embed_tokens"):
            raise AdapterError(
                f"the adapter updates {module}, and this model ties it to the other end; a merge would change both: "
                "serve the adapter unmerged, or train without it"
            )
        if entry is None:
            raise MismatchError(f"the adapter updates {module}, which {checkpoint.folder} does not have")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{checkpoint.folder}: {module} is stored as {entry.dtype}; give the 16-bit original")
        if tuple(entry.shape) != pair.weight_shape:
            raise MismatchError(f"the adapter updates {module} as {pair.weight_shape}, the base has {entry.shape}")


def merge_shards(
    checkpoint: Checkpoint,
    adapter: Adapter,
    out: Path,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write the merged shards (and index) into `out`; returns their sha256 by file name.

    Without `dtype` the base's headers are kept to the byte, and untouched tensors with them.
    """
    scratch = Scratch()
    digests: dict[str, str] = {}
    layout: dict[str, list[TensorPlan]] = {}
    for shard in checkpoint.shards:
        entries = sorted((e for e in checkpoint.entries.values() if e.file == shard), key=lambda e: (e.start, e.end))
        plans = [TensorPlan(e.name, target_dtype(e, dtype), e.shape) for e in entries]
        layout[shard.name] = plans
        same = all(plan.dtype == entry.dtype for plan, entry in zip(plans, entries, strict=True))
        header = checkpoint.headers[shard.name] if same else plan_header(plans, read_metadata(shard))
        with ShardWriter(out / shard.name, header) as writer:
            for entry in entries:
                for rows in merged_tiles(checkpoint, entry, target_dtype(entry, dtype), adapter, scratch):
                    writer.write(rows)
                    advance(rows.numel() * rows.element_size())
        digests[shard.name] = writer.sha256
    if (checkpoint.folder / INDEX).is_file():
        write_json(out / INDEX, index_of(layout))
    return digests


def target_dtype(entry: TensorEntry, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: only floating-point ones are converted."""
    return dtype if dtype is not None and entry.dtype in FLOATS else entry.dtype


def merged_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes of the merged weights."""
    return sum(TensorPlan(e.name, target_dtype(e, dtype), e.shape).nbytes for e in checkpoint.entries.values())


def merged_tiles(
    checkpoint: Checkpoint, entry: TensorEntry, dtype: torch.dtype, adapter: Adapter, scratch: Scratch
) -> Iterator[Tensor]:
    """The tensor's rows, in order, with its update added; NaN and Inf are refused."""
    module = entry.name.removesuffix(".weight")
    updated = entry.name.endswith(".weight") and module in adapter.pairs
    delta = TileDelta.of(adapter.pairs[module]) if updated else None
    for start, tile in checkpoint.tiles(entry.name):
        if delta is None:
            yield tile.to(dtype)
            continue
        # Mixed dtypes take a slow path: the weight is widened by a copy, added in fp32, and narrowed by a copy.
        whole = dtype == torch.float32
        total = scratch.take("total", tile.shape, torch.float32, written=whole).copy_(tile)
        total = delta.add_to(total, start, scratch)
        narrow = total if whole else scratch.take("narrow", tile.shape, dtype, written=True).copy_(total)
        if not all_finite(narrow):
            raise MismatchError(
                f"{entry.name} + update is NaN or Inf near row {start}; the base or the adapter is damaged"
            )
        yield narrow
