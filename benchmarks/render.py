"""results.json as a table for the terminal and as docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
MIB = 2**20

HEAD = """<!-- Written by scripts/render_docs.py from benchmarks/results.json; do not edit. -->
# Benchmarks

`make bench` measures this on your machine: each contender is a process of its own with one thread, contenders take
turns, the page cache is warm, and figures are medians (of ratios within a round, where two are compared). "Beyond the
interpreter" is the process's peak memory (VmHWM) minus that of a process that only imports torch and safetensors.
"""
SMOKE = (
    "**These are figures of a smoke run on toy sizes** (`--size tiny`): they show that the benchmark works, start-up "
    "is all they measure, and no goal is judged by them."
)


def load(file: Path = RESULTS) -> dict[str, Any]:
    """The committed results, empty where there are none."""
    body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return body


def page(results: dict[str, Any]) -> str:
    """The whole of docs/benchmarks.md."""
    parts = [HEAD, *(section(entry) for entry in results.values())]
    return "\n".join(parts)


def section(entry: dict[str, Any]) -> str:
    """One benchmark: setting, goals, runs, conditions."""
    where = entry["conditions"]
    judged = where["size"] != "tiny"
    facts = "".join(f" {name[:1].upper()}{name[1:]}: {spell_fact(value)}." for name, value in entry["facts"].items())
    versions = ", ".join(f"{name} {value}" for name, value in where["versions"].items())
    lines = [
        f"## {entry['title']}",
        "",
        *([] if judged else [SMOKE, ""]),
        f"{entry['setting'][:1].upper()}{entry['setting'][1:]}.{facts}",
        "",
        "| figure | measured | goal |",
        "|---|---:|---|",
        *(goal_row(goal, judged) for goal in entry["goals"]),
        "",
        *run_table(entry["runs"]),
        "",
        f"`{where['command']}` on {where['date']}, commit `{where['commit']}`. {where['machine']}. {versions}.",
        "",
    ]
    return "\n".join(lines)


def goal_row(goal: dict[str, Any], judged: bool) -> str:
    """A figure and what it should be."""
    return f"| {goal['what']} | {spell(goal['value'], goal['unit'])} | {verdict(goal, judged)} |"


def verdict(goal: dict[str, Any], judged: bool) -> str:
    """The limit and whether it holds."""
    if goal["met"] is None:
        return ""
    above = goal["at_most"] is not None
    limit = f"{'≤' if above else '≥'} {spell(goal['at_most'] if above else goal['at_least'], goal['unit'], exact=True)}"
    return limit if not judged else f"{limit}: {'met' if goal['met'] else '**missed**'}"


def run_table(runs: dict[str, Any]) -> list[str]:
    """What each process took; where a peak was predicted, the prediction beside it."""
    if any("predicted_bytes" in run.get("figures", {}) for samples in runs.values() for run in samples):
        head = ["| configuration | measured MiB | predicted MiB | error |", "|---|---:|---:|---:|"]
        return head + [predicted_row(name, samples[0]) for name, samples in runs.items()]
    head = ["| process | CPU s | wall s | peak MiB | runs |", "|---|---:|---:|---:|---:|"]
    return head + [run_row(name, samples) for name, samples in runs.items()]


def predicted_row(name: str, run: dict[str, Any]) -> str:
    """A peak and its prediction."""
    peak, predicted = run["peak"], run["figures"]["predicted_bytes"]
    return f"| {name} | {peak / MIB:,.0f} | {predicted / MIB:,.0f} | {predicted / peak - 1:+.0%} |"


def run_row(name: str, runs: list[dict[str, Any]]) -> str:
    """The medians of a contender."""
    cpu, wall, peak = (median(run[what] for run in runs) for what in ("cpu", "wall", "peak"))
    return f"| {name} | {cpu:.2f} | {wall:.2f} | {peak / MIB:,.0f} | {len(runs)} |"


def spell(value: float, unit: str, *, exact: bool = False) -> str:
    """A figure with its unit."""
    whole = unit == "MiB" or (unit == "" and value == int(value) and value > 10)
    number = f"{value:g}" if exact else f"{value:,.0f}" if whole else f"{value:.2f}"
    if not exact and 0 < abs(value) < 0.005:
        number = f"{value:.0e}"
    return f"{number} {unit}" if unit not in ("", "×") else number + unit


def spell_fact(value: object) -> str:
    """Yes and no for truth values."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def table(results: dict[str, Any]) -> str:
    """The goals of all benchmarks, for the terminal."""
    rows = [("benchmark", "figure", "measured", "goal")]
    for name, entry in results.items():
        judged = entry["conditions"]["size"] != "tiny"
        for goal in entry["goals"]:
            limit = verdict(goal, judged).replace("**", "")
            rows.append((name, goal["what"], spell(goal["value"], goal["unit"]), limit))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
