"""What `plan` says was measured is what the benchmark's records say."""

from __future__ import annotations

import re

import pytest

from benchmarks.kept_gain import Records
from benchmarks.transfer import FIRST, MODEL, TASK
from loram.measured import KEPT, because


@pytest.mark.parametrize("method", KEPT)
def test_figures_are_those_of_the_records(method: str) -> None:
    ratio, keep = ("", None) if method == "nf4" else ("0.5", FIRST)
    found = Records(MODEL, TASK).outcome(method, ratio, keep)
    assert found is not None
    assert KEPT[method] == pytest.approx(found.mean, abs=0.0051)


def test_the_order_of_the_advice_is_that_of_the_figures() -> None:
    """Bits before cuts, task text before general text."""
    assert KEPT["nf4"] > KEPT["taylor"] > KEPT["refit"] > KEPT["refit-general"]
    assert KEPT["taylor-touched"] > KEPT["taylor"]
    assert KEPT["taylor-block-nf4"] > KEPT["taylor-nf4"]


def test_every_sentence_stands_on_figures() -> None:
    assert "%" not in because(None, "none")
    assert re.findall(r"(\d+)%", because(None, "nf4")) == [f"{100 * KEPT[name]:.0f}" for name in ("nf4", "taylor")]
    cut = because("0.65", "nf4")
    assert "bits first" in cut
    assert "calibrate" in cut
    assert "align" in cut
    assert "--touch-up" in cut
