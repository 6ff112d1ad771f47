"""eval and its ladder on the committed model: right numbers of the right model, wrong kinds refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram.errors import DataError, InputError, KindError, MismatchError, OptionError, ResourceError
from loram.evaluation import subjects
from loram.modeling import load_model
from loram.options import EvalOptions, PruneOptions, RecoverOptions, TrainOptions
from loram.stages.evaluate import evaluate
from loram.stages.prune import prune
from loram.stages.recover import recover
from loram.stages.train import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
ROWS = [{"prompt": f"And {word} said unto", "completion": " Moses, Go"} for word in ("he", "the LORD", "Aaron", "all")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, small, small-adapter, recovered, ceiling, other (a small model with another map), data."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(FIXTURE, folder / "large")
    for name, seed in (("small", 0), ("other", 1)):
        large, out = str(folder / "large"), str(folder / name)
        prune(PruneOptions(model=large, out=out, method="random", keep_first=1, keep_last=1, seed=seed))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for model, out in (("small", "small-adapter"), ("large", "ceiling")):
        data = (str(folder / "data.jsonl"),)
        train(
            TrainOptions(model=str(folder / model), data=data, out=str(folder / out), steps=12, lr=5e-3, dtype="fp32")
        )
    recover(RecoverOptions(adapter=str(folder / "small-adapter"), out=str(folder / "recovered")))
    return folder


def options(work: Path, **changes: Any) -> EvalOptions:
    for name in ("model", "adapter", "small", "small_adapter", "ceiling"):
        if isinstance(changes.get(name), str):
            changes[name] = str(work / changes[name])
    plain = {"model": str(work / "large"), "data": (str(work / "data.jsonl"),), "dtype": "fp32"}
    return EvalOptions(**{**plain, **changes})


def by_hand(model: Any, folder: Path) -> float:
    """Completion loss without any of our code: prompt and completion end in tokens of their own here."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in ROWS:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        assert whole[: len(prompt)] == prompt
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model.eval()(ids, use_cache=False).logits[0]
        losses = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[len(prompt) - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def loaded(work: Path, model: str, adapter: str | None) -> Any:
    base = load_model(work / model, dtype="fp32")
    return base if adapter is None else PeftModel.from_pretrained(base, str(work / adapter))


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("large", None), ("small", None), ("small", "small-adapter"), ("large", "recovered"), ("large", "ceiling")],
)
def test_the_loss_is_that_of_the_model_and_adapter_named(work: Path, model: str, adapter: str | None) -> None:
    result = evaluate(options(work, model=model, adapter=adapter))
    expected = by_hand(loaded(work, model, adapter), work / model)
    body = result.to_json()
    assert body["loss"] == pytest.approx(expected, rel=1e-4)
    assert body["perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)
    assert body["accuracy"] is None
    assert ("small model" in str(result)) == (model == "small")
    assert body["rows"] == len(ROWS)


def test_the_ladder_has_every_rung_with_its_own_loss(work: Path) -> None:
    result = evaluate(options(work, adapter="recovered", compare=True, ceiling="ceiling", generate=True, new_tokens=6))
    body = result.to_json()
    rows = {row["name"]: row for row in body["ladder"]["rows"]}
    pairs = {
        "base": ("large", None),
        "small": ("small", None),
        "small + adapter": ("small", "small-adapter"),
        "large + recovered": ("large", "recovered"),
        "ceiling": ("large", "ceiling"),
    }
    assert list(rows) == list(pairs)
    for name, (model, adapter) in pairs.items():
        expected = by_hand(loaded(work, model, adapter), work / "large")
        assert rows[name]["loss"] == pytest.approx(expected, rel=1e-4), name
        assert rows[name].keys() == {"name", "loss", "stderr", "accuracy"}
        assert rows[name]["accuracy"] is not None
    assert body["loss"] == rows["large + recovered"]["loss"]
    assert body["subject"] == "large + recovered"
    assert body["verdict"] == str(result)
    assert "of what LoRA on the large model itself gains" in body["verdict"]


@pytest.mark.parametrize("packing", [False, True])
def test_models_that_do_not_fit_are_measured_block_by_block(
    work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, packing: bool
) -> None:
    """The whole ladder, large and small: the same figures, chosen by itself and said a line for each model."""
    asked = options(work, adapter="recovered", compare=True, ceiling="ceiling", packing=packing, max_length=64)
    whole = evaluate(asked)
    monkeypatch.setattr(subjects, "free_bytes", lambda: 1000)
    monkeypatch.setattr(subjects, "load_model", None)
    with caplog.at_level(logging.INFO):
        blocks = evaluate(asked)
    assert caplog.text.count("it is measured block by block") == 2
    assert blocks.losses.nll == pytest.approx(whole.losses.nll, rel=1e-5)
    assert whole.ladder is not None
    assert blocks.ladder is not None
    for one, other in zip(whole.ladder.rows, blocks.ladder.rows, strict=True):
        assert (one.name, one.loss) == (other.name, pytest.approx(other.loss, rel=1e-5))
    with pytest.raises(ResourceError, match=r"1000 B are free; --generate needs it whole"):
        evaluate(options(work, generate=True))


def test_rungs_that_cannot_be_found_are_left_out_and_said(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(work / "recovered", tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        alone = evaluate(options(work, adapter=str(tmp_path / "moved"), compare=True))
    assert alone.ladder is not None
    assert [row.name for row in alone.ladder.rows] == ["base", "large + recovered"]
    assert "give it with --small-adapter" in caplog.text
    named = evaluate(options(work, adapter=str(tmp_path / "moved"), compare=True, small_adapter="small-adapter"))
    assert named.ladder is not None
    assert [row.name for row in named.ladder.rows] == ["base", "small", "small + adapter", "large + recovered"]


def test_limit_looks_at_the_first_rows(work: Path) -> None:
    limited = evaluate(options(work, limit=2))
    assert limited.loss.rows == 2
    assert limited.loss.tokens < evaluate(options(work)).loss.tokens


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"adapter": "small-adapter"}, KindError, "is for the small model; run `loram recover"),
        ({"model": "small", "adapter": "recovered"}, KindError, "is for the large model and .*small is a small one"),
        ({"model": "other", "adapter": "small-adapter"}, MismatchError, "give the small model that it was trained on"),
        ({"model": "recovered"}, KindError, "is an adapter, not a model; give its model and add --adapter"),
        ({"adapter": "large"}, InputError, "has no adapter_config.json"),
        ({"adapter": "gone"}, InputError, "gone does not exist"),
        ({"model": "gone"}, InputError, "gone does not exist"),
        ({"adapter": "small"}, KindError, "is a small-model, not an adapter"),
        ({"model": "small", "adapter": "recovered", "compare": True}, KindError, "--compare starts from the large one"),
        ({"compare": True}, OptionError, "--compare needs the recovered adapter"),
        ({"adapter": "recovered", "compare": True, "small": "large-gone"}, InputError, "--small .*does not exist"),
        (
            {"adapter": "recovered", "compare": True, "small": "recovered"},
            KindError,
            "is a adapter; expected a",
        ),
        (
            {"adapter": "recovered", "compare": True, "small": "other"},
            MismatchError,
            "was trained with the",
        ),
        ({"data": ()}, OptionError, "add --data FILE"),
        ({"data": ("gone.jsonl",)}, DataError, "gone.jsonl does not exist"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    work: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(options(work, **changes))


@pytest.mark.parametrize("free", [2**60, 1000], ids=["whole", "by blocks"])
def test_an_adapter_of_other_weights_or_shapes_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(subjects, "free_bytes", lambda: free)
    other = AutoModelForCausalLM.from_pretrained(work / "large")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "changed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / "large" / name, tmp_path / "changed" / name)
    with pytest.raises(MismatchError, match=r"is for .*large with weights .* give that model"):
        evaluate(options(work, model=str(tmp_path / "changed"), adapter="recovered"))
    # A foreign adapter has no manifest: its shapes are all there is to go by.
    shutil.copytree(work / "small-adapter", tmp_path / "foreign", ignore=shutil.ignore_patterns("loram.json"))
    with pytest.raises(MismatchError, match="updates a weight of shape"):
        evaluate(options(work, adapter=str(tmp_path / "foreign")))


@pytest.mark.parametrize("free", [2**60, 1000], ids=["whole", "by blocks"])
def test_an_adapter_with_nan_is_refused(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(subjects, "free_bytes", lambda: free)
    shutil.copytree(work / "recovered", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, tmp_path / "nan" / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="NaN or Inf"):
        evaluate(options(work, adapter=str(tmp_path / "nan")))


def test_packing_changes_no_figure(work: Path) -> None:
    plain, packed = (evaluate(options(work, packing=packing, max_length=64)) for packing in (False, True))
    assert (packed.loss.tokens, packed.loss.rows) == (plain.loss.tokens, plain.loss.rows)
    assert packed.loss.mean == pytest.approx(plain.loss.mean, abs=1e-5)
    assert packed.loss.stderr == pytest.approx(plain.loss.stderr, abs=1e-5)


def test_weights_have_no_meaning_here(work: Path) -> None:
    with pytest.raises(OptionError, match=r"--data .*data\.jsonl=2 has a weight, which only training data has"):
        evaluate(options(work, data=(f"{work}/data.jsonl=2",)))
