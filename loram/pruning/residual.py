"""Least-squares repair of a Linear from what is missing at its output, the input being the small model's own.

W′ = W + R·Xᵀ·(X·Xᵀ + λ·mean(diag X·Xᵀ)·I)⁻¹ where X (in, tokens) is what the Linear sees in the small model and
R (out, tokens) = T − W·X is what its output lacks: the sequential, two-stream form of the refit in `refit`.
Without anything missing, W stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loram.errors import MismatchError
from loram.pruning.damping import DAMPING, damped_factor

ROUNDS = 64
STRENGTHS = tuple(DAMPING * 10**power for power in range(5))


class Residual:
    """X·Xᵀ (in, in) and R·Xᵀ (out, in), fp64 sums of fp32 products over the tokens that were added."""

    def __init__(self) -> None:
        self.moment = torch.empty(0)
        self.cross = torch.empty(0)

    def add(self, x: Tensor, missing: Tensor) -> None:
        """Add inputs (tokens, in) and what their outputs lack (tokens, out)."""
        x, missing = x.float(), missing.float()
        moment, cross = (x.T @ x).double(), (missing.T @ x).double()
        first = not self.moment.numel()
        self.moment = moment if first else self.moment.add_(moment)
        self.cross = cross if first else self.cross.add_(cross)

    def update(self, mask: Tensor | None = None, damping: float = DAMPING, what: str = "a weight") -> Tensor:
        """What W changes by, (out, in) fp64; zero where `mask` (out, in) is off.

        MismatchError names `what` where the inputs are NaN or Inf.
        """
        moment = self.moment.clone()
        scale = moment.diagonal().mean()
        if bool(scale == 0):
            return torch.zeros_like(self.cross)
        if mask is None:
            return torch.cholesky_solve(self.cross.T, damped_factor(moment, what, damping)).T
        if not bool(torch.isfinite(scale)):
            raise MismatchError(f"the input of {what} is NaN or Inf; the model's weights are damaged: fetch them again")
        moment.diagonal().add_(damping * scale)
        return masked_solve(moment, self.cross, mask.to(moment.device))


class CheckedResidual:
    """A residual of some tokens, and one of others that says how much of the repair to believe.

    With few tokens the least squares fit their noise, and the layers behind add up what is wrong. So λ grows tenfold
    from DAMPING as long as that lowers the error on the other tokens; where no λ of STRENGTHS does, W stays.
    """

    def __init__(self) -> None:
        self.fitted, self.checked = Residual(), Residual()

    def update(self, mask: Tensor | None = None, what: str = "a weight") -> Tensor:
        """What W changes by, (out, in) fp64; with no other tokens, what λ = DAMPING gives."""
        best = self.fitted.update(mask, what=what)
        if not self.checked.moment.numel():
            return best
        gain = self.gain(best)
        for strength in STRENGTHS[1:]:
            found = self.fitted.update(mask, strength, what)
            more = self.gain(found)
            if more <= gain:
                break
            best, gain = found, more
        return best if gain > 0 else torch.zeros_like(best)

    def gain(self, update: Tensor) -> float:
        """How much smaller ‖R‖² gets on the other tokens: 2⟨D, R·Xᵀ⟩ − ⟨D·X·Xᵀ, D⟩."""
        return float(2 * (update * self.checked.cross).sum() - (update @ self.checked.moment * update).sum())


def masked_solve(moment: Tensor, cross: Tensor, mask: Tensor, rounds: int = ROUNDS) -> Tensor:
    """D (out, in) with D·M = cross at the entries of `mask` and D = 0 elsewhere: conjugate gradients, all rows at once.

    Each row has a support of its own, so there is no common factor; with the damping M is well conditioned.
    """
    keep = mask.to(moment.dtype)
    found = torch.zeros_like(cross)
    rest = cross * keep
    direction = rest.clone()
    size = rest.square().sum(1, keepdim=True)
    floor = size * 1e-20
    for _ in range(rounds):
        if bool((size <= floor).all()):
            break
        image = (direction @ moment) * keep
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(moment.dtype).tiny)
        found += step * direction
        rest -= step * image
        fresh = rest.square().sum(1, keepdim=True)
        direction = rest + (fresh / size.clamp_min(torch.finfo(moment.dtype).tiny)) * direction
        size = fresh
    return found
