"""Encoded rows into one right-padded batch.

Labels are made from the loss mask and the row's length, never from token ids; whatever id fills the
padding is seen by nothing. A pack (several rows in one) has positions that begin anew with each row, and no attention
mask: with one, transformers would take the pack for a single text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loram.data.encoding import EncodedRow

IGNORED = -100


def collate(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` (-100 where no loss is carried), each (rows, longest)."""
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for number, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"], dtype=torch.long)
        mask = torch.tensor(row["loss_mask"], dtype=torch.bool)
        input_ids[number, : len(ids)] = ids
        attention_mask[number, : len(ids)] = 1
        labels[number, : len(ids)] = ids.masked_fill(~mask, IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def collate_packs(packs: Sequence[Sequence[EncodedRow]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `position_ids` and `labels`, each (packs, longest); every token of the padding is at position 0."""
    longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    input_ids = torch.zeros(len(packs), longest, dtype=torch.long)
    position_ids = torch.zeros(len(packs), longest, dtype=torch.long)
    labels = torch.full((len(packs), longest), IGNORED, dtype=torch.long)
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            ids = torch.tensor(row["input_ids"], dtype=torch.long)
            # What stands before a row in its pack must not predict the row's first token.
            mask = torch.tensor([False, *row["loss_mask"][1:]])
            place = slice(start, start + len(ids))
            input_ids[number, place] = ids
            position_ids[number, place] = torch.arange(len(ids))
            labels[number, place] = ids.masked_fill(~mask, IGNORED)
            start += len(ids)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def owners(packs: Sequence[Sequence[EncodedRow]]) -> torch.Tensor:
    """For each position of `collate_packs`, the number of its row counted through all packs; 0 in the padding."""
    lengths = [[len(row["input_ids"]) for row in pack] for pack in packs]
    found = torch.zeros(len(packs), max(map(sum, lengths)), dtype=torch.long)
    row = 0
    for number, pack in enumerate(lengths):
        start = 0
        for length in pack:
            found[number, start : start + length] = row
            start, row = start + length, row + 1
    return found


def packed_tokens(position_ids: torch.Tensor) -> torch.Tensor:
    """How many tokens of a collated batch of packs are no padding; rows have two tokens or more."""
    return (position_ids > 0).sum() + (position_ids == 1).sum()
