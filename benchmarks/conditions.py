"""Under which conditions figures were measured: date, commit, command, machine, versions; no names."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "typer")


def conditions(size: str, command: str) -> dict[str, Any]:
    """All of it, for results.json."""
    return {
        "size": size,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": command,
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def commit() -> str:
    """The checkout's commit, with + where something is changed; 'unknown' outside a checkout."""
    try:
        head = git("rev-parse", "--short=12", "HEAD").strip()
        changed = [line for line in git("status", "--porcelain").splitlines() if line.endswith(".py")]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def git(*arguments: str) -> str:
    """The output of a git command in the checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def machine(threads: int = 1) -> str:
    """Processor, cores, memory and threads used, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    used = f"{threads} thread{'s' * (threads > 1)}"
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}; {used}"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named and named[0] != "unknown" else platform.machine()
