"""align --packing: documents in a window do not see each other, in the student, in the teacher, in the loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import GROUPED, make, tokens
from torch import Tensor, nn

from loram.data.windows import Mixture, mix
from loram.errors import OptionError
from loram.modeling import load_model, load_tokenizer
from loram.options import AlignOptions, PruneOptions
from loram.stages.align import align
from loram.stages.prune import prune
from loram.training.objectives import Student, distilled, next_token, resident_teacher

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
PLACES = torch.tensor([[3, 4, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
"""The end of a document, three more (one of a single token), and one that fills its window."""


def pieces(places: Tensor) -> Iterator[tuple[int, int, int]]:
    """(window, first, last) of every document or part of one, found without the code under test."""
    for row, line in enumerate(places.tolist()):
        first = 0
        for number in range(1, len(line) + 1):
            if number == len(line) or line[number] != line[number - 1] + 1:
                yield row, first, number
                first = number


def alone(model: Any, windows: Tensor, places: Tensor) -> tuple[Tensor, float]:
    """Last hidden states of every document by itself, and the mean loss of their next tokens, by the stock forward."""
    hidden = torch.zeros(*windows.shape, int(model.config.hidden_size))
    total, count = 0.0, 0
    for row, first, last in pieces(places):
        ids = windows[row : row + 1, first:last]
        hidden[row, first:last] = model.get_decoder()(ids, use_cache=False)[0][0]
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item() if last - first > 1 else 0.0
        count += last - first - 1
    return hidden, total / count


@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_documents_in_a_window_are_as_they_are_alone(name: str) -> None:
    """Every family: hidden states to 1e-4, and so the loss; without places, the documents do see each other."""
    windows = tokens(3, rows=2, length=12)
    student = Student(make(name), windows, torch.float32, PLACES)
    hidden, loss = alone(student.model, windows, PLACES)
    assert torch.allclose(student.hidden([0, 1]), hidden, atol=1e-4)
    assert float(next_token(student)([0, 1])) == pytest.approx(loss, rel=1e-5)
    seeing = Student(student.model, windows, torch.float32)
    assert not torch.allclose(seeing.hidden([0, 1]), hidden, atol=1e-2)


def test_a_teacher_keeps_them_apart_too() -> None:
    """A model distilled into itself has nothing to learn, however its documents are laid; with other places it has."""
    windows = tokens(3, rows=2, length=12)
    student = Student(make("llama-gqa"), windows, torch.float32, PLACES)
    same = distilled(student, resident_teacher(student, 1.0), 1.0, 0.0)
    assert float(same([0, 1])) == pytest.approx(0.0, abs=1e-6)
    other = distilled(student, resident_teacher(Student(student.model, windows, torch.float32), 1.0), 1.0, 0.0)
    assert float(other([0, 1])) > 1e-4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    shutil.copytree(FIXTURE, folder / "large")
    large, small = str(folder / "large"), str(folder / "small")
    prune(PruneOptions(model=large, out=small, method="random", keep_first=1, keep_last=1))
    rows = [{"text": f"And the LORD said unto Moses, {n} rivers. " * (1 + n % 3)} for n in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(work: Path, out: Path, **changes: Any) -> AlignOptions:
    plain = {"model": str(work / "small"), "out": str(out), "data": (str(work / "text.jsonl"),), "length": 32}
    running = {
        "method": "distill",
        "dtype": "fp32",
        "batch": 2,
        "steps": 8,
        "held_out": 6,
        "packing": True,
        "log_every": 1,
    }
    return AlignOptions(**{**plain, **running, **changes})


@pytest.mark.parametrize("method", ["lm", "distill"])
def test_losses_are_those_of_documents_alone(work: Path, tmp_path: Path, method: str) -> None:
    result = align(options(work, tmp_path / "out", method=method))
    assert result.before is not None
    assert result.after is not None
    found: Mixture = mix((str(work / "text.jsonl"),), load_tokenizer(work / "small"), (16, 6), (32, True), 0)
    assert found.held_places is not None
    for folder, loss in ((work / "small", result.before), (tmp_path / "out", result.after)):
        with torch.no_grad():
            expected = alone(load_model(folder, dtype="fp32"), found.held_out, found.held_places)[1]
        assert loss == pytest.approx(expected, rel=1e-5)
    assert method == "distill" or result.after < result.before


def test_a_window_holds_its_documents_one_after_the_other(work: Path) -> None:
    """Places begin anew exactly where a text does; the tokens are those of windows that are not kept apart."""
    sources, tokenizer = (str(work / "text.jsonl"),), load_tokenizer(work / "small")
    apart, together = (mix(sources, tokenizer, (16, 4), (32, kept), 0) for kept in (True, False))
    assert torch.equal(apart.windows, together.windows)
    assert together.places is None
    assert apart.places is not None
    begun = [tokenizer.decode(ids[place == 0][:1]) for ids, place in zip(apart.windows, apart.places, strict=True)]
    assert all("And".startswith(text.strip()) or text.strip() in ("And", "") for text in begun)


@pytest.mark.parametrize(
    "changes", [{"method": "refit"}, {"method": "block"}, {"method": "distill", "teacher_cache": "cache"}]
)
def test_what_sees_windows_under_one_mask_refuses(work: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="--packing is for lm and for distill with the large model in memory"):
        options(work, tmp_path / "out", **changes)
