"""Kill alignments at random moments: `scripts/killed_alignment.py SMALL DATA [--output docs/killed-alignment.json]`.

Each is a `loram align` of its own that gets SIGKILL at some time of a step (of a layer, of a part of the teacher cache)
that was drawn, and the same command line again. What was lost is what was done before and is not what the second one
went on from; at the end its weights are compared with those of an alignment that nobody disturbed, and so is the cache.
The table in docs/align.md is written from the figures by scripts/render_docs.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVERY, PATIENCE = 4, 1800
STEPS = ("--steps", "10", "--save-every", str(EVERY), "--batch", "2", "--length", "64")
LAYERS = ("--samples", "8", "--length", "64")
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "distill": ("step", 10, ("--method", "distill", *STEPS)),
    "distill, LoRA": ("step", 10, ("--method", "distill", "--scope", "lora", *STEPS)),
    "lm": ("step", 10, ("--method", "lm", *STEPS)),
    "refit": ("layer", 30, ("--method", "refit", *LAYERS)),
    "block": ("layer", 30, ("--method", "block", "--steps", "4", *LAYERS)),
    "teacher cache": ("part", 3, ("--method", "distill", "--steps", "6", "--batch", "100", "--length", "16")),
}
"""{what: (what is saved, how many of it there are, options)}; a part of the cache is 256 windows."""
WEIGHTS, LOGITS, SEAL = "model.safetensors", "logits.safetensors", "checksums.json"


@dataclass(frozen=True)
class Alignment:
    """A command line and where it writes."""

    case: str
    small: Path
    data: Path
    out: Path

    @property
    def cache(self) -> Path:
        """Where the large model's logits are put, if at all."""
        return self.out.with_name(self.out.name + "-cache")

    @property
    def words(self) -> list[str]:
        """What is typed."""
        command = [
            sys.executable,
            "-m",
            "loram",
            "align",
            str(self.small),
            "--data",
            str(self.data),
            "-o",
            str(self.out),
        ]
        cache = ["--teacher-cache", str(self.cache)] if CASES[self.case][0] == "part" else []
        return [*command, *CASES[self.case][2], *cache, "--held-out", "4", "--log-every", "1"]

    def start(self) -> subprocess.Popen[str]:
        """Begin; what it says goes to a file."""
        with open(f"{self.out}.said", "w", encoding="utf-8") as said:
            return subprocess.Popen(self.words, stdout=said, stderr=said, text=True)

    def said(self) -> str:
        """What it said."""
        return Path(f"{self.out}.said").read_text(encoding="utf-8")

    def seals(self) -> dict[str, int]:
        """The parts of the cache that are whole: {name: the moment it was sealed, ns}."""
        return {file.parent.name: file.stat().st_mtime_ns for file in self.cache.glob(f"part-*/{SEAL}")}

    def done(self) -> int:
        """Steps or layers that are written down, or parts that are whole."""
        if CASES[self.case][0] == "part":
            return len(self.seals())
        file = self.out.with_name(self.out.name + ".partial") / "metrics.jsonl"
        return file.read_text(encoding="utf-8").count("\n") if file.is_file() else 0


def finish(alignment: Alignment) -> None:
    """The same command line, to its end."""
    child = alignment.start()
    if child.wait(PATIENCE):
        raise RuntimeError(alignment.said())


def timed(alignment: Alignment) -> float:
    """An alignment that nobody disturbs; the seconds of one of what it saves."""
    child, moments = alignment.start(), {0: 0.0}
    while child.poll() is None:
        moments.setdefault(alignment.done(), time.monotonic())
        time.sleep(0.005)
    if child.returncode:
        raise RuntimeError(alignment.said())
    last = max(moments)
    return (moments[last] - moments[1]) / (last - 1)


def killed(alignment: Alignment, after: int, delay: float) -> int:
    """SIGKILL `delay` seconds after so many are done; how many were done then."""
    child = alignment.start()
    deadline = time.monotonic() + PATIENCE
    while alignment.done() < after or (after == 0 and not started(alignment)):
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            raise RuntimeError(f"it ended before its moment had come: {alignment.said()}")
        time.sleep(0.005)
    time.sleep(delay)
    reached = alignment.done()
    child.kill()
    if child.wait(PATIENCE) != -9:
        raise RuntimeError("it was over before it could be killed")
    return reached


def started(alignment: Alignment) -> bool:
    """Whether it has made the folder it works in."""
    part = CASES[alignment.case][0] == "part"
    return (alignment.cache if part else alignment.out.with_name(alignment.out.name + ".partial")).is_dir()


def see(alignment: Alignment, undisturbed: Alignment, after: int, delay: float) -> dict[str, Any]:
    """Kill it, go on, and compare."""
    unit, count, _ = CASES[alignment.case]
    reached, sealed = killed(alignment, after, delay), alignment.seals()
    finish(alignment)
    found = re.search(r"going on at step (\d+)", alignment.said())
    start = int(found[1]) if found else 0
    if unit == "part":
        start = sum(alignment.seals()[name] == moment for name, moment in sealed.items())
    files = [(alignment.out / WEIGHTS, undisturbed.out / WEIGHTS)]
    files += [(alignment.cache / name / LOGITS, undisturbed.cache / name / LOGITS) for name in undisturbed.seals()]
    return {
        "what": alignment.case,
        "unit": unit,
        "count": count,
        "after": after,
        "delay": round(delay, 2),
        "reached": reached,
        "went on from": start,
        "lost": reached - start,
        "same": all(one.read_bytes() == other.read_bytes() for one, other in files),
    }


def measure(place: tuple[Path, Path, Path], name: str, times: int, record: Record) -> None:
    """One case, as often as it is not on record yet, at moments drawn with a seed."""
    small, data, scratch = place
    draw = random.Random(f"{record.seed} {name}")
    # Not after the last one: what is left then may be over before the signal comes.
    moments = [draw.random() * CASES[name][1] for _ in range(times)]
    if not moments[len(record.of(name)) :]:
        return
    undisturbed = Alignment(name, small, data, scratch / "undisturbed")
    seconds = timed(undisturbed)
    for moment in moments[len(record.of(name)) :]:
        alignment = Alignment(name, small, data, scratch / "out")
        record.add(see(alignment, undisturbed, int(moment), moment % 1 * seconds))
        for folder in (alignment.out, alignment.cache):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (undisturbed.out, undisturbed.cache):
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Record:
    """The rows that were seen, kept as they come: what was stopped goes on."""

    file: Path | None
    model: str
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.is_file():
            self.rows = json.loads(self.file.read_text(encoding="utf-8"))["rows"]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The rows of a case."""
        return [row for row in self.rows if row["what"] == name]

    def add(self, row: dict[str, Any]) -> None:
        """One more."""
        self.rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")
        if self.file is not None:
            body = {"model": self.model, "every": EVERY, "seed": self.seed, "rows": self.rows}
            self.file.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("small", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append", help="may be repeated")
    parser.add_argument("--times", type=int, default=3, help="how often each is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    record = Record(chosen.output, chosen.small.name, chosen.seed)
    for name in chosen.only or CASES:
        with tempfile.TemporaryDirectory(prefix="loram-killed-", ignore_cleanup_errors=True) as scratch:
            measure((chosen.small.resolve(), chosen.data.resolve(), Path(scratch)), name, chosen.times, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
