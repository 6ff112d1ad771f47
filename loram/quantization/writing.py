"""A checkpoint written in a storage, as a stream: one tile of one tensor is in memory.

How long a weight's description is turns out only when it has been quantized, and a safetensors header comes first:
room is left for the longest one there can be, and the true one is put there, padded with spaces, at the end. In the
file wide dtypes come before narrow ones, as safetensors' own writer has it, so that every tensor is aligned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loram.artifact import write_json
from loram.checkpoint import INDEX, all_finite
from loram.errors import MismatchError
from loram.quantization.storage import Storage, Stored
from loram.shards import TensorPlan, index_of, plan_header, plan_shards

SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Source:
    """One tensor of the model: what it is, whether it is stored in fewer bits, and how its rows are read."""

    plan: TensorPlan
    quantized: bool
    rows: Callable[[], Iterable[Tensor]]

    def stored(self, storage: Storage) -> list[TensorPlan]:
        """The tensors that stand for it."""
        return storage.plans(self.plan) if self.quantized else [self.plan]

    def encode(self, storage: Storage) -> Stored:
        """Those tensors with their data; MismatchError where a number is not finite."""
        try:
            if self.quantized:
                yield from storage.encode(self.plan, self.rows())
            else:
                yield from ((self.plan, rows) for rows in checked(self.rows()))
        except MismatchError as error:
            raise MismatchError(f"{self.plan.name} {error}") from None


def checked(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows that are stored as they are, after a look for NaN and Inf."""
    for piece in rows:
        if not all_finite(piece):
            raise MismatchError("holds NaN or Inf; the checkpoint is damaged: fetch it again")
        yield piece


def stored_bytes(sources: Iterable[Source], storage: Storage) -> int:
    """Bytes of the tensors to be written, at most."""
    return sum(plan.nbytes for source in sources for plan in source.stored(storage))


def write_stored(
    sources: Sequence[Source],
    storage: Storage,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> int:
    """Write shards and index into `out`; returns the tensors' bytes. A weight and its statistics share a shard."""
    deal = plan_shards([whole(source, storage) for source in sources], shard_bytes)
    by_name = {source.plan.name: source for source in sources}
    written: dict[str, list[TensorPlan]] = {}
    for shard, group in deal.items():
        written[shard] = write_shard(out / shard, [by_name[plan.name] for plan in group], storage, advance)
    if len(written) > 1:
        write_json(out / INDEX, index_of(written))
    return sum(plan.nbytes for plans in written.values() for plan in plans)


def whole(source: Source, storage: Storage) -> TensorPlan:
    """All that stands for a tensor as one, for dealing it to a shard."""
    return TensorPlan(source.plan.name, torch.uint8, (stored_bytes([source], storage),))


def layout(sources: Sequence[Source], storage: Storage) -> list[TensorPlan]:
    """The tensors of a shard in their order in the file; those of unknown length last."""

    def place(plan: TensorPlan) -> tuple[bool, int]:
        return bool(storage.variable) and plan.name.endswith(str(storage.variable)), -plan.itemsize

    return sorted((plan for source in sources for plan in source.stored(storage)), key=place)


def write_shard(
    file: Path, sources: Sequence[Source], storage: Storage, advance: Callable[[int], None]
) -> list[TensorPlan]:
    """One shard, its header last; returns what is in it."""
    ordered = layout(sources, storage)
    room = len(plan_header(ordered))
    places, end = {}, room
    for plan in ordered:
        places[plan.name] = end
        end += plan.nbytes
    shorter: dict[str, tuple[TensorPlan, Tensor]] = {}
    with open(file, "wb", buffering=0) as stream:
        for source in sources:
            for plan, data in source.encode(storage):
                if storage.variable and plan.name.endswith(storage.variable):
                    shorter[plan.name] = (plan, data)
                else:
                    places[plan.name] += put(stream.fileno(), data, places[plan.name])
                advance(data.nbytes)
        plans = [shorter[plan.name][0] if plan.name in shorter else plan for plan in ordered]
        end = room + sum(plan.nbytes for plan in plans if plan.name not in shorter)
        for plan in plans:
            if plan.name in shorter:
                end += put(stream.fileno(), shorter[plan.name][1], end)
        put_bytes(stream.fileno(), memoryview(plan_header(plans, room=room)), 0)
    return plans


def put(descriptor: int, data: Tensor, place: int) -> int:
    """Write a tensor's bytes at `place` of the file; returns how many."""
    if data.numel():
        put_bytes(descriptor, data.contiguous().reshape(-1).view(torch.uint8).numpy().data, place)
    return data.nbytes


def put_bytes(descriptor: int, data: memoryview, place: int) -> None:
    """Write all of `data`, however often that takes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], place + done)
