"""Bytes: how many this process has used at most, how many the disk has left, and how people write them."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import sys
from pathlib import Path

from loram.errors import OptionError, ResourceError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def peak_bytes() -> int:
    """The process's peak resident memory (VmHWM), file pages included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that new work may take without swapping, as the kernel reckons; a huge number where it does not say."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 2**60


def parse_bytes(text: str) -> int:
    """'24GiB', '24 GB', '800M' → bytes; a bare number below 10000 means GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or (not match[2] and "b" in text.lower()):
        raise OptionError(f"--memory is {text!r}; expected a size such as 24GiB")
    number = float(match[1])
    if not match[2] and number < 10_000:
        number *= 2**30
    return int(number * UNITS[match[2]])


def format_bytes(count: float) -> str:
    """Bytes with a binary unit: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def check_disk(folder: str | Path, needed: int) -> None:
    """ResourceError where the disk under `folder` has less than `needed` bytes left."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"writing {folder} needs {format_bytes(needed)} and the disk has {format_bytes(free)} left; "
            "free some space or choose another disk with -o"
        )


def restart_peak() -> None:
    """Make `peak_bytes` count from now on, where the kernel can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
