"""Whether there is room to measure a model whole; where there is not, `evaluation.streamed` does it block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from loram.activations import Workload
from loram.checkpoint import read_config
from loram.data.encoding import EncodedRow
from loram.families.small import stored_widths
from loram.memory import available_bytes
from loram.memory_model import Model, forward_memory
from loram.quantization.loading import quantization_of


def whole_bytes(
    folder: Path, rows: Sequence[EncodedRow], batch: int, dtype: str, packed_to: int | None = None
) -> int | None:
    """What a model takes while it is measured whole; None for a quantized one, which only goes whole."""
    config = read_config(folder)
    if quantization_of(config) is not None:
        return None
    length = packed_to or max(len(row["input_ids"]) for row in rows)
    attention = str(config.get("attn_implementation") or "sdpa")
    work = Workload(batch=min(batch, len(rows)), length=length, dtype=dtype, attention=attention)
    return forward_memory(Model(config, stored_widths(config)), work).total


def free_bytes() -> int:
    """What can be had now: of the GPU where there is one, else of the machine."""
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else available_bytes()
