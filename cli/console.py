"""The only place that prints. Results go to stdout, everything else to stderr; `--json` keeps stdout for one object.

rich is imported when something is drawn, and colors follow NO_COLOR and whether anybody looks.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loram.hub.failures import redact
from loram.progress import SILENT, Progress
from loram.results import StageResult

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

    from .progress import LiveProgress

BAR_WIDTH = 24


class Console:
    """Where a command's words go, for one command line."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._live: LiveProgress | None = None

    @cached_property
    def out(self) -> RichConsole:
        """stdout."""
        from rich.console import Console as RichConsole

        return RichConsole(highlight=False, soft_wrap=True)

    @cached_property
    def err(self) -> RichConsole:
        """stderr."""
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self) -> Iterator[Progress]:
        """A stage is at work: its log lines and progress go to stderr, and nothing else reaches stdout."""
        handler = RichHandler(self.err)
        logger = logging.getLogger("loram")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO)
        if not self.verbose:
            logging.captureWarnings(True)  # to a logger that nobody hears: libraries warn about each other
        display = self.display()
        try:
            with redirect_stdout(sys.stderr):
                yield display
        finally:
            if self._live is not None:
                self._live.stop()
            logging.captureWarnings(False)
            logger.removeHandler(handler)

    def display(self) -> Progress:
        """Nothing with -q, a live block on a terminal, lines otherwise."""
        if self.quiet:
            return SILENT
        from .progress import LineProgress, LiveProgress

        if not self.err.is_terminal:
            return LineProgress(self.err)
        self._live = LiveProgress(self.err)
        return self._live

    def result(self, result: StageResult) -> None:
        """What a stage gives back; the last line is the path and what to type next."""
        if self.json:
            self.object(result.to_json())
            return
        if not self.quiet:
            ladder = getattr(result, "ladder", None)
            rows = getattr(ladder, "rows", ladder)
            if rows:
                self.out.print(ladder_table(rows, unicode=self.out.encoding.startswith("utf")))
            self.text(result.summary())
            for row in getattr(result, "shown", ()):
                self.masked(row.stretches, row.tokens)
        next_command = f"next: {result.next_command}" if result.next_command else ""
        self.text("    ".join(part for part in (str(result.path or ""), next_command) if part))

    def object(self, value: Any) -> None:
        """One JSON object on stdout; numbers that JSON does not know become null."""
        sys.stdout.write(json.dumps(finite(value), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """Plain text on stdout, never read as markup."""
        if text:
            from rich.text import Text

            self.out.print(Text(text))

    def masked(self, stretches: Any, tokens: int) -> None:
        """A row of data: what carries loss is green, the rest dim; between ⟦ ⟧ where nothing is colored."""
        from rich.text import Text

        if self.out.is_terminal and not self.out.no_color:
            parts = [(part.text, "bold green" if part.loss else "dim") for part in stretches]
        else:
            left, right = ("⟦", "⟧") if self.out.encoding.startswith("utf") else ("[[", "]]")
            parts = [(f"{left}{part.text}{right}" if part.loss else part.text, "") for part in stretches]
        self.out.print(Text.assemble((f"── {tokens} tokens\n", "cyan"), *parts))

    def document(self, value: dict[str, Any], text: str) -> None:
        """A text to be saved as it is, or the same as JSON."""
        if self.json:
            self.object(value)
        else:
            sys.stdout.write(text if text.endswith("\n") else text + "\n")

    def pairs(self, value: dict[str, Any], rows: Mapping[str, str], last_line: str = "") -> None:
        """Two columns, or `value` as JSON."""
        if self.json:
            self.object(value)
            return
        width = max((len(name) for name in rows), default=0)
        for name, text in rows.items():
            self.text(f"{name:<{width}}  {text}".rstrip())
        if not self.quiet:
            self.text(last_line)

    def error(self, sentence: str, error: BaseException) -> None:
        """One line on stderr; the traceback before it with -v."""
        from rich.text import Text

        if self.verbose:
            self.err.print(Text(redact("".join(traceback.format_exception(error)))))
        self.err.print(Text.assemble(("error: ", "bold red"), sentence))


class RichHandler(logging.Handler):
    """Log records as plain lines, above the live block where there is one."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.console.print(Text(prefix + record.getMessage(), style="yellow" if prefix else ""))


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ladder_table(rows: Any, *, unicode: bool) -> Table:
    """The quality ladder: a row per model, its held-out loss with standard error, and a bar (longer is better)."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = [{name: cell(row, name) for name in ("name", "loss", "stderr", "accuracy")} for row in rows]
    scored = any(row["accuracy"] is not None for row in columns)
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column("± stderr", justify="right")
    if scored:
        table.add_column("accuracy", justify="right")
    table.add_column("accuracy" if scored else "likelihood per token, best = full")
    best = min((row["loss"] for row in columns if row["loss"] is not None), default=0.0)
    for row in columns:
        cells = [str(row["name"]), number(row["loss"]), number(row["stderr"])]
        if scored:
            cells.append("" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %")
        share = row["accuracy"] if scored else None if row["loss"] is None else math.exp(best - row["loss"])
        table.add_row(*cells, bar(share, "█" if unicode else "#"))
    return table


def cell(row: Any, name: str) -> Any:
    """A field of a ladder row, which is a dataclass or a mapping."""
    return row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)


def number(value: float | None) -> str:
    """Four digits, or nothing."""
    return "" if value is None else f"{value:.4f}"


def bar(share: float | None, character: str) -> str:
    """A bar for a share of 1."""
    return character * round(BAR_WIDTH * min(max(share or 0.0, 0.0), 1.0))
