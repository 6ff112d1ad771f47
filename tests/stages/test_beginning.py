"""train --adapter: training goes on from an adapter's factors, on the model that it belongs to and on no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loram
from loram.adapter import load_adapter
from loram.artifact import read_manifest
from loram.errors import InputError, KindError, MismatchError, OptionError, OutputError
from loram.options import RunOptions, TrainOptions
from loram.recipe import Recipe
from loram.stages.wiring import wire

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WEIGHTS = "adapter_model.safetensors"
ROWS = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large model, two small ones, data, an adapter of the first small one, and that adapter recovered."""
    folder = tmp_path_factory.mktemp("beginning")
    shutil.copytree(FIXTURE, folder / "large")
    rows = [{"prompt": f"And the LORD said {n} ", "completion": "unto Moses " * (1 + n % 3)} for n in range(ROWS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("small", 0), ("other", 1)):
        loram.prune(folder / "large", out=folder / name, method="random", keep_first=1, keep_last=1, seed=seed)
    loram.prune(folder / "large", out=folder / "semi", method="semi", score="magnitude")
    train(folder, "small", folder / "first")
    train(folder, "semi", folder / "masked")
    loram.recover(folder / "first", out=folder / "recovered")
    return folder


def train(work: Path, model: str, out: Path, **changes: Any) -> Any:
    """All rows in every step and an optimizer without memory: four steps and four more are eight."""
    plain: dict[str, Any] = {"steps": 4, "lr": 0.05, "schedule": "constant", "warmup": 0, "optimizer": "sgd", "clip": 0}
    plain |= {"dropout": 0.0, "dtype": "fp32", "batch": ROWS, "data": (str(work / "data.jsonl"),)}
    return loram.train(work / model, out=out, **{**plain, **changes})


@pytest.mark.parametrize(("model", "first"), [("small", "first"), ("semi", "masked")])
def test_four_steps_and_four_more_are_eight(model: str, first: str, work: Path, tmp_path: Path) -> None:
    train(work, model, tmp_path / "eight", steps=8)
    train(work, model, tmp_path / "more", adapter=str(work / first))
    whole, halves, begun = (
        load_file(place / WEIGHTS) for place in (tmp_path / "eight", tmp_path / "more", work / first)
    )
    assert whole.keys() == halves.keys() == begun.keys()
    moved = max(float((whole[key] - begun[key]).abs().max()) for key in whole)
    assert moved > 1e-3
    for key, value in whole.items():
        torch.testing.assert_close(halves[key], value, rtol=0, atol=1e-4 * moved)


def test_a_recovered_adapter_goes_on_on_the_large_model(work: Path, tmp_path: Path) -> None:
    result = train(work, "large", tmp_path / "touched", adapter=str(work / "recovered"))
    manifest, recovered = read_manifest(tmp_path / "touched"), read_manifest(work / "recovered")
    assert manifest is not None
    assert recovered is not None
    assert (manifest.kind, [parent.digest for parent in manifest.parents]) == ("adapter", [recovered.digest()])
    fresh = train(work, "large", tmp_path / "fresh")
    assert result.run.loss_first < fresh.run.loss_first
    stock = AutoModelForCausalLM.from_pretrained(work / "large")
    PeftModel.from_pretrained(stock, str(tmp_path / "touched"))
    checks = {check.name: check for check in loram.verify(tmp_path / "touched", numeric=True).checks}
    assert all(check.ok for check in checks.values())
    assert checks["identity"].detail.startswith("not checked: it was trained on the large model itself")
    rows = str(work / "data.jsonl")
    ladder = loram.evaluate(work / "large", data=rows, adapter=tmp_path / "touched", compare=True).ladder
    assert [rung.name for rung in ladder.rows] == ["base", "small", "small + adapter", "large + recovered"]


def test_an_adapter_brings_its_own_configuration(work: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"rank": 4, "alpha": 6.0, "rslora": True, "layers": ("0-1",)}
    own |= {
        "rank_pattern": ("q_proj=2",),
        "alpha_pattern": ("layers.1.mlp.up_proj=9",),
        "targets": ("q_proj", "up_proj"),
    }
    train(work, "small", tmp_path / "own", **own)
    train(work, "small", tmp_path / "more", adapter=str(tmp_path / "own"), lr=1e-12)
    before, after = (load_adapter(tmp_path / name) for name in ("own", "more"))
    assert before.pairs.keys() == after.pairs.keys()
    for module, pair in before.pairs.items():
        assert after.pairs[module].scale == pytest.approx(pair.scale)
        torch.testing.assert_close(after.pairs[module].a, pair.a, rtol=0, atol=1e-9)
        torch.testing.assert_close(after.pairs[module].b, pair.b, rtol=0, atol=1e-9)
    again = train(work, "small", tmp_path / "typed", adapter=str(tmp_path / "own"), rank=4, alpha=6.0)
    assert again.run.steps == 4


def test_targets_that_are_a_pattern(work: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    shutil.copytree(work / "recovered", place, ignore=shutil.ignore_patterns("loram*"))
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"})
    )
    train(work, "large", tmp_path / "more", adapter=str(place), lr=1e-12)
    assert load_adapter(tmp_path / "more").pairs.keys() == load_adapter(work / "recovered").pairs.keys()


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        ("small", {"adapter": "gone"}, InputError, "gone does not exist"),
        ("small", {"adapter": "recovered"}, KindError, "is for the large model"),
        ("large", {"adapter": "first"}, KindError, "run `loram recover"),
        ("other", {"adapter": "first"}, MismatchError, "give the small model that it was trained on"),
        ("large", {"adapter": "small"}, KindError, "is a small-model, not an adapter"),
        ("small", {"adapter": "first", "rank": 4}, OptionError, r"--rank is 4, and .* its own \(8\); leave it out"),
        ("small", {"adapter": "first", "targets": ("q_proj",)}, OptionError, "--targets is q_proj, and"),
        ("small", {"adapter": "first", "init": "gaussian"}, OptionError, "--init is gaussian, and"),
        ("semi", {"adapter": "masked", "unmasked_update": True}, OptionError, "was masked in training; leave out"),
    ],
)
def test_what_is_refused(
    work: Path, tmp_path: Path, model: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    place = work / changes["adapter"]
    changes = changes | ({"adapter": str(place)} if place.exists() else {})
    with pytest.raises(error, match=message):
        train(work, model, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_factors_that_are_not_numbers(work: Path, tmp_path: Path) -> None:
    place = tmp_path / "poisoned"
    shutil.copytree(work / "recovered", place)
    tensors = load_file(place / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, place / WEIGHTS)
    with pytest.raises(MismatchError, match="NaN or Inf"):
        train(work, "large", tmp_path / "out", adapter=str(place))
    assert not (tmp_path / "out").exists()


def test_the_same_command_is_finished_and_another_adapter_is_another_run(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(work, "small", out, adapter=str(work / "first"))
    before = (out / WEIGHTS).read_bytes()
    assert train(work, "small", out, adapter=str(work / "first")).run.steps == 4
    assert (out / WEIGHTS).read_bytes() == before
    train(work, "small", tmp_path / "second", adapter=str(work / "first"), seed=3)
    with pytest.raises(OutputError, match="exists"):
        train(work, "small", out, adapter=str(tmp_path / "second"))


def test_the_ceiling_of_a_run_begins_anew() -> None:
    recipe = Recipe("here", {"prune": {}, "train": {"adapter": "earlier", "steps": 3}})
    options = RunOptions(recipe="here", model="large", out="run", data=("d",), eval_data=("e",), ceiling=True)
    steps = {step.name: step.options for step in wire(options, recipe, "large")}
    assert isinstance(steps["train"], TrainOptions)
    assert isinstance(steps["ceiling"], TrainOptions)
    assert (steps["train"].adapter, steps["train"].steps) == ("earlier", 3)
    assert (steps["ceiling"].adapter, steps["ceiling"].steps) == (None, 3)
