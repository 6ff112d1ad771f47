"""What loading a model in 4 or 8 bit takes besides transformers: the library, the dtype, and a guard.

bitsandbytes 0.50.2 packs 4-bit weights anew, in place, at the first forward in eval mode on a CPU with AVX512-BF16,
and what it makes of them again when they are saved or dequantized is wrong: a model saved after an evaluation is
another one, and so is the model in memory. Nothing says so. `keep_unpacked` turns that off.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loram.quantization.storage import bitsandbytes_functions

PACKING = "support_avx512bf16_for_cpu"


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """How a raw config says that its model is quantized; None where it is not."""
    section = config.get("quantization_config")
    if not section:
        return None
    return str(section.get("quant_method", "unknown")) if isinstance(section, Mapping) else "unknown"


def require_library(config: Mapping[str, Any]) -> None:
    """OptionError that names the extra, where a model needs bitsandbytes and it is not there."""
    if quantization_of(config) == "bitsandbytes":
        bitsandbytes_functions()


def settle(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make a model that has just been loaded in 4 or 8 bit safe, and compute in `dtype` (None: as its config says)."""
    if not getattr(model, "is_quantized", False):
        return
    keep_unpacked(model)
    for module in model.modules():
        if dtype is not None and hasattr(module, "compute_dtype"):
            setattr(module, "compute_dtype", dtype)  # noqa: B010 (torch's own types know nothing of it)
    # LLM.int8() multiplies in fp16 and says so at every layer; nobody can do anything about it.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def keep_unpacked(model: nn.Module) -> None:
    """Never let bitsandbytes pack this model's 4-bit weights for AVX512-BF16: saving and merging would be wrong."""
    for module in model.modules():
        if hasattr(module, PACKING):
            setattr(module, PACKING, False)
