"""Closed-form repair of a Linear whose input features were cut.

W′ = W·C[:,K]·(C[K,K] + D)⁻¹ with C = Σ x·xᵀ over the Linear's input in the large model and D = λ·mean(diag C[K,K])·I:
the least-squares weights for reproducing W·x from the kept features K (FASP 2501.09412, SlimLLM). As C[K,K] stands on
both sides, this is W[:,K] + (W[:,R]·C[R,K] − W[:,K]·D)·(C[K,K] + D)⁻¹ with R the features that went: it takes a
solution for every row of W, of which down has fewer than input features, and only what changes is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loram.pruning.damping import DAMPING, damped_factor


@dataclass(frozen=True)
class Refit:
    """The repair of all weights that read one input; made by `Refit.of`, called with rows of a weight.

    `across` is C[R,K] in fp32, as C was summed; `factor` the Cholesky factor of C[K,K] + D and `added` the diagonal
    of D, both fp64. Where no kept feature was ever active there is no factor, and weights stay as they are.
    """

    kept: Tensor
    gone: Tensor
    across: Tensor
    factor: Tensor | None
    added: Tensor

    @classmethod
    def of(cls, second_moment: Tensor, kept: Tensor, damping: float = DAMPING, what: str = "a weight") -> Refit:
        """From C (in, in) and the sorted indices of the features that stay.

        Where C[K,K] is not positive definite, `damped_factor` damps it more, or raises MismatchError naming `what`.
        """
        kept = kept.to(second_moment.device)
        stays = torch.zeros(len(second_moment), dtype=torch.bool, device=kept.device)
        stays[kept] = True
        gone = (~stays).nonzero()[:, 0]
        inner = second_moment[kept[:, None], kept].double()
        before = inner.diagonal().clone()
        factor = damped_factor(inner, what, damping) if bool((before != 0).any()) else None
        return cls(kept, gone, second_moment[gone[:, None], kept], factor, inner.diagonal() - before)

    def __call__(self, weight: Tensor) -> Tensor:
        """Rows of W (rows, in) → the same of W′ (rows, kept), in the weight's dtype."""
        small = weight[:, self.kept]
        if self.factor is None:
            return small
        lack = (weight[:, self.gone].to(self.across.dtype) @ self.across).double() - small.double() * self.added
        return (small.double() + torch.cholesky_solve(lack.T, self.factor).T).to(weight.dtype)
