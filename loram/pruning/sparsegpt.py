"""SparseGPT (2301.00774): choose elements by w² / [H⁻¹]ⱼⱼ and let those that stay make up for the others.

H = Σ x·xᵀ over the input (its scale cancels), damped; columns are visited in order, in blocks. The loop keeps
weights as (in, out), so that a column is one stretch of memory, and within a block divides each row of the factor
by its diagonal: a column then costs one product and one multiplication. Weights that read the same input
(q, k, v; gate, up) are solved side by side, with one factorization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loram.families.sparsity import Sparsity
from loram.pruning.damping import DAMPING
from loram.pruning.inverse import inverse_factor
from loram.pruning.lowest import lowest_per_row, mark_lowest
from loram.pruning.weight_score import WeightScore

BLOCK = 128
INNER = 32
STRIP = 64
GAP = 16


def sparsegpt(
    weights: Sequence[Tensor], moment: Tensor, sparsity: Sparsity, what: str = "a weight", damping: float = DAMPING
) -> list[tuple[Tensor, Tensor]]:
    """(new weight, what went) of each weight (out, in) that reads the input with second moment (in, in).

    Exactly floor(ratio · size) elements of each weight go, spread evenly over the blocks of columns; with N:M
    exactly M − N of each group. Weights come back in their own dtype, with zeros where the bool mask is True.
    Features that were never active go first, and what is left of their columns is zero.
    """
    factor = inverse_factor(moment.float(), what, damping)
    work = side_by_side(weights)
    work[moment.diagonal() == 0] = 0
    sizes = [weight.shape[0] for weight in weights]
    gone = solve(work, factor, sizes, sparsity)
    rows = zip(weights, torch.split(work, sizes, 1), torch.split(gone, sizes, 1), strict=True)
    return [(new.T.to(old.dtype).contiguous(), mask.T.contiguous()) for old, new, mask in rows]


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """A copy of weights (out, in) in fp32 as one (in, sum of out), with a gap after each row.

    Rows that are a multiple of 4 KiB apart would fall into the same few sets of the cache: the products lose 7 %.
    """
    total = sum(weight.shape[0] for weight in weights)
    work = torch.empty(weights[0].shape[1], total + GAP, device=weights[0].device)[:, :total]
    first = 0
    # A strip at a time is turned within the cache.
    for strip in (strip for weight in weights for strip in torch.split(weight, STRIP)):
        work[:, first : first + len(strip)] = strip.T.contiguous()
        first += len(strip)
    return work


def solve(work: Tensor, factor: Tensor, sizes: list[int], sparsity: Sparsity) -> Tensor:
    """Prune weights of `sizes` outputs, side by side in `work` (in, out), in place: what went, bool (in, out).

    `factor` is U of H⁻¹ = Uᵀ·U. In a block the marks of what goes are the numbers 1 and 0: a comparison that
    gives numbers, their product and their sum cost a fraction of what they cost for bools.
    """
    gone = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    width = max(BLOCK // sparsity.group, 1) * sparsity.group if sparsity.group else BLOCK
    buffers = work.new_empty(2, min(width, work.shape[0]), work.shape[1])
    for start in range(0, work.shape[0], width):
        stop = min(start + width, work.shape[0])
        part, (errors, marks) = work[start:stop], buffers[:, : stop - start]
        inner = factor[start:stop, start:stop]
        scale = inner.diagonal()[:, None]
        inner = (inner / scale).T.contiguous()
        if sparsity.group:
            solve_groups(part, inner, scale, sparsity, errors, marks)
        else:
            counts = [sparsity.removed(n * stop) - sparsity.removed(n * start) for n in sizes]
            choose(part, marks, scale, sizes, counts)
            solve_block(part, inner, errors, marks)
        gone[start:stop] = marks
        part.addcmul_(part, marks, value=-1)
        errors /= scale
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return gone


def choose(part: Tensor, marks: Tensor, scale: Tensor, sizes: list[int], counts: list[int]) -> None:
    """Mark the elements of one block (columns, out) that go: the lowest of each weight."""
    scores = (part / scale).square_()
    for own, mark, count in zip(torch.split(scores, sizes, 1), torch.split(marks, sizes, 1), counts, strict=True):
        mark.copy_(lowest_per_row(own.reshape(1, -1), count).reshape(own.shape))


def solve_block(part: Tensor, inner: Tensor, errors: Tensor, marks: Tensor) -> None:
    """Columns one after the other, each making up for those before it that went; `errors` is what went.

    `inner` is the block's factor with unit diagonal, transposed: row j holds what column j owes to the others.
    """
    for first in range(0, part.shape[0], INNER):
        last = min(first + INNER, part.shape[0])
        if first:
            part[first:last].addmm_(inner[first:last, :first], errors[:first], alpha=-1)
        for column in range(first, last):
            if column > first:
                part[column].addmv_(errors[first:column].T, inner[column, first:column], alpha=-1)
            torch.mul(part[column], marks[column], out=errors[column])


def solve_groups(part: Tensor, inner: Tensor, scale: Tensor, sparsity: Sparsity, errors: Tensor, marks: Tensor) -> None:
    """The same for N:M, where a group's elements are chosen, and marked, when its turn has come.

    Within a group, what goes is e = M∘(p − L·e), with p the group, M its marks and L what its columns owe to each
    other, strictly lower triangular. r marks in a column make M∘L nilpotent of order r there, so r − 1 insertions
    from e = M∘p on give e itself: a few operations on the group in place of some for every pair of its columns.
    """
    group, removed = sparsity.group, sparsity.group - sparsity.keep
    scores = part.new_empty(group, part.shape[1])
    start, step = 0, max(INNER // group, 1) * group
    for first, own, own_scale, own_marks, went in zip(
        range(0, len(part), group), *(torch.split(whole, group) for whole in (part, scale, marks, errors)), strict=True
    ):
        last = first + group
        if first and first % step == 0:
            start, stop = first, first + step
            part[start:stop].addmm_(inner[start:stop, :start], errors[:start], alpha=-1)
        if first > start:
            own.addmm_(inner[first:last, start:first], errors[start:first], alpha=-1)
        torch.div(own, own_scale, out=scores).square_()
        mark_lowest(scores, removed, own_marks)
        among = inner[first:last, first:last].tril(-1)
        torch.mul(own, own_marks, out=went)
        for _ in range(removed - 1):
            owed = torch.mm(among, went, out=scores)
            torch.mul(torch.sub(own, owed, out=went), own_marks, out=went)
        own.addmm_(among, went, alpha=-1)


SPARSEGPT = WeightScore("sparsegpt", "moments", prune=sparsegpt, updates=True)
