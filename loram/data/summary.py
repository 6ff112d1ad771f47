"""What was read, in numbers and a few plain lines."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from loram.artifact import read_json


class Lengths(NamedTuple):
    """Percentiles of the tokens in a row, before any cut."""

    p50: int
    p90: int
    p95: int
    p99: int
    longest: int

    def to_json(self) -> dict[str, int]:
        """By name."""
        return {"p50": self.p50, "p90": self.p90, "p95": self.p95, "p99": self.p99, "max": self.longest}


@dataclass(frozen=True)
class Endings:
    """Whether rows teach the model to stop: of `whole` rows, `stopping` end their loss in a token that ends generation.

    `token` is what most rows end in, `stops` the tokens that end generation.
    """

    token: str
    whole: int
    stopping: int
    stops: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether all of them do."""
        return self.stopping == self.whole

    def warning(self) -> str:
        """What is wrong with them, and what to do."""
        if self.right:
            return ""
        known = ", ".join(self.stops) or "nothing"
        return (
            f"{self.whole - self.stopping} rows do not teach the model to stop: their loss ends in {self.token!r}, but "
            f"generation ends at {known}; add that token's id to eos_token_id in generation_config.json, or use a "
            "tokenizer whose eos_token it is"
        )


@dataclass(frozen=True)
class DataSummary:
    """What was read, in numbers; prints as a few lines."""

    formats: tuple[str, ...]
    rows: int
    cut: int
    dropped: int
    tokens: int
    loss_tokens: int
    lengths: Lengths
    max_length: int
    joined: int = 0
    too_long: int = 0
    endings: Endings | None = None
    notices: tuple[str, ...] = ()

    @property
    def loss_share(self) -> float:
        """Share of the tokens that carry loss."""
        return self.loss_tokens / self.tokens

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        body: dict[str, Any] = {
            "formats": list(self.formats),
            "rows": self.rows,
            "cut": self.cut,
            "too_long": self.too_long,
            "dropped": self.dropped,
            "joined": self.joined,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "loss_share": self.loss_share,
            "lengths": self.lengths.to_json(),
            "notices": list(self.notices),
        }
        if self.endings is not None:
            body["end"] = {"token": self.endings.token, "in_loss": self.endings.right, "stops": self.endings.stops}
        return body

    def __str__(self) -> str:
        text = (
            f"{' + '.join(self.formats)}: {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.loss_share:.0%} carry loss; tokens a row: median {self.lengths.p50}, "
            f"90% up to {self.lengths.p90}, longest {self.lengths.longest}"
        )
        return "\n".join([text, *self.remarks()])

    def remarks(self) -> list[str]:
        """What a reader should mind, a line each."""
        lines = [lost for lost in (self.lost_rows(),) if lost]
        if self.joined:
            lines.append(
                f"in {self.joined} rows one token spans the end of the prompt and the start of the completion; "
                "move the space at the prompt's end to the completion, so that the prompt alone gives the same tokens"
            )
        lines += self.notices
        if self.endings is not None and not self.endings.right:
            lines.append(self.endings.warning())
        return lines

    def lost_rows(self) -> str:
        """What was cut and what was dropped, and why."""
        parts = []
        if self.cut:
            parts.append(f"{self.cut} rows are longer than --max-length {self.max_length} and were cut")
        if self.too_long:
            parts.append(f"{self.too_long} rows are longer than --max-length {self.max_length} and were dropped")
        if self.dropped:
            more = f"{self.dropped} more" if parts else f"{self.dropped} rows"
            parts.append(f"{more} have no loss left and were dropped")
        return "; ".join(parts)


def percentiles(lengths: list[int]) -> Lengths:
    """Median, 90th, 95th and 99th percentile, and maximum."""
    if len(lengths) == 1:
        (only,) = lengths
        return Lengths(only, only, only, only, only)
    cuts = [round(value) for value in quantiles(lengths, n=100, method="inclusive")]
    return Lengths(cuts[49], cuts[89], cuts[94], cuts[98], max(lengths))


def stop_tokens(folder: Path | str, tokenizer: Any) -> frozenset[int]:
    """The ids at which generation ends: the tokenizer's, and those of generation_config.json and config.json."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        ends = read_json(file).get("eos_token_id") if file.is_file() else None
        found |= set(ends if isinstance(ends, list) else [ends] if ends is not None else [])
    return frozenset(found)


def endings_of(tokenizer: Any, last: Collection[int], stops: Collection[int]) -> Endings | None:
    """How the rows end, from the id of each row's last token with loss; None where every row was cut."""
    if not last:
        return None
    wrong = [token for token in last if token not in stops]
    shown = max(set(wrong or last), key=(wrong or list(last)).count)
    return Endings(
        token=str(tokenizer.convert_ids_to_tokens(shown)),
        whole=len(last),
        stopping=len(last) - len(wrong),
        stops=tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops)),
    )
