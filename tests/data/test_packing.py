"""Best-fit decreasing, by hand and against what must hold for any lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loram.data.collate import collate, collate_packs, owners, packed_tokens
from loram.data.encoding import EncodedRow
from loram.data.packing import pack, packed


def row(*ids: int, loss_from: int = 1) -> EncodedRow:
    return EncodedRow(input_ids=list(ids), loss_mask=[place >= loss_from for place in range(len(ids))])


def test_each_row_goes_where_it_fits_best() -> None:
    assert pack([6, 5, 3, 5, 4], 10) == [[0, 4], [1, 3], [2]]
    assert pack([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert pack([5, 8, 2, 5], 10) == [[1, 2], [0, 3]]
    assert pack([12, 3], 10) == [[0], [1]]
    assert pack([], 10) == []


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_every_row_once_no_pack_too_full_and_no_two_packs_that_would_fit_in_one(lengths: list[int], room: int) -> None:
    packs = pack(lengths, room)
    assert sorted(number for numbers in packs for number in numbers) == list(range(len(lengths)))
    filled = sorted(sum(lengths[number] for number in numbers) for numbers in packs)
    assert all(total <= room for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > room
    assert pack(lengths, room) == packs


def test_a_collated_pack() -> None:
    rows = [row(5, 6, 7), row(8, 9, loss_from=0), row(3, 4, 5, 6, loss_from=3)]
    batch = collate_packs([rows[:2], rows[2:]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 6, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, -100, -100, 6, -100]]
    assert "attention_mask" not in batch
    assert owners([rows[:2], rows[2:]]).tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 0]]
    assert packed_tokens(batch["position_ids"]) == 9 == collate(rows)["attention_mask"].sum()


def test_rows_in_packs() -> None:
    rows = [row(1, 2), row(1, 2, 3), row(4, 5)]
    assert packed(rows, 5) == [[rows[1], rows[0]], [rows[2]]]
