"""How many heads and channels stay: exact, whatever the ratio's text, against arithmetic done here."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from loram.errors import OptionError
from loram.families.widths import Cut, Widths, describe_uncut, kept_channels, kept_heads, parse_ratio


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("0.65", Fraction(13, 20)),
        ("13/20", Fraction(13, 20)),
        (" .5 ", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)),
        (1e-3, Fraction(1, 1000)),
        (0.1, Fraction(1, 10)),
        (0.8, Fraction(4, 5)),
        ("0.3333", Fraction(3333, 10000)),
        ("0.999999999999999999999", 1 - Fraction(1, 10**21)),
    ],
)
def test_a_ratio_is_the_fraction_its_text_spells(text: Any, ratio: Fraction) -> None:
    assert parse_ratio(text) == ratio


@pytest.mark.parametrize("text", ["0", "1", "-1", "1.5", "2/1", 0, 1, -0.5, 0.0, 1.0, "65"])
def test_a_ratio_outside_is_refused(text: Any) -> None:
    with pytest.raises(OptionError, match=r"must lie strictly between 0 and 1"):
        parse_ratio(text)


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "abc", "", "50%", "0,5", "1/0", "0x1", float("nan"), float("inf"), "0.5.1"]
)
def test_what_is_no_number_is_refused(text: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a decimal or fraction such as 0.65"):
        parse_ratio(text)


@pytest.mark.parametrize(
    ("size", "ratio", "kept"),
    [
        (10240, "0.8", 2048),  # floats: 2047
        (10240, "0.9", 1024),
        (8960, "0.55", 4032),
        (8960, "0.8", 1792),
        (25600, "0.8", 5120),
        (13824, "0.65", 4838),
        (28672, "0.65", 10035),
        (28672, "0.85", 4300),
        (28672, "0.95", 1433),
        (10, "0.99", 0),
    ],
)
def test_channels_of_real_models(size: int, ratio: str, kept: int) -> None:
    assert kept_channels(size, parse_ratio(ratio)) == kept


@pytest.mark.parametrize("size", [1, 7, 320, 1536, 8960, 10240, 13824, 25600, 28672])
def test_channels_at_every_percent_in_integers(size: int) -> None:
    for percent in range(1, 100):
        for spelled in (f"0.{percent:02}", f"{percent}/100", percent / 100):
            assert kept_channels(size, parse_ratio(spelled)) == size * (100 - percent) // 100
        assert kept_channels(size, parse_ratio(f"0.{percent:02}"), 64) == size * (100 - percent) // 100 // 64 * 64


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8, 32, 40])
@pytest.mark.parametrize("head_dim", [12, 64, 128, 256])
def test_heads_at_every_permille_in_integers(kv_heads: int, head_dim: int) -> None:
    """The paper's rule: rows are removed to the ratio, then only whole heads of them."""
    rows = kv_heads * head_dim
    for permille in range(1, 1000):
        removed = (rows - rows * (1000 - permille) // 1000) // head_dim
        assert kept_heads(kv_heads, head_dim, Fraction(permille, 1000)) == kv_heads - removed


@pytest.mark.parametrize(
    ("kv_heads", "ratio", "kept"), [(8, "0.65", 3), (8, "0.75", 2), (8, "0.85", 2), (8, "0.95", 1), (40, "0.65", 14)]
)
def test_heads_of_the_papers_models(kv_heads: int, ratio: str, kept: int) -> None:
    assert kept_heads(kv_heads, 128, parse_ratio(ratio)) == kept


def test_first_and_last_layers_stay_whole() -> None:
    widths = Cut(Fraction(1, 2), keep_first=2, keep_last=1).widths(5, 4, 16, 100)
    assert widths == Widths((4, 4, 2, 2, 4), (100, 100, 50, 50, 100))
    assert not widths.uniform
    assert Cut(Fraction(1, 2), 0, 0).widths(2, 4, 16, 100) == Widths((2, 2), (50, 50))
    assert Cut(Fraction(1, 2), 0, 0).widths(2, 4, 16, 100).uniform
    assert Cut(Fraction(1, 2)).widths(7, 4, 16, 100).mlp == (100,) * 4 + (50,) + (100,) * 2


@pytest.mark.parametrize(("first", "last"), [(4, 2), (6, 0), (0, 6), (7, 3)])
def test_keeping_all_layers_is_refused(first: int, last: int) -> None:
    with pytest.raises(OptionError, match=rf"--keep-first {first} and --keep-last {last} leave no layer of 6"):
        Cut(Fraction(1, 2), first, last).widths(6, 4, 16, 100)


@pytest.mark.parametrize(
    ("cut", "what"),
    [
        (Cut(Fraction(999, 1000), 0, 0), "leaves no MLP channel"),
        (Cut(Fraction(985, 1000), 0, 0), "leaves no kv head"),
        (Cut(Fraction(1, 2), 0, 0, round_to=64), "leaves no MLP channel.*rounded to 64"),
    ],
)
def test_a_ratio_that_leaves_nothing_is_refused(cut: Cut, what: str) -> None:
    with pytest.raises(OptionError, match=what):
        cut.widths(2, 4, 16, 100)


def test_what_could_not_be_cut_is_said() -> None:
    assert describe_uncut(1, 100, Widths((1, 1), (100, 50))) == ["attention is not cut: there is one kv head"]
    assert "2 kv heads are too coarse" in describe_uncut(2, 100, Widths((2, 2), (100, 70)))[0]
    assert "MLP channels are not cut" in describe_uncut(2, 100, Widths((2, 1), (100, 100)))[0]
    assert describe_uncut(2, 100, Widths((2, 1), (100, 50))) == []
