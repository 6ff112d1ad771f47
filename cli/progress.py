"""Two ways to draw progress: a live block on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from loram.progress import Progress

LINES = 20
MANY = 2**24


class LiveProgress(Progress):
    """One block that redraws itself: bar, count, time left, figures, memory. Work inside work gets its own line."""

    def __init__(self, console: Console) -> None:
        self.bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self.tasks: list[TaskID] = []

    def begin(self, label: str, total: int) -> None:
        self.bars.start()
        self.tasks.append(self.bars.add_task(label, total=total or None, figures="", count=""))

    def advance(self, amount: int = 1, **figures: float) -> None:
        if self.tasks:
            self.bars.advance(self.tasks[-1], amount)
            task = next(task for task in self.bars.tasks if task.id == self.tasks[-1])
            self.bars.update(task.id, count=count_text(int(task.completed), int(task.total or 0)))
            if figures:
                self.bars.update(task.id, figures=figures_text(figures))

    def end(self) -> None:
        if self.tasks:
            self.bars.remove_task(self.tasks.pop())
        if not self.tasks:
            self.bars.stop()

    def ask(self, question: str) -> bool | None:
        """Yes only if it is typed; nobody is asked where nobody types."""
        if not sys.stdin.isatty():
            return None
        self.bars.stop()
        answer = self.bars.console.input(Text(f"{question} [y/N] "))
        return answer.strip().lower() in ("y", "yes")

    def stop(self) -> None:
        """Take the block away, also after an error."""
        self.tasks.clear()
        self.bars.stop()


@dataclass
class Work:
    """A piece of work as LineProgress counts it."""

    label: str
    total: int
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    printed: int = 0
    seconds: float = 0.0


class LineProgress(Progress):
    """About twenty lines per piece of work at most, and one in `seconds`; each complete in itself, for logs."""

    def __init__(self, console: Console, seconds: float = 1.0) -> None:
        self.console = console
        self.seconds = seconds
        self.stack: list[Work] = []

    def begin(self, label: str, total: int) -> None:
        self.stack.append(Work(label, total))

    def advance(self, amount: int = 1, **figures: float) -> None:
        if not self.stack:
            return
        work = self.stack[-1]
        work.done += amount
        seconds = time.monotonic() - work.started
        due = work.done - work.printed >= max(1, work.total // LINES) and seconds - work.seconds >= self.seconds
        if due or work.done == work.total:
            work.printed, work.seconds = work.done, seconds
            left = seconds / work.done * max(0, work.total - work.done) if work.done else 0.0
            times = f"{clock(seconds)} left {clock(left)}"
            parts = [work.label, count_text(work.done, work.total), times, figures_text(figures)]
            self.console.print(Text("  ".join(part for part in parts if part)))

    def end(self) -> None:
        if self.stack:
            self.stack.pop()


def figures_text(figures: dict[str, float]) -> str:
    """`loss 2.315  812 tok/s  1.2 GiB`; the memory of this process where the stage does not say."""
    known = figures if "memory" in figures else {**figures, "memory": float(memory_in_use())}
    return "  ".join(figure_text(name, value) for name, value in known.items() if name != "memory" or value)


def figure_text(name: str, value: float) -> str:
    """One figure with its unit."""
    match name:
        case "tokens_per_second":
            return f"{value:,.0f} tok/s"
        case "memory":
            return f"{value / 2**30:.1f} GiB"
        case "lr":
            return f"lr {value:.2e}"
        case _:
            return f"{name.replace('_', ' ')} {value:.4g}"


def count_text(done: int, total: int) -> str:
    """`3/40`; a total of many millions is bytes."""
    return f"{done / 2**30:.2f}/{total / 2**30:.2f} GiB" if total >= MANY else f"{done}/{total}"


def memory_in_use() -> int:
    """Bytes of this process in memory, 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else 0


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
