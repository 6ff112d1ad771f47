"""W + s·B·A, streamed: shard by shard, tile by tile, so that peak memory is a few tensors.

The delta is computed in fp32 and added in fp32, and the sum is cast once to the weight's dtype: bit for
bit what PEFT's merge does. That needs tiles of at least 128 rows (see loram.checkpoint.ROWS), since a
product of few rows takes another path through the BLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loram.adapter import Adapter, LoraPair
from loram.artifact import write_json
from loram.checkpoint import FLOATS, INDEX, Checkpoint, TensorEntry, all_finite, read_metadata
from loram.errors import AdapterError, CheckpointError, MismatchError
from loram.shards import ShardWriter, TensorPlan, index_of, plan_header


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
        return TileDelta(pair.b.float(), pair.a.float(), pair.scale, pair.embedding)

    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows [start, stop) of ΔW, fp32, in `out` (or beside it, for an embedding)."""
        if self.transposed:
            return (self.left @ self.right[:, start:stop]).mul_(self.scale).T
        torch.mm(self.left[start:stop], self.right, out=out)
        return out if self.scale == 1 else out.mul_(self.scale)


class Scratch:
    """Two fp32 buffers that every tile uses again: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0), torch.empty(0)]

    def pair(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Two fp32 tensors of a tile's shape, with whatever was in them."""
        size = shape.numel()
        if self._buffers[0].numel() < size:
            self._buffers = [torch.empty(size), torch.empty(size)]
        first, second = (buffer[:size].view(shape) for buffer in self._buffers)
        return first, second


def check_mergeable(checkpoint: Checkpoint, adapter: Adapter, tied: bool) -> None:
    """Refuse a base or an adapter for which W + s·B·A is not the adapter's effect."""
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{checkpoint.folder} is quantized ({method}); merging would round the update away: give the 16-bit one"
        )
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
            for entry, plan in zip(entries, plans, strict=True):
                for rows in merged_tiles(checkpoint, entry, plan.dtype, adapter, scratch):
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
        total, widened = scratch.pair(tile.shape)
        total = delta.rows(start, start + tile.shape[0], total).add_(widened.copy_(tile))
        narrowed = tile.copy_(total) if tile.dtype == dtype else total.to(dtype)
        if not all_finite(narrowed):
            raise MismatchError(
                f"{entry.name} + update is NaN or Inf near row {start}; the base or the adapter is damaged"
            )
        yield narrowed
