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
    """Make a model that has just been loaded in 4 or 8 bit safe, and compute in `dtype` (None: as it was stored).

    transformers 5.23 leaves what is not quantized in the dtype of the file, whatever it is asked for.
    """
    if not getattr(model, "is_quantized", False):
        return
    keep_unpacked(model)
    if dtype is not None:
        compute_in(model, dtype)
    # LLM.int8() multiplies in fp16 and says so at every layer; nobody can do anything about it.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that are not quantized, and what the quantized ones are unfolded to."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            setattr(module, "compute_dtype", dtype)  # noqa: B010 (torch's own types know nothing of it)


def keep_unpacked(model: nn.Module) -> None:
    """Never let bitsandbytes pack this model's 4-bit weights for AVX512-BF16: saving and merging would be wrong."""
    for module in model.modules():
        if hasattr(module, PACKING):
            setattr(module, PACKING, False)
