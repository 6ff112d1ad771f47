"""init: the recipe it writes goes through the real parser and says what was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loram.errors import InputError, OptionError, OutputError, ResourceError
from loram.options import InitOptions
from loram.recipe import load_recipe, parse_recipe
from loram.stages.init import init

LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LLAMA_13B))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_is_one_that_run_takes(folder: Path) -> None:
    given = InitOptions(model="large", data=("a.jsonl", "b.txt"), eval_data=("c.jsonl",), out="mine.yaml")
    result = init(given)
    recipe = load_recipe("mine.yaml")
    assert recipe.sections["run"] == {"model": "large", "data": ["a.jsonl", "b.txt"], "eval_data": ["c.jsonl"]}
    assert list(recipe.sections)[:3] == ["run", "prune", "train"]
    assert (folder / "mine.yaml").read_text() == result.text
    assert result.next_command == "loram run mine.yaml -o RUN"
    # Half the calibration is the task, half general, however many files the task has.
    assert recipe.sections["prune"]["calibration"] == ["a.jsonl", "b.txt", "builtin=2"]


def test_memory_decides_the_ratio(folder: Path) -> None:
    roomy, tight = (
        init(InitOptions(model="large", data=("a",), memory=memory, dry_run=True)).text for memory in ("24GiB", "12GiB")
    )
    assert "12GiB" in tight
    assert roomy != tight
    roomy, tight, tightest = (
        parse_recipe(init(InitOptions(model="large", data=("a",), memory=m, dry_run=True)).text, "r").sections
        for m in ("80GiB", "12GiB", "5GiB")
    )
    assert (roomy["prune"]["ratio"], "quantize" in roomy) == (0.5, False)
    assert ("prune" in tight, tight["quantize"]) == (False, {"type": "nf4"})
    assert tightest["quantize"] == {"type": "nf4"}
    assert 0.5 < tightest["prune"]["ratio"] < 1
    assert list(tightest)[:5] == ["run", "prune", "align", "quantize", "train"]
    assert "align" not in roomy
    assert "align" not in tight
    with pytest.raises(ResourceError, match="fits into 1GiB"):
        init(InitOptions(model="large", data=("a",), memory="1GiB", out="mine.yaml"))
    assert [path.name for path in folder.iterdir()] == ["large"]


def test_what_is_there_is_not_overwritten(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"recipe.yaml exists"):
        init(InitOptions(model="large", data=("a",)))
    assert (folder / "recipe.yaml").read_text() == "mine"
    init(InitOptions(model="large", data=("a",), force=True))
    assert (folder / "recipe.yaml").read_text() != "mine"
    with pytest.raises(OptionError, match="add --data FILE"):
        init(InitOptions(model="large", out="x.yaml"))
    with pytest.raises(InputError, match="does not exist"):
        init(InitOptions(model="gone", data=("a",), out="x.yaml"))
    with pytest.raises(OutputError, match="cannot write"):
        init(InitOptions(model="large", data=("a",), out="recipe.yaml/x.yaml"))
    assert not (folder / "x.yaml").exists()
