"""Where training and evaluation run, in which dtype, and how much memory the process has used."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from loram import memory
from loram.errors import OptionError


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str) -> str:
    """`auto` as bf16 where the hardware computes it natively, else fp32; other names as they are."""
    if name == "fp16" and not torch.cuda.is_available():
        raise OptionError("--dtype fp16 needs a GPU; use --dtype bf16 or fp32")
    if name != "auto":
        return name
    return "bf16" if native_bf16() else "fp32"


def native_bf16() -> bool:
    """Whether bf16 is computed in hardware; emulated bf16 is slower than fp32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def refuse_without_compiler() -> None:
    """OptionError where torch.compile would find no C++ compiler; on a GPU it brings Triton."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not torch.cuda.is_available() and shutil.which(name) is None:
        raise OptionError(
            f"--compile needs a C++ compiler, and there is no {name}; install one, set CXX, or leave it out"
        )


def place(model: torch.nn.Module) -> torch.nn.Module:
    """The model on the device, unless loading has spread or quantized it already."""
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model
    return model.to(pick_device())


def reset_peak() -> None:
    """Start counting the GPU's peak anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most memory held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return memory.peak_bytes()
