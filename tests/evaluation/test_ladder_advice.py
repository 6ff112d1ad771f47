"""Advice follows from how the small model was made; every flag and command it names is real."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from loram.evaluation.advice import Making, advise
from loram.options import SECTIONS, flag

GENERAL = Making(("axes", "refit"), "structured", Fraction(1, 2), False, "wanda", 40)


def names(advice: tuple[str, ...]) -> list[str]:
    """What is typed, in order."""
    return [word for sentence in advice for word in re.findall(r"`(?:loram )?([a-z-]+)", sentence)]


def test_general_text_comes_first() -> None:
    advice = advise(GENERAL)
    assert advice[0].startswith("calibrate on the text that you train on (`loram prune --calibration FILE")
    assert names(advice) == ["prune", "--ratio", "--quantize", "train", "run", "align", "recover", "train"]
    assert advice[-1].startswith("train more than 40 steps")


def test_what_was_done_is_not_advised() -> None:
    best = Making(
        ("axes", "refit", "aligned", "nf4"), "structured", Fraction(3, 10), True, "taylor", 400, True, touched=True
    )
    assert advise(best) == ("train more than 400 steps, or at a higher rate (`loram train --lr`)",)
    deeper = Making(
        ("axes", "refit", "aligned", "nf4"), "structured", Fraction(13, 20), True, "taylor", None, True, touched=True
    )
    assert advise(deeper) == (
        "cut less than 0.65 (`--ratio`)",
        "train more steps, or at a higher rate (`loram train --lr`)",
    )


def test_a_random_cut_and_one_that_was_not_refitted() -> None:
    assert "--method structured" in advise(Making(("axes",), "random", Fraction(1, 2), False, None, 8))[0]
    assert "--refit" in advise(Making(("axes",), "structured", Fraction(1, 2), True, "wanda", 8))[0]


def test_bits_alone_leave_only_steps() -> None:
    assert advise(Making(("nf4",), steps=10)) == ("train more than 10 steps, or at a higher rate (`loram train --lr`)",)
    unaligned = advise(Making(("axes", "refit", "nf4"), "structured", Fraction(1, 2), True, "wanda", 10))
    assert "repair the small model layer by layer before quantizing (`loram align --method block`)" in unaligned
    assert any("--streamed" in sentence for sentence in unaligned)


def test_a_plain_update_is_advised_after_a_masked_one() -> None:
    masked = Making(("mask",), "semi", None, True, "sparsegpt", 10, masked=True)
    assert "--unmasked-update" in advise(masked)[0]
    assert "--unmasked-update" not in " ".join(advise(Making(("mask",), "semi", None, True, "sparsegpt", 10)))


def test_the_score_is_advised_once_the_text_is_right() -> None:
    wanda = Making(("axes", "refit", "nf4"), "structured", Fraction(3, 10), True, "wanda", 10)
    assert advise(wanda)[0] == "choose what is cut by gradients (`loram prune --score taylor`)"
    for other in ({"score": "taylor"}, {"task_text": False}, {"method": "depth"}, {"score": None}):
        assert not any("--score" in sentence for sentence in advise(replace(wanda, **other)))  # type: ignore[arg-type]


def test_every_flag_and_command_exists() -> None:
    flags = {flag(name) for kind in SECTIONS.values() for name in kind.__dataclass_fields__}
    for made in (
        GENERAL,
        Making(("axes",), "random"),
        Making(("mask",)),
        Making(("axes",), "structured", None, True, "wanda"),
    ):
        for sentence in advise(made):
            assert set(re.findall(r"--([a-z-]+)", sentence)) <= flags
            assert set(re.findall(r"`loram (\w+)", sentence)) <= set(SECTIONS)
