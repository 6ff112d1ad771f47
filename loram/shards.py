"""Safetensors written as a stream: shards of known layout, front to back, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loram.checkpoint import DTYPE_NAMES, SINGLE


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


def plan_header(tensors: Sequence[TensorPlan], metadata: Mapping[str, str] | None = None, *, room: int = 0) -> bytes:
    """Length and header of a safetensors file that holds these tensors in this order; at least `room` bytes."""
    body: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for plan in tensors:
        body[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    raw = json.dumps(body, separators=(",", ":")).encode()
    raw += b" " * max(-len(raw) % 8, room - 8 - len(raw))
    return struct.pack("<Q", len(raw)) + raw


class ShardWriter:
    """One safetensors file written front to back: the header first, then tensors in its order."""

    def __init__(self, path: str | Path, header: bytes) -> None:
        self.path = Path(path)
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed by the context manager)
        self._digest = hashlib.sha256()
        self._put(memoryview(header))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, rows: Tensor) -> None:
        """Append the next rows (or a whole tensor)."""
        if rows.numel():
            self._put(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _put(self, data: memoryview) -> None:
        self._digest.update(data)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])

    @property
    def sha256(self) -> str:
        """Hex sha256 of what has been written."""
        return self._digest.hexdigest()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """A small safetensors file, tensors in the order of their names; the same tensors always give the same bytes."""
    plans = [TensorPlan(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)]
    with ShardWriter(path, plan_header(plans)) as writer:
        for plan in plans:
            writer.write(tensors[plan.name])


def plan_shards(tensors: Sequence[TensorPlan], shard_bytes: int = 4 * 2**30) -> dict[str, list[TensorPlan]]:
    """Tensors dealt to shards of at most `shard_bytes` (a larger tensor has one of its own), by file name."""
    groups: list[list[TensorPlan]] = [[]]
    room = shard_bytes
    for plan in tensors:
        if groups[-1] and plan.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(plan)
        room -= plan.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def index_of(shards: Mapping[str, Sequence[TensorPlan]]) -> dict[str, Any]:
    """The body of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(plan.nbytes for group in shards.values() for plan in group)},
        "weight_map": {plan.name: shard for shard, group in shards.items() for plan in group},
    }
