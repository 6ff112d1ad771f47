"""Kill calibrations at random moments: `scripts/killed_pruning.py MODEL DATA [--output docs/killed-pruning.json]`.

Each is a `loram prune` of its own that gets SIGKILL in a block that was drawn, and the same command line again. Lost
are the blocks that were done and are done again; at the end every weight, map and mask is compared with those of a
pruning that nobody disturbed. The table in docs/prune.md is written from the figures by scripts/render_docs.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE, SEAL = 3600, "checksums.json"
SIZE = ("--samples", "8", "--length", "128")
CASES: dict[str, tuple[str, ...]] = {
    "wanda": ("--score", "wanda"),
    "taylor": ("--score", "taylor"),
    "sparsegpt": ("--method", "semi", "--score", "sparsegpt"),
    "depth": ("--method", "depth"),
}


@dataclass
class Pruning:
    """A command line, the folder it writes, and which blocks it has been seen to finish."""

    case: str
    model: Path
    data: Path
    out: Path
    seen: dict[str, int] = field(default_factory=dict)
    """{block: the moment it was sealed last, ns}, in the order in which they were seen first."""

    def start(self) -> subprocess.Popen[str]:
        """Begin; what it says goes to a file."""
        words = [sys.executable, "-m", "loram", "prune", str(self.model), "--calibration", str(self.data)]
        words += ["--calibration", "builtin", *SIZE, *CASES[self.case], "-o", str(self.out)]
        with open(f"{self.out}.said", "w", encoding="utf-8") as said:
            return subprocess.Popen(words, stdout=said, stderr=said, text=True)

    def look(self) -> int:
        """How many blocks it has finished; Taylor finishes each twice, there and back.

        Whether hidden states are saved behind a block is a matter of time in the other passes, so those do not count.
        """
        kinds = ("block-*", "input-*") if self.case == "taylor" else ("block-*",)
        place = self.out.with_name(self.out.name + ".partial") / "checkpoints"
        for file in [file for kind in kinds for file in sorted(place.glob(f"{kind}/{SEAL}"))]:
            try:
                self.seen[file.parent.name] = file.stat().st_mtime_ns
            except FileNotFoundError:  # dropped meanwhile
                continue
        return len(self.seen)

    def finish(self) -> None:
        """Watch it from the beginning to the end; RuntimeError where it fails."""
        child = self.start()
        while child.poll() is None:
            self.look()
            time.sleep(0.02)
        if child.returncode:
            raise RuntimeError(Path(f"{self.out}.said").read_text(encoding="utf-8"))

    def kill_in(self, block: int, delay: float) -> None:
        """SIGKILL, `delay` seconds after so many blocks are done."""
        child = self.start()
        deadline = time.monotonic() + PATIENCE
        while self.look() < block:
            if child.poll() is not None or time.monotonic() > deadline:
                child.kill()
                raise RuntimeError(Path(f"{self.out}.said").read_text(encoding="utf-8"))
            time.sleep(0.02)
        time.sleep(delay)
        child.kill()
        if child.wait(PATIENCE) != -9:
            raise RuntimeError("it was over before it could be killed")
        self.look()


def see(killed: Pruning, undisturbed: Pruning, block: int, delay: float) -> dict[str, Any]:
    """Kill it, go on, and compare."""
    killed.kill_in(block, delay)
    before = dict(killed.seen)
    killed.finish()
    again = [name for name, moment in before.items() if killed.seen[name] != moment]
    names = sorted(file.name for file in undisturbed.out.glob("*.safetensors"))
    return {
        "what": killed.case,
        "blocks": len(undisturbed.seen),
        "reached": len(before),
        "delay": round(delay, 2),
        "again": len(again),
        "same": bool(names)
        and names == sorted(file.name for file in killed.out.glob("*.safetensors"))
        and all((killed.out / name).read_bytes() == (undisturbed.out / name).read_bytes() for name in names),
    }


def measure(model: Path, data: Path, scratch: Path, names: list[str], times: tuple[int, int]) -> list[dict[str, Any]]:
    """Every case so many times, at moments drawn with a seed."""
    rows = []
    for name in names:
        draw = random.Random(f"{times[1]} {name}")
        undisturbed = Pruning(name, model, data, scratch / "undisturbed")
        undisturbed.finish()
        moments = sorted(undisturbed.seen.values())
        seconds = (moments[-1] - moments[0]) / 1e9 / (len(moments) - 1)
        for _ in range(times[0]):
            killed = Pruning(name, model, data, scratch / "out")
            # Behind the last block what is left may be over before the signal comes.
            rows.append(see(killed, undisturbed, draw.randrange(1, len(moments)), draw.random() * seconds))
            sys.stderr.write(json.dumps(rows[-1]) + "\n")
            shutil.rmtree(killed.out)
        shutil.rmtree(undisturbed.out)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=CASES, action="append", help="may be repeated")
    parser.add_argument("--times", type=int, default=2, help="how often each is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loram-killed-", ignore_cleanup_errors=True) as scratch:
        names, times = chosen.only or list(CASES), (chosen.times, chosen.seed)
        rows = measure(chosen.model.resolve(), chosen.data.resolve(), Path(scratch), names, times)
    body = {"model": chosen.model.name, "seed": chosen.seed, "rows": rows}
    if chosen.output:
        chosen.output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
