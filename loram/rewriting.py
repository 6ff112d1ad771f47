"""A checkpoint with some of its tensors replaced, streamed shard by shard; the others are copied to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from loram.artifact import write_json
from loram.checkpoint import INDEX, Checkpoint, all_finite
from loram.errors import MismatchError
from loram.shards import ShardWriter, TensorPlan, index_of

Changed = Mapping[str, Callable[[], Tensor]]
"""Tensors that are replaced: {tensor name: makes it, in any float dtype}."""


def rewrite(
    checkpoint: Checkpoint, changed: Changed, out: Path, advance: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Write the shards (and index) into `out` with the headers they have; returns their sha256 by file name."""
    digests: dict[str, str] = {}
    layout: dict[str, list[TensorPlan]] = {}
    for shard in checkpoint.shards:
        entries = sorted((e for e in checkpoint.entries.values() if e.file == shard), key=lambda e: (e.start, e.end))
        layout[shard.name] = [TensorPlan(e.name, e.dtype, e.shape) for e in entries]
        with ShardWriter(out / shard.name, checkpoint.headers[shard.name]) as writer:
            for entry in entries:
                for rows in tiles(checkpoint, entry.name, changed):
                    writer.write(rows)
                    advance(rows.numel() * rows.element_size())
        digests[shard.name] = writer.sha256
    if (checkpoint.folder / INDEX).is_file():
        write_json(out / INDEX, index_of(layout))
    return digests


def tiles(checkpoint: Checkpoint, name: str, changed: Changed) -> Iterator[Tensor]:
    """One tensor's rows, in order: those of the replacement, cast once, where there is one."""
    if name not in changed:
        yield from (tile for _, tile in checkpoint.tiles(name))
        return
    entry = checkpoint.entry(name)
    value = changed[name]().detach().to("cpu", entry.dtype)
    assert tuple(value.shape) == entry.shape, name
    if not all_finite(value):
        raise MismatchError(f"{name} became NaN or Inf in {entry.dtype}; lower --lr, or raise the number of windows")
    yield value
