"""Safetensors written as a stream: shards of known layout, front to back, hashed on the way. No torch.

Hashing is most of the work where nothing is computed, so a second thread does it while the next rows are made.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loram.stored import CODES, IN_FLIGHT, SINGLE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

CODE_OF = {f"torch.{name}": code for code, (name, _) in CODES.items()}
INLINE = 64 * 1024
"""Fewer bytes than this are hashed at once: handing them to the other thread takes longer."""

PIECE = 256 * 1024
"""Bytes of a write: the system looks for memory in one block for each, and finds larger blocks more slowly."""
RESERVED = 2**20
"""Room is reserved for files of at least so many bytes."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written; `dtype` is torch's, or safetensors' code for it."""

    name: str
    dtype: Any
    shape: tuple[int, ...]

    @property
    def code(self) -> str:
        """What safetensors calls the dtype."""
        return self.dtype if isinstance(self.dtype, str) else CODE_OF[str(self.dtype)]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return CODES[self.code][1]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.itemsize


def plan_header(tensors: Sequence[TensorPlan], metadata: Mapping[str, str] | None = None, *, room: int = 0) -> bytes:
    """Length and header of a safetensors file that holds these tensors in this order; at least `room` bytes."""
    body: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for plan in tensors:
        body[plan.name] = {
            "dtype": plan.code,
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
        self._hasher: ThreadPoolExecutor | None = None
        self._hashing: deque[Future[None]] = deque()
        try:
            reserve(self._file.fileno(), file_length(header))
            self._put(memoryview(header))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle(0)
        if self._hasher is not None:
            self._hasher.shutdown()
        self._file.close()

    def write(self, rows: Tensor | NDArray[Any]) -> None:
        """Append the next rows (or a whole tensor).

        The rows may still be hashed when this returns, and are left alone when IN_FLIGHT more calls have: whoever
        reuses memory takes one buffer more than that, in turns.
        """
        data = bytes_of(rows)
        if data.size:
            self._put(data.data)

    def _put(self, data: memoryview) -> None:
        if len(data) < INLINE:
            self._settle(0)
            self._digest.update(data)
        else:
            self._settle(IN_FLIGHT - 1)
            self._hasher = self._hasher or ThreadPoolExecutor(1)
            self._hashing.append(self._hasher.submit(self._digest.update, data))
        done = 0
        while done < len(data):
            done += self._file.write(data[done : done + PIECE])

    def _settle(self, left: int) -> None:
        while len(self._hashing) > left:
            self._hashing.popleft().result()

    @property
    def sha256(self) -> str:
        """Hex sha256 of what has been written."""
        self._settle(0)
        return self._digest.hexdigest()


def bytes_of(rows: Tensor | NDArray[Any]) -> NDArray[Any]:
    """The bytes of a tensor or array, in order, without a copy where they lie so already."""
    import numpy

    if isinstance(rows, numpy.ndarray):
        return numpy.ascontiguousarray(rows).reshape(-1).view(numpy.uint8)
    import torch

    found: NDArray[Any] = rows.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def file_length(header: bytes) -> int:
    """Bytes of the whole file that a header, with the eight bytes of its length before it, belongs to."""
    tensors = (value for key, value in json.loads(header[8:] or b"{}").items() if key != "__metadata__")
    return len(header) + max((tensor["data_offsets"][1] for tensor in tensors), default=0)


def reserve(descriptor: int, size: int) -> None:
    """Room for a file of a known length, where the system can give it at once; OSError where the disk has too little.

    On ext4 and XFS, writing into reserved blocks takes a fraction of the CPU time that growing the file does. What
    glibc offers instead of the system call writes into every block where the file system cannot: it is not used.
    """
    if size < RESERVED or sys.platform != "linux":
        return
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(descriptor, 0, 0, size) and ctypes.get_errno() == ENOSPC:
        raise OSError(ENOSPC, os.strerror(ENOSPC))


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
