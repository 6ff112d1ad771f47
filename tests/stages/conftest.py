"""A small adapter with a planted error, and one calibration of it, for all the tests that look at them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planting import EXAMPLES, calibrate, plant

import loram
from loram.stages import scaling
from loram.stages.recover import RecoverResult


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, small, trained (small adapter), wrong (the same, the MLPs of one third three times too large)."""
    folder = tmp_path_factory.mktemp("calibrate")
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv", folder / "large")
    for name in ("train", "test"):
        shutil.copyfile(EXAMPLES / f"{name}.jsonl", folder / f"{name}.jsonl")
    cut: dict[str, Any] = {"ratio": 0.25, "keep_first": 1, "keep_last": 1, "samples": 16, "length": 64}
    loram.prune(folder / "large", out=folder / "small", calibration=[folder / "train.jsonl", "builtin"], **cut)
    plain: dict[str, Any] = {"steps": 60, "lr": 3e-3, "max_length": 64, "dropout": 0.0, "dtype": "fp32"}
    loram.train(folder / "small", data=folder / "train.jsonl", out=folder / "trained", **plain)
    plant(folder / "trained", folder / "wrong")
    return folder


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration in fp32 wherever the tests run: what is measured can be compared to five digits."""
    monkeypatch.setattr(scaling, "resolve_dtype", lambda name: "fp32")


@pytest.fixture(scope="session")
def calibrated(planted: Path) -> Iterator[RecoverResult]:
    """One calibration of `wrong`, in planted/found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "resolve_dtype", lambda name: "fp32")
        yield calibrate(planted, planted / "found")
