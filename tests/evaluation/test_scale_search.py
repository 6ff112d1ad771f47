"""The search for scales on functions whose minimum is known, and the check that doubts it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import pytest

from loram.errors import MismatchError, OptionError
from loram.evaluation.losses import RowLosses
from loram.evaluation.scale_search import check, mean, remembered, search

SIX = ("a", "b", "c", "d", "e", "f")


class Bowl:
    """A loss with its minimum at `best`; counts how often it is asked."""

    def __init__(self, best: Mapping[str, float], floor: float = 1.0) -> None:
        self.best, self.floor, self.calls = dict(best), floor, 0

    def __call__(self, scales: Mapping[str, float]) -> RowLosses:
        self.calls += 1
        loss = self.floor + sum(0.3 * (scales[name] - at) ** 2 for name, at in self.best.items())
        return RowLosses((loss * 3, loss * 5), (3, 5))


def test_a_planted_minimum_is_found_within_the_evaluations_allowed() -> None:
    best = dict(zip(SIX, (1 / 3, 1.0, 1.2, 0.9, 1.0, 2.0), strict=True))
    bowl = Bowl(best)
    found = search(SIX, bowl, 60)
    assert bowl.calls <= 60
    assert found == pytest.approx(best, abs=0.15)
    assert mean(bowl(found)) < 1.01
    one = search(["a"], Bowl({"a": 1 / 3}), 20)
    assert one["a"] == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("limit", [8, 11, 30])
def test_never_more_evaluations_than_allowed_and_never_worse_than_ones(limit: int) -> None:
    bowl = Bowl(dict.fromkeys(SIX, 0.4))
    found = search(SIX, bowl, limit)
    assert bowl.calls <= limit
    assert mean(bowl(found)) < mean(bowl(dict.fromkeys(SIX, 1.0)))
    level = search(SIX, Bowl({}), limit)
    assert level == dict.fromkeys(SIX, 1.0)


def test_scales_stay_in_bounds_and_are_rounded_as_they_are_written() -> None:
    asked: list[Mapping[str, float]] = []
    bowl = Bowl({"a": 9.0, "b": -3.0})

    def measure(scales: Mapping[str, float]) -> RowLosses:
        asked.append(scales)
        return bowl(scales)

    found = search(["a", "b"], measure, 40)
    assert found == {"a": 4.0, "b": 0.0}
    assert all(0 <= value <= 4 and value == round(value, 3) for scales in asked for value in scales.values())


def overflowing(beyond: float) -> Callable[[Mapping[str, float]], RowLosses]:
    bowl = Bowl({"a": 1.3})

    def measure(scales: Mapping[str, float]) -> RowLosses:
        if scales["a"] > beyond:
            raise MismatchError("the loss of row 1 is nan")
        return bowl(scales)

    return measure


def test_where_the_loss_overflows_is_avoided_unless_it_does_at_once() -> None:
    found = search(["a"], overflowing(1.35), 30)
    assert 1.1 < found["a"] <= 1.35
    with pytest.raises(MismatchError, match="is nan"):
        search(["a"], overflowing(0.5), 30)


def test_what_does_not_help_on_the_second_split_goes_back_to_one() -> None:
    found = {"a": 0.3, "b": 1.5, "c": 1.0}
    assert check(found, Bowl({"a": 0.4, "b": 1.4})) == found
    assert check(found, Bowl({"a": 0.4, "b": 1.0})) == {"a": 0.3, "b": 1.0, "c": 1.0}
    assert check(found, Bowl({"a": 1.0, "b": 1.0})) == dict.fromkeys(found, 1.0)
    assert check(found, Bowl({})) == dict.fromkeys(found, 1.0)  # no better is not better
    ones = dict.fromkeys(found, 1.0)
    assert check(ones, Bowl({"a": 2.0})) == ones


def test_each_set_of_scales_is_measured_once() -> None:
    bowl = Bowl({"a": 0.5})
    look = remembered(bowl)
    for _ in range(3):
        assert look({"a": 1.0}) == look({"a": 1.0})
        look({"a": 2.0})
    assert bowl.calls == 2


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(OptionError, match=r"pip install 'loram\[calibrate\]'"):
        search(["a"], Bowl({"a": 0.5}), 20)
