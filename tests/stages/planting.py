"""An adapter with a planted error, its calibration, and calibrations that are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import loram
from loram.stages.recover import RecoverResult

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
WEIGHTS = "adapter_model.safetensors"
PLANTED = "mlp.middle"
"""The part of the adapter whose updates are too large in `wrong`."""
FEW = {"calibrate_rows": 4, "evaluations": 8}


def plant(trained: Path, out: Path, by: float = 3.0) -> None:
    """The adapter with the update of PLANTED so many times too large."""
    shutil.copytree(trained, out)
    tensors = load_file(out / WEIGHTS)
    for key, value in tensors.items():
        if "layers.2.mlp" in key and "lora_B" in key:
            value.mul_(by)
    save_file(tensors, out / WEIGHTS)


def calibrate(planted: Path, out: Path, adapter: str = "wrong", **changes: Any) -> RecoverResult:
    """recover --calibrate of one of the folder's adapters, on its held-out rows."""
    plain = {"calibrate": planted / "test.jsonl", "max_length": 64, "calibrate_rows": 16, "evaluations": 30, "out": out}
    found: Any = loram.recover(planted / adapter, **{**plain, **changes})
    return found


def refused(planted: Path, tmp_path: Path, error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=message):
        calibrate(planted, tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()
