"""The teacher's logits in a folder: what they teach, whose they are, and going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from loram.checkpoint import Checkpoint, read_tensors
from loram.errors import Interrupted, OptionError
from loram.modeling import load_small
from loram.options import AlignOptions, PruneOptions
from loram.progress import Progress
from loram.stages.align import align
from loram.stages.prune import prune
from loram.training import teacher

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
VOCABULARY, LAYERS, WINDOWS = 1024, 4, 10


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copytree(FIXTURE, folder / "large")
    prune(
        PruneOptions(model=str(folder / "large"), out=str(folder / "small"), method="random", keep_first=1, keep_last=1)
    )
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten windows in three parts, the last of them short."""
    monkeypatch.setattr(teacher, "PART", 4)


def options(work: Path, out: Path, cache: Path | None, **changes: Any) -> AlignOptions:
    plain = {"model": str(work / "small"), "out": str(out), "data": ("builtin",), "length": 24, "batch": 2, "steps": 5}
    more = {
        "method": "distill",
        "dtype": "fp32",
        "held_out": 2,
        "log_every": 1,
        "teacher_cache": None if cache is None else str(cache),
    }
    return AlignOptions(**{**plain, **more, **changes})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_logits_teach_what_the_teacher_does(work: Path, tmp_path: Path) -> None:
    how = {"temperature": 2.0, "hidden_weight": 0.5}
    align(options(work, tmp_path / "resident", None, **how))
    align(options(work, tmp_path / "cached", tmp_path / "cache", top_k=VOCABULARY, **how))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "resident"), rel=1e-3)
    with Checkpoint(tmp_path / "resident") as one, Checkpoint(tmp_path / "cached") as two:
        for name in one.entries:
            # bf16 weights: equal, but for a rounding here and there.
            torch.testing.assert_close(one.read(name).float(), two.read(name).float(), rtol=0.01, atol=1e-3)


def test_what_is_in_the_cache(work: Path, tmp_path: Path) -> None:
    """Against whole logits of the stock model."""
    align(options(work, tmp_path / "out", tmp_path / "cache", top_k=7))
    parts = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert parts == ["part-00000", "part-00001", "part-00002"]
    model = load_small(work / "large", dtype="fp32").eval()
    first = read_tensors(tmp_path / "cache" / "part-00000" / "logits.safetensors")
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "tokens": (4, 24, 7),
        "logs": (4, 24, 7),
        "rest": (4, 24),
    }
    assert read_tensors(tmp_path / "cache" / "part-00002" / "logits.safetensors")["rest"].shape == (2, 24)
    torch.testing.assert_close(first["logs"].exp().sum(2) + first["rest"].exp(), torch.ones(4, 24))
    windows = windows_of(work, tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=windows[:4]).logits.log_softmax(dim=2)
    best = wanted.topk(7, dim=2)
    torch.testing.assert_close(first["logs"], best.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wanted.gather(2, first["tokens"].long()), first["logs"], rtol=1e-4, atol=1e-4)


def windows_of(work: Path, tmp_path: Path) -> torch.Tensor:
    from loram.stages.align import text_of

    return text_of(options(work, tmp_path / "x", None), work / "small").windows


class Stop(Progress):
    """A signal after so many layers of writing the cache."""

    def __init__(self, layers: int) -> None:
        self.left, self.label, self.total = layers, "", 0

    def begin(self, label: str, total: int) -> None:
        self.label = label
        self.total = total if label == "teacher" else self.total

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.left -= amount if self.label == "teacher" else 0
        if self.left == 0:
            self.left = -1
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_writer_goes_on_with_the_next_part(work: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM before the first step .*; go on with `loram align"):
        align(options(work, out, cache), Stop(LAYERS + 2))
    assert (cache / "part-00000" / "checksums.json").is_file()
    assert not (cache / "part-00001").exists()
    written = (cache / "part-00000" / "logits.safetensors").stat().st_mtime_ns
    heard = Stop(-1)
    align(options(work, out, cache), heard)
    assert heard.total == 2 * LAYERS
    assert (cache / "part-00000" / "logits.safetensors").stat().st_mtime_ns == written
    align(options(work, tmp_path / "whole", tmp_path / "other"))
    for part in sorted(cache.glob("part-*")):
        assert (part / "logits.safetensors").read_bytes() == (
            tmp_path / "other" / part.name / "logits.safetensors"
        ).read_bytes()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_cache_is_used_again_and_a_damaged_part_is_not(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    align(options(work, tmp_path / "first", tmp_path / "cache"))
    file = tmp_path / "cache" / "part-00001" / "logits.safetensors"
    good = file.read_bytes()
    heard = Stop(-1)
    align(options(work, tmp_path / "second", tmp_path / "cache"), heard)
    assert heard.total == 0
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with caplog.at_level("WARNING"):
        align(options(work, tmp_path / "third", tmp_path / "cache"), heard)
    assert "part-00001 is damaged (logits.safetensors has changed) and is written again" in caplog.text
    assert heard.total == LAYERS
    assert file.read_bytes() == good
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == losses(tmp_path / "third")


def test_another_teacher_or_other_windows_are_refused(work: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    align(options(work, tmp_path / "first", cache))
    for changes, what in (
        ({"seed": 3}, "windows"),
        ({"temperature": 2.0}, "temperature"),
        ({"hidden_weight": 1.0}, "hidden"),
        ({"top_k": 5}, "top_k"),
    ):
        with pytest.raises(OptionError, match=f"holds logits that differ in {what}; give what it was written with"):
            align(options(work, tmp_path / "second", cache, **changes))
        assert not (tmp_path / "second").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OptionError, match="holds other things than logits"):
        align(options(work, tmp_path / "second", tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
