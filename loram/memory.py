"""Bytes: how many this process has used at most and may still take, how many the disk has, how people write them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import shutil
import sys
from pathlib import Path

from loram.errors import OptionError, ResourceError

STATUS = Path("/proc/self/status")
UNLIMITED = 2**60
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KERNELS = 256
KERNEL_CACHES = (("LRU_CACHE_CAPACITY",), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"))
"""The variables that say how many compiled kernels torch and oneDNN keep; oneDNN reads its older name as well."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def peak_bytes() -> int:
    """The process's peak resident memory (VmHWM), file pages included."""
    told = _kibibytes(STATUS, "VmHWM")
    if told is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that new work may take: the least of what the kernel has to give without swapping, what the process's
    control group leaves, and what its own limits leave; a huge number where nothing says."""
    kernel = _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    return min(UNLIMITED if kernel is None else kernel, _group_leaves(Path("/sys/fs/cgroup")), _limits_leave())


def resident_bytes() -> int:
    """What this process holds in memory now (VmRSS); 0 where the kernel does not say."""
    return _kibibytes(STATUS, "VmRSS") or 0


def _kibibytes(file: Path, field: str) -> int | None:
    """A field of a file in /proc, in bytes; None where it is not there."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _limits_leave() -> int:
    """What `ulimit -v` and `ulimit -d` leave of address space and of data."""
    left = UNLIMITED
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, used = resource.getrlimit(limit)[0], _kibibytes(STATUS, field)
        if most != resource.RLIM_INFINITY and used is not None:
            left = min(left, max(0, most - used))
    return left


def _group_leaves(root: Path) -> int:
    """What the control group leaves (cgroup v2, then v1); page cache that can be dropped counts as free."""
    for folder, most, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, held, stat = ((folder / name).read_text(encoding="ascii") for name in (most, used, "memory.stat"))
        except OSError:
            continue
        match = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
        if limit.strip().isdigit():
            return max(0, int(limit) - int(held) + (int(match[1]) if match else 0))
    return UNLIMITED


def parse_bytes(text: str, option: str = "--memory") -> int:
    """'24GiB', '24 GB', '800M' → bytes; a bare number below 10000 means GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or (not match[2] and "b" in text.lower()):
        raise OptionError(f"{option} is {text!r}; expected a size such as 24GiB")
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


def return_large_blocks(size: int = 8 * 2**20) -> None:
    """Have the C library give blocks of `size` bytes and more back as soon as they are freed (glibc; elsewhere nothing
    changes). Smaller ones cost time: the system clears every page that it hands out.

    By itself it soon keeps blocks of up to 32 MiB in its heap, where the holes between what lives longer add up: to a
    gigabyte after forty layers, seen where the address space is limited.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, size)
        library.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def give_back() -> None:
    """Return to the system what nobody uses any more (glibc; elsewhere it is only collected): after a training the heap
    holds gigabytes of holes, which would count as the next stage's memory, and be missing to it."""
    gc.collect()
    return_holes()


def return_holes() -> None:
    """Return the pages of the heap that hold nothing (glibc; elsewhere nothing changes): some milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bound_kernel_caches() -> None:
    """Have torch and oneDNN keep 256 compiled kernels and not 1024, unless the environment says how many.

    For bf16 on a CPU, oneDNN compiles a kernel for every shape of a product, and both keep it: 62 of them, 35 MiB, for
    every length of a batch that has not been seen (SmolLM2-135M, cut; two widths of layers). They lie between what a
    step frees, too, and tear the heap: over 16 steps the peak was 4.2 GiB, and is 3.6. A step needs some 30 for every
    width of layer, and what does not fit costs time: with none kept, a step took 2.3 times as long.

    Read when the first product is computed, so it must be called before that.
    """
    for names in KERNEL_CACHES:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = str(KERNELS)
