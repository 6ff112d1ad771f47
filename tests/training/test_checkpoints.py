"""Checkpoints: whole or passed over, and of this run or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from loram.data.encoding import EncodedRow
from loram.errors import InputError, OptionError
from loram.options import TrainOptions
from loram.training.checkpoints import (
    checkpoints_of,
    damage,
    differences,
    find_start,
    identity,
    keep_newest,
    listed,
    newest_whole,
    seal,
    set_aside,
    write_identity,
)

ROWS = [EncodedRow(input_ids=[1, 2, 3], loss_mask=[False, True, True])]


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"model": "m", "data": ("d",), "out": "o", **changes})


def make(place: Path, *steps: int) -> Path:
    for step in steps:
        folder = place / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(bytes(range(50)) * step)
        (folder / "trainer_state.json").write_text("{}")
        seal(folder)
    return place


def test_the_newest_whole_one_is_found_and_the_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, 5, 10, 15, 20)
    (tmp_path / "checkpoint-20" / "checksums.json").unlink()
    file = tmp_path / "checkpoint-15" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        found = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 10
    assert "going back to step 10" in caplog.text
    assert "checkpoint-20 is damaged (it was not written to its end)" in caplog.text
    assert "checkpoint-15 is damaged (optimizer.pt has changed)" in caplog.text


def test_a_missing_file_is_damage_and_nothing_whole_is_none(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    assert damage(tmp_path / "checkpoint-5") == "trainer_state.json is missing"
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-5" / "checksums.json").write_text("{}")
    assert damage(tmp_path / "checkpoint-5") == "checksums.json is broken"


def test_only_the_newest_are_kept_by_step_and_not_by_name(tmp_path: Path) -> None:
    make(tmp_path, 90, 100, 110)
    keep_newest(tmp_path, 2)
    assert [item.step for item in listed(tmp_path)] == [100, 110]


def test_differences_are_named_and_what_does_not_matter_is_not() -> None:
    before = identity(options(lr=1e-3), ROWS, "x")
    same = options(lr=1e-3, out="elsewhere", log_every=3, resume="p", save_every=7, data=("moved",))
    assert differences(json.loads(json.dumps(before)), identity(same, ROWS, "x")) == []
    (found,) = differences(before, identity(options(lr=2e-3), ROWS, "x"))
    assert found == "--lr was 0.001 and is 0.002 now"
    other = [EncodedRow(input_ids=[1, 2, 3], loss_mask=[False, False, True])]
    assert differences(before, identity(options(lr=1e-3), other, "y")) == [
        "the training data is not the same",
        "the model is not the same",
    ]


def test_where_to_start(tmp_path: Path) -> None:
    out, now = tmp_path / "o", identity(options(), ROWS, "x")
    assert find_start(out, options(), now) is None
    place = make(tmp_path / "o.partial" / "checkpoints", 5, 10)
    write_identity(place, now)
    for resume, step in {
        "auto": 10,
        str(place): 10,
        str(tmp_path / "o.partial"): 10,
        str(place / "checkpoint-5"): 5,
    }.items():
        found = find_start(out, options(resume=resume), now)
        assert found is not None
        assert found.step == step, resume
    assert find_start(out, options(resume="never"), now) is None
    with pytest.raises(OptionError, match=r"stopped at step 10 .*--rank was 8 and is 4 now; .*--resume never"):
        find_start(out, options(rank=4), identity(options(rank=4), ROWS, "x"))
    with pytest.raises(InputError, match="there is no whole checkpoint"):
        find_start(out, options(resume=str(tmp_path)), now)


def test_checkpoints_put_aside_come_back(tmp_path: Path) -> None:
    place = make(tmp_path / "o.partial" / "checkpoints", 5)
    set_aside(tmp_path / "o.partial", tmp_path / "o")
    assert not place.exists()
    (found,) = listed(checkpoints_of(tmp_path / "o"))
    assert found.folder == place / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["o.partial"]
