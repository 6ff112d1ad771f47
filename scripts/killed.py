"""Kill a training in every way and see what is lost: `scripts/killed.py SMALL DATA [--output docs/killed.json]`.

Each case is a `loram train` of its own, killed while it runs, and the same command line again. What was lost is the
last step before the end less the step that the second one went on from; at the end its adapter is compared with that of
a training that nobody disturbed. The table in docs/train.md is written from the figures by scripts/render_docs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, EVERY, MOMENT = 10, 4, 6
OPTIONS = ("--steps", str(STEPS), "--save-every", str(EVERY), "--batch", "1", "--max-length", "96", "--log-every", "1")
CHECKPOINTS = Path("checkpoints")
PATIENCE = 600
"""Seconds that a case may take."""


@dataclass(frozen=True)
class Training:
    """A command line, the folder it writes, and what is put before it (a place with a small disk)."""

    small: Path
    data: Path
    out: Path

    @property
    def partial(self) -> Path:
        """Where it works."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def words(self) -> list[str]:
        """What is typed."""
        command = [sys.executable, "-m", "loram", "train", str(self.small), "--data", str(self.data)]
        return [*command, "-o", str(self.out), *OPTIONS]

    def start(self) -> subprocess.Popen[str]:
        """Begin; what it says goes to a file."""
        with open(f"{self.out}.said", "w", encoding="utf-8") as said:
            return subprocess.Popen(self.words, stdout=said, stderr=said, text=True)

    def reached(self) -> int:
        """The last step that is written down."""
        file = self.partial / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        steps = [int(found[1]) for line in lines if (found := re.search(r'"step": (\d+)', line))]
        return max(steps, default=0)

    def saved(self) -> list[Path]:
        """Checkpoints, oldest first, whole or not."""
        found = (self.partial / CHECKPOINTS).glob("checkpoint-*")
        return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def until(child: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait for something to happen in a training; RuntimeError where it ends before."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            raise RuntimeError("the training ended before its moment had come")
        time.sleep(0.0005)


def signaled(*numbers: int) -> Callable[[Training], int]:
    """Send signals in the step after MOMENT, one right after the other."""

    def case(training: Training) -> int:
        child = training.start()
        until(child, lambda: training.reached() >= MOMENT)
        for number in numbers:
            child.send_signal(number)
            time.sleep(0.05)
        return child.wait(PATIENCE)

    return case


def killed_while_saving(training: Training) -> int:
    """SIGKILL between the first file of the second checkpoint and its checksums."""

    def saving() -> bool:
        found = training.saved()
        return len(found) == 2 and any(found[-1].iterdir()) and not (found[-1] / "checksums.json").exists()

    child = training.start()
    until(child, saving)
    child.kill()
    return child.wait(PATIENCE)


def damaged(training: Training) -> int:
    """SIGKILL after the second save, whose optimizer file then loses its second half."""
    child = training.start()
    until(child, lambda: training.reached() > 2 * EVERY)
    child.kill()
    code = child.wait(PATIENCE)
    file = training.saved()[-1] / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)
    return code


def full_disk(training: Training) -> int:
    """A disk of its own that has room for one checkpoint and a half; more room afterwards."""
    folder = training.out.parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100M", "tmpfs", str(folder)], check=True)
    child = training.start()
    until(child, lambda: bool(training.saved()) and (training.saved()[0] / "checksums.json").exists())
    size = sum(file.stat().st_size for file in training.partial.rglob("*") if file.is_file())
    subprocess.run(["mount", "-o", f"remount,size={int(size * 1.5)}", str(folder)], check=True)
    code = child.wait(PATIENCE)
    subprocess.run(["mount", "-o", "remount,size=400M", str(folder)], check=True)
    return code


CASES: dict[str, tuple[str, str, str, Callable[[Training], int]]] = {
    "sigterm": ("SIGTERM", "in a step", "nothing: the step is finished and saved", signaled(signal.SIGTERM)),
    "sigint": ("SIGINT (Ctrl-C)", "in a step", "nothing", signaled(signal.SIGINT)),
    "sigusr1": ("SIGUSR1", "in a step", "nothing", signaled(signal.SIGUSR1)),
    "twice": (
        "SIGTERM, and again at once",
        "in a step",
        "the steps since the last save",
        signaled(signal.SIGTERM, signal.SIGTERM),
    ),
    "sigkill": ("SIGKILL", "in a step", "the steps since the last save", signaled(signal.SIGKILL)),
    "saving": (
        "SIGKILL",
        "while a checkpoint is written",
        "the steps since the save before: one without checksums does not count",
        killed_while_saving,
    ),
    "damaged": (
        "SIGKILL, and half of `optimizer.pt` gone",
        "after the second save",
        "the steps since the save before; the damage is said",
        damaged,
    ),
    "full": ("disk full", "while a checkpoint is written", "the steps since the save before", full_disk),
}


def see(name: str, small: Path, data: Path, scratch: Path, undisturbed: Path) -> dict[str, Any]:
    """One case: how the first process ended, what the second went on from, and whether it came to the same."""
    what, when, rule, case = CASES[name]
    folder = scratch / name
    folder.mkdir()
    training = Training(small, data, folder / "out")
    code = case(training)
    reached = training.reached()
    said = Path(f"{training.out}.said").read_text(encoding="utf-8")
    again = training.start()
    if again.wait(PATIENCE):
        raise RuntimeError(Path(f"{training.out}.said").read_text(encoding="utf-8"))
    found = re.search(r"going on at step (\d+)", Path(f"{training.out}.said").read_text(encoding="utf-8"))
    start = int(found[1]) if found else 0
    weights = "adapter_model.safetensors"
    return {
        "what": what,
        "when": when,
        "rule": rule,
        "code": code,
        "last line": placeless(said.strip().splitlines()[-1], small, data, scratch) if code > 0 else "",
        "reached": max(reached, start),
        "went on from": start,
        "lost": max(reached - start, 0),
        "same": (training.out / weights).read_bytes() == (undisturbed / weights).read_bytes(),
    }


def placeless(text: str, *places: Path) -> str:
    """A line without paths of this machine."""
    for place in places:
        text = text.replace(str(place), place.name)
    return text


def measure(small: Path, data: Path, scratch: Path, names: list[str]) -> list[dict[str, Any]]:
    """All cases, beside a training that nobody disturbed."""
    undisturbed = Training(small, data, scratch / "undisturbed")
    if undisturbed.start().wait(PATIENCE):
        raise RuntimeError(Path(f"{undisturbed.out}.said").read_text(encoding="utf-8"))
    rows = []
    for name in names:
        rows.append(see(name, small, data, scratch, undisturbed.out))
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("small", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append", help="may be repeated")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if os.environ.get("LORAM_KILLED") is None and (options.only is None or "full" in options.only):
        # A name space of its own, in which anybody may mount a disk that is small.
        os.environ["LORAM_KILLED"] = "1"
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(prefix="loram-killed-", ignore_cleanup_errors=True) as scratch:
        rows = measure(options.small.resolve(), options.data.resolve(), Path(scratch), options.only or list(CASES))
    body = {"model": options.small.name, "steps": STEPS, "every": EVERY, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
