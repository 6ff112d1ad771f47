"""The lowest scores, in exact number: what goes when weights are pruned element by element.

Counts are by rank and never by a threshold: weights that were rounded (bf16, de-quantized) have many ties.
Among equal scores the first in their row go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loram.families.sparsity import Sparsity

ROWS = 512
BUBBLED = 8
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
    if group <= BUBBLED:
        lowest = members <= nth_lowest(members.unbind(1), count)[:, None]
        if int(torch.count_nonzero(lowest)) * group == scores.numel() * count:
            return lowest.reshape(scores.shape)
    columns = members.movedim(1, -1)
    found = lowest_per_row(columns.reshape(-1, group).contiguous(), count)
    return found.reshape(columns.shape).movedim(-1, 1).reshape(scores.shape)


def nth_lowest(members: Sequence[Tensor], count: int) -> Tensor:
    """The `count`-th lowest of several tensors, element by element: the lowest is bubbled out `count` times."""
    rest = list(members)
    for _ in range(count):
        lowest, *others = rest
        rest = []
        for other in others:
            rest.append(torch.maximum(lowest, other))
            lowest = torch.minimum(lowest, other)
    return lowest


def lowest_elements(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """What goes of (out, in) scores, in equal numbers per row: N:M groups, or floor(ratio · in) per row; bool."""
    if sparsity.group:
        count = sparsity.group - sparsity.keep
        return torch.cat([lowest_of_groups(rows.T, count, sparsity.group).T for rows in torch.split(scores, ROWS)])
    return lowest_per_row(scores, sparsity.removed(scores.shape[1]))
