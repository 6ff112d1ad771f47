"""SparseGPT (2301.00774): choose elements by w² / [H⁻¹]ⱼⱼ and let those that stay make up for the others.

H = Σ x·xᵀ over the input (its scale cancels), damped; columns are visited in order, in blocks. The loop keeps
weights as (in, out), so that a column is one stretch of memory, and divides each row of the factor by its
diagonal beforehand: a column then costs one product and one multiplication. Weights that read the same input
(q, k, v; gate, up) are solved side by side, with one factorization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loram.families.sparsity import Sparsity
from loram.pruning.damping import DAMPING
from loram.pruning.inverse import inverse_factor
from loram.pruning.lowest import lowest_of_groups, lowest_per_row
from loram.pruning.weight_score import WeightScore

BLOCK = 128
INNER = 32


def sparsegpt(
    weights: Sequence[Tensor], moment: Tensor, sparsity: Sparsity, what: str = "a weight", damping: float = DAMPING
) -> list[tuple[Tensor, Tensor]]:
    """(new weight, what went) of each weight (out, in) that reads the input with second moment (in, in).

    Exactly floor(ratio · size) elements of each weight go, spread evenly over the blocks of columns; with N:M
    exactly M − N of each group. Weights come back in their own dtype, with zeros where the bool mask is True.
    Features that were never active go first, and what is left of their columns is zero.
    """
    factor = inverse_factor(moment.float(), what, damping)
    work = torch.cat([weight.float() for weight in weights]).T.contiguous()
    work[moment.diagonal() == 0] = 0
    sizes = [weight.shape[0] for weight in weights]
    gone = solve(work, factor, sizes, sparsity)
    rows = zip(weights, torch.split(work, sizes, 1), torch.split(gone, sizes, 1), strict=True)
    return [(new.T.to(old.dtype).contiguous(), mask.T.contiguous()) for old, new, mask in rows]


def solve(work: Tensor, factor: Tensor, sizes: list[int], sparsity: Sparsity) -> Tensor:
    """Prune weights of `sizes` outputs, side by side in `work` (in, out), in place: what went, bool (in, out).

    `factor` is U of H⁻¹ = Uᵀ·U; its rows are divided by the diagonal, in place.
    """
    scale = factor.diagonal().clone()
    factor /= scale[:, None]
    gone = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    width = max(BLOCK // sparsity.group, 1) * sparsity.group if sparsity.group else BLOCK
    for start in range(0, work.shape[0], width):
        stop = min(start + width, work.shape[0])
        part, lost = work[start:stop], gone[start:stop]
        inner = factor[start:stop, start:stop].T.contiguous()
        if sparsity.group:
            errors = solve_groups(part, lost, inner, scale[start:stop], sparsity)
        else:
            counts = [sparsity.removed(n * stop) - sparsity.removed(n * start) for n in sizes]
            choose(part, lost, scale[start:stop], sizes, counts)
            errors = solve_block(part, lost, inner)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    work.masked_fill_(gone, 0)
    return gone


def choose(part: Tensor, lost: Tensor, scale: Tensor, sizes: list[int], counts: list[int]) -> None:
    """Mark in `lost` the elements of one block (columns, out) that go: the lowest of each weight."""
    scores = (part / scale[:, None]).square_()
    for own, mark, count in zip(torch.split(scores, sizes, 1), torch.split(lost, sizes, 1), counts, strict=True):
        mark.copy_(lowest_per_row(own.reshape(1, -1), count).reshape(own.shape))


def solve_block(part: Tensor, lost: Tensor, inner: Tensor) -> Tensor:
    """Columns one after the other, each making up for those before it that went: the errors (columns, out).

    `inner` is the block's factor with unit diagonal, transposed: row j holds what column j owes to the others.
    """
    errors = torch.empty_like(part)
    mask = lost.to(part.dtype)
    for first in range(0, part.shape[0], INNER):
        last = min(first + INNER, part.shape[0])
        if first:
            part[first:last].addmm_(inner[first:last, :first], errors[:first], alpha=-1)
        for column in range(first, last):
            if column > first:
                part[column].addmv_(errors[first:column].T, inner[column, first:column], alpha=-1)
            torch.mul(part[column], mask[column], out=errors[column])
    return errors


def solve_groups(part: Tensor, lost: Tensor, inner: Tensor, scale: Tensor, sparsity: Sparsity) -> Tensor:
    """The same for N:M, where a group's elements are chosen when its turn has come."""
    errors = torch.empty_like(part)
    columns, mistakes, owes = part.unbind(), errors.unbind(), inner.tolist()
    start, step = 0, max(INNER // sparsity.group, 1) * sparsity.group
    for first in range(0, part.shape[0], sparsity.group):
        last = first + sparsity.group
        if first and first % step == 0:
            start, stop = first, first + step
            part[start:stop].addmm_(inner[start:stop, :start], errors[:start], alpha=-1)
        own = part[first:last]
        if first > start:
            own.addmm_(inner[first:last, start:first], errors[start:first], alpha=-1)
        scores = (own / scale[first:last, None]).square_()
        lowest = lowest_of_groups(scores, sparsity.group - sparsity.keep, sparsity.group)
        lost[first:last] = lowest
        errors[first:last] = lowest
        for column in range(first, last):
            for before in range(first, column):
                columns[column].sub_(mistakes[before], alpha=owes[column][before])
            mistakes[column].mul_(columns[column])
    return errors


SPARSEGPT = WeightScore("sparsegpt", "moments", prune=sparsegpt, updates=True)
