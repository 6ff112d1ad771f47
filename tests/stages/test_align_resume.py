"""An alignment that was stopped and went on is the one that was never stopped, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loram.errors import Interrupted, OptionError
from loram.option_fields import command_line
from loram.options import AlignOptions, PruneOptions
from loram.progress import Progress
from loram.stages.align import align
from loram.stages.prune import prune

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
METHODS: dict[str, dict[str, Any]] = {
    "lm": {"method": "lm", "accumulate": 2},
    "distill": {"method": "distill", "scope": "lora", "rank": 4},
    "refit": {"method": "refit", "refit_all": True},
    "block": {"method": "block", "steps": 3, "accumulate": 2},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large model, a small one, and text."""
    folder = tmp_path_factory.mktemp("align-resume")
    shutil.copytree(FIXTURE, folder / "large")
    prune(
        PruneOptions(model=str(folder / "large"), out=str(folder / "small"), method="random", keep_first=1, keep_last=1)
    )
    return folder


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Any:
    """The folder that a method writes when nobody stops it; made once."""

    def made(name: str) -> Path:
        out = work / name
        if not out.exists():
            align(options(work, out, name))
        return out

    return made


def options(work: Path, out: Path, name: str, **changes: Any) -> AlignOptions:
    plain = {"model": str(work / "small"), "out": str(out), "data": ("builtin",), "length": 32, "samples": 6}
    running = {"dtype": "fp32", "batch": 2, "steps": 7, "held_out": 2, "log_every": 1, "save_every": 3}
    return AlignOptions(**{**plain, **running, **METHODS[name], **changes})


class Stop(Progress):
    """Sends this process a signal after so many steps of aligning."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.label = ""
        self.steps = 0

    def begin(self, label: str, total: int) -> None:
        self.label = label

    def advance(self, amount: int = 1, **figures: float) -> None:
        if self.label != "align":
            return
        self.steps += amount
        self.left -= amount
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def assert_same(out: Path, other: Path) -> None:
    assert lines(out) == lines(other)
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    bodies = [json.loads((folder / "loram.json").read_text()) for folder in (out, other)]
    assert bodies[0]["training"] == bodies[1]["training"]
    assert not (out / "checkpoints").exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name + ".")] == []


LAYERS = 4  # of the fixture: refit and block are saved by the layer


@pytest.mark.parametrize(
    ("name", "step"),
    [("lm", 1), ("lm", 5), ("lm", 7), ("distill", 4), ("refit", 1), ("refit", 3), ("block", 2), ("block", LAYERS)],
)
def test_a_signal_saves_and_the_continuation_is_exact(
    work: Path, undisturbed: Any, tmp_path: Path, name: str, step: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=rf"stopped by SIGTERM at .*{step}, which is saved") as caught:
        align(options(work, out, name), Stop(step))
    assert caught.value.exit_code == 75
    assert f"go on with `loram align {work / 'small'} -o {out} " in str(caught.value)
    assert not out.exists()
    heard = Stop(-1)
    align(options(work, out, name), heard)
    # What was done before the stop is shown at once, and is not done again.
    assert_same(out, undisturbed(name))


def test_another_run_is_refused_and_never_starts_anew(work: Path, undisturbed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        align(options(work, out, "lm"), Stop(2))
    with pytest.raises(OptionError, match=r"--lr was None and is 0\.01 now; .*--resume never"):
        align(options(work, out, "lm", lr=0.01))
    align(options(work, out, "lm", lr=0.01, resume="never"))
    assert lines(out)[0] != lines(undisturbed("lm"))[0]


def test_a_finished_one_says_so(work: Path, undisturbed: Any, caplog: pytest.LogCaptureFixture) -> None:
    out = undisturbed("lm")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with caplog.at_level("INFO"):
        result = align(options(work, out, "lm"))
    assert "is finished already" in caplog.text
    assert result.to_json()["loss"] == json.loads((out / "loram.json").read_text())["training"]["loss"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.slow
def test_killed_at_any_moment(work: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of 80 steps, twice; then to the end, as a run that nobody killed."""
    chosen = options(work, tmp_path / "out", "lm", steps=80, save_every=10, accumulate=1)
    command = [sys.executable, "-m", "loram_cli", *command_line("align", chosen).split()[1:]]
    for reached in (15, 40):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(tmp_path / "out.partial" / "metrics.jsonl", reached, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.partition("going on at step ")[2].split()[0]) >= 30
    align(options(work, tmp_path / "whole", "lm", steps=80, save_every=0, accumulate=1, log_every=100))
    assert_same(tmp_path / "out", tmp_path / "whole")


def wait_for(file: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if file.is_file() and len(file.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the alignment did not get there in a minute")
