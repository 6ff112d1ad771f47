"""Every way of pruning, plain and in NF4, through all stages: `scripts/methods.py MODEL SCRATCH [--output FILE]`.

Each chain is prune, perhaps quantize, train, recover, verify --numeric, merge, and the ladder, on the demo's data; each
stage is a `loram` of its own, whose words stay in SCRATCH beside what it wrote. A stage that is done is not done again,
so the same command goes on after any end. docs/methods.md is written from the figures by scripts/render_docs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.conditions import commit, machine  # noqa: E402  (the checkout is no package of its own)

DATA = Path("recipes") / "data"
LENGTH, HELD_OUT = 112, 32
TEXT = ("--calibration", str(DATA / "train.jsonl"), "--calibration", "builtin", "--samples", "32", "--length", "128")
TRAIN = ("--data", str(DATA / "train.jsonl"), "--steps", "8", "--batch", "4", "--lr", "2e-3")
ROWS = ("--max-length", str(LENGTH))
EVAL = ("--data", str(DATA / "test.jsonl"), *ROWS, "--limit", str(HELD_OUT))
METHODS: dict[str, tuple[str, ...]] = {
    "random": ("--method", "random"),
    "structured": ("--method", "structured", "--score", "wanda", *TEXT),
    "semi": ("--method", "semi", "--pattern", "2:4", "--score", "sparsegpt", *TEXT),
    "unstructured": ("--method", "unstructured", "--score", "wanda", *TEXT),
    "depth": ("--method", "depth", *TEXT),
}


@dataclass(frozen=True)
class Chain:
    """A way of pruning, whether what it leaves is stored in NF4, and whether its masks are ignored in training."""

    method: str
    nf4: bool
    unmasked: bool = False

    @property
    def name(self) -> str:
        """Its folder in the scratch folder."""
        return self.method + "-nf4" * self.nf4 + "-unmasked" * self.unmasked


CHAINS = [Chain(method, nf4) for method in METHODS for nf4 in (False, True)] + [Chain("semi", True, unmasked=True)]


@dataclass(frozen=True)
class Place:
    """The large model, and the folder of a chain (or of what chains share)."""

    model: Path
    folder: Path

    def stage(self, name: str, *words: str | Path, writes: str = "") -> dict[str, Any]:
        """What a stage took and said in JSON; it runs unless that is written down."""
        record = self.folder / f"{name}.json"
        if not record.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            out = self.folder / writes
            if writes and out.exists():  # it was finished, but not written down
                shutil.rmtree(out)
            command = [*map(str, words), *(["-o", str(out)] if writes else [])]
            body = measured(command, self.folder / name)
            record.with_suffix(".new").write_text(json.dumps(body, indent=1), encoding="utf-8")
            record.with_suffix(".new").replace(record)
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found


def measured(command: list[str], said: Path) -> dict[str, Any]:
    """Run `loram COMMAND --json`: CPU seconds, peak of resident memory, and its JSON. What it says goes to a file."""
    sys.stderr.write(f"$ loram {' '.join(command)}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    streams = [
        (os.POSIX_SPAWN_OPEN, number, f"{said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number, kind in ((1, "stdout"), (2, "stderr"))
    ]
    words = [sys.executable, "-m", "loram", *command, "--json"]
    child = os.posix_spawn(sys.executable, words, environment, file_actions=streams)
    _, status, usage = os.wait4(child, 0)  # this process is small, so the child's peak is its own
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"ended with {code}: loram {' '.join(command)}\n{Path(f'{said}.stderr').read_text()}")
    return {
        "cpu": round(usage.ru_utime + usage.ru_stime, 1),
        "peak": usage.ru_maxrss * 1024,
        "result": json.loads(Path(f"{said}.stdout").read_text(encoding="utf-8")),
    }


def see(chain: Chain, model: Path, scratch: Path) -> dict[str, Any]:
    """A chain from the large model to the merged one, as a row of the record."""
    shared, own = Place(model, scratch / chain.method), Place(model, scratch / chain.name / "chain")
    stages = {"prune": shared.stage("prune", "prune", model, *METHODS[chain.method], writes="small")}
    small = shared.folder / "small"
    if chain.nf4:
        stages["quantize"] = shared.stage("quantize", "quantize", small, writes="small-nf4")
        small = shared.folder / "small-nf4"
    free = ["--unmasked-update"] if chain.unmasked else []
    stages["train"] = own.stage("train", "train", small, *TRAIN, *ROWS, *free, writes="adapter-small")
    stages["recover"] = own.stage("recover", "recover", own.folder / "adapter-small", writes="adapter")
    adapter = own.folder / "adapter"
    stages["verify"] = own.stage("verify", "verify", adapter, "--numeric")
    stages["merge"] = own.stage("merge", "merge", adapter, writes="merged")
    stages["eval"] = own.stage("eval", "eval", model, *EVAL, "--adapter", adapter, "--compare")
    merged = own.stage("eval-merged", "eval", own.folder / "merged", *EVAL)
    ladder = stages["eval"]["result"]
    checks = {check["name"]: check["detail"] for check in stages["verify"]["result"]["checks"]}
    return {
        "method": chain.method,
        "nf4": chain.nf4,
        "unmasked": chain.unmasked,
        "small bytes": sum(file.stat().st_size for file in small.glob("*.safetensors") if file.name[:5] == "model"),
        "ladder": {row["name"]: round(row["loss"], 4) for row in ladder["ladder"]["rows"]},
        "gain stderr": round(ladder["gain_stderr"], 4),
        "merged": round(merged["result"]["loss"], 4),
        "identity": identity(checks["identity"]),
        "mask": checks.get("mask", ""),
        "stages": {name: {"cpu": stage["cpu"], "peak": stage["peak"]} for name, stage in stages.items()},
    }


def identity(said: str) -> float:
    """The largest difference between logits that verify speaks of; 0 where they agree exactly."""
    found = re.search(r"agree (?:exactly|to (\S+) relative)", said)
    if found is None:
        raise SystemExit(f"verify says of the identity: {said}")
    return float(found[1] or 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the large model")
    parser.add_argument("scratch", type=Path, help="folder for everything that is written; 4 GB for SmolLM2-135M")
    parser.add_argument("--only", choices=[chain.name for chain in CHAINS], action="append", help="may be repeated")
    parser.add_argument("--output", type=Path, help="where the figures go, once every chain is done")
    options = parser.parse_args()
    os.chdir(ROOT)
    model, scratch = options.model.resolve(), options.scratch.resolve()
    rows = [see(chain, model, scratch) for chain in CHAINS if not options.only or chain.name in options.only]
    body = {
        "model": model.name,
        "rows": rows,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
    }
    text = json.dumps(body, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
