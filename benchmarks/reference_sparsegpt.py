"""The plain formulation of SparseGPT, as its authors publish it: one weight, one factor, column by column.

What `loram.pruning.sparsegpt` is measured against: (out, in) storage, every column corrects all that follow it
in its block, an error column divided by the diagonal, one Hessian and three factorizations for every weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
DAMPING = 0.01


def reference_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse."""
    hessian = moment.clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def reference_loop(weight: Tensor, factor: Tensor, ratio: float, keep: int = 0, group: int = 0) -> Tensor:
    """The pruned weight (out, in); `ratio` of each block, or `keep` of every `group`."""
    weight = weight.clone()
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        part = weight[:, start:stop].clone()
        pruned, errors = torch.zeros_like(part), torch.zeros_like(part)
        inner = factor[start:stop, start:stop]
        if group:
            mask = torch.zeros_like(part, dtype=torch.bool)
        else:
            scores = part**2 / inner.diagonal().reshape(1, -1) ** 2
            limit = scores.flatten().sort()[0][int(scores.numel() * ratio)]
            mask = scores <= limit
        for column in range(stop - start):
            if group and column % group == 0:
                own = slice(column, column + group)
                scores = part[:, own] ** 2 / inner.diagonal()[own].reshape(1, -1) ** 2
                mask.scatter_(1, column + torch.topk(scores, group - keep, dim=1, largest=False)[1], True)
            kept = part[:, column].clone()
            kept[mask[:, column]] = 0
            pruned[:, column] = kept
            error = (part[:, column] - kept) / inner[column, column]
            part[:, column:] -= error.unsqueeze(1).matmul(inner[column, column:].unsqueeze(0))
            errors[:, column] = error
        weight[:, start:stop] = pruned
        weight[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return weight
