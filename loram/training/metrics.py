"""What training reports: `metrics.jsonl`, a line per optimizer step, and the live figures.

The file is only ever appended to and flushed line by line, so that a killed run keeps what it wrote.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.device import peak_bytes
from loram.errors import MismatchError
from loram.progress import Progress

METRICS = "metrics.jsonl"


class StepReport(TrainerCallback):
    """Writes every step to `metrics.jsonl`, drives `Progress` and stops at a loss that is no number."""

    def __init__(self, folder: Path, progress: Progress, log_every: int) -> None:
        self.file = folder / METRICS
        self.progress = progress
        self.log_every = log_every
        self.losses: list[float] = []
        self.tokens = 0
        self.seconds = 0.0
        self.started = 0.0
        self.shown = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts."""
        self.started = time.perf_counter()
        self.progress.begin("train", state.max_steps)

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
        loss, step = float(logs["loss"]), state.global_step
        if not math.isfinite(loss):
            name = "NaN" if math.isnan(loss) else "infinite"
            raise MismatchError(f"the loss became {name} at step {step} with --lr {args.learning_rate:g}; lower --lr")
        self.losses.append(loss)
        self.tokens = int(state.num_input_tokens_seen)
        self.seconds = time.perf_counter() - self.started
        self.append({"step": step, "loss": loss, "lr": logs["learning_rate"], "tokens": self.tokens})
        if step - self.shown >= self.log_every or step in (1, state.max_steps):
            rate = self.tokens / self.seconds
            self.progress.advance(step - self.shown, loss=loss, tokens_per_second=rate, memory=float(peak_bytes()))
            self.shown = step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The work is over."""
        self.progress.end()

    def append(self, line: dict[str, float]) -> None:
        """One line, on disk when this returns."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "seconds": round(self.seconds, 3)}) + "\n")
