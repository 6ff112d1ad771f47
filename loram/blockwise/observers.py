"""What can be learnt from the inputs of a Linear, or from what a block does, while windows run through.

An observer is called with rows of features (tokens, in) as they come, and sums in fp32 or wider on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loram.families import Family

STRIP = 256
"""Rows that are summed at a time: of a second moment, or of squares."""


class SecondMoment:
    """Σ x·xᵀ, (in, in) fp32, over `count` tokens: the Hessian of a least-squares fit, up to a factor."""

    def __init__(self) -> None:
        self.count = 0
        self._upper = torch.empty(0)

    def __call__(self, x: Tensor) -> None:
        """Add rows of features (tokens, in)."""
        x = x.float()
        width = x.shape[1]
        if not self.count:
            self._upper = x.new_zeros(width, width)
        for start in range(0, width, STRIP):
            # The lower half is the upper one's mirror image: nearly half of the work.
            stop = min(start + STRIP, width)
            self._upper[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.count += len(x)

    @property
    def total(self) -> Tensor:
        """The whole symmetric matrix; it may be changed, and then no more must be added."""
        found = self._upper
        for start in range(0, len(found), STRIP):
            stop = start + STRIP
            found[stop:, start:stop] = found[start:stop, stop:].T
        return found

    @property
    def norm(self) -> Tensor:
        """‖x‖₂ of each feature over all tokens, (in,)."""
        return self._upper.diagonal().clamp_min(0).sqrt()


class Norm:
    """Σ x², (in,) fp64, over `count` tokens; `norm` is its root, all that Wanda needs."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.empty(0)

    def __call__(self, x: Tensor) -> None:
        """Add rows of features (tokens, in)."""
        for rows in torch.split(x, STRIP):  # a strip stays in the cache: a tenth of what the whole takes
            squares = rows.float().square().sum(0).double()
            self.total = self.total + squares if self.count else squares
            self.count += len(rows)

    @property
    def norm(self) -> Tensor:
        """‖x‖₂ of each feature over all tokens, (in,) fp32."""
        return self.total.sqrt().float()


class MeanVariance:
    """Mean and variance of each feature, (in,) fp64, over `count` tokens, by Chan's update: FLAP (2312.11983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0)
        self._squares = torch.empty(0)

    def __call__(self, x: Tensor) -> None:
        """Add rows of features (tokens, in)."""
        for rows in torch.split(x, STRIP):  # in fp64 the whole would take twelve times its bytes
            self._add(rows.double())

    def _add(self, x: Tensor) -> None:
        mean = x.mean(0)
        squares = (x - mean).square().sum(0)
        if not self.count:
            self.mean, self._squares, self.count = mean, squares, len(x)
            return
        total = self.count + len(x)
        step = mean - self.mean
        self._squares += squares + step.square() * (self.count * len(x) / total)
        self.mean = self.mean + step * (len(x) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The variance with divisor n − 1 (n for a single token)."""
        return self._squares / max(self.count - 1, 1)


class Fluctuation:
    """Mean and variance of each feature, and with `products` the centered second moment: all that FLAP looks at."""

    def __init__(self, products: bool = False) -> None:
        self._spread = MeanVariance()
        self._moment = SecondMoment() if products else None

    def __call__(self, x: Tensor) -> None:
        """Add rows of features (tokens, in)."""
        self._spread(x)
        if self._moment is not None:
            self._moment(x)

    @property
    def mean(self) -> Tensor:
        """(in,) fp64."""
        return self._spread.mean

    @property
    def variance(self) -> Tensor:
        """(in,) fp64."""
        return self._spread.variance

    @property
    def norm(self) -> Tensor:
        """‖x‖₂ of each feature over all tokens, (in,) fp64."""
        spread = self._spread
        return (spread.variance * max(spread.count - 1, 1) + spread.count * spread.mean.square()).sqrt()

    @property
    def total(self) -> Tensor:
        """Σ (x − mean)·(x − mean)ᵀ, (in, in) fp32; it may be changed, and then no more must be added."""
        assert self._moment is not None
        mean = self.mean.float()
        return self._moment.total.addmm_(mean[:, None], mean[None], alpha=-self._spread.count)


class Cosine:
    """Mean over tokens of the cosine between a block's input and output; given to `around`.

    1 − mean is the block's influence (ShortGPT 2403.03853).
    """

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add a block's input and output (…, hidden)."""
        found = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
        self._total += float(found.double().sum())
        self.count += found.numel()

    @property
    def mean(self) -> float:
        """The mean cosine."""
        return self._total / self.count


def shared_inputs(family: Family) -> dict[str, tuple[str, ...]]:
    """The Linears of a layer by the input they share: {first name: all names}; q/k/v are one, gate/up another."""
    groups: dict[tuple[str, object], list[str]] = {}
    for weight in family.linears:
        groups.setdefault((weight.name.rpartition(".")[0], weight.columns), []).append(weight.name)
    return {names[0]: tuple(names) for names in groups.values()}
