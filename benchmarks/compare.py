"""Whether two checkpoints hold the same bits, however they are sharded: `python -m benchmarks.compare A B`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

PIECE = 8 * 2**20


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    start: int
    stop: int
    kind: str


def tensors(folder: Path) -> dict[str, Place]:
    """Every tensor of a folder's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = Place(file, start, stop, f"{entry['dtype']}{entry['shape']}")
    return found


def pieces(stream: BinaryIO, place: Place) -> Iterator[bytes]:
    """The tensor's bytes, some at a time."""
    stream.seek(place.start)
    for start in range(place.start, place.stop, PIECE):
        yield stream.read(min(PIECE, place.stop - start))


def same(first: Place, second: Place) -> bool:
    """Same dtype, shape and bytes."""
    if first.kind != second.kind or first.stop - first.start != second.stop - second.start:
        return False
    with first.file.open("rb") as one, second.file.open("rb") as two:
        return all(a == b for a, b in zip(pieces(one, first), pieces(two, second), strict=True))


def differences(first: Path, second: Path) -> list[str]:
    """Names of the tensors that are not in both folders with the same bits."""
    ours, theirs = tensors(first), tensors(second)
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {name for name in both if not same(ours[name], theirs[name])})


if __name__ == "__main__":
    wrong = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stderr.write(f"{len(wrong)} tensors differ, the first is {wrong[0]}\n" if wrong else "")
    raise SystemExit(bool(wrong))
