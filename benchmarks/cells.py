"""Run one cell through loram's public stages, and keep its figures.

What a stage wrote lies in the scratch folder under a digest of everything that led to it, so equal prunes are made
once, and a killed cell goes on with the stage it was in (training with its newest checkpoint). A figure is one small
file, written whole at the end.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.conditions import LIBRARIES, commit, machine
from benchmarks.grid import LARGE, SPARE, TASKS, TRAIN, Cell, Options
from benchmarks.measure import ROOT, say

RESULTS = ROOT / "benchmarks" / "quality"
PLACES = (LARGE, TRAIN, SPARE, "@test", "@before", "@small")
NO_FOLDER = ("eval",)
TOLD = ("params", "bytes", "loss", "steps", "tokens", "scales")


@dataclass(frozen=True)
class Bench:
    """Where models, data, intermediate folders and results lie on this machine."""

    scratch: Path
    models: dict[str, str]
    data: Path | None = None
    results: Path = RESULTS

    def model(self, name: str) -> str:
        """The folder of a large model; LookupError where nobody said which."""
        if name in self.models:
            return self.models[name]
        if name == "smollm2-135m":
            from loram.stages.demo import find_model

            return str(find_model())
        raise LookupError(f"where is {name}? add --place {name}=FOLDER")

    def file(self, relative: str) -> str:
        """A file of the checkout, or of `--data`; LookupError where it is in neither."""
        for root in (ROOT, self.data):
            if root is not None and (root / relative).is_file():
                return str(root / relative)
        raise LookupError(f"where is {relative}? add --data FOLDER, the folder that holds it")

    def record(self, cell: Cell) -> Path:
        """Where a cell's figures are kept."""
        return self.results / f"{cell.id}.json"


def run_cell(cell: Cell, bench: Bench) -> dict[str, Any]:
    """All stages of a cell, and its record."""
    task = TASKS[cell.task]
    places = {LARGE: bench.model(cell.model), TRAIN: bench.file(task.train), "@test": bench.file(task.test)}
    places |= {SPARE: bench.file(task.spare)} if task.spare else {}
    chain: list[Any] = [cell.model, task.train]
    stages: list[dict[str, Any]] = []
    for name, options in cell.stages():
        if name == "train":
            places["@small"] = places.get("@before", places[LARGE])
        chain += [name, options, cell.seed]
        entry = run_stage(name, options | {"seed": cell.seed}, places, bench.scratch / digest(name, chain))
        stages.append({"stage": name, "options": {k: v for k, v in options.items() if v is not None}, **entry})
    body: dict[str, Any] = describe(cell) | stages[-1].pop("figures") | {"reduction": reduction(stages)}
    body |= {"effort": task.effort, "stages": stages, "conditions": conditions()}
    write(bench.record(cell), body)
    return body


def run_stage(name: str, options: Options, places: dict[str, str], folder: Path) -> dict[str, Any]:
    """One stage, or what is remembered of it where its folder is there."""
    memory = folder.with_name(folder.name + ".json")
    writes = name not in NO_FOLDER
    if memory.is_file() and (folder.is_dir() or not writes):
        entry: dict[str, Any] = json.loads(memory.read_text(encoding="utf-8"))
    else:
        filled = {key: fill(value, places) for key, value in options.items()}
        filled |= {"out": str(folder)} if writes else {}
        began, burnt = time.monotonic(), time.process_time()
        result = run_function(name, filled)
        entry = {"seconds": round(time.monotonic() - began, 1), "cpu": round(time.process_time() - burnt, 1)}
        entry |= {"figures": figures(result)} if name == "eval" else {"result": without_paths(result.to_json())}
        write(memory, entry)
        say(f"  {name}: {entry['seconds']} s")
    if writes:
        places["@before"] = str(folder)
    return entry


def run_function(name: str, options: Options) -> Any:
    """Call a stage of loram's; the launcher itself stays light until then."""
    from loram.options import SECTIONS, from_mapping
    from loram.progress import SILENT
    from loram.stages import stage_function

    return stage_function(name)(from_mapping(SECTIONS[name], options, name), SILENT)


def fill(value: Any, places: dict[str, str]) -> Any:
    """An option's value with its symbols put in place."""
    if isinstance(value, (tuple, list)):
        return tuple(fill(item, places) for item in value)
    return places[value] if isinstance(value, str) and value in PLACES else value


def digest(name: str, chain: list[Any]) -> str:
    """A folder name for what a chain of stages makes."""
    return f"{name}-{sha256(json.dumps(chain, sort_keys=True).encode()).hexdigest()[:16]}"


def figures(result: Any) -> dict[str, Any]:
    """Held-out loss with its standard error, and the raw sums of every row."""
    rows = result.losses
    return {
        "loss": result.loss.mean,
        "stderr": result.loss.stderr,
        "rows": {"nll": [round(value, 4) for value in rows.nll], "tokens": list(rows.tokens)},
    }


def without_paths(body: dict[str, Any]) -> dict[str, Any]:
    """A stage's JSON with the numbers only."""
    return {
        key: value for key, value in body.items() if key in ("params", "bytes", "loss", "steps", "tokens", "scales")
    }


def reduction(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters of the large and the small model and their ratio, embeddings included, as prune counted them."""
    for stage in stages:
        if stage["stage"] == "prune":
            return dict(stage["result"]["params"])
    return {}


def describe(cell: Cell) -> dict[str, Any]:
    """What the cell is."""
    return {
        "cell": cell.id,
        "model": cell.model,
        "task": cell.task,
        "method": cell.method,
        "ratio": cell.ratio,
        "keep": cell.keep,
        "seed": cell.seed,
        "lr": cell.lr,
        "measured": cell.measured,
    }


def conditions() -> dict[str, Any]:
    """Date, commit, machine, versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def write(file: Path, body: dict[str, Any]) -> None:
    """A JSON file with a line for every key, absent or whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in body.items())
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(file)
