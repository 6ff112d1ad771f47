"""Every packaged recipe goes through the real parser, and the parser refuses what it should."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from loram.errors import OptionError, RecipeError
from loram.families.widths import parse_ratio
from loram.recipe import load_recipe, packaged_recipes, parse_recipe, recipe_text

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(FILES) >= 4
    assert [file.stem for file in FILES] == list(packaged_recipes())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_parses(file: Path) -> None:
    recipe = load_recipe(str(file))
    assert recipe.sections == load_recipe(file.stem).sections
    assert {"run", "prune", "train", "recover"} <= recipe.sections.keys()
    assert recipe.section("run")["model"]
    assert file.read_text().startswith("# "), "the first line is the description that `loram recipes` shows"


@pytest.mark.parametrize(
    ("name", "ratio", "method"),
    [
        ("llama-2-13b-structured", "0.65", "structured"),
        ("llama-2-13b-random", "0.65", "random"),
        ("llama-3.1-70b-structured", "0.85", "structured"),
        *((f"llama-2-70b-qloram-{ratio}", ratio, "structured") for ratio in ("0.65", "0.75", "0.85", "0.95")),
        ("llama-3.1-70b-qloram", "0.85", "structured"),
    ],
)
def test_the_papers_settings(name: str, ratio: str, method: str) -> None:
    recipe = load_recipe(name)
    prune, train = recipe.section("prune"), recipe.section("train")
    assert parse_ratio(prune["ratio"]) == Fraction(ratio)
    assert prune["method"] == method
    assert (prune["keep_first"], prune["keep_last"]) == (4, 2)
    assert (train["rank"], train["alpha"], train["dropout"], train["max_length"]) == (8, 16, 0.05, 512)
    assert train["batch"] * train["accumulate"] == 128
    assert train["schedule"] == "cosine"
    sections = list(recipe.sections)
    assert ("quantize" in sections) == ("qloram" in name)
    if "qloram" in name:
        assert recipe.section("quantize") == {"type": "nf4"}
        assert sections.index("prune") < sections.index("quantize") < sections.index("train")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no sections"),
        ("- prune", "has no sections"),
        ("prune: [1]", "section prune of the recipe x.yaml is [1]; expected `key: value` lines"),
        ("prunne: {}", "unknown section 'prunne'"),
        ("prunne: {}", "did you mean prune?"),
        ("prune: {rato: 0.5}", "x.yaml: prune has no option 'rato'; did you mean ratio?"),
        ("prune: {ratio: 2}", "x.yaml: prune: --ratio is 2"),
        ("prune: {refit: sometimes}", "x.yaml: prune: refit is 'sometimes'; expected bool"),
        ("train: {steps: 1.5}", "x.yaml: train: steps is 1.5; expected int"),
        ("train: {schedule: cosin}", "did you mean cosine?"),
        ("prune: {a: b: c}", "is not valid YAML"),
    ],
)
def test_refusals(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "x.yaml")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        recipe_text(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match=r"did you mean quickstart\?"):
        recipe_text("quickstat")
    binary = tmp_path / "bad.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipe_text(str(binary))


@pytest.mark.parametrize(
    ("assignment", "section", "key", "value"),
    [
        ("train.steps=5", "train", "steps", 5),
        ("train.max-length=64", "train", "max_length", 64),
        ("train.lr=1e-5", "train", "lr", "1e-5"),
        ("train.targets=q_proj,v_proj", "train", "targets", "q_proj,v_proj"),
        ("ceiling=true", "run", "ceiling", True),
        ("run.data=a=b.jsonl", "run", "data", "a=b.jsonl"),
    ],
)
def test_overrides(assignment: str, section: str, key: str, value: Any) -> None:
    recipe = parse_recipe("train: {steps: 1}", "x.yaml")
    assert recipe.override([assignment]).section(section)[key] == value
    assert recipe.section("train") == {"steps": 1}


@pytest.mark.parametrize("assignment", ["steps", "=3", "train.stesp=3", "trian.steps=3", "train.steps=many"])
def test_bad_overrides(assignment: str) -> None:
    with pytest.raises(OptionError):
        parse_recipe("train: {steps: 1}", "x.yaml").override([assignment])
