"""The record of every way of pruning through all stages: what it has to show, and the script that makes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODEL = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loram" / "models" / "SmolLM2-135M-Instruct"
CHAINS = {(name, nf4) for name in ("random", "structured", "semi", "unstructured", "depth") for nf4 in (False, True)}


def check(row: dict[str, Any]) -> None:
    """The adapter is the one that was trained, training and merging did their work, and every stage was measured."""
    ladder = row["ladder"]
    assert row["identity"] <= 1e-5, row
    assert ladder["small + adapter"] < ladder["small"], row
    assert ladder["large + recovered"] < ladder["base"], row
    assert abs(row["merged"] - ladder["large + recovered"]) < 0.02, row  # bf16
    assert {"prune", "train", "recover", "verify", "merge", "eval"} <= set(row["stages"])
    assert ("quantize" in row["stages"]) == row["nf4"]
    assert bool(row["mask"]) == (row["method"] in ("semi", "unstructured")), row
    assert all(stage["cpu"] > 0 and stage["peak"] > 2**24 for stage in row["stages"].values())


def test_the_record_shows_every_way() -> None:
    rows = json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        check(row)
    assert {(row["method"], row["nf4"]) for row in rows if not row["unmasked"]} == CHAINS
    assert [(row["method"], row["nf4"]) for row in rows if row["unmasked"]] == [("semi", True)]


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="make model")
def test_a_chain_is_made_once(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "methods.py"), str(MODEL), str(tmp_path / "scratch")]
    words += ["--only", "random", "--output", str(tmp_path / "methods.json")]
    first = subprocess.run(words, check=True, capture_output=True, text=True)
    (row,) = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))["rows"]
    check(row)
    assert first.stderr.count("$ loram ") == 7
    (tmp_path / "scratch" / "random" / "chain" / "merge.json").unlink()  # as a kill right before leaves it
    again = subprocess.run(words, check=True, capture_output=True, text=True)
    assert [line.split()[2] for line in again.stderr.splitlines()] == ["merge"]
