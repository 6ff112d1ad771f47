"""Stopped and continued is the same as never stopped: to the last digit, whatever the moment and the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from loram import artifact
from loram.errors import Interrupted, OptionError, OutputError, ResourceError
from loram.options import PruneOptions, RunOptions, TrainOptions
from loram.progress import Progress
from loram.stages.prune import prune
from loram.stages.run import run
from loram.stages.train import TrainResult, train
from loram.training import checkpoints

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
STEPS = 9


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large model, a small one, data of 14 rows (so that an epoch ends in an odd place), and an undisturbed run."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(FIXTURE, folder / "large")
    prune(
        PruneOptions(model=str(folder / "large"), out=str(folder / "small"), method="random", keep_first=1, keep_last=1)
    )
    rows = [
        {"prompt": f"And the LORD said {number} ", "completion": "unto Moses " * (1 + number % 3)}
        for number in range(14)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(options(folder, folder / "undisturbed"))
    return folder


def options(work: Path, out: Path, **changes: Any) -> TrainOptions:
    plain = {"model": str(work / "small"), "data": (str(work / "data.jsonl"),), "out": str(out), "steps": STEPS}
    running = {"dtype": "fp32", "batch": 2, "accumulate": 2, "lr": 2e-3, "dropout": 0.2, "log_every": 1}
    return TrainOptions(**{**plain, **running, **changes})


class Disturbance(Progress):
    """Sends signals to this very process after some steps of training."""

    def __init__(self, *moments: tuple[int, int]) -> None:
        self.moments = dict(moments)
        self.step = 0
        self.label = ""

    def begin(self, label: str, total: int) -> None:
        self.label = label

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.step += amount if self.label == "train" else 0
        if self.step in self.moments:
            os.kill(os.getpid(), self.moments.pop(self.step))


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def assert_undisturbed(work: Path, out: Path) -> None:
    assert lines(out) == lines(work / "undisturbed")
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (work / "undisturbed" / name).read_bytes()
    assert not (out / "checkpoints").exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name + ".")] == []


def stop_at(work: Path, out: Path, step: int, number: int = signal.SIGTERM, **changes: Any) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        train(options(work, out, **changes), Disturbance((step, number)))
    return caught.value


@pytest.mark.parametrize(("step", "number"), [(1, "SIGTERM"), (4, "SIGINT"), (6, "SIGUSR1")])
def test_a_signal_saves_and_the_continuation_is_exact(work: Path, tmp_path: Path, step: int, number: str) -> None:
    """14 rows in steps of 4 are 4 steps an epoch: the signals come within, at and after its end."""
    before = signal.getsignal(signal.SIGTERM)
    error = stop_at(work, tmp_path / "out", step, getattr(signal, number))
    assert error.exit_code == 75
    assert str(error).startswith(f"stopped by {number} at step ")
    assert f"go on with `loram train {work / 'small'} -o {tmp_path / 'out'} " in str(error)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "out").exists()
    result = train(options(work, tmp_path / "out"))
    assert_undisturbed(work, tmp_path / "out")
    assert result.run is not None
    assert result.run.steps == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_fa": True},
        {"lora_plus_ratio": 4.0, "neftune": 5.0, "rank_pattern": ("q_proj=3",)},
        {"dtype": "bf16", "targets": ("all-linear", "embed_tokens"), "checkpointing": True},
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_exact_with_other_options_too(work: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(options(work, tmp_path / "whole", **changes))
    stop_at(work, tmp_path / "out", 5, **changes)
    train(options(work, tmp_path / "out", **changes))
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_twice_stopped(work: Path, tmp_path: Path) -> None:
    stop_at(work, tmp_path / "out", 2)
    stop_at(work, tmp_path / "out", 7)
    train(options(work, tmp_path / "out"))
    assert_undisturbed(work, tmp_path / "out")


def test_a_damaged_checkpoint_falls_back(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    stop_at(work, out, 6, save_every=2)
    place = tmp_path / "out.partial" / "checkpoints"
    newest = max(place.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        train(options(work, out, save_every=2))
    assert f"{newest.name} is damaged (optimizer.pt has changed)" in caplog.text
    assert_undisturbed(work, out)


def test_all_checkpoints_damaged_starts_anew(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop_at(work, tmp_path / "out", 3)
    for file in tmp_path.glob("out.partial/checkpoints/*/optimizer.pt"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        train(options(work, tmp_path / "out"))
    assert "no whole checkpoint" in caplog.text
    assert_undisturbed(work, tmp_path / "out")


def test_a_signal_after_the_last_step_takes_no_further_step(work: Path, tmp_path: Path) -> None:
    stop_at(work, tmp_path / "out", STEPS)
    heard = Disturbance()
    train(options(work, tmp_path / "out"), heard)
    assert heard.step == 0
    assert_undisturbed(work, tmp_path / "out")


def test_a_finished_run_says_so(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = work / "undisturbed"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with caplog.at_level(logging.INFO):
        result = train(options(work, out))
    assert f"is finished already, at step {STEPS}" in caplog.text
    assert isinstance(result, TrainResult)
    assert result.run is not None
    assert result.run.loss_last == lines(out)[-1]["loss"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with pytest.raises(OutputError, match="exists and is not empty"):
        train(options(work, out, lr=1e-3))


def test_other_options_or_data_are_refused_and_nothing_is_lost(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(work, out, 3)
    with pytest.raises(OptionError, match=r"--lr was 0\.002 and is 0\.01 now; .*--resume never"):
        train(options(work, out, lr=0.01))
    (tmp_path / "other.jsonl").write_text((work / "data.jsonl").read_text().replace("Moses", "Aaron"))
    with pytest.raises(OptionError, match="the training data is not the same"):
        train(options(work, out, data=(str(tmp_path / "other.jsonl"),)))
    train(options(work, out))
    assert_undisturbed(work, out)


def test_never_starts_anew(work: Path, tmp_path: Path) -> None:
    stop_at(work, tmp_path / "out", 3)
    train(options(work, tmp_path / "out", lr=0.01, resume="never"))
    assert lines(tmp_path / "out")[0]["step"] == 1
    assert [line["lr"] for line in lines(tmp_path / "out")] != [line["lr"] for line in lines(work / "undisturbed")]


def test_force_continues_too_and_replaces_the_old_output_last(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(work / "small", out)
    stop_at(work, out, 3, force=True)
    assert (out / "loram.json").is_file()
    train(options(work, out, force=True))
    assert_undisturbed(work, out)


def test_killed_while_the_output_is_put_in_place(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(partial: Path, target: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "publish", killed)
        with pytest.raises(SystemExit):
            train(options(work, tmp_path / "out"))
    heard = Disturbance()
    train(options(work, tmp_path / "out"), heard)
    assert heard.step == 0
    assert_undisturbed(work, tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "checksums.json"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3912832 vs 3912720"),
    ],
    ids=["kernel", "safetensors", "torch.save"],
)
def test_a_full_disk_costs_the_steps_since_the_last_save(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """As the kernel says it, and as the writers pass it on (seen on a disk that was full, scripts/killed.py)."""
    real = checkpoints.seal

    def full(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            raise error
        real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", full)
        with pytest.raises(ResourceError, match="the disk is full"):
            train(options(work, tmp_path / "out", save_every=2))
    with caplog.at_level(logging.INFO):
        train(options(work, tmp_path / "out", save_every=2))
    assert "checkpoint-4 is damaged (it was not written to its end)" in caplog.text
    assert "going on at step 2 " in caplog.text
    assert_undisturbed(work, tmp_path / "out")


def start(work: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, with long rows of work."""
    words = ["train", str(work / "small"), "--data", str(work / "data.jsonl"), "-o", str(out), "--steps", "400"]
    fixed = [
        "--dtype",
        "fp32",
        "--batch",
        "2",
        "--accumulate",
        "2",
        "--lr",
        "2e-3",
        "--dropout",
        "0.2",
        "--log-every",
        "1",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "loram_cli", *words, *fixed, *more],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_step(out: Path, step: int) -> None:
    file = out.with_name(out.name + ".partial") / "metrics.jsonl"
    for _ in range(1200):
        if file.is_file() and len(file.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError("training did not get there in a minute")


def test_sigkill_loses_at_most_the_steps_since_the_last_save(work: Path, tmp_path: Path) -> None:
    process = start(work, tmp_path / "out", "--save-every", "5")
    wait_for_step(tmp_path / "out", 13)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = len((tmp_path / "out.partial" / "metrics.jsonl").read_text().splitlines())
    process = start(work, tmp_path / "out", "--save-every", "5")
    wait_for_step(tmp_path / "out", reached + 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    resumed = int(err.partition("going on at step ")[2].split()[0])
    assert resumed >= reached - 5
    steps = [line["step"] for line in lines(tmp_path / "out.partial")]
    assert steps == list(range(1, len(steps) + 1))
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert "go on with `loram train" in last


def test_a_second_signal_quits_at_once(work: Path, tmp_path: Path) -> None:
    process = start(work, tmp_path / "out", "--batch", "14", "--accumulate", "40")
    wait_for_step(tmp_path / "out", 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - began < 2


def test_run_stops_there_and_goes_on_there(work: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune: {method: random, keep_first: 1, keep_last: 1, samples: 4, length: 8, refit: false}\n"
        f"train: {{dtype: fp32, batch: 2, accumulate: 2, lr: 2e-3, dropout: 0.2, steps: {STEPS}, log_every: 1}}\n"
        "recover: {}\n"
    )
    where = {"recipe": str(recipe), "model": str(work / "large"), "data": (str(work / "data.jsonl"),)}
    chosen = RunOptions(**where, out=str(tmp_path / "run"), force=True)
    with pytest.raises(
        Interrupted, match=r"train stopped by SIGTERM at step \d, which is saved; go on with `loram run "
    ) as caught:
        run(chosen, Disturbance((4, signal.SIGTERM)))
    assert "--force" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "loram.log",
        "prune",
        "run.json",
        "train.partial",
    ]
    run(RunOptions(**where, out=str(tmp_path / "run")))
    found = lines(tmp_path / "run" / "train")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert (tmp_path / "run" / "adapter" / "loram.json").is_file()
    run(RunOptions(**where, out=str(tmp_path / "again")))
    assert found == lines(tmp_path / "again" / "train")


def test_a_packed_run_goes_on_too(work: Path, tmp_path: Path) -> None:
    packing = {"packing": True, "max_length": 40}
    train(options(work, tmp_path / "undisturbed", **packing))
    stop_at(work, tmp_path / "out", 4, **packing)
    train(options(work, tmp_path / "out", **packing))
    assert_undisturbed(tmp_path, tmp_path / "out")
