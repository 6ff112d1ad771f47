"""Encoded rows into one right-padded batch.

Labels are made from the loss mask and the row's length, never from token ids; whatever id fills the
padding is seen by nothing.
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
