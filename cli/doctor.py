"""What this machine and installation have. No environment variables and no tokens: people paste this into issues."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loram.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
    "lm_eval",
    "flwr",
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")


def examine() -> dict[str, Any]:
    """Everything, as a flat object of short values."""
    return {
        "loram": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "memory_bytes": memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "gpus": gpus(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"),
        **{name: installed(name) for name in PACKAGES},
    }


def installed(name: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_flags() -> list[str]:
    """Which of the instruction sets that matter here the processor has, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return [flag for flag in CPU_FLAGS if flag in words]


def memory_bytes() -> int | None:
    """The machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def gpus() -> list[str]:
    """Names and sizes of the GPUs torch can use."""
    try:
        import torch
    except ImportError:
        return []
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{gpu.name} ({gpu.total_memory / 2**30:.1f} GiB)" for gpu in found]
    return ["Apple MPS"] if torch.backends.mps.is_available() else []
