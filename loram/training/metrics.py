"""What training reports: `metrics.jsonl`, a line per optimizer step, and the live figures.

The file is appended to and flushed line by line, so that a killed run keeps what it wrote. A run that goes on begins
with the lines up to its checkpoint, so no step is there twice. Only process 0 writes and shows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.device import peak_bytes
from loram.errors import MismatchError
from loram.progress import Progress
from loram.training.processes import is_writer

METRICS = "metrics.jsonl"


class StepReport(TrainerCallback):
    """Writes every step to `metrics.jsonl`, drives `Progress` and stops at a loss that is no number."""

    def __init__(self, folder: Path, progress: Progress, log_every: int) -> None:
        self.file = folder / METRICS
        self.progress = progress
        self.log_every = log_every
        self.losses: list[float] = []
        self.lines: list[dict[str, float]] = []
        self.extra: dict[str, float] = {}
        self.tokens = 0
        self.seconds = self.seconds_before = 0.0
        self.started = 0.0
        self.shown = self.total = 0

    def restore(self, lines: Iterable[dict[str, float]]) -> None:
        """Begin with these lines, whatever the file holds."""
        for line in lines:
            self.losses.append(line["loss"])
            self.lines.append(line)
            self.tokens = int(line["tokens"])
            self.seconds = self.seconds_before = line["seconds"]
            self.shown = int(line["step"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts."""
        self.begin("train", state.max_steps)

    def begin(self, label: str, total: int) -> None:
        """Start the clock, and the display at the steps that are done already."""
        self.started = time.perf_counter()
        self.total = total
        self.progress.begin(label, total)
        if self.shown:
            self.progress.advance(self.shown)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One optimizer step is done (the Trainer logs each one); its closing summary has no loss."""
        if not logs or "loss" not in logs:
            return
        self.tokens = int(state.num_input_tokens_seen)
        self.total = state.max_steps
        self.record(state.global_step, float(logs["loss"]), logs["learning_rate"], args.learning_rate)

    def record(self, step: int, loss: float, rate: float, peak_rate: float) -> None:
        """Write a step down and show it now and then; MismatchError for a loss that is no number."""
        if not math.isfinite(loss):
            name = "NaN" if math.isnan(loss) else "infinite"
            raise MismatchError(f"the loss became {name} at step {step} with --lr {peak_rate:g}; lower --lr")
        self.losses.append(loss)
        self.seconds = self.seconds_before + time.perf_counter() - self.started
        self.append({"step": step, "loss": loss, "lr": rate, "tokens": self.tokens, **self.extra})
        if step - self.shown >= self.log_every or step in (1, self.total) or self.extra:
            figures = {"tokens_per_second": self.tokens / self.seconds, "memory": float(peak_bytes()), **self.extra}
            self.progress.advance(step - self.shown, loss=loss, **figures)
            self.shown = step
        self.extra = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The work is over."""
        self.progress.end()

    def append(self, line: dict[str, float]) -> None:
        """One line, on disk when this returns."""
        self.lines.append(line)
        if not is_writer():
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "seconds": round(self.seconds, 3)}) + "\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines that training wrote to a folder; none where it wrote none."""
    file = folder / METRICS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
