"""The manifests of a whole run tell how its small model was made, and the ladder's advice follows."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

import loram
from loram.stages.making import making_of

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny-llama-kjv"
DATA = ROOT / "docs" / "examples" / "train.jsonl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prune on general text, train two steps, recover."""
    place = tmp_path_factory.mktemp("made")
    cut = {"ratio": "0.4", "keep_first": 1, "keep_last": 1, "samples": 4, "length": 32}
    loram.prune(TINY, out=place / "small", calibration="builtin", **cut)
    loram.train(place / "small", data=DATA, steps=2, batch=2, max_length=48, out=place / "trained")
    loram.recover(place / "trained", out=place / "adapter")
    return place


def test_the_chain_is_followed_from_the_recovered_adapter_alone(folders: Path) -> None:
    made = making_of([folders / "adapter", None])
    assert made.compression == ("axes", "refit")
    assert (made.method, made.ratio, made.task_text, made.steps) == ("structured", Fraction(2, 5), False, 2)


def test_steps_on_the_large_model_itself_are_known(folders: Path, tmp_path: Path) -> None:
    further = {"data": DATA, "steps": 1, "batch": 2, "max_length": 48}
    loram.train(TINY, adapter=folders / "adapter", streamed=True, out=tmp_path / "touched", **further)
    made = making_of([tmp_path / "touched"])
    assert (made.touched, made.method, made.steps) == (True, "structured", 2)
    assert not making_of([folders / "adapter"]).touched


def test_what_is_gone_or_damaged_is_unknown(folders: Path, tmp_path: Path) -> None:
    lone = shutil.copytree(folders / "trained", tmp_path / "lone")
    assert making_of([lone]).method is None
    assert making_of([lone]).steps == 2
    (lone / "loram.json").write_text("{")
    assert making_of([lone]).compression == ()


def test_eval_advises_by_it(folders: Path) -> None:
    held = ROOT / "docs" / "examples" / "test.jsonl"
    body = loram.evaluate(TINY, data=held, adapter=folders / "adapter", compare=True, limit=2, max_length=48).to_json()
    assert body["advice"][0].startswith("calibrate on the text that you train on")
    assert any(each.startswith("train more than 2 steps") for each in body["advice"])
    assert json.dumps(body)
