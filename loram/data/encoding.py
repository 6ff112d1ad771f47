"""Examples into token ids and a loss mask that says, by position, which tokens carry loss.

The mask never looks at token ids: where pad and eos are one id (SmolLM2) the end of an answer keeps
its loss. A row's first token is never predicted, so it never carries loss. A token that straddles the
boundary between prompt and completion belongs to the completion.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypedDict

from loram.data.chat import Span, render_with_spans
from loram.data.formats import Example
from loram.data.sources import Source, named
from loram.data.summary import DataSummary, endings_of, percentiles
from loram.errors import DataError

logger = logging.getLogger(__name__)


class EncodedRow(TypedDict):
    """Token ids and, for each, whether it carries loss."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass
class Encoder:
    """Rows as they are encoded, and what there is to say about them."""

    tokenizer: Any
    max_length: int
    drop_long: bool = False
    rows: list[EncodedRow] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    too_long: int = 0
    dropped: int = 0
    joined: int = 0
    last: list[int] = field(default_factory=list)
    notices: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, example: Example) -> bool:
        """Encode one row and keep it if it is usable; whether it is."""
        row, found = encode_and_check(example, self.tokenizer)
        ids, mask = row["input_ids"], row["loss_mask"]
        self.lengths.append(len(ids))
        if self.drop_long and len(ids) > self.max_length:
            self.too_long += 1
            return False
        short = EncodedRow(input_ids=ids[: self.max_length], loss_mask=mask[: self.max_length])
        if not any(short["loss_mask"]):
            self.dropped += 1
            return False
        if len(ids) > self.max_length:
            self.cut += 1
        else:
            self.last.append(ids[len(mask) - 1 - mask[::-1].index(True)])
        self.joined += found.joined
        for notice in found.notices:
            self.notices[notice].append(example.place)
        self.rows.append(short)
        return True

    def add_source(self, source: Source) -> None:
        """Every row of a source; DataError where none of them is usable."""
        used = [self.add(example) for example in source.rows]
        if not any(used):
            places = named([example.place for example in source.rows], source.path)
            longest = max(self.lengths[-len(used) :], default=0)
            shorter = self.drop_long and longest > self.max_length
            why = "is within --max-length" if shorter else "has a token with loss within --max-length"
            raise DataError(
                f"none of the {len(used)} rows of {source.path} ({places}) {why} {self.max_length} "
                f"(the longest row has {longest} tokens); raise --max-length"
            )

    def summary(self, formats: Sequence[str], stops: Collection[int]) -> DataSummary:
        """All that was counted."""
        return DataSummary(
            formats=tuple(dict.fromkeys(formats)),
            rows=len(self.rows),
            cut=self.cut,
            dropped=self.dropped,
            tokens=sum(len(row["input_ids"]) for row in self.rows),
            loss_tokens=sum(sum(row["loss_mask"]) for row in self.rows),
            lengths=percentiles(self.lengths),
            max_length=self.max_length,
            joined=self.joined,
            too_long=self.too_long,
            endings=endings_of(self.tokenizer, self.last, stops),
            notices=tuple(
                f"the model's chat template {notice} in {len(places)} rows (first {places[0]})"
                for notice, places in self.notices.items()
            ),
        )


def encode(
    sources: Sequence[Source],
    tokenizer: Any,
    max_length: int,
    *,
    long: str = "cut",
    stops: Collection[int] | None = None,
) -> tuple[list[EncodedRow], DataSummary]:
    """Every usable row of the sources, none longer than `max_length`; what is lost on the way is counted.

    `long` says whether longer rows are cut or dropped; `stops` are the ids at which generation ends (by default the
    tokenizer's), for the check that rows end in one of them.
    """
    encoder = Encoder(tokenizer, max_length, drop_long=long == "drop")
    for source in sources:
        encoder.add_source(source)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    summary = encoder.summary([source.format for source in sources], own if stops is None else stops)
    return encoder.rows, summary


def encode_example(example: Example, tokenizer: Any) -> EncodedRow:
    """One example in full length."""
    return encode_and_check(example, tokenizer)[0]


def encode_and_check(example: Example, tokenizer: Any) -> tuple[EncodedRow, Tokens]:
    """One example in full length, and what was noticed on the way."""
    if example.messages is not None:
        chat = render_with_spans(tokenizer, example)
        found = tokenize(tokenizer, chat.text, chat.spans, special_tokens=False)
        found.notices = chat.notices
    else:
        prompt = example.prompt or ""
        text = prompt + (example.completion or "") if example.text is None else example.text
        found = with_end(tokenize(tokenizer, text, [(len(prompt), len(text))]), tokenizer.eos_token_id)
    if found.mask:
        found.mask[0] = False
    return EncodedRow(input_ids=found.ids, loss_mask=found.mask), found


@dataclass
class Tokens:
    """Ids, which of them overlap a span, and whether one of them holds what is on both sides of a span's start."""

    ids: list[int]
    mask: list[bool]
    joined: bool = False
    notices: tuple[str, ...] = ()


def with_end(tokens: Tokens, eos: int | None) -> Tokens:
    """The end-of-text token at the end, once, carrying loss."""
    if eos is not None and tokens.ids[-1:] != [eos]:
        tokens.ids.append(eos)
        tokens.mask.append(True)
    elif eos is not None:
        tokens.mask[-1] = True
    return tokens


def tokenize(tokenizer: Any, text: str, spans: list[Span], *, special_tokens: bool = True) -> Tokens:
    """Ids of `text`, and which of them overlap one of the spans."""
    if not tokenizer.is_fast:
        return tokenize_by_pieces(tokenizer, text, spans, special_tokens=special_tokens)
    found = tokenizer(
        text, add_special_tokens=special_tokens, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    offsets = found["offset_mapping"]
    mask = [any(low < end and high > start for start, end in spans) for low, high in offsets]
    starts = {start for start, _ in spans}
    joined = any(low < start < high for start in starts for low, high in offsets)
    return Tokens(list(found["input_ids"]), mask, joined)


def tokenize_by_pieces(tokenizer: Any, text: str, spans: list[Span], *, special_tokens: bool) -> Tokens:
    """The same for a tokenizer that gives no offsets: every piece is tokenized on its own."""
    tokens = Tokens([], [])
    if special_tokens and begins_with_bos(tokenizer):
        tokens = Tokens([tokenizer.bos_token_id], [False])
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    for low, high in pairwise(edges):
        piece = tokenizer(text[low:high], add_special_tokens=False, verbose=False)["input_ids"]
        tokens.ids += piece
        tokens.mask += [any(low < end and high > start for start, end in spans)] * len(piece)
    return tokens


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its beginning-of-text token before every text by itself."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def within_context(max_length: int, config: Mapping[str, Any]) -> int:
    """`max_length`, or the model's context length where that is shorter (said in the log)."""
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or max_length <= context:
        return max_length
    logger.info("--max-length %d is more than the model's context of %d tokens; using %d", max_length, context, context)
    return context
