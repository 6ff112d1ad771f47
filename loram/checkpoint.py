"""Safetensors checkpoints, read by slice.

A 140 GB model passes through a buffer of a few MiB: tensors are read by rows with `pread` into one
reused buffer (fresh allocations cost four copies, and a memory map counts as our memory). Headers are
checked against the files' lengths before anything is believed. Never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loram.artifact import Base, read_json, relative_location, require_folder, sha256_file
from loram.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 16 * 2**20
EDGE = 64 * 1024
ROWS = 128
"""Tiles start at multiples of this many rows: a product of 128 rows has the bits of the whole product."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BY_FLAG = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype, shape (out, in), and the bytes from `start` to `end`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of everything behind the first dimension)."""
        return (self.end - self.start) // max(self.shape[0] if self.shape else 1, 1)


class Checkpoint:
    """The weights of a model folder: headers are read and checked at once, tensors only when asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = require_folder(folder)
        self.config: dict[str, Any] = read_config(self.folder)
        self.shards = find_shards(self.folder)
        self.entries: dict[str, TensorEntry] = {}
        self.headers: dict[str, bytes] = {}
        for shard in self.shards:
            self.headers[shard.name], entries = read_header(shard)
            self.entries.update(entries)
        self._check_index()
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; CheckpointError where there is none of this name."""
        if name not in self.entries:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}; the checkpoint is incomplete or of another model"
            )
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self.entry(name)
        return self._read(entry, entry.start, entry.end).clone().view(entry.dtype).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in a buffer that the next call overwrites."""
        entry = self.entry(name)
        first = entry.start + start * entry.row_bytes
        raw = self._read(entry, first, first + (stop - start) * entry.row_bytes)
        return raw.view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def tiles(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor in pieces of about 16 MiB: (first row, rows), each overwritten by the next."""
        entry = self.entry(name)
        if not entry.shape:
            yield 0, self.read(name)
            return
        for start, stop in tile_bounds(entry.shape[0], entry.row_bytes):
            yield start, self.rows(name, start, stop)

    def _read(self, entry: TensorEntry, first: int, last: int) -> Tensor:
        size = last - first
        if self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, CHUNK), dtype=torch.uint8)
        if entry.file not in self._files:
            self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
        raw = self._buffer[:size]
        done = 0
        view: memoryview = raw.numpy().data
        while done < size:
            got = os.preadv(self._files[entry.file], [view[done:]], first + done)
            if not got:
                raise CheckpointError(f"{entry.file} ends inside {entry.name}; it is truncated: fetch it again")
            done += got
        return raw

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if not index.is_file():
            return
        for name, shard in weight_map(index).items():
            if name not in self.entries:
                raise CheckpointError(f"{index} says that {shard} holds {name}, and it does not; fetch the shard again")

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.end - entry.start for entry in self.entries.values())

    def fingerprint(self) -> str:
        """A digest of every shard's header and the first and last 64 KiB of every tensor: cheap on 140 GB."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(self.headers[shard.name])
            with open(shard, "rb", buffering=0) as file:
                for entry in self.entries.values():
                    if entry.file != shard:
                        continue
                    for first in (entry.start, max(entry.start, entry.end - EDGE)):
                        file.seek(first)
                        digest.update(file.read(min(EDGE, entry.end - first)))
        return digest.hexdigest()


def tile_bounds(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Row ranges of about 16 MiB that start at multiples of 128; a short rest joins the tile before it."""
    height = max(ROWS, CHUNK // max(row_bytes, 1) // ROWS * ROWS)
    starts = list(range(0, rows, height))
    if len(starts) > 1 and rows - starts[-1] < ROWS:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows][: len(starts)], strict=True))


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf: the extremes tell, in one quick pass and without overflow."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def read_config(folder: Path) -> dict[str, Any]:
    """The raw config.json of a model folder."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object; it is damaged")
    return config


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → shard name, from a checkpoint's index."""
    body = read_json(index)
    found = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no weight_map; it is damaged: fetch it again")
    return {str(name): str(shard) for name, shard in found.items()}


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each of which must exist."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(weight_map(index).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names the shard {name!r}, which is not a plain file name")
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f" ({pickles[0]} is a pickle, which loram never reads: convert it to safetensors)" if pickles else ""
        raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}; loram needs safetensors weights{hint}")
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not in {folder}; fetch it again")
    return [folder / name for name in names]


def read_header(path: str | Path) -> tuple[bytes, dict[str, TensorEntry]]:
    """The header bytes and tensor entries of a safetensors file, checked against the file's length."""
    file = Path(path)
    size = file.stat().st_size
    with open(file, "rb", buffering=0) as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        fits = 2 <= length <= size - 8
        # A header of 640 bytes begins like a pickle does: only a length that cannot be makes it one.
        if not fits and prefix[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(f"{file} is a pickle, not safetensors; loram never reads pickles: convert it first")
        if not fits:
            raise CheckpointError(f"{file} is empty, truncated, or not safetensors ({size} bytes); fetch it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        entries = {
            name: TensorEntry(
                name, file, DTYPES[info["dtype"]], tuple(info["shape"]), *(8 + length + o for o in info["data_offsets"])
            )
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} has a damaged header ({type(error).__name__}: {error}); fetch it again"
        ) from None
    for entry in entries.values():
        if not all(isinstance(extent, int) and extent >= 0 for extent in entry.shape):
            raise CheckpointError(f"{file}: the header of {entry.name} has shape {entry.shape}; the file is damaged")
        count = math.prod(entry.shape)
        if entry.end - entry.start != count * entry.dtype.itemsize or not 8 + length <= entry.start <= entry.end:
            raise CheckpointError(f"{file}: the header of {entry.name} contradicts itself; the file is damaged")
        if entry.end > size:
            raise CheckpointError(
                f"{file} is truncated: {entry.name} ends at byte {entry.end} of {size}; fetch it again"
            )
    return struct.pack("<Q", length) + raw, entries


def read_metadata(path: str | Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    header, _ = read_header(path)
    return dict(json.loads(header[8:]).get("__metadata__") or {})


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


def describe_base(
    folder: str | Path, base_id: str | None = None, revision: str | None = None, *, seen_from: str | Path | None = None
) -> Base:
    """The identity of a large model: who it is, where it is (as a path from `seen_from`), and digests of it."""
    with Checkpoint(folder) as checkpoint:
        return Base(
            id=base_id or guess_id(checkpoint.folder, checkpoint.config),
            location=str(folder) if seen_from is None else relative_location(folder, seen_from),
            revision=guess_revision(checkpoint.folder) or revision,
            config_sha256=sha256_file(checkpoint.folder / "config.json"),
            weights_fingerprint=checkpoint.fingerprint(),
        )


def guess_id(folder: Path, config: Mapping[str, Any]) -> str:
    """The Hub id that a config or the Hub cache's path gives away, else the folder as it was named."""
    named = str(config.get("_name_or_path") or "")
    if named.count("/") == 1 and not named.startswith((".", "/", "~")) and not Path(named).exists():
        return named
    for part in folder.resolve().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return str(folder)


def guess_revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot of the Hub cache."""
    resolved = folder.resolve()
    return resolved.name if resolved.parent.name == "snapshots" else None
