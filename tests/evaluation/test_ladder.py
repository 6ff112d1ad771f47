"""The ladder's file format and its one sentence."""

from __future__ import annotations

from loram.evaluation.ladder import Ladder, Rung


def ladder(recovered: float, *, stderr: float | None = 0.01, ceiling: float | None = None) -> Ladder:
    rows = [Rung("base", 2.0, 0.05), Rung("small", 3.0, 0.06), Rung("small + adapter", 1.9, 0.05)]
    rows += [Rung("large + recovered", recovered, 0.04, 0.5)]
    rows += [] if ceiling is None else [Rung("ceiling", ceiling, 0.04)]
    return Ladder(tuple(rows), stderr)


def test_the_file_format_is_the_designs() -> None:
    assert Ladder((Rung("base", 2.0, 0.05), Rung("large + recovered", 1.5, 0.04, 0.25))).to_json() == {
        "rows": [
            {"name": "base", "loss": 2.0, "stderr": 0.05, "accuracy": None},
            {"name": "large + recovered", "loss": 1.5, "stderr": 0.04, "accuracy": 0.25},
        ]
    }


def test_it_helps() -> None:
    assert ladder(1.5).verdict() == (
        "the recovered adapter helps the large model: 0.500 ± 0.010 nats a token less loss"
    )
    half = ladder(1.5, ceiling=1.0).verdict()
    assert "less loss, 50% of what LoRA on the large model itself gains; to keep more: " in half
    assert ladder(1.1, ceiling=1.0).verdict().endswith("90% of what LoRA on the large model itself gains")


def test_it_harms_or_does_nothing_and_says_what_to_change() -> None:
    for recovered, words in ((2.5, "harms the large model: 0.500 ± 0.010 nats a token more"), (1.99, "no clear diff")):
        verdict = ladder(recovered).verdict()
        assert words in verdict
        assert "--calibration" in verdict
        assert "more steps" in verdict


def test_the_small_models_gain_is_never_taken_for_the_large_ones() -> None:
    small_only = Ladder((Rung("base", 2.0, 0.1), Rung("small", 3.0, 0.1), Rung("small + adapter", 1.0, 0.1)))
    assert small_only.gain is None
    assert small_only.verdict().startswith("no verdict")


def test_a_ceiling_that_is_no_better_gives_no_share() -> None:
    assert ladder(1.5, ceiling=2.1).kept_share is None
    assert "%" not in ladder(1.5, ceiling=2.1).verdict()
