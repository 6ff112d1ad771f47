"""Align one small model in many ways: `scripts/record_alignments.py SMALL --large LARGE --data FILE --test FILE ...`.

Every way is a `loram align` of its own on the same text, and `loram eval` of what came of it on texts that no way saw.
Time and memory are the process's own, as the operating system counts them; the measuring is not in them. Figures are
kept as they come, and a record that was stopped goes on. The tables in docs/align.md are written from
docs/alignments.json by scripts/render_docs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "alignments.json"
LENGTH, BATCH = 128, 4
WAYS: dict[str, str] = {
    "refit": "--method refit --samples 64",
    "refit, all Linears": "--method refit --refit-all --samples 64",
    "block": "--method block --samples 64 --steps 20",
    "lm": "--method lm --steps 40",
    "lm, LoRA": "--method lm --scope lora --steps 40",
    "lm, norms": "--method lm --scope norms --steps 40",
    "distill": "--method distill --steps 30",
    "distill, hidden states too": "--method distill --hidden-weight 1 --steps 30",
    "distill from a teacher cache": "--method distill --steps 30 --teacher-cache CACHE",
}
"""What is compared, on the same mixture."""
MEMORY: dict[str, str] = {
    f"{teacher}, {scope}": f"--method distill --scope {scope} --steps 4{cache}"
    for scope in ("all", "lora", "norms")
    for teacher, cache in (
        ("in memory", ""),
        ("streamed into a cache", " --teacher-cache CACHE"),
        ("from the cache", " --teacher-cache CACHE"),
    )
} | {f"no teacher, {scope}": f"--method lm --scope {scope} --steps 4" for scope in ("all", "lora", "norms")}
"""What is weighed, on few tokens; the second of a pair with a cache finds what the first has written."""


@dataclass(frozen=True)
class Place:
    """The small and the large model, what is aligned on, what is measured on, and where files may be left."""

    small: Path
    large: Path
    data: list[str]
    tests: dict[str, Path]
    scratch: Path


def loram(*words: str) -> tuple[str, dict[str, float]]:
    """Run a command; what it printed, and what it took: CPU seconds and the most bytes it ever had in memory."""
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen([sys.executable, "-m", "loram", *words], stdout=printed)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        if child.returncode:
            raise RuntimeError(f"loram {' '.join(words)} ended with {child.returncode}")
        return printed.read(), {"cpu_seconds": round(seconds(usage), 1), "peak_bytes": usage.ru_maxrss * 1024}


def seconds(usage: resource.struct_rusage) -> float:
    """In user and system mode."""
    return usage.ru_utime + usage.ru_stime


def losses(place: Place, model: Path) -> dict[str, float]:
    """The mean loss of a model on every text."""
    found = {}
    for name, file in place.tests.items():
        printed, _ = loram("eval", str(model), "--data", str(file), "--json")
        found[name] = round(json.loads(printed)["loss"], 4)
    return found


def aligned(place: Place, name: str, words: str, *, measure: bool) -> dict[str, Any]:
    """One way."""
    out = place.scratch / "out"
    cache = place.scratch / f"cache-{name.rpartition(', ')[2]}"
    given = [str(cache) if word == "CACHE" else word for word in words.split()]
    text = [word for source in place.data for word in ("--data", source)]
    shape = ["--length", str(LENGTH), "--batch", str(BATCH), "--held-out", "8"]
    printed, usage = loram("align", str(place.small), *given, *text, *shape, "-o", str(out), "--force", "--json")
    body: dict[str, Any] = {"options": words, **usage, "own": json.loads(printed)["loss"]}
    return body | {"loss": losses(place, out)} if measure else body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("small", type=Path)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True, help="to align on; may be repeated")
    parser.add_argument("--test", action="append", required=True, metavar="NAME=FILE", help="to measure on")
    parser.add_argument("--only", action="append", choices=[*WAYS, *MEMORY])
    parser.add_argument("--output", type=Path, default=RECORD)
    chosen = parser.parse_args()
    tests = {name: Path(file) for name, _, file in (word.partition("=") for word in chosen.test)}
    record: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="loram-alignments-") as scratch:
        place = Place(chosen.small, chosen.large, chosen.data, tests, Path(scratch))

        def keep(part: str, name: str, body: Any) -> None:
            record.setdefault(part, {})[name] = body
            chosen.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            sys.stderr.write(f"{name}: {json.dumps(body)}\n")

        record |= {"length": LENGTH, "batch": BATCH, "planned": WAYS}
        for name, model in (("large", place.large), ("small", place.small)):
            if name not in record.get("start", {}):
                keep("start", name, losses(place, model))
        for part, ways in (("ways", WAYS), ("memory", MEMORY)):
            for name, words in ways.items():
                if name not in record.get(part, {}) and name in (chosen.only or ways):
                    keep(part, name, aligned(place, name, words, measure=part == "ways"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
