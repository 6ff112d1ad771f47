"""The lowest scores, in exact number: what goes when weights are pruned element by element.

Counts are by rank and never by a threshold: weights that were rounded (bf16, de-quantized) have many ties.
Among equal scores the first in their row go.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial, reduce

import numpy as np
import torch
from torch import Tensor

from loram.families.sparsity import Sparsity

ROWS = 512
MERGED = 8
"""Up to this group size the limit comes from minima and maxima; beyond it, and among ties, from a selection."""


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """Which `count` elements of each row of (rows, n) are lowest: bool, exactly `count` per row."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = kth_lowest(scores, count)
    lowest = scores < limit
    equal = scores == limit
    wanted = count - lowest.sum(1)
    tied = equal.sum(1) > wanted
    if bool(tied.any()):
        # Only rows with more ties than places need an order among them.
        equal[tied] &= equal[tied].cumsum(1, dtype=torch.int32) <= wanted[tied, None]
    return lowest.logical_or_(equal)


def kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest value of each row of (rows, n), as (rows, 1)."""
    if scores.is_cuda:
        return scores.kthvalue(count, dim=1, keepdim=True).values
    # numpy selects with vector instructions, many times faster than torch's kthvalue on a CPU.
    return torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())


def lowest_of_groups(scores: Tensor, count: int, group: int) -> Tensor:
    """Which `count` of every `group` consecutive rows of (n, columns) are lowest, column by column: bool."""
    members = scores.reshape(-1, group, *scores.shape[1:])
    if group <= MERGED:
        lowest = members <= nth_lowest(members.unbind(1), count)[:, None]
        if int(torch.count_nonzero(lowest)) * group == scores.numel() * count:
            return lowest.reshape(scores.shape)
    columns = members.movedim(1, -1)
    found = lowest_per_row(columns.reshape(-1, group).contiguous(), count)
    return found.reshape(columns.shape).movedim(-1, 1).reshape(scores.shape)


def mark_lowest(scores: Tensor, count: int, marks: Tensor) -> None:
    """Write 1 into `marks` (group, columns) where one of the `count` lowest scores of a column is, and 0 elsewhere.

    A comparison that gives numbers, and their sum, cost a fraction of what they cost with bools.
    """
    group, columns = scores.shape
    if group <= MERGED:
        torch.le(scores, nth_lowest(scores.unbind(), count), out=marks)
        if marks.sum().item() == count * columns:
            return
    marks.copy_(lowest_of_groups(scores, count, group))


def nth_lowest(members: Sequence[Tensor], count: int) -> Tensor:
    """The `count`-th lowest of several tensors, element by element."""
    values = list(members)
    for lower, one, other in selection(len(values), count):
        values.append((torch.minimum if lower else torch.maximum)(values[one], values[other]))
    return values[-1]


@cache
def selection(members: int, count: int) -> list[tuple[bool, int, int]]:
    """The minima (True) and maxima that lead to the `count`-th lowest: each is of two members or earlier results.

    Ascending runs are merged two by two. What stands at a place of the merged run is the least, over all ways to
    take so many values from the fronts of both, of the greater of the two values taken last.
    """
    steps: list[tuple[bool, int, int]] = []

    def step(lower: bool, one: int, other: int) -> int:
        steps.append((lower, one, other))
        return members + len(steps) - 1

    runs = [[member] for member in range(members)]
    while len(runs) > 1:
        left, right, *runs = runs
        total = len(left) + len(right)
        places = range(min(count, total)) if runs else [count - 1]
        runs.append([])
        for place in places:
            fronts = [(left[:one], right[: place + 1 - one]) for one in range(place + 2)]
            lasts = [[run[-1] for run in front if run] for front in fronts if sum(map(len, front)) == place + 1]
            greater = [last[0] if len(last) == 1 else step(False, *last) for last in lasts]
            runs[-1].append(reduce(partial(step, True), greater))
    return steps


def lowest_elements(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """What goes of (out, in) scores, in equal numbers per row: N:M groups, or floor(ratio · in) per row; bool."""
    if sparsity.group:
        count = sparsity.group - sparsity.keep
        return torch.cat([lowest_of_groups(rows.T, count, sparsity.group).T for rows in torch.split(scores, ROWS)])
    return lowest_per_row(scores, sparsity.removed(scores.shape[1]))
