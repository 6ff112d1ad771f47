"""Progress as text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loram.progress import SILENT
from loram_cli.progress import LineProgress, LiveProgress, clock, count_text, figures_text


def test_lines_are_few_and_end_with_the_last_step() -> None:
    written = io.StringIO()
    progress = LineProgress(Console(file=written, width=200), seconds=0)
    progress.begin("train", 1000)
    for step in range(1000):
        progress.advance(1, loss=1 / (step + 1), tokens_per_second=1234.5, memory=2.0 * 2**30)
    progress.end()
    lines = written.getvalue().splitlines()
    assert 10 <= len(lines) <= 25
    assert lines[-1].startswith("train  1000/1000")
    assert "loss 0.001" in lines[-1]
    assert "1,234 tok/s" in lines[-1]
    assert "2.0 GiB" in lines[-1]


def test_quick_work_is_one_line() -> None:
    written = io.StringIO()
    progress = LineProgress(Console(file=written, width=200))
    progress.begin("cut", 100)
    for _ in range(100):
        progress.advance()
    assert [line.split()[1] for line in written.getvalue().splitlines()] == ["100/100"]


def test_work_inside_work_and_stray_calls() -> None:
    written = io.StringIO()
    progress = LineProgress(Console(file=written, width=200))
    progress.advance()
    progress.end()
    progress.begin("outer", 2)
    progress.begin("inner", 1)
    progress.advance()
    progress.end()
    progress.advance(2)
    assert [line.split()[0] for line in written.getvalue().splitlines()] == ["inner", "outer"]


def test_live_block_draws_and_goes_away() -> None:
    written = io.StringIO()
    progress = LiveProgress(Console(file=written, force_terminal=True, width=120))
    progress.begin("train", 10)
    progress.advance(5, loss=2.5)
    progress.bars.refresh()
    progress.end()
    progress.stop()
    assert "train" in written.getvalue()
    assert "5/10" in written.getvalue()
    assert "loss 2.5" in written.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_counts_of_bytes_and_own_memory() -> None:
    assert count_text(3, 40) == "3/40"
    assert count_text(2**30, 2**32) == "1.00/4.00 GiB"
    assert figures_text({"lr": 1e-4}).startswith("lr 1.00e-04")


@pytest.mark.parametrize(("typed", "answer"), [("y", True), ("Yes ", True), ("", False), ("n", False)])
def test_a_question_is_answered_by_typing(typed: str, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(typed + "\n"))
    stream = io.StringIO()
    assert LiveProgress(Console(file=stream, force_terminal=True)).ask("upload?") is answer
    assert "upload? [y/N]" in stream.getvalue()


def test_nobody_is_asked_where_nobody_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    stream = io.StringIO()
    assert LiveProgress(Console(file=stream, force_terminal=True)).ask("upload?") is None
    assert LineProgress(Console(file=stream)).ask("upload?") is None
    assert SILENT.ask("upload?") is None
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    """A standard input at which somebody types."""

    def isatty(self) -> bool:
        return True
