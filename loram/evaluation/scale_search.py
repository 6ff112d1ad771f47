"""Scales for the groups of an adapter's modules, by the large model's loss: searched on some rows, checked on others.

COBYLA (Powell 1994; scipy) needs no gradient and a few evaluations per unknown. What it found is then doubted: on rows
it has not seen, each group goes back to 1 unless that costs something, and all of them do unless the loss is lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loram.errors import MismatchError, OptionError
from loram.evaluation.losses import RowLosses, summarize
from loram.group_scales import Scales

Measure = Callable[[Scales], RowLosses]
"""The losses of one split's rows under these scales."""
HIGHEST = 4.0
STEP = 0.5
"""How far COBYLA looks at first."""
FINEST = 0.02
DIGITS = 3
"""Scales are rounded to so many decimals before they are tried: what is measured is what is written."""
HOPELESS = 10.0
"""Nats above the loss at scales of 1, in place of a loss that is not finite."""


@dataclass(frozen=True)
class Comparison:
    """The losses of one split's rows with all scales at 1, and with those that were chosen."""

    before: RowLosses
    after: RowLosses


def mean(losses: RowLosses) -> float:
    """Mean over the tokens that carry loss."""
    return summarize(losses).mean


def scipy_minimize() -> Any:
    """scipy's `minimize`; OptionError that names the extra where it is not installed."""
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise OptionError(
            f"--calibrate needs scipy ({error}); install it with `pip install 'loram[calibrate]'`"
        ) from error
    return minimize


def search(names: Sequence[str], measure: Measure, limit: int) -> dict[str, float]:
    """The scales in [0, HIGHEST] with the lowest loss among at most `limit` that are tried; 1 is tried first."""
    tried: dict[tuple[float, ...], float] = {}

    def loss(point: Sequence[float]) -> float:
        rounded = tuple(round(min(HIGHEST, max(0.0, float(value))), DIGITS) for value in point)
        if rounded not in tried:
            if len(tried) >= limit:
                raise _Enough
            tried[rounded] = loss_at(dict(zip(names, rounded, strict=True)))
        return tried[rounded]

    def loss_at(scales: Scales) -> float:
        if not tried:
            return mean(measure(scales))
        try:
            return mean(measure(scales))
        except MismatchError:  # an update four times too large may well overflow
            return next(iter(tried.values())) + HOPELESS

    start = [1.0] * len(names)
    loss(start)
    with suppress(_Enough):
        scipy_minimize()(
            loss,
            start,
            method="COBYLA",
            bounds=[(0.0, HIGHEST)] * len(names),
            options={"rhobeg": STEP, "tol": FINEST, "maxiter": max(limit, len(names) + 2)},
        )
    best = min(tried, key=lambda point: tried[point])
    return dict(zip(names, best, strict=True))


class _Enough(Exception):
    """As often as was allowed."""


def check(found: Scales, measure: Measure) -> dict[str, float]:
    """Those of the scales that lower the loss on rows they were not chosen on; the others are 1."""
    ones = dict.fromkeys(found, 1.0)
    before = mean(measure(ones))
    kept = dict(found)
    least = mean(measure(kept)) if kept != ones else before
    for name in found:
        without = {**kept, name: 1.0}
        if kept[name] != 1.0 and (loss := mean(measure(without))) <= least:
            kept, least = without, loss
    return kept if least < before else ones


def remembered(measure: Measure) -> Measure:
    """The same, each set of scales measured once."""
    known: dict[tuple[float, ...], RowLosses] = {}

    def look(scales: Mapping[str, float]) -> RowLosses:
        key = tuple(scales.values())
        if key not in known:
            known[key] = measure(scales)
        return known[key]

    return look
