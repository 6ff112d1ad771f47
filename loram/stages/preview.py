"""loram data: what is in a data file, as the model would be trained on it. Reads text and a tokenizer, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loram.checkpoint import read_config
from loram.data.encoding import encode, within_context
from loram.data.masks import Stretch, stretches
from loram.data.packing import pack
from loram.data.sources import Source, read_sources
from loram.data.summary import DataSummary, stop_tokens
from loram.hub.download import resolve_model
from loram.modeling import load_tokenizer
from loram.options import DataOptions, require
from loram.progress import SILENT, Progress
from loram.results import StageResult


@dataclass(frozen=True)
class ShownRow:
    """One row as it is trained on: its text by whether it carries loss, and how many tokens that is."""

    stretches: tuple[Stretch, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PreviewResult(StageResult):
    """The format, the counts, and the first rows with their loss mask."""

    source: Source
    data: DataSummary
    packs: int
    shown: tuple[ShownRow, ...] = ()

    @property
    def filled(self) -> float:
        """The share of packed rows that is tokens."""
        return self.data.tokens / (self.packs * self.data.max_length)

    def to_json(self) -> dict[str, Any]:
        """Format and counts; `shown` holds the first rows as [text, carries loss] pairs."""
        rows = [
            {"tokens": row.tokens, "text": [[part.text, part.loss] for part in row.stretches]} for row in self.shown
        ]
        return {
            "format": self.source.format,
            "blank": self.source.blank,
            **self.data.to_json(),
            "max_length": self.data.max_length,
            "packing": {"rows": self.packs, "filled": self.filled},
            "shown": rows,
        }

    def summary(self) -> str:
        """A few aligned lines, then what to mind."""
        data, lengths = self.data, self.data.lengths
        lost = data.lost_rows() or f"no row is longer than --max-length {data.max_length}"
        blank = f" ({self.source.blank} blank ones passed over)" if self.source.blank else ""
        lines = {
            "format": self.source.format,
            "rows": f"{data.rows:,} usable of {len(self.source.rows):,}{blank}",
            "tokens": f"{data.tokens:,}; a row: p50 {lengths.p50:,}  p90 {lengths.p90:,}  p95 {lengths.p95:,}  "
            f"p99 {lengths.p99:,}  max {lengths.longest:,}",
            "lengths": lost,
            "loss": f"on {data.loss_share:.1%} of the tokens ({data.loss_tokens:,})",
            "end": ending_line(data),
            "packing": f"{self.packs:,} rows of {data.max_length} tokens, {self.filled:.0%} filled",
        }
        remarks = [line for line in data.remarks() if line != data.lost_rows()]
        return "\n".join([*(f"{name:<8} {text}" for name, text in lines.items()), *(f"note     {r}" for r in remarks)])


def ending_line(data: DataSummary) -> str:
    """Whether rows end in a token that carries loss and ends generation."""
    if data.endings is None:
        return "every row is cut before its end; raise --max-length, or the model never learns to stop"
    if data.endings.right:
        return f"{data.endings.token} is inside the loss, and generation ends at it"
    return f"{data.endings.token} is no end of generation"


def preview(options: DataOptions, progress: Progress = SILENT) -> PreviewResult:
    """Encode the data as `train` would and say what came of it."""
    require(bool(options.model), "loram data counts tokens as the model does; add --model FOLDER")
    (source,) = read_sources([options.data], options.columns, options.system)
    folder = resolve_model(options.model, weights=False)
    tokenizer = load_tokenizer(folder)
    length = within_context(options.max_length, read_config(folder))
    rows, summary = encode([source], tokenizer, length, long=options.long, stops=stop_tokens(folder, tokenizer))
    return PreviewResult(
        source=source,
        data=summary,
        packs=len(pack([len(row["input_ids"]) for row in rows], length)),
        shown=tuple(ShownRow(stretches(row, tokenizer), len(row["input_ids"])) for row in rows[: options.rows]),
        next_command=f"loram train SMALL --data {options.data} -o ADAPTER",
    )
