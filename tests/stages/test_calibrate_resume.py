"""recover --calibrate, interrupted: it goes on where it was, ends alike, and leaves nothing half done."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planting import WEIGHTS, calibrate

from loram.errors import Interrupted
from loram.evaluation import scoring
from loram.evaluation.losses import RowLosses, measure
from loram.stages import scaling
from loram.stages.recover import RecoverResult

pytestmark = pytest.mark.usefixtures("in_fp32")


class Killed(BaseException):
    pass


def killing(after: int, calls: list[int]) -> Callable[..., RowLosses]:
    """`measure`, which dies after so many calls."""

    def look(*arguments: Any) -> RowLosses:
        if len(calls) >= after:
            raise Killed
        calls.append(1)
        return measure(*arguments)

    return look


def test_killed_at_any_moment_it_goes_on_and_ends_alike(
    calibrated: RecoverResult, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, total = tmp_path / "x", 0
    for after in (1, 9, 14):
        calls: list[int] = []
        monkeypatch.setattr(scoring, "measure", killing(after, calls))
        with pytest.raises(Killed):
            calibrate(planted, out)
        assert not out.exists()
        total += len(calls)
    calls = []
    monkeypatch.setattr(scoring, "measure", killing(1000, calls))
    calibrate(planted, out)
    assert total == 24
    assert 0 < len(calls) < 45 - 24
    assert (out / WEIGHTS).read_bytes() == (planted / "found" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    assert not (out / "checkpoints").exists()


def test_a_signal_ends_it_with_what_to_type(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*arguments: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(scaling, "fits", signalled)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; go on with `loram recover .*--calibrate"):
        calibrate(planted, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert len([*(tmp_path / "x.partial" / "checkpoints").glob("choose-*")]) == 1
