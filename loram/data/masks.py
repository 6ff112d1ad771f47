"""Encoded rows as text again, in stretches with and without loss, for a person to look at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from loram.data.encoding import EncodedRow


@dataclass(frozen=True)
class Stretch:
    """Neighboring tokens that all carry loss, or none of them."""

    text: str
    loss: bool


def stretches(row: EncodedRow, tokenizer: Any) -> tuple[Stretch, ...]:
    """The whole text of a row, special tokens included.

    Every stretch is what its tokens add to the text before them: decoded on its own it could lose its first space.
    """
    found: list[Stretch] = []
    before, end = "", 0
    for loss, group in groupby(row["loss_mask"]):
        end += len(list(group))
        text = decoded(row["input_ids"][:end], tokenizer)
        # A character whose bytes are on both sides decodes to a mark until it is whole: it goes with the latter.
        whole = text if end == len(row["input_ids"]) else text.rstrip("\ufffd")
        if whole[len(before) :]:
            found.append(Stretch(whole[len(before) :], loss))
        before = whole
    return tuple(found)


def decoded(ids: list[int], tokenizer: Any) -> str:
    """Tokens as they stand."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
