"""KL(teacher ‖ student) of next-token distributions without whole logits: a few positions at a time.

The head is frozen in alignment, so the gradient of the hidden states is computed in the same pass as the loss, as in
`cross_entropy`. The teacher is either whole (its hidden states and its head) or the k largest probabilities of each
position with the rest of the mass as one bucket. With temperature t both distributions are softmax(z / t) and the
loss is multiplied by t², which keeps the size of its gradients (1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loram.training.cross_entropy import capped, chunk_rows, soft_cap

Comparison = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(student logits / t of some positions, which positions) → (summed KL, its gradient in those logits)."""


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution at some positions: the k largest log-probabilities, and that of all other tokens.

    `tokens` (positions, k) int; `logs` (positions, k) fp32; `rest` (positions,) fp32, −inf where there are no others.
    """

    tokens: Tensor
    logs: Tensor
    rest: Tensor


def top_k(logits: Tensor, count: int) -> TopK:
    """The k largest of softmax(logits); `logits` (positions, vocabulary), already divided by the temperature."""
    logits = logits.float()
    scale = logits.logsumexp(dim=1, keepdim=True)
    values, tokens = logits.topk(min(count, logits.shape[1]), dim=1)
    others = logits.scatter(1, tokens, float("-inf"))
    return TopK(tokens.to(torch.int32), values - scale, others.logsumexp(dim=1) - scale[:, 0])


def whole_divergence(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Σ KL(softmax(teacher) ‖ softmax(logits)) over positions, and its gradient in `logits`: q − p."""
    student, wanted = logits.log_softmax(dim=1), teacher.log_softmax(dim=1)
    share = wanted.exp()
    return (share * (wanted - student)).sum(), student.exp_().sub_(share)


def bucket_divergence(logits: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """Σ KL between the two distributions over {k tokens, all others}, and its gradient in `logits`.

    The gradient is q − p at the k tokens and q·(1 − P/Q) at each of the others, where P and Q are the masses that
    teacher and student give to all others: their proportions among each other are left as the student has them.
    """
    tokens = teacher.tokens.long()
    student = logits.log_softmax(dim=1)
    picked = student.gather(1, tokens)
    others = student.scatter(1, tokens, float("-inf")).logsumexp(dim=1)
    some = torch.isfinite(teacher.rest)
    share, rest = teacher.logs.exp(), teacher.rest.exp()
    shortfall = torch.where(some, rest * (teacher.rest - others), torch.zeros_like(rest))
    total = (share * (teacher.logs - picked)).sum() + shortfall.nan_to_num(0.0).sum()
    ratio = torch.where(some, (teacher.rest - others).exp(), torch.zeros_like(rest))
    slope = student.exp_()
    at_tokens = slope.gather(1, tokens) - share
    slope.mul_((1 - ratio.nan_to_num(0.0))[:, None]).scatter_(1, tokens, at_tokens)
    return total, slope


class FrozenHeadDivergence(torch.autograd.Function):
    """Summed divergence of hidden states under a head that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, compare: Comparison, weight: Tensor, cap: float | None, t: float) -> Tensor:
        """The loss, and its gradient laid by for the backward pass."""
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = chunk_rows(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                piece = slice(start, start + rows)
                logits = capped((hidden[piece].to(weight.dtype) @ weight.T).float(), cap)
                loss, slope = compare(logits / t, piece)
                total += t * t * loss
                slope.mul_(t)
                if cap is not None:
                    slope.mul_(1 - (logits / cap) ** 2)
                gradient[piece] = (slope.to(weight.dtype) @ weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None


def summed_divergence(model: Any, hidden: Tensor, compare: Comparison, temperature: float) -> Tensor:
    """Summed KL, in fp32, at hidden states (positions, width) under the model's frozen head."""
    weight = model.get_output_embeddings().weight
    found: Tensor = FrozenHeadDivergence.apply(  # type: ignore[no-untyped-call]
        hidden, compare, weight, soft_cap(model), temperature
    )
    return found


def against_hidden(hidden: Tensor, weight: Tensor, cap: float | None, temperature: float) -> Comparison:
    """Compare with a teacher given by its hidden states (positions, width) and its head."""

    def compare(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        teacher = capped((hidden[piece].to(weight.dtype) @ weight.T).float(), cap)
        return whole_divergence(logits, teacher / temperature)

    return compare


def against_top_k(teacher: TopK) -> Comparison:
    """Compare with a teacher given by its k largest probabilities, at the same temperature."""

    def compare(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        return bucket_divergence(logits, TopK(teacher.tokens[piece], teacher.logs[piece], teacher.rest[piece]))

    return compare


def hidden_error(hidden: Tensor, teacher: Tensor) -> Tensor:
    """‖h_student − h_teacher‖² / ‖h_teacher‖², in fp32."""
    wanted = teacher.float()
    return (hidden.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
