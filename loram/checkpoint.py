"""A model's weights as tensors, read by slice from the files of loram.stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from loram.errors import CheckpointError
from loram.stored import (
    CODES,
    INDEX,
    SINGLE,
    StoredModel,
    TensorEntry,
    describe_base,
    find_shards,
    finite_numbers,
    read_config,
    read_header,
    read_metadata,
    tile_bounds,
)

__all__ = [
    "BY_FLAG",
    "FLOATS",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "TensorEntry",
    "all_finite",
    "describe_base",
    "find_shards",
    "read_config",
    "read_entry",
    "read_header",
    "read_metadata",
    "read_tensors",
    "tile_bounds",
]

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, (name, _) in CODES.items()}
DTYPE_NAMES = {dtype: code for code, dtype in DTYPES.items()}
BY_FLAG = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint(StoredModel):
    """The weights of a model folder as tensors."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self.entry(name)
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        done = 0
        for start, stop in tile_bounds(entry.shape[0] if entry.shape else 1, entry.row_bytes):
            piece = self.raw(name, start, stop)
            raw.numpy()[done : done + piece.size] = piece
            done += piece.size
        return raw.view(entry.dtype).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; what is written into them is lost, at the latest with the next call."""
        entry = self.entry(name)
        return torch.from_numpy(self.raw(name, start, stop)).view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def tiles(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor in pieces of about 2 MiB: (first row, rows)."""
        entry = self.entry(name)
        if not entry.shape:
            yield 0, self.read(name)
            return
        for start, stop in tile_bounds(entry.shape[0], entry.row_bytes):
            yield start, self.rows(name, start, stop)


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf, told in two quick passes over the bits."""
    if values.dtype not in FLOATS or not values.numel():
        return True
    if values.device.type != "cpu":
        return bool(values.isfinite().all())
    bits = values.contiguous().reshape(-1).view(torch.uint8).numpy().view(f"u{values.element_size()}")
    return finite_numbers(bits, DTYPE_NAMES[values.dtype])


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one (small) safetensors file."""
    return {name: read_entry(entry) for name, entry in read_header(path)[1].items()}


def read_entry(entry: TensorEntry) -> Tensor:
    """One tensor, in memory of its own."""
    raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    view: memoryview = raw.numpy().data
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{entry.file} ends inside {entry.name}; it is truncated: fetch it again")
            done += got
    return raw.view(entry.dtype).reshape(entry.shape)
