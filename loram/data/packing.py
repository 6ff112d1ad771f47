"""Several rows in one, isolated from each other, so that little of a batch is padding.

Best-fit decreasing: rows from the longest to the shortest, each into the fullest pack that still has room.
Isolation comes from transformers: where positions begin anew and there is neither a cache nor an attention mask,
its masks let no token look into another row. `isolation` makes sure of it on the very model.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from loram.data.encoding import EncodedRow


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The numbers of the rows in each pack; none is fuller than `capacity` (a longer row is alone in its pack)."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for row in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        found = bisect_left(room, (lengths[row], -1))
        if found == len(room):
            packs.append([row])
            insort(room, (capacity - lengths[row], len(packs) - 1))
        else:
            left, number = room.pop(found)
            packs[number].append(row)
            insort(room, (left - lengths[row], number))
    return packs


def packed(rows: Sequence[EncodedRow], capacity: int) -> list[list[EncodedRow]]:
    """The rows themselves, in packs."""
    return [[rows[number] for number in numbers] for numbers in pack([len(row["input_ids"]) for row in rows], capacity)]
