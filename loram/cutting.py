"""cut(large) written as a stream: rows and columns are gathered tile by tile, refitted weights taken as given.

Weights are spoken of by the large model's names; the small ones that are written may be numbered otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loram.artifact import write_json
from loram.checkpoint import INDEX, Checkpoint, all_finite
from loram.errors import MismatchError
from loram.families import Family
from loram.masks import masked
from loram.pruning_map import PruningMap
from loram.quantization import Storage
from loram.quantization.writing import Source
from loram.shards import ShardWriter, TensorPlan, index_of, plan_header, plan_shards

Refitted = Mapping[str, Callable[[], Tensor]]
"""Weights that were computed instead of gathered: {tensor name: reads it}."""


def write_small(
    checkpoint: Checkpoint,
    pruning_map: PruningMap,
    refitted: Refitted,
    out: Path,
    *,
    shard_bytes: int = 4 * 2**30,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write the small checkpoint's shards and index; returns their sha256 by file name."""
    sources = small_tensors(checkpoint, pruning_map, refitted)
    shards = plan_shards(list(sources.values()), shard_bytes)
    digests: dict[str, str] = {}
    to_large = pruning_map.numbering.to_large
    for shard, group in shards.items():
        with ShardWriter(out / shard, plan_header(group)) as writer:
            for plan in group:
                for rows in cut_rows(checkpoint, pruning_map, to_large(plan.name), refitted):
                    writer.write(rows)
                    advance(rows.numel() * rows.element_size())
        digests[shard] = writer.sha256
    if len(shards) > 1:
        write_json(out / INDEX, index_of(shards))
    return digests


def small_sources(checkpoint: Checkpoint, pruning_map: PruningMap, refitted: Refitted) -> list[Source]:
    """The small checkpoint's tensors, each cut as it is read: for writing it in fewer bits without a detour."""
    family = pruning_map.family

    def source(plan: TensorPlan) -> Source:
        name = pruning_map.numbering.to_large(plan.name)
        return Source(plan, is_decoder_linear(family, name), lambda: cut_rows(checkpoint, pruning_map, name, refitted))

    return [source(plan) for plan in small_tensors(checkpoint, pruning_map, refitted).values()]


def is_decoder_linear(family: Family, name: str) -> bool:
    """Whether a tensor is the weight of a Linear in a decoder layer: what is stored in fewer bits."""
    module, _, kind = name.rpartition(".")
    weight, layer = family.find(module)
    return kind == "weight" and layer is not None and bool(weight.columns)


def stored_config(config: Mapping[str, Any], storage: Storage, sources: Sequence[Source]) -> dict[str, Any]:
    """A model's raw config, saying how its Linears are stored."""
    others = next(source.plan.dtype for source in sources if not source.quantized)
    return {**config, "quantization_config": storage.config(others)}


def small_tensors(checkpoint: Checkpoint, pruning_map: PruningMap, refitted: Refitted) -> dict[str, TensorPlan]:
    """The small checkpoint's tensors by name, in the order of the forward pass.

    Biases of `refitted` that the large checkpoint does not have follow their weights.
    """
    found: dict[str, TensorPlan] = {}
    for name, _, _ in pruning_map.family.tensors(checkpoint.config):
        small = pruning_map.numbering.to_small(name)
        if small is None:
            continue
        module, _, kind = name.rpartition(".")
        kept = [pruning_map.kept(module, dimension) for dimension in range(2)]
        entry = checkpoint.entry(name)
        shape = tuple(n if k is None else k.numel() for n, k in zip(entry.shape, kept, strict=False))
        found[small] = TensorPlan(small, entry.dtype, shape)
        added = f"{module}.bias"
        if kind == "weight" and added in refitted and added not in checkpoint:
            bias = small.removesuffix("weight") + "bias"
            found[bias] = TensorPlan(bias, entry.dtype, shape[:1])
    return found


def cut_rows(checkpoint: Checkpoint, pruning_map: PruningMap, name: str, refitted: Refitted) -> Iterator[Tensor]:
    """The rows of the small tensor that is cut from the large tensor `name`, in order."""
    if name in refitted:
        yield refitted[name]()
        return
    module = name.rpartition(".")[0]
    kept_rows = pruning_map.kept(module, 0)
    kept_columns = pruning_map.kept(module, 1) if len(checkpoint.entry(name).shape) == 2 else None
    mask = pruning_map.masks.get(name)
    for start, tile in checkpoint.tiles(name):
        if mask is not None:
            tile = masked(tile, mask.rows(start, start + tile.shape[0]))
        if kept_rows is not None:
            inside = kept_rows[(kept_rows >= start) & (kept_rows < start + tile.shape[0])] - start
            tile = tile.index_select(0, inside)
        if kept_columns is not None:
            tile = tile.index_select(1, kept_columns)
        if not all_finite(tile):
            raise MismatchError(
                f"{checkpoint.folder}: {name} holds NaN or Inf; the checkpoint is damaged: fetch it again"
            )
        yield tile


def small_bytes(checkpoint: Checkpoint, pruning_map: PruningMap, refitted: Refitted) -> int:
    """Bytes of the small checkpoint."""
    plans = small_tensors(checkpoint, pruning_map, refitted).values()
    return sum(math.prod(plan.shape) * plan.dtype.itemsize for plan in plans)
