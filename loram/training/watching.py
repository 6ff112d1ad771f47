"""What is measured while training, what it is written down as, and when it ends the training.

All that is remembered between measurements is in `metrics.jsonl`, so a continued run judges as an uninterrupted one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.training.metrics import StepReport
from loram.training.processes import done_by_writer, is_writer
from loram.training.trainer import adapter_state, load_weights

logger = logging.getLogger(__name__)

SMALL_LOSS = "eval_loss"
LARGE_LOSS = "large_loss"


@dataclass(frozen=True)
class Measure:
    """A figure of the model that is taken every N steps and after the last one."""

    name: str
    every: int
    take: Callable[[Any], float]


@dataclass(frozen=True)
class Watch:
    """The measures, and the one that may end the training: `patience` times in a row no better."""

    measures: tuple[Measure, ...] = ()
    patience: int | None = None
    stop_on: str = SMALL_LOSS

    def best(self, lines: Iterable[dict[str, float]]) -> int | None:
        """The step with the lowest figure so far."""
        found = [(line[self.stop_on], int(line["step"])) for line in lines if self.stop_on in line]
        return min(found)[1] if found else None

    def exhausted(self, lines: Iterable[dict[str, float]]) -> bool:
        """Whether the last `patience` measurements were no better than one before them."""
        values = [line[self.stop_on] for line in lines if self.stop_on in line]
        if self.patience is None or len(values) <= self.patience:
            return False
        return min(values[-self.patience :]) >= min(values[: -self.patience])


class Watcher(TrainerCallback):
    """Takes the measures, keeps the best weights where there is patience, and stops when it is at its end."""

    def __init__(self, watch: Watch, report: StepReport, place: Path) -> None:
        self.watch = watch
        self.report = report
        self.place = place

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step is done: what is to be measured?"""
        model, step = kwargs["model"], state.global_step
        due = [each for each in self.watch.measures if step % each.every == 0 or step == state.max_steps]
        for each in due:
            self.report.extra[each.name] = float(done_by_writer(partial(each.take, model)))
        if self.watch.patience is None or self.watch.stop_on not in self.report.extra:
            return
        lines = [*self.report.lines, {"step": step, **self.report.extra}]
        if self.watch.best(lines) == step and is_writer():
            self.keep(model, step)
        if self.watch.exhausted(lines):
            logger.info("%s has not fallen for %d measurements; stopping", self.watch.stop_on, self.watch.patience)
            control.should_training_stop = True

    def keep(self, model: Any, step: int) -> None:
        """Write the weights of the best step."""
        folder = best_folder(self.place, step)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter_state(model), folder / "partial")
        os.replace(folder / "partial", folder / "adapter_model.safetensors")


def best_folder(place: Path, step: int) -> Path:
    """Where the weights of a best step are kept."""
    return place / f"best-{step}"


def restore_best(model: Any, watch: Watch, report: StepReport, place: Path) -> int | None:
    """Put the best step's weights into the model, where early stopping was asked for; its number."""
    step = watch.best(report.lines) if watch.patience is not None else None
    if step is None:
        return None
    if not (best_folder(place, step) / "adapter_model.safetensors").is_file():
        logger.warning("the weights of the best step, %d, are gone; keeping the last ones", step)
        return None
    load_weights(model, best_folder(place, step))
    logger.info("kept the weights of step %d, whose %s was the lowest", step, watch.stop_on)
    return step
