"""cut(large) written as a stream: rows and columns are gathered tile by tile, refitted weights taken as given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loram.artifact import write_json
from loram.checkpoint import FLOATS, INDEX, Checkpoint, all_finite
from loram.errors import CheckpointError, FamilyError, MismatchError
from loram.families import Family
from loram.pruning_map import PruningMap
from loram.quantization import Storage
from loram.quantization.writing import Source
from loram.shards import ShardWriter, TensorPlan, index_of, plan_header, plan_shards

IGNORED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
Refitted = Mapping[str, Callable[[], Tensor]]
"""Weights that were computed instead of gathered: {tensor name: reads it}."""


def check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    """Every tensor that the config promises is there in the declared shape, and no other is."""
    config = checkpoint.config
    if "quantization_config" in config:
        raise CheckpointError(f"{checkpoint.folder} is quantized; pruning needs the 16-bit original: give that")
    geometry = family.geometry(config)
    declared: set[str] = set()
    for name, dimensions, _ in family.tensors(config):
        shape = tuple(sum(geometry.size(s.count) * geometry.size(s.width) for s in d) for d in dimensions)
        entry = checkpoint.entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {entry.shape}, config.json says {shape}; "
                "the two do not belong together"
            )
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{checkpoint.folder}: {name} is stored as {entry.dtype}; give the 16-bit original")
        declared.add(name)
    extra = [n for n in checkpoint.entries if n not in declared and not n.endswith(IGNORED)]
    if geometry.tied:
        extra = [name for name in extra if name != f"{family.head.name}.weight"]
    if extra:
        raise FamilyError(
            f"{checkpoint.folder} holds {extra[0]}, which the {family.name} family does not have; "
            "loram cannot tell how to cut it"
        )


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
    plans: list[TensorPlan] = []
    for name, dimensions, _ in pruning_map.family.tensors(checkpoint.config):
        shape = pruning_map.small_shape(name.rpartition(".")[0])[: len(dimensions)]
        plans.append(TensorPlan(name, checkpoint.entry(name).dtype, shape))
    shards = plan_shards(plans, shard_bytes)
    digests: dict[str, str] = {}
    for shard, group in shards.items():
        with ShardWriter(out / shard, plan_header(group)) as writer:
            for plan in group:
                for rows in cut_rows(checkpoint, pruning_map, plan.name, refitted):
                    writer.write(rows)
                    advance(rows.numel() * rows.element_size())
        digests[shard] = writer.sha256
    if len(shards) > 1:
        write_json(out / INDEX, index_of(shards))
    return digests


def small_sources(checkpoint: Checkpoint, pruning_map: PruningMap, refitted: Refitted) -> list[Source]:
    """The small checkpoint's tensors, each cut as it is read: for writing it in fewer bits without a detour."""
    family = pruning_map.family

    def source(name: str, dimensions: int) -> Source:
        shape = pruning_map.small_shape(name.rpartition(".")[0])[:dimensions]
        plan = TensorPlan(name, checkpoint.entry(name).dtype, shape)
        return Source(plan, is_decoder_linear(family, name), lambda: cut_rows(checkpoint, pruning_map, name, refitted))

    return [source(name, len(dimensions)) for name, dimensions, _ in family.tensors(checkpoint.config)]


def is_decoder_linear(family: Family, name: str) -> bool:
    """Whether a tensor is the weight of a Linear in a decoder layer: what is stored in fewer bits."""
    module, _, kind = name.rpartition(".")
    weight, layer = family.find(module)
    return kind == "weight" and layer is not None and bool(weight.columns)


def stored_config(config: Mapping[str, Any], storage: Storage, sources: Sequence[Source]) -> dict[str, Any]:
    """A model's raw config, saying how its Linears are stored."""
    others = next(source.plan.dtype for source in sources if not source.quantized)
    return {**config, "quantization_config": storage.config(others)}


def cut_rows(checkpoint: Checkpoint, pruning_map: PruningMap, name: str, refitted: Refitted) -> Iterator[Tensor]:
    """The rows of one small tensor, in order."""
    if name in refitted:
        yield refitted[name]()
        return
    module = name.rpartition(".")[0]
    kept_rows = pruning_map.kept(module, 0)
    kept_columns = pruning_map.kept(module, 1) if len(checkpoint.entry(name).shape) == 2 else None
    for start, tile in checkpoint.tiles(name):
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


def small_bytes(checkpoint: Checkpoint, pruning_map: PruningMap) -> int:
    """Bytes of the small checkpoint."""
    total = 0
    for name, dimensions, _ in pruning_map.family.tensors(checkpoint.config):
        count = 1
        for extent in pruning_map.small_shape(name.rpartition(".")[0])[: len(dimensions)]:
            count *= extent
        total += count * checkpoint.entry(name).dtype.itemsize
    return total
