"""Examples into token ids and a loss mask that says, by position, which tokens carry loss.

The mask never looks at token ids: where pad and eos are one id (SmolLM2) the end of an answer keeps
its loss. A row's first token is never predicted, so it never carries loss. A token that straddles the
boundary between prompt and completion belongs to the completion.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import quantiles
from typing import Any, TypedDict

from loram.data.chat import Span, render_with_spans
from loram.data.formats import Example, Source
from loram.errors import DataError

logger = logging.getLogger(__name__)


class EncodedRow(TypedDict):
    """Token ids and, for each, whether it carries loss."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class DataSummary:
    """What was read, in numbers; prints as one or two lines."""

    formats: tuple[str, ...]
    rows: int
    cut: int
    dropped: int
    tokens: int
    loss_tokens: int
    lengths: tuple[int, int, int]
    max_length: int
    joined: int = 0

    @property
    def loss_share(self) -> float:
        """Share of the tokens that carry loss."""
        return self.loss_tokens / self.tokens

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        median, ninetieth, longest = self.lengths
        return {
            "formats": list(self.formats),
            "rows": self.rows,
            "cut": self.cut,
            "dropped": self.dropped,
            "joined": self.joined,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "loss_share": self.loss_share,
            "lengths": {"p50": median, "p90": ninetieth, "max": longest},
        }

    def __str__(self) -> str:
        median, ninetieth, longest = self.lengths
        text = (
            f"{' + '.join(self.formats)}: {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.loss_share:.0%} carry loss; "
            f"tokens a row: median {median}, 90% up to {ninetieth}, longest {longest}"
        )
        if self.cut or self.dropped:
            text += f"\n{self.cut} rows are longer than --max-length {self.max_length} and were cut"
            text += f"; {self.dropped} more have no loss left and were dropped" if self.dropped else ""
        if self.joined:
            text += (
                f"\nin {self.joined} rows one token spans the end of the prompt and the start of the completion; "
                "move the space at the prompt's end to the completion, so that the prompt alone gives the same tokens"
            )
        return text


def encode(sources: Sequence[Source], tokenizer: Any, max_length: int) -> tuple[list[EncodedRow], DataSummary]:
    """Every row of the sources, cut to `max_length`; rows without any loss left are dropped and counted."""
    rows: list[EncodedRow] = []
    lengths: list[int] = []
    cut = dropped = joined = 0
    for source in sources:
        for example in source.rows:
            row, spanning = encode_and_check(example, tokenizer)
            lengths.append(len(row["input_ids"]))
            short = EncodedRow(input_ids=row["input_ids"][:max_length], loss_mask=row["loss_mask"][:max_length])
            if not any(short["loss_mask"]):
                dropped += 1
                continue
            cut += len(row["input_ids"]) > max_length
            joined += spanning
            rows.append(short)
    names = ", ".join(source.path for source in sources)
    if not rows:
        raise DataError(
            f"none of the {dropped} rows of {names} has a token with loss within --max-length {max_length} "
            f"(the longest row has {max(lengths, default=0)} tokens); raise --max-length"
        )
    summary = DataSummary(
        formats=tuple(dict.fromkeys(source.format for source in sources)),
        rows=len(rows),
        cut=cut,
        dropped=dropped,
        tokens=sum(len(row["input_ids"]) for row in rows),
        loss_tokens=sum(sum(row["loss_mask"]) for row in rows),
        lengths=percentiles(lengths),
        max_length=max_length,
        joined=joined,
    )
    return rows, summary


def encode_example(example: Example, tokenizer: Any) -> EncodedRow:
    """One example in full length."""
    return encode_and_check(example, tokenizer)[0]


def encode_and_check(example: Example, tokenizer: Any) -> tuple[EncodedRow, bool]:
    """One example in full length, and whether a token spans the beginning of what carries loss."""
    if example.messages is not None:
        text, spans = render_with_spans(tokenizer, example)
        found = tokenize(tokenizer, text, spans, special_tokens=False)
    else:
        prompt = example.prompt or ""
        text = prompt + (example.completion or "") if example.text is None else example.text
        found = with_end(tokenize(tokenizer, text, [(len(prompt), len(text))]), tokenizer.eos_token_id)
    if found.mask:
        found.mask[0] = False
    return EncodedRow(input_ids=found.ids, loss_mask=found.mask), found.joined


@dataclass
class Tokens:
    """Ids, which of them overlap a span, and whether one of them holds what is on both sides of a span's start."""

    ids: list[int]
    mask: list[bool]
    joined: bool = False


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


def percentiles(lengths: list[int]) -> tuple[int, int, int]:
    """Median, 90th percentile and maximum."""
    if len(lengths) == 1:
        return lengths[0], lengths[0], lengths[0]
    cuts = quantiles(lengths, n=10, method="inclusive")
    return round(cuts[4]), round(cuts[8]), max(lengths)


def within_context(max_length: int, config: Mapping[str, Any]) -> int:
    """`max_length`, or the model's context length where that is shorter (said in the log)."""
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or max_length <= context:
        return max_length
    logger.info("--max-length %d is more than the model's context of %d tokens; using %d", max_length, context, context)
    return context
