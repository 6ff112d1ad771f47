"""What alignment minimizes: the next token's cross-entropy, or the divergence from the large model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loram.data.collate import IGNORED
from loram.training.alignment import Objective
from loram.training.cross_entropy import soft_cap, summed_loss
from loram.training.divergence import Comparison, against_hidden, hidden_error, summed_divergence


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about some windows: how to compare logits, and its last hidden states (positions, width)."""

    compare: Comparison
    hidden: Tensor | None = None


Teacher = Callable[[Sequence[int]], Lesson]
"""Numbers of windows → what the large model says about them."""


@dataclass(frozen=True)
class Student:
    """The small model with the windows (count, length) that it is aligned on, and the dtype it computes in.

    `places`: where in its document each token is; then documents in a window do not see each other.
    """

    model: Any
    windows: Tensor
    dtype: torch.dtype
    places: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The model's."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    def batch(self, numbers: Sequence[int]) -> Tensor:
        """Token ids (rows, length) on the model's device."""
        return self.windows[list(numbers)].to(self.device)

    def targets(self, numbers: Sequence[int]) -> Tensor:
        """The tokens to predict (rows, length - 1); IGNORED where a document begins, which nothing before it tells."""
        ids = self.batch(numbers)[:, 1:]
        if self.places is None:
            return ids
        return ids.masked_fill(self.places[list(numbers)][:, 1:].to(self.device) == 0, IGNORED)

    def hidden(self, numbers: Sequence[int]) -> Tensor:
        """Last hidden states (rows, length, width), as the head reads them."""
        apart = {} if self.places is None else {"position_ids": self.places[list(numbers)].to(self.device)}
        with self.computing(self.device.type):
            found: Tensor = self.model.get_decoder()(input_ids=self.batch(numbers), use_cache=False, **apart)[0]
        return found

    def computing(self, device: str) -> AbstractContextManager[Any]:
        """The dtype that Linears compute in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device, dtype=self.dtype)


def next_token(student: Student) -> Objective:
    """Mean cross-entropy of the next tokens (2502.13533, alignment)."""

    def objective(numbers: Sequence[int]) -> Tensor:
        targets = student.targets(numbers)
        carry = targets != IGNORED
        hidden = student.hidden(numbers)[:, :-1]
        return summed_loss(student.model, hidden[carry], targets[carry]) / carry.sum()

    return objective


def distilled(student: Student, teacher: Teacher, temperature: float, hidden_weight: float) -> Objective:
    """Mean KL(teacher ‖ student) per token, plus the relative error of the last hidden states times its weight."""

    def objective(numbers: Sequence[int]) -> Tensor:
        lesson = teacher(numbers)
        hidden = student.hidden(numbers)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        loss = summed_divergence(student.model, hidden, lesson.compare, temperature) / len(hidden)
        if hidden_weight:
            assert lesson.hidden is not None
            loss = loss + hidden_weight * hidden_error(hidden, lesson.hidden)
        return loss

    return objective


def resident_teacher(large: Student, temperature: float) -> Teacher:
    """The large model in memory, beside the small one."""
    large.model.eval()
    large.model.requires_grad_(False)

    @torch.no_grad()
    def teach(numbers: Sequence[int]) -> Lesson:
        hidden = large.hidden(numbers)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        head = large.model.get_output_embeddings().weight
        return Lesson(against_hidden(hidden, head, soft_cap(large.model), temperature), hidden)

    return teach
