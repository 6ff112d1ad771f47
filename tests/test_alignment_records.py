"""What docs/align.md shows of killed alignments and of memory is what was seen, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_a_killed_alignment_loses_no_more_than_it_had_not_saved() -> None:
    body = json.loads((DOCS / "killed-alignment.json").read_text(encoding="utf-8"))
    assert {"distill", "lm", "refit", "block", "teacher cache"} <= {row["what"] for row in body["rows"]}
    for row in body["rows"]:
        assert row["same"], row
        assert 0 <= row["lost"] <= (body["every"] if row["unit"] == "step" else 1), row


@pytest.mark.parametrize("scope", ["all", "lora", "norms"])
def test_a_cached_teacher_takes_less_memory_than_one_beside_the_student(scope: str) -> None:
    memory = json.loads((DOCS / "alignments.json").read_text(encoding="utf-8"))["memory"]
    beside, streamed, cached, without = (
        memory[f"{teacher}, {scope}"]["peak_bytes"]
        for teacher in ("in memory", "streamed into a cache", "from the cache", "no teacher")
    )
    large = 134_515_008 * 2  # bf16
    assert max(streamed, cached) < beside - large
    assert without < cached
