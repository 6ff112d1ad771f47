"""Held-out losses while training, of the small and of the large model, and stopping by them."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loram.data.encoding import EncodedRow
from loram.errors import Interrupted, OptionError
from loram.options import EvalOptions, PruneOptions, RecoverOptions, TrainOptions
from loram.progress import Progress
from loram.stages import watching
from loram.stages.evaluate import evaluate
from loram.stages.prune import prune
from loram.stages.recover import recover
from loram.stages.train import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watching")
    shutil.copytree(FIXTURE, folder / "large")
    prune(
        PruneOptions(model=str(folder / "large"), out=str(folder / "small"), method="random", keep_first=1, keep_last=1)
    )
    for name, first in (("data", 0), ("held", 50)):
        rows = [{"prompt": f"And the LORD said {n} ", "completion": "unto Moses"} for n in range(first, first + 12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(work: Path, out: Path, **changes: Any) -> TrainOptions:
    plain = {"model": str(work / "small"), "data": (str(work / "data.jsonl"),), "out": str(out), "steps": 6}
    running = {"dtype": "fp32", "batch": 4, "lr": 2e-3, "dropout": 0.1, "eval_data": (str(work / "held.jsonl"),)}
    return TrainOptions(**{**plain, **running, **changes})


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss_of(work: Path, model: str, adapter: Path) -> float:
    asked = EvalOptions(model=str(work / model), data=(str(work / "held.jsonl"),), adapter=str(adapter), dtype="fp32")
    return evaluate(asked).loss.mean


def test_the_losses_are_those_that_eval_measures_and_training_does_not_notice(work: Path, tmp_path: Path) -> None:
    train(options(work, tmp_path / "watched", eval_every=2, recover_eval=3))
    train(options(work, tmp_path / "plain", eval_data=()))
    watched = lines(tmp_path / "watched")
    assert [line["step"] for line in watched if "eval_loss" in line] == [2, 4, 6]
    assert [line["step"] for line in watched if "large_loss" in line] == [3, 6]
    assert [line["loss"] for line in watched] == [line["loss"] for line in lines(tmp_path / "plain")]
    recover(RecoverOptions(adapter=str(tmp_path / "watched"), out=str(tmp_path / "recovered")))
    assert watched[-1]["eval_loss"] == pytest.approx(loss_of(work, "small", tmp_path / "watched"), rel=1e-5)
    assert watched[-1]["large_loss"] == pytest.approx(loss_of(work, "large", tmp_path / "recovered"), rel=1e-5)


def test_the_figures_are_shown(work: Path, tmp_path: Path) -> None:
    class Recorder(Progress):
        def __init__(self) -> None:
            self.heard: set[str] = set()

        def advance(self, amount: int = 1, **figures: float) -> None:
            self.heard |= set(figures)

    recorder = Recorder()
    train(options(work, tmp_path / "out", eval_every=3, recover_eval=3), recorder)
    assert {"eval_loss", "large_loss"} <= recorder.heard


@pytest.mark.parametrize("stop_on", ["small", "large"])
def test_patience_ends_it_and_the_best_is_kept(
    work: Path, tmp_path: Path, stop_on: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Figures that fall twice and then rise, whatever the model does."""
    falling = iter([5.0, 4.0, 3.0, 3.5, 3.0, 9.0, 9.0])
    kept: dict[str, torch.Tensor] = {}
    real = watching.loss_of

    def scripted(model: Any, rows: Any, batch: int) -> float:
        real(model, rows, batch)
        value = next(falling)
        if value == 3.0 and not kept:
            kept.update({name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name})
        return value

    monkeypatch.setattr(watching, "loss_of", scripted)
    extra = {"recover_eval": 1, "eval_every": 10**6} if stop_on == "large" else {"eval_every": 1}
    with caplog.at_level(logging.INFO):
        result = train(options(work, tmp_path / "out", steps=20, patience=2, stop_on=stop_on, **extra))
    assert result.run is not None
    assert result.run.steps == 5
    assert "kept the weights of step 3" in caplog.text
    if stop_on == "small":
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        for name, weight in kept.items():
            assert torch.equal(saved[name.replace(".default", "")], weight)
    assert not list((tmp_path / "out").glob("*/"))


def test_patience_survives_a_stop(work: Path, tmp_path: Path) -> None:
    class Stop(Progress):
        def __init__(self) -> None:
            self.done = False

        def advance(self, amount: int = 1, **figures: float) -> None:
            if not self.done:
                self.done = True
                signal.raise_signal(signal.SIGTERM)

    changes: dict[str, Any] = {"eval_every": 1, "patience": 1, "lr": 0.05, "steps": 30, "schedule": "constant"}
    whole = train(options(work, tmp_path / "whole", **changes))
    with pytest.raises(Interrupted):
        train(options(work, tmp_path / "out", **changes), Stop())
    again = train(options(work, tmp_path / "out", **changes))
    assert whole.run is not None
    assert again.run is not None
    assert again.run.steps == whole.run.steps < 30
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_split_holds_rows_out(work: Path, tmp_path: Path) -> None:
    train(options(work, tmp_path / "out", eval_data=(), eval_split=0.25, eval_every=3))
    assert [line["step"] for line in lines(tmp_path / "out") if "eval_loss" in line] == [3, 6]
    with pytest.raises(OptionError, match="leaves none on one side"):
        train(options(work, tmp_path / "b", eval_data=(), eval_split=12.0))


@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["rows", "packed"])
def test_a_large_model_that_does_not_fit_is_measured_block_by_block(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    """The same losses, chosen without being asked for and said once; the training itself does not notice."""
    watched = {"recover_eval": 2, "eval_every": 3, **changes}
    train(options(work, tmp_path / "whole", **watched))
    with monkeypatch.context() as patched, caplog.at_level(logging.INFO):
        patched.setattr(watching, "limit_bytes", lambda training: training.peak + 1000)
        patched.setattr(watching, "load_model", None)
        train(options(work, tmp_path / "blocks", **watched))
    assert caplog.text.count("its loss is measured block by block") == 1
    whole, blocks = lines(tmp_path / "whole"), lines(tmp_path / "blocks")
    assert [line["step"] for line in blocks if "large_loss" in line] == [2, 4, 6]
    for one, other in zip(whole, blocks, strict=True):
        assert one["loss"] == other["loss"]
        assert one.get("eval_loss") == other.get("eval_loss")
        assert one.get("large_loss", 0.0) == pytest.approx(other.get("large_loss", 0.0), rel=1e-6)


def test_early_stopping_looks_at_a_large_model_that_does_not_fit(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this rate the large model gets worse sooner or later, and both ways of measuring stop at the same step."""
    changes = {"recover_eval": 1, "stop_on": "large", "patience": 1, "lr": 0.05, "steps": 30, "schedule": "constant"}
    whole = train(options(work, tmp_path / "whole", **changes))
    monkeypatch.setattr(watching, "limit_bytes", lambda training: 0)
    blocks = train(options(work, tmp_path / "blocks", **changes))
    assert whole.run is not None
    assert blocks.run is not None
    assert whole.run.steps == blocks.run.steps < 30


def test_a_plain_model_has_nothing_to_recover(work: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is about small models"):
        train(options(work, tmp_path / "out", model=str(work / "large"), recover_eval=2))


def test_a_row_that_is_there_twice_is_on_one_side_only() -> None:
    rows = [EncodedRow(input_ids=[1, number % 6], loss_mask=[False, True]) for number in range(12)]
    chosen = TrainOptions(model="m", eval_split=0.5)
    kept, held = watching.held_out(chosen, rows, None, 9)
    assert (len(kept), len(held)) == (6, 3)
    assert not {tuple(row["input_ids"]) for row in kept} & {tuple(row["input_ids"]) for row in held}
