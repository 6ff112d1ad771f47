"""The ways of aligning, each from what the stage has read to the tensors that change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loram.artifact import Manifest, sha256_json
from loram.checkpoint import BY_FLAG, Checkpoint
from loram.data.encoding import EncodedRow
from loram.data.windows import Mixture
from loram.device import place, resolve_dtype
from loram.errors import InputError
from loram.evaluation.losses import measure, summarize
from loram.modeling import load_model
from loram.options import AlignOptions
from loram.progress import Progress
from loram.rewriting import Changed
from loram.stages.lineage import check_base, find_large
from loram.training.alignment import Objective, Task, align_weights
from loram.training.loop import Session
from loram.training.objectives import Student, distilled, next_token, resident_teacher
from loram.training.scopes import add_lora, merged_lora, prepare, trained_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What one call of align works with; `path` is the draft's folder, `out` where it will be."""

    options: AlignOptions
    manifest: Manifest
    checkpoint: Checkpoint
    mixture: Mixture
    path: Path
    out: Path
    session: Session
    progress: Progress

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed in."""
        return BY_FLAG[resolve_dtype(self.options.dtype)]

    def large(self) -> Path:
        """The large model's folder; InputError where it is not found, MismatchError where it is another one."""
        folder = find_large(self.checkpoint.folder, self.manifest, self.options.large)
        if folder is None or self.manifest.base is None:
            name = self.manifest.base.id if self.manifest.base else "the large model"
            raise InputError(f"{self.checkpoint.folder} was cut from {name}, which was not found; give it with --large")
        check_base(self.manifest.base, folder)
        return folder


def digest_of(mixture: Mixture) -> str:
    """Changes when a token or the order does."""
    return sha256_json([mixture.windows.tolist(), mixture.held_out.tolist(), mixture.order])


def held_out_loss(work: Work, folder: Path) -> float:
    """Mean next-token loss of a small model on the windows that were held out."""
    rows = [
        EncodedRow(input_ids=ids, loss_mask=[False] + [True] * (len(ids) - 1)) for ids in work.mixture.held_out.tolist()
    ]
    model = place(load_model(folder, dtype=work.dtype))
    return summarize(measure(model, rows, work.options.batch, work.progress, "measure")).mean


def learn(work: Work) -> Changed:
    """lm and distill: train the weights of --scope, from the next tokens or from the large model."""
    options = work.options
    model: Any = place(load_model(work.checkpoint.folder, dtype=work.dtype))
    if options.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = trained_weights(work, model)
    logger.info("aligning %s of %s parameters", f"{count(parameters):,}", f"{count(dict(model.named_parameters())):,}")
    student = Student(model, work.mixture.windows, work.dtype)
    task = Task(parameters, objective_of(work, student), work.mixture.order, work.mixture.windows.shape[1])
    align_weights(task, options, work.path, work.progress, work.session)
    final: Mapping[str, Tensor] = parameters
    if options.scope == "lora":
        final = merged_lora(parameters, work.checkpoint)
    return {name: partial(kept_zeros, work, name, value) for name, value in final.items()}


def trained_weights(work: Work, model: Any) -> dict[str, nn.Parameter]:
    """What --scope trains, made ready for it."""
    options = work.options
    if options.scope == "lora":
        model.requires_grad_(False)
        return add_lora(model, options.rank, options.seed)
    return prepare(model, trained_names(model, options.scope), work.checkpoint)


def count(parameters: Mapping[str, Tensor]) -> int:
    """Numbers in tensors."""
    return sum(value.numel() for value in parameters.values())


def objective_of(work: Work, student: Student) -> Objective:
    """The loss that --method minimizes."""
    options = work.options
    if options.method == "lm":
        return next_token(student)
    large = Student(place(load_model(work.large(), dtype=work.dtype)), student.windows, work.dtype)
    teacher = resident_teacher(large, options.temperature)
    return distilled(student, teacher, options.temperature, options.hidden_weight)


def kept_zeros(work: Work, name: str, value: Tensor) -> Tensor:
    """A changed weight as it is written."""
    return value


CHANGES: dict[str, Callable[[Work], Changed]] = {"lm": learn, "distill": learn}
