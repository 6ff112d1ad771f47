"""Mixtures of windows: shares, what is held out, what is seen again, and the same for the same seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from character_tokenizer import make_tokenizer

from loram.data.windows import Mixture, mix
from loram.errors import DataError


def texts(folder: Path, **lengths: int) -> dict[str, str]:
    """Files of one letter each, so that a window tells where it is from."""
    for letter, length in lengths.items():
        (folder / f"{letter}.txt").write_text(letter * length)
    return {letter: str(folder / f"{letter}.txt") for letter in lengths}


def mixed(sources: tuple[str, ...], train: int, held: int, seed: int = 0) -> Mixture:
    return mix(sources, make_tokenizer(), (train, held), (10, False), seed)


def origin(windows: torch.Tensor) -> Counter[int]:
    """How many windows there are of each letter's id."""
    return Counter(int(window[0]) for window in windows)


def test_shares_follow_the_weights_and_nothing_held_out_is_seen(tmp_path: Path) -> None:
    files = texts(tmp_path, a=4000, b=4000)
    found = mixed((f"{files['a']}=3", files["b"]), 40, 8)
    assert sorted(origin(found.windows[list(found.order)]).values()) == [10, 30]
    assert sorted(origin(found.held_out).values()) == [2, 6]
    assert sorted(found.order) == list(range(40))
    assert list(found.order) != sorted(found.order)
    assert found.repeats == 1


def test_a_short_source_is_seen_again_and_not_what_is_held_out(tmp_path: Path) -> None:
    files = texts(tmp_path, a=4000, b=85)
    found = mixed((files["a"], files["b"]), 40, 4)
    assert sorted(origin(found.windows[list(found.order)]).values()) == [20, 20]
    (few, many) = sorted(origin(found.windows).values())
    assert few == 8 - 2
    assert many == 20
    assert len(found.held_out) == 4
    seen = Counter(found.order)
    assert max(seen.values()) - min(count for count in seen.values() if count > 1) <= 1


def test_the_seed_decides(tmp_path: Path) -> None:
    files = texts(tmp_path, a=4000, b=4000)
    first, again, other = (mixed((files["a"], files["b"]), 20, 4, seed) for seed in (0, 0, 1))
    assert first.order == again.order != other.order
    assert torch.equal(first.windows, again.windows)


def test_too_little_text(tmp_path: Path) -> None:
    files = texts(tmp_path, a=29, b=5)
    with pytest.raises(DataError, match="too few to hold any out"):
        mixed((files["a"],), 20, 4)
    with pytest.raises(DataError, match="less than one window of 10"):
        mixed((files["b"],), 20, 4)


def test_documents_that_are_kept_apart_keep_their_bos(tmp_path: Path) -> None:
    """Each begins at place 0 with the BOS that the tokenizer puts before a text, and so does every window."""
    (tmp_path / "a.txt").write_text("\n\n".join("abcde"[:n] for n in (1, 3, 5) * 20))
    tokenizer = make_tokenizer(bos=True)
    found = mix((str(tmp_path / "a.txt"),), tokenizer, (10, 2), (10, True), 0)
    assert found.places is not None
    assert torch.equal(found.windows == tokenizer.bos_token_id, found.places == 0)
    assert (found.places[:, 0] == 0).all()
    assert mix((str(tmp_path / "a.txt"),), tokenizer, (10, 2), (10, False), 0).places is None
