"""Calibration windows: weights, seeds, BOS, and too little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from character_tokenizer import FIXTURE, make_tokenizer
from transformers import AutoTokenizer

from loram.data.calibration import calibration_windows, is_general, parse_spec, shares
from loram.errors import DataError, OptionError


def documents(path: Path, letter: str, count: int) -> str:
    path.write_text("\n\n".join(letter * 9 for _ in range(count)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([1, 1], 5, [3, 2]), ([1, 1, 1], 32, [11, 11, 10]), ([3, 1], 4, [3, 1]), ([0.1, 0.9], 1, [0, 1]), ([5], 7, [7])],
)
def test_shares_by_largest_remainder(weights: list[float], total: int, expected: list[int]) -> None:
    assert shares(weights, total) == expected


def test_specs(tmp_path: Path) -> None:
    odd = tmp_path / "a=2"
    odd.write_text("x")
    assert parse_spec("a.jsonl=2") == ("a.jsonl", 2.0)
    assert parse_spec("a.jsonl") == ("a.jsonl", 1.0)
    assert parse_spec(str(odd)) == (str(odd), 1.0)
    assert parse_spec("builtin=0.5") == ("builtin", 0.5)
    assert is_general("builtin=3")
    assert is_general("builtin")
    assert not is_general("builtin.txt")
    for bad in ("a=0", "a=-1", "a=nan", "a=inf", "=1"):
        with pytest.raises(OptionError, match="positive weight"):
            parse_spec(bad)


def test_windows_follow_the_weights(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sources = (documents(tmp_path / "a.txt", "a", 50) + "=3", documents(tmp_path / "b.txt", "b", 50))
    windows = calibration_windows(sources, tokenizer, 8, 20, seed=0)
    assert [tuple(window.shape) for window in windows] == [(20,)] * 8
    letters = ["a" if "a" in tokenizer.decode(window) else "b" for window in windows]
    assert letters == ["a"] * 6 + ["b"] * 2
    assert tokenizer.decode(windows[0]) == "aaaaaaaaa<|im_end|>" * 2


def test_completions_are_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "abc", "completion": "def"}))
    (window,) = calibration_windows((str(file),), make_tokenizer(), 1, 7, seed=0)
    assert make_tokenizer().decode(window) == "abcdef<|im_end|>"


def test_every_window_begins_with_bos_where_the_tokenizer_wants_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    windows = calibration_windows((documents(tmp_path / "a.txt", "a", 50),), tokenizer, 4, 10, seed=0)
    assert all(window[0] == tokenizer.bos_token_id and len(window) == 10 for window in windows)
    assert all((window[1:] != tokenizer.bos_token_id).all() for window in windows)


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"document number {number} of many" for number in range(60)))
    first, same, other = (calibration_windows((str(file),), tokenizer, 3, 32, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_too_little_text_says_what_is_there_and_what_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = documents(tmp_path / "a.txt", "a", 2)
    assert len(calibration_windows((file,), make_tokenizer(), 3, 8, seed=0)) == 2
    assert "fills 2 windows of 8 tokens, not 3" in caplog.text
    with pytest.raises(DataError, match=r"holds 20 tokens, less than one window of 24; add text, or lower --length"):
        calibration_windows((file,), make_tokenizer(), 3, 24, seed=0)
    with pytest.raises(OptionError, match="add --calibration"):
        calibration_windows((), make_tokenizer(), 3, 8, seed=0)


def test_the_packaged_text_is_enough_for_the_defaults() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    assert len(calibration_windows(("builtin",), tokenizer, 32, 256, seed=0)) == 32
