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
        return text


def encode(sources: Sequence[Source], tokenizer: Any, max_length: int) -> tuple[list[EncodedRow], DataSummary]:
    """Every row of the sources, cut to `max_length`; rows without any loss left are dropped and counted."""
    rows: list[EncodedRow] = []
    lengths: list[int] = []
    cut = dropped = 0
    for source in sources:
        for example in source.rows:
            row = encode_example(example, tokenizer)
            lengths.append(len(row["input_ids"]))
            short = EncodedRow(input_ids=row["input_ids"][:max_length], loss_mask=row["loss_mask"][:max_length])
            if not any(short["loss_mask"]):
                dropped += 1
                continue
            cut += len(row["input_ids"]) > max_length
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
    )
    return rows, summary


def encode_example(example: Example, tokenizer: Any) -> EncodedRow:
    """One example in full length."""
    if example.messages is not None:
        text, spans = render_with_spans(tokenizer, example)
        ids, mask = tokenize(tokenizer, text, spans, special_tokens=False)
    elif example.text is not None:
        ids, mask = tokenize(tokenizer, example.text, [(0, len(example.text))])
        ids, mask = with_end(ids, mask, tokenizer.eos_token_id)
    else:
        prompt, completion = example.prompt or "", example.completion or ""
        ids, mask = tokenize(tokenizer, prompt + completion, [(len(prompt), len(prompt) + len(completion))])
        ids, mask = with_end(ids, mask, tokenizer.eos_token_id)
    if mask:
        mask[0] = False
    return EncodedRow(input_ids=ids, loss_mask=mask)


def with_end(ids: list[int], mask: list[bool], eos: int | None) -> tuple[list[int], list[bool]]:
    """The end-of-text token at the end, once, carrying loss."""
    if eos is None:
        return ids, mask
    if ids and ids[-1] == eos:
        return ids, [*mask[:-1], True]
    return [*ids, eos], [*mask, True]


def tokenize(
    tokenizer: Any, text: str, spans: list[Span], *, special_tokens: bool = True
) -> tuple[list[int], list[bool]]:
    """Ids of `text`, and which of them overlap one of the spans."""
    if not tokenizer.is_fast:
        return tokenize_by_pieces(tokenizer, text, spans, special_tokens=special_tokens)
    found = tokenizer(
        text, add_special_tokens=special_tokens, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    mask = [any(low < end and high > start for start, end in spans) for low, high in found["offset_mapping"]]
    return list(found["input_ids"]), mask


def tokenize_by_pieces(
    tokenizer: Any, text: str, spans: list[Span], *, special_tokens: bool
) -> tuple[list[int], list[bool]]:
    """The same for a tokenizer that gives no offsets: every piece is tokenized on its own."""
    ids: list[int] = []
    mask: list[bool] = []
    if special_tokens and begins_with_bos(tokenizer):
        ids, mask = [tokenizer.bos_token_id], [False]
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    for low, high in pairwise(edges):
        piece = tokenizer(text[low:high], add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        mask += [any(low < end and high > start for start, end in spans)] * len(piece)
    return ids, mask


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
