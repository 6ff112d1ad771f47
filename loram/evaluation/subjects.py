"""What is evaluated: a model, with or without an adapter, one model in memory at a time, or one block of it.

Adapters are loaded by stock peft, as a user of the result would, after the shapes have been compared:
peft itself passes over modules that the model does not have. One that was masked in training gets its masks again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loram.adapter import check_finite, check_modules, load_adapter
from loram.data.encoding import EncodedRow
from loram.device import place
from loram.errors import MismatchError, ResourceError
from loram.evaluation.generation import Question, exact_match
from loram.evaluation.losses import RowLosses, measure
from loram.evaluation.room import free_bytes, whole_bytes
from loram.evaluation.streamed import StreamedModel
from loram.evaluation.tasks import run_tasks
from loram.evaluation.under_masks import masks_for
from loram.memory import format_bytes
from loram.modeling import empty_model, load_model
from loram.progress import Progress
from loram.training.lora import attach_masked, without_peft_noise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A rung's name, its model and its adapter."""

    name: str
    model: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Exam:
    """What every subject has to do."""

    rows: list[EncodedRow]
    tokenizer: Any
    batch: int
    dtype: str
    questions: list[Question] = field(default_factory=list)
    new_tokens: int = 64
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    packed_to: int | None = None


@dataclass(frozen=True)
class Measured:
    """What came out for one subject."""

    losses: RowLosses
    accuracy: float | None = None
    tasks: dict[str, Any] = field(default_factory=dict)


def examine(subjects: Sequence[Subject], exam: Exam, progress: Progress) -> dict[str, Measured]:
    """Every subject measured; subjects that share a model are measured on one loading of it, where it fits."""
    found: dict[str, Measured] = {}
    for path in dict.fromkeys(subject.model for subject in subjects):
        model: Any = None
        mine = [subject for subject in subjects if subject.model == path]
        if not fits(path, exam):
            found |= {subject.name: by_blocks(subject, exam, progress) for subject in mine}
            continue
        try:
            model = place(load_model(path, dtype=exam.dtype))
            for subject in mine:
                tested = model if subject.adapter is None else attach(model, subject.adapter, path)
                found[subject.name] = take(subject, tested, exam, progress, with_tasks=subject is subjects[-1])
                model = model if subject.adapter is None else tested.unload()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of GPU memory while evaluating {path} with --batch {exam.batch}; lower it"
            ) from error
        finally:
            del model
            gc.collect()
    return found


def fits(model: Path, exam: Exam) -> bool:
    """Whether a model is measured whole; said where it is not, ResourceError where it would have to be."""
    needed, free = whole_bytes(model, exam.rows, exam.batch, exam.dtype, exam.packed_to), free_bytes()
    if needed is None or needed <= free:
        return True
    sentence = f"{model} takes {format_bytes(needed)} to be measured whole and {format_bytes(free)} are free"
    asked = "--generate" if exam.questions else "--tasks" if exam.tasks else None
    if asked is not None:
        raise ResourceError(
            f"{sentence}; {asked} needs it whole: leave it out, and the loss is measured block by block"
        )
    logger.info("%s: it is measured block by block", sentence)
    return False


def by_blocks(subject: Subject, exam: Exam, progress: Progress) -> Measured:
    """The loss of a model that does not fit."""
    adapter = None
    if subject.adapter is not None:
        adapter = load_adapter(subject.adapter)
        check_finite(adapter, subject.adapter)
        shapes = empty_model(subject.model)
        check_modules(adapter, partial(module_shape, shapes, subject.adapter), set(), subject.adapter)
    streamed = StreamedModel(subject.model, exam.batch, exam.dtype)
    return Measured(streamed.measure(exam.rows, adapter, progress, subject.name))


def attach(model: Any, adapter: Path, folder: Path | None = None) -> Any:
    """The model with an adapter on it; MismatchError where the adapter is another model's.

    `folder`: where the model was loaded from, with the masks that a masked adapter needs.
    """
    loaded = load_adapter(adapter)
    check_finite(loaded, adapter)
    check_modules(loaded, partial(module_shape, model, adapter), set(), adapter)
    masks = masks_for(loaded, folder)
    if masks is not None:
        return attach_masked(model, loaded, masks)
    with without_peft_noise():
        return PeftModel.from_pretrained(model, str(adapter))


def module_shape(model: Any, adapter: Path, module: str) -> tuple[int, ...]:
    """(out, in) of a module that an adapter names, (vocabulary, hidden) of an embedding."""
    try:
        part = model.get_submodule(module)
    except AttributeError:
        raise MismatchError(
            f"{adapter} adapts {module}, which the model does not have; it is another model's"
        ) from None
    if hasattr(part, "in_features"):
        return part.out_features, part.in_features
    return tuple(part.weight.shape)


def take(subject: Subject, model: Any, exam: Exam, progress: Progress, *, with_tasks: bool) -> Measured:
    """One subject's loss, and its answers and lm-eval tasks where they are asked for."""
    losses = measure(model, exam.rows, exam.batch, progress, subject.name, exam.packed_to)
    accuracy = None
    if exam.questions:
        accuracy = exact_match(model, exam.tokenizer, exam.questions, exam.batch, exam.new_tokens, progress)
    tasks = run_tasks(model, exam.tokenizer, exam.tasks, exam.batch, exam.limit) if with_tasks and exam.tasks else {}
    return Measured(losses, accuracy, tasks)
