"""Two processes under accelerate's launcher train as one does, and one of them writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
STEPS = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(FIXTURE, folder / "model")
    rows = [{"prompt": f"And the LORD said {n} ", "completion": "unto Moses " * (1 + n % 4)} for n in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(work: Path, out: Path, processes: int, *more: str) -> subprocess.Popen[str]:
    words = ["train", str(work / "model"), "--data", str(work / "data.jsonl"), "-o", str(out), "--dropout", "0"]
    fixed = ["--batch", str(4 // processes), "--dtype", "fp32", "--lr", "2e-3", "--json", *more]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        port,
    ]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    started = ["-m", *launcher, *plain, "loram"] if processes > 1 else ["-m", "loram"]
    return subprocess.Popen(
        [sys.executable, *started, *words, *fixed],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_as_good_as_one_and_one_writes(work: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        process = train(work, tmp_path / str(count), count, "--steps", str(STEPS))
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert json.loads(out)["steps"] == STEPS  # one object: only one process speaks
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "12")
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(work: Path, tmp_path: Path) -> None:
    process = train(work, tmp_path / "out", 2, "--steps", "300")
    file = tmp_path / "out.partial" / "metrics.jsonl"
    for _ in range(1200):
        if file.is_file() and len(file.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "go on with" in err
    steps = len(file.read_text().splitlines())
    assert (tmp_path / "out.partial" / "checkpoints" / f"checkpoint-{steps}" / "checksums.json").is_file()
    process = train(work, tmp_path / "out", 2, "--steps", "300")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert f"going on at step {steps}" in err
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 301))
