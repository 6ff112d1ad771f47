"""The tables of what was killed when and what was lost: done again, with every case a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loram

ROOT = Path(__file__).parents[1]
MODEL = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loram" / "models" / "SmolLM2-135M-Instruct"
RECORD = ROOT / "docs" / "killed.json"
PRUNING = ROOT / "docs" / "killed-pruning.json"


def check(body: dict[str, object]) -> None:
    """What docs/train.md promises."""
    rows = body["rows"]
    every = body["every"]
    assert isinstance(rows, list)
    assert isinstance(every, int)
    for row in rows:
        assert row["same"], row
        asked = row["what"].partition(" ")[0] in ("SIGTERM", "SIGINT", "SIGUSR1")
        assert row["lost"] <= every * (2 if "optimizer" in row["what"] else 1), row
        assert (row["code"], row["lost"]) == (75, 0) if asked else row["code"] != 0, row
        assert not asked or "go on with `loram train" in row["last line"]


def test_the_record_keeps_the_promise() -> None:
    body = json.loads(RECORD.read_text(encoding="utf-8"))
    check(body)
    assert len(body["rows"]) == 8


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="make model")
def test_killed_in_every_way_and_gone_on(tmp_path: Path) -> None:
    small, data, out = tmp_path / "small", tmp_path / "rows.jsonl", tmp_path / "killed.json"
    loram.prune(MODEL, out=small, method="random", ratio=0.5)
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f" It is {2 * n}."} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = [sys.executable, str(ROOT / "scripts" / "killed.py"), str(small), str(data), "--output", str(out)]
    subprocess.run(script, check=True, timeout=1800)
    check(json.loads(out.read_text(encoding="utf-8")))


def check_pruning(rows: list[dict[str, Any]], cases: set[str]) -> None:
    """What docs/prune.md promises."""
    assert {row["what"] for row in rows} == cases
    for row in rows:
        assert row["same"], row
        assert 0 < row["reached"] <= row["blocks"], row
        assert row["again"] < row["reached"] or row["reached"] < 3, row


def test_the_record_of_calibrations_keeps_the_promise() -> None:
    check_pruning(json.loads(PRUNING.read_text(encoding="utf-8"))["rows"], {"wanda", "taylor", "sparsegpt", "depth"})


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="make model")
def test_a_calibration_is_killed_in_a_block_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "killed.json"
    script = [sys.executable, str(ROOT / "scripts" / "killed_pruning.py"), str(MODEL)]
    data = str(ROOT / "recipes" / "data" / "train.jsonl")
    subprocess.run([*script, data, "--only", "wanda", "--times", "1", "--output", str(out)], check=True, timeout=1800)
    check_pruning(json.loads(out.read_text(encoding="utf-8"))["rows"], {"wanda"})
