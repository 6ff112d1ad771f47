"""The rows of recover --calibrate: every format of train, and a word where they have been seen before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planting import EXAMPLES, FEW, calibrate, refused

import loram
from loram.artifact import read_manifest
from loram.errors import DataError, OptionError
from loram.stages.recover import RecoverResult

pytestmark = pytest.mark.usefixtures("in_fp32")


def test_every_format_of_train_is_read(planted: Path, tmp_path: Path) -> None:
    data = [EXAMPLES / name for name in ("questions.csv", "text.jsonl", "alpaca.json")]
    calibrate(planted, tmp_path / "x", calibrate=data, calibrate_rows=6, evaluations=8)
    manifest = read_manifest(tmp_path / "x")
    assert manifest is not None
    assert manifest.calibration is not None
    assert 4 <= len(manifest.calibration["rows"]) <= 6


def test_rows_that_were_seen_before_are_named(
    planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planted)
    calibrate(planted, tmp_path / "x", calibrate="train.jsonl", **FEW)
    assert "what the adapter was trained on" in caplog.text
    loram.train(
        planted / "small",
        data=planted / "train.jsonl",
        eval_data=planted / "test.jsonl",
        out=tmp_path / "watched",
        steps=1,
        max_length=64,
    )
    calibrate(planted, tmp_path / "y", str(tmp_path / "watched"), calibrate="test.jsonl", **FEW)
    assert "the held-out data of the training" in caplog.text


def test_eval_says_so_where_rows_are_those_of_the_calibration(
    calibrated: RecoverResult, planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (planted / "test.jsonl").read_text().splitlines()
    (tmp_path / "same.jsonl").write_text("\n".join(reversed(lines)))
    plain: dict[str, Any] = {"adapter": planted / "found", "max_length": 64}
    loram.evaluate(planted / "large", data=tmp_path / "same.jsonl", **plain)
    assert "16 of these rows" in caplog.text
    caplog.clear()
    loram.evaluate(planted / "large", data=planted / "train.jsonl", limit=8, **plain)
    assert "of these rows" not in caplog.text


def test_rows_that_cannot_be_read_or_are_too_few(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(planted, tmp_path, DataError, "empty", calibrate=tmp_path / "empty.jsonl")
    (tmp_path / "few.jsonl").write_text("".join((planted / "test.jsonl").read_text().splitlines(True)[:3]) * 4)
    refused(planted, tmp_path, DataError, "has 3 rows .* 4 are needed", calibrate=tmp_path / "few.jsonl")
    refused(planted, tmp_path, DataError, "does not exist", calibrate=tmp_path / "gone.jsonl")
    refused(planted, tmp_path, OptionError, "has a weight", calibrate=f"{planted / 'test.jsonl'}=2")
