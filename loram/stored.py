"""Safetensors files as they lie on disk: headers, raw rows, identity. No torch.

A 140 GB model passes through a few MiB: rows are read without a copy, through a memory map whose pages are given back
soon after (they would count as our memory), and of a piece of the file at a time (all of it would count against a limit
on the address space). Headers are checked against the files' lengths before anything is
believed. Never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loram.artifact import Base, read_json, relative_location, require_folder, sha256_file
from loram.errors import CheckpointError

if TYPE_CHECKING:  # both are imported where they are used: `loram --help` and `loram prune --method random` do without
    import numpy
    import torch
    from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AROUND = 2 * 2**20  # the system maps pages around the one that was touched; no page is larger than this
CHUNK = 2 * 2**20
IN_FLIGHT = 2
"""So many pieces that were written last may still be hashed in another thread (see loram.shards)."""

WINDOW = 64 * 2**20
"""Bytes of a file that are mapped at a time, at least."""
EDGE = 64 * 1024
ROWS = 128
"""Tiles start at multiples of this many rows: a product of 128 rows has the bits of the whole product."""

CODES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
"""What safetensors calls a dtype: torch's name for it, bytes of an element."""
EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""Bits of the exponent: a number with all of them set is NaN or Inf."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype code, shape (out, in), and the bytes from `start` to `end`."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype."""
        import torch

        found: torch.dtype = getattr(torch, CODES[self.code][0])
        return found

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return CODES[self.code][1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of everything behind the first dimension)."""
        return (self.end - self.start) // max(self.shape[0] if self.shape else 1, 1)

    @property
    def is_float(self) -> bool:
        """Whether these are weights of at least 16 bits."""
        return self.code in EXPONENTS


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a file that is mapped: the bytes from `start` to `stop`."""

    file: Path
    start: int
    stop: int
    pages: mmap.mmap

    def holds(self, file: Path, first: int, last: int) -> bool:
        """Whether bytes of a file are in it."""
        return file == self.file and self.start <= first and last <= self.stop


def map_window(file: Path, first: int, size: int, length: int) -> Window:
    """A private map of `size` bytes or more of a file of `length`, from `first` on; gone with the last who reads it."""
    start = min(first, length - 1)
    start -= start % mmap.ALLOCATIONGRANULARITY
    stop = min(max(first + size, start + WINDOW), length)
    with open(file, "rb", buffering=0) as stream:
        pages = mmap.mmap(stream.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
    return Window(file, start, stop, pages)


class StoredModel:
    """The weights of a model folder: headers are read and checked at once, bytes only when asked for."""

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
        self._window: Window | None = None
        self._resident: deque[tuple[Window, int, int]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._resident.clear()
        self._window = None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; CheckpointError where there is none of this name."""
        if name not in self.entries:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}; the checkpoint is incomplete or of another model"
            )
        return self.entries[name]

    def raw(self, name: str, start: int, stop: int) -> NDArray[numpy.uint8]:
        """The bytes of rows [start, stop), not copied; what was read a few calls ago is given back to the system.

        The map is private: who writes into the bytes changes neither the file nor what a later call reads.
        """
        import numpy

        entry = self.entry(name)
        first, size = entry.start + start * entry.row_bytes, (stop - start) * entry.row_bytes
        window = self._mapped(entry, first, size)
        return numpy.frombuffer(window.pages, numpy.uint8, size, first - window.start)

    def numbers(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as unsigned integers of the element's size: (rows, ...)."""
        entry = self.entry(name)
        raw = self.raw(name, start, stop)
        if entry.start % entry.itemsize:  # old files are not padded
            raw = raw.copy()
        return raw.view(f"u{entry.itemsize}").reshape(stop - start, *entry.shape[1:])

    def _mapped(self, entry: TensorEntry, first: int, size: int) -> Window:
        length = entry.file.stat().st_size
        if length < first + size:  # to read beyond the end would kill the process
            raise CheckpointError(f"{entry.file} ends inside {entry.name}; it is truncated: fetch it again")
        if self._window is None or not self._window.holds(entry.file, first, first + size):
            self._window = map_window(entry.file, first, size, length)
        self._give_back()
        self._resident.append((self._window, first, first + size))
        return self._window

    def _give_back(self) -> None:
        # The last pieces may still be hashed in another thread (see ShardWriter.write): dropped now, their pages
        # would come back at once, and stay.
        while len(self._resident) > IN_FLIGHT:
            window, first, last = self._resident.popleft()
            if not hasattr(mmap, "MADV_DONTNEED"):
                continue
            low, high = around(first, last, [(a, b) for other, a, b in self._resident if other is window])
            low, high = max(low, window.start), min(high, window.stop)
            if high > low:
                window.pages.madvise(mmap.MADV_DONTNEED, low - window.start, high - low)

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if not index.is_file():
            return
        for name, shard in weight_map(index).items():
            if name not in self.entries:
                raise CheckpointError(f"{index} says that {shard} holds {name}, and it does not; fetch the shard again")

    @property
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


def around(first: int, last: int, alive: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Where the system may have mapped pages for bytes [first, last), less the pages of what is still read."""
    page = mmap.PAGESIZE
    low, high = first - first % AROUND, last + -last % AROUND
    for start, end in alive:
        if start > first:
            high = min(high, start - start % page)
        else:
            low = max(low, end + -end % page)
    return low, high


def tile_bounds(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Row ranges of about 2 MiB that start at multiples of 128; a short rest joins the tile before it."""
    height = max(ROWS, CHUNK // max(row_bytes, 1) // ROWS * ROWS)
    starts = list(range(0, rows, height))
    if len(starts) > 1 and rows - starts[-1] < ROWS:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows][: len(starts)], strict=True))


def finite_numbers(values: NDArray[Any], code: str) -> bool:
    """Whether numbers of a dtype, seen as unsigned integers, hold neither NaN nor Inf.

    Seen as integers, these are the largest of the positive and the largest of the negative numbers.
    """
    exponent = EXPONENTS.get(code)
    if exponent is None or not values.size:
        return True
    sign = 1 << (8 * values.itemsize - 1)
    return int(values.max()) < sign + exponent and int(values.view(f"i{values.itemsize}").max()) < exponent


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
                name, file, known(info["dtype"]), tuple(info["shape"]), *(8 + length + o for o in info["data_offsets"])
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
        if entry.end - entry.start != count * entry.itemsize or not 8 + length <= entry.start <= entry.end:
            raise CheckpointError(f"{file}: the header of {entry.name} contradicts itself; the file is damaged")
        if entry.end > size:
            raise CheckpointError(
                f"{file} is truncated: {entry.name} ends at byte {entry.end} of {size}; fetch it again"
            )
    return struct.pack("<Q", length) + raw, entries


def known(code: str) -> str:
    """A dtype code that is in CODES; KeyError otherwise."""
    CODES[code]
    return code


def read_metadata(path: str | Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    header, _ = read_header(path)
    return dict(json.loads(header[8:]).get("__metadata__") or {})


def describe_base(
    folder: str | Path, base_id: str | None = None, revision: str | None = None, *, seen_from: str | Path | None = None
) -> Base:
    """The identity of a large model: who it is, where it is (as a path from `seen_from`), and digests of it."""
    with StoredModel(folder) as checkpoint:
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
