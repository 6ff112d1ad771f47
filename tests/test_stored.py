"""Reading a checkpoint larger than memory: what was read is given back, and what is still read is left alone."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from loram import stored
from loram.shards import ShardWriter, TensorPlan, file_length, plan_header, reserve
from loram.stored import IN_FLIGHT, StoredModel, around, tile_bounds

MIB = 2**20
SHAPE = (16384, 1024)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tensors of 32 MiB each in one file."""
    plans = [TensorPlan(name, "BF16", SHAPE) for name in ("a", "b")]
    tile = numpy.arange(MIB // 2, dtype=numpy.uint16) % 1000
    with ShardWriter(tmp_path / "model.safetensors", plan_header(plans)) as writer:
        for _ in range(64):
            writer.write(tile)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def resident(file: Path) -> int:
    """Bytes of a file that are mapped into this process and present."""
    entries = Path("/proc/self/smaps").read_text().split(str(file))[1:]
    return sum(1024 * int(re.findall(r"Rss:\s+(\d+)", entry)[0]) for entry in entries)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_file_that_passes_through_unchanged_stays_out_of_memory(folder: Path, tmp_path: Path) -> None:
    peak = 0
    with StoredModel(folder) as model, ShardWriter(tmp_path / "copy.safetensors", b"") as writer:
        for name in ("a", "b"):
            for start, stop in tile_bounds(SHAPE[0], model.entry(name).row_bytes):
                writer.write(model.numbers(name, start, stop))
                peak = max(peak, resident(folder / "model.safetensors"))
    assert MIB <= peak <= (2 * IN_FLIGHT + 7) * MIB  # the pieces in flight, and what the system maps around them


@pytest.mark.skipif(sys.platform != "linux", reason="room is reserved on Linux alone")
def test_room_for_a_file_is_taken_before_the_first_tensor(tmp_path: Path) -> None:
    plans = [TensorPlan(name, "BF16", SHAPE) for name in ("a", "b")]
    header = plan_header(plans)
    with ShardWriter(tmp_path / "model.safetensors", header):
        found = (tmp_path / "model.safetensors").stat()
    assert found.st_size == file_length(header) == len(header) + sum(plan.nbytes for plan in plans)
    assert 512 * found.st_blocks >= found.st_size


@pytest.mark.skipif(sys.platform != "linux", reason="room is reserved on Linux alone")
def test_a_file_without_room_for_it_is_closed_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int, __: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loram.shards.reserve", full)
    with pytest.raises(OSError, match="No space"):
        ShardWriter(tmp_path / "model.safetensors", plan_header([TensorPlan("a", "BF16", SHAPE)]))


def test_what_cannot_be_reserved_is_written_all_the_same(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as writable:
        reserve(writable.fileno(), 2**62)  # larger than any file of the system: refused, for another reason than room
    assert (tmp_path / "x").stat().st_size == 0


def test_what_is_read_now_and_what_may_still_be_hashed_keeps_what_was_written_into_it(folder: Path) -> None:
    with StoredModel(folder) as model:
        alive: list[Any] = []
        for number, start in enumerate(range(0, 4000, 100)):  # rows that share pages with their neighbors
            piece = model.numbers("a", start, start + 100)
            piece[:] = number + 2000
            alive = [*alive, (number, piece)][-IN_FLIGHT:]
            assert all((rows == value + 2000).all() for value, rows in alive)
        assert model.numbers("a", 0, 100).max() < 1000  # the file is as it was


@pytest.mark.parametrize(
    ("first", "last", "alive"),
    [
        (3, 9, []),
        (3, 9, [(9, 12)]),
        (3, 9, [(0, 3), (20, 21)]),
        (3, 9, [(5, 7)]),
        (3, 9, [(1, 30)]),
        (3000, 9000, [(2000, 4000), (8000, 9500)]),
    ],
)
def test_pages_of_live_pieces_are_not_given_back(first: int, last: int, alive: list[tuple[int, int]]) -> None:
    unit = mmap.PAGESIZE // 4
    low, high = around(first * unit, last * unit, [(a * unit, b * unit) for a, b in alive])
    assert low % mmap.PAGESIZE == high % mmap.PAGESIZE == 0
    for a, b in alive:
        assert high <= low or b * unit <= low or a * unit >= high
    if not alive:
        assert low <= first * unit
        assert high >= last * unit


class Slow:
    """sha256 that is always behind."""

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def update(self, data: Any) -> None:
        time.sleep(0.01)
        self.digest.update(data)

    def hexdigest(self) -> str:
        return str(self.digest.hexdigest())


def test_the_digest_is_of_the_file_also_where_hashing_is_behind(tmp_path: Path) -> None:
    buffers = [numpy.empty(MIB, numpy.uint8) for _ in range(IN_FLIGHT + 1)]
    file = tmp_path / "x.safetensors"
    with ShardWriter(file, b"head") as writer:
        writer._digest = Slow(writer._digest)  # type: ignore[assignment]
        for number in range(12):
            piece = buffers[number % len(buffers)]
            piece[:] = number
            writer.write(piece if number % 4 else piece[:100])  # short pieces are hashed at once, in their turn
    assert writer.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_piece_of_the_file_is_mapped_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a shard would count against a limit on the address space."""
    monkeypatch.setattr(stored, "WINDOW", 4 * MIB)
    file = folder / "model.safetensors"
    most = 0
    with StoredModel(folder) as model:
        whole = file.read_bytes()
        for name in ("b", "a", "b"):
            entry = model.entry(name)
            for start, stop in [*tile_bounds(SHAPE[0], entry.row_bytes)][:: 1 if name == "a" else -1]:
                first = entry.start + start * entry.row_bytes
                assert model.raw(name, start, stop).tobytes() == whole[first : first + (stop - start) * entry.row_bytes]
                sizes = re.findall(rf"^([0-9a-f]+)-([0-9a-f]+) .*{file}$", Path("/proc/self/maps").read_text(), re.M)
                most = max(most, sum(int(end, 16) - int(begin, 16) for begin, end in sizes))
        assert model.raw("a", 0, 0).size == 0
        assert model.raw("b", SHAPE[0], SHAPE[0]).size == 0
    assert 4 * MIB <= most <= (IN_FLIGHT + 2) * 4 * MIB
