"""Run one child process and say what it took: CPU seconds, wall seconds, peak memory.

CPU seconds come from `wait4`. Peak memory is what the child itself read from VmHWM when it ended (child.py), else
`ru_maxrss`, which is only right because this process is small.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = "LORAM_BENCHMARK_REPORT"
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "CUDA_VISIBLE_DEVICES": "",  # these figures are of one CPU thread, also on a machine with a GPU
}


@dataclass(frozen=True)
class Sample:
    """One run of one contender; `figures` is what the child reported besides."""

    cpu: float
    wall: float
    peak: int
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Rounded to what was measured."""
        body: dict[str, Any] = {"cpu": round(self.cpu, 3), "wall": round(self.wall, 3), "peak": self.peak}
        return body | ({"figures": self.figures} if self.figures else {})


Command = Sequence[str]


def job(*arguments: object) -> list[str]:
    """The command line of a job in child.py."""
    return [sys.executable, "-m", "benchmarks.child", *map(str, arguments)]


def run(command: Command, folder: Path) -> Sample:
    """Run a command to its end; RuntimeError with the end of its output where it fails."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = {**os.environ, **ONE_THREAD, **QUIET, "PYTHONPATH": str(ROOT), REPORT: str(report)}
    os.sync()  # what the run before has written must not be written back during this one
    with (folder / "output.txt").open("wb+") as output:
        streams = [(os.POSIX_SPAWN_DUP2, output.fileno(), number) for number in (1, 2)]
        began = time.perf_counter()
        child = os.posix_spawnp(command[0], list(command), environment, file_actions=streams)
        _, status, usage = os.wait4(child, 0)
        wall = time.perf_counter() - began
        if status:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}:\n{said}")
    figures = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Sample(usage.ru_utime + usage.ru_stime, wall, int(figures.pop("peak", largest)), figures)


def interleaved(
    contenders: Mapping[str, Command], rounds: int, folder: Path, outputs: Mapping[str, Path]
) -> dict[str, list[Sample]]:
    """Every contender once a round, forwards and backwards in turn; what it wrote before is removed first."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
            if name in outputs:
                shutil.rmtree(outputs[name], ignore_errors=True)
            samples[name].append(run(contenders[name], folder))
            say(f"  {name}: {samples[name][-1].cpu:.2f} s CPU, {samples[name][-1].wall:.2f} s")
    return samples


def say(text: str) -> None:
    """A line for whoever is waiting."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def ratio(ours: list[Sample], theirs: list[Sample], what: str) -> float:
    """Median over the rounds of ours ÷ theirs, for `cpu` or `wall`."""
    return float(median(getattr(a, what) / getattr(b, what) for a, b in zip(ours, theirs, strict=True)))


def after_start(ours: list[Sample], theirs: list[Sample], floor: list[Sample]) -> float:
    """Median ratio of wall times, with the time to start an interpreter with torch taken off ours."""
    start = median(item.wall for item in floor)
    return float(median((a.wall - start) / b.wall for a, b in zip(ours, theirs, strict=True)))


def beyond(ours: list[Sample], floor: list[Sample]) -> int:
    """Median peak above that of a process that only imports torch and safetensors."""
    return int(median(item.peak for item in ours) - median(item.peak for item in floor))
