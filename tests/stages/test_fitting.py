"""train says what it will take, warns, and ends with advice where memory really runs out."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loram.artifact import read_manifest
from loram.data.encoding import EncodedRow
from loram.errors import OutOfMemory, is_out_of_memory
from loram.options import PruneOptions, TrainOptions
from loram.stages import fitting
from loram.stages.fitting import advised, memory_plan, predicted, training_of, warn
from loram.stages.prune import prune
from loram.stages.train import train
from loram.train_options import may_be_streamed

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitting")
    shutil.copytree(FIXTURE, folder / "large")
    cut: dict[str, Any] = {"method": "random", "ratio": "0.5", "keep_first": 1, "keep_last": 1}
    prune(PruneOptions(model=str(folder / "large"), out=str(folder / "small"), **cut))
    rows = [{"text": "And the LORD said unto Moses, " * 60} for _ in range(512)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(work: Path, **changes: Any) -> TrainOptions:
    plain: dict[str, Any] = {"model": str(work / "small"), "data": (str(work / "rows.jsonl"),), "out": "out"}
    return TrainOptions(**{**plain, "dtype": "fp32", "max_length": 64, "steps": 1, **changes})


def row(length: int, carry: int) -> EncodedRow:
    return EncodedRow(input_ids=[5] * length, loss_mask=[False] * (length - carry) + [True] * carry)


def test_the_workload_is_that_of_the_longest_rows(work: Path) -> None:
    rows = [row(10, 3), row(40, 2), row(20, 9), row(30, 1)]
    found = training_of(options(work, batch=2, lora_fa=True, layers=("1-2",)), work / "small", None, rows).work
    assert (found.batch, found.length, found.supervised, found.masked) == (2, 40, 12, True)
    assert (found.frozen_a, found.layers, found.dropout) == (True, (1, 2), 0.05)
    one = training_of(options(work, batch=1), work / "small", None, rows).work
    assert (one.length, one.masked) == (40, False)
    few = training_of(options(work, batch=64), work / "small", None, [row(10, 3)] * 2).work
    assert (few.batch, few.masked) == (2, False)
    packs = training_of(options(work, batch=2, packing=True), work / "small", None, rows).work
    assert (packs.length, packs.masked) == (64, True)


def test_the_model_is_the_one_in_the_folder(work: Path) -> None:
    small = training_of(options(work), work / "small", read_manifest(work / "small"), [row(10, 3)])
    large = training_of(options(work), work / "large", None, [row(10, 3)])
    assert small.model.widths is not None
    assert large.model.widths is None
    assert (small.model.stored, small.model.quantize) == ("bf16", "none")
    assert memory_plan(small).parts["weights"] < memory_plan(large).parts["weights"]
    assert large.deeper is None
    assert small.deeper is not None
    assert "--ratio 0.75" in small.deeper[1]
    assert memory_plan(fitting.Training(small.deeper[0], small.work, small.hardware)).total < small.peak


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({}, True), ({"compile": True}, False), ({"targets": ("q_proj", "lm_head")}, False), ({"dtype": "fp16"}, False)],
)
def test_one_layer_in_memory_is_advised_where_it_is_not_refused(changes: dict[str, Any], allowed: bool) -> None:
    assert may_be_streamed(TrainOptions(model="m", data=("d",), out="o", **changes)) == allowed


def test_train_says_both_figures(work: Path, tmp_path: Path) -> None:
    dry = train(options(work, out=str(tmp_path / "a"), batch=4, dry_run=True))
    assert "peak memory would be" in str(dry)
    result = train(options(work, out=str(tmp_path / "a"), batch=4))
    body = result.to_json()
    assert body["predicted_bytes"] == dry.to_json()["predicted_bytes"] == sum(body["predicted_parts"].values())
    assert body["peak_bytes"] > 0
    assert " predicted)" in str(result)


def test_a_training_that_will_not_fit_is_warned_of(
    work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = training_of(options(work, batch=64), work / "small", None, [row(64, 63)] * 64)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(fitting, "limit_bytes", lambda training: training.peak)
        warn(training)
        assert caplog.text == ""
        monkeypatch.setattr(fitting, "limit_bytes", lambda training: training.peak - 1)
        warn(training)
    assert "is likely to run out of memory; cheapest first: --batch 32 --accumulate 2 saves" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_to_run_out_ends_in_advice(error: Exception, work: Path) -> None:
    training = training_of(options(work, batch=64), work / "small", None, [row(64, 63)] * 64)
    assert is_out_of_memory(error)
    told = pytest.raises(OutOfMemory, match=r"predicted .* could be had; cheapest first: --batch 32")
    with told as caught, advised(training):
        raise error
    assert caught.value.exit_code == 3


def test_other_errors_pass(work: Path) -> None:
    training = training_of(options(work), work / "small", None, [row(10, 3)])
    with pytest.raises(RuntimeError, match=r"^shapes$"), advised(training):
        raise RuntimeError("shapes")
    assert predicted(training) == training.peak or torch.cuda.is_available()


LIMITED = """
import re, resource, sys
import loram.stages.train
from importlib.metadata import entry_points
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
limit = used + 500 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
(script,) = entry_points(group="console_scripts", name="loram")
sys.exit(script.load()(sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is the Linux kernel's")
def test_memory_that_really_runs_out_ends_with_three_changes(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    command = ["train", str(work / "small"), "--data", str(work / "rows.jsonl"), "-o", str(out), "--dtype", "fp32"]
    command += ["--batch", "512", "--max-length", "256", "--steps", "1"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    warning, error = (next(line for line in done.stderr.splitlines() if word in line) for word in ("likely", "error: "))
    assert "is likely to run out of memory" in warning
    assert "out of memory at step 1: predicted " in error
    advice = error.partition("cheapest first: ")[2].split("; ")
    assert [change.split()[0] for change in advice] == ["--batch", "--checkpointing", "--streamed"]
    assert all("GiB (" in change or "MiB (" in change for change in advice)
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not out.with_name("adapter.partial").exists()
