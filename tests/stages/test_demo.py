"""demo: the packaged recipe with the packaged data, on the tiny trained model (fast) and on SmolLM2 (slow)."""

from __future__ import annotations

from pathlib import Path

import pytest

from loram.errors import InputError
from loram.options import DemoOptions
from loram.stages.demo import demo, find_model

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama-kjv"
SMALLER = (
    "prune.keep_first=1",
    "prune.keep_last=1",
    "prune.samples=8",
    "prune.length=64",
    "train.steps=4",
    "train.batch=2",
    "eval.limit=8",
)


def test_demo_on_the_tiny_model(tmp_path: Path) -> None:
    result = demo(DemoOptions(model=str(TINY), out=str(tmp_path / "demo"), overrides=SMALLER))
    assert [row.name for row in result.ladder.rows] == ["base", "small", "small + adapter", "large + recovered"]
    assert (tmp_path / "demo" / "adapter" / "adapter_config.json").is_file()
    assert result.next_command.startswith("loram merge")


def test_missing_model_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="make model"):
        find_model()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_helps_the_real_model(tmp_path: Path) -> None:
    try:
        find_model()
    except InputError as error:
        pytest.skip(str(error))
    result = demo(DemoOptions(out=str(tmp_path / "demo")))
    assert result.ladder.gain > 4 * result.ladder.gain_stderr
