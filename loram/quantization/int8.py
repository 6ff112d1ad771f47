"""8 bit as LLM.int8() (2208.07339) stores it: a scale per row, in bitsandbytes' own serialized format.

bitsandbytes casts a weight to fp16 first, whatever its dtype, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loram.errors import MismatchError
from loram.quantization.storage import Storage, Stored
from loram.shards import TensorPlan

LEVELS = 127.0


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, in) → (int8 of the same shape; the rows' magnitudes, fp32)."""
    half = rows.to(torch.float16)
    magnitudes = half.abs().amax(dim=1).float()
    if not bool(torch.isfinite(magnitudes).all()):
        raise MismatchError("holds NaN, Inf or a value beyond fp16, in which int8 is reckoned; use --type nf4")
    # A row of zeros has no scale; bitsandbytes multiplies 0 by infinity there.
    scale = torch.where(magnitudes > 0, LEVELS / magnitudes, 0)
    return torch.round(half * scale.unsqueeze(-1)).to(torch.int8), magnitudes


def module_of(weight: TensorPlan) -> str:
    """`model.layers.0.mlp.up_proj` for its weight."""
    return weight.name.removesuffix(".weight")


def plans(weight: TensorPlan) -> list[TensorPlan]:
    """The weight, its rows' magnitudes, and the number of the (only) layout that bitsandbytes still writes."""
    return [
        TensorPlan(weight.name, torch.int8, weight.shape),
        TensorPlan(f"{module_of(weight)}.SCB", torch.float32, weight.shape[:1]),
        TensorPlan(f"{module_of(weight)}.weight_format", torch.uint8, ()),
    ]


def encode(weight: TensorPlan, rows: Iterable[Tensor]) -> Stored:
    """The rows as they come, then their magnitudes."""
    data, scales, layout = plans(weight)
    magnitudes = []
    for piece in rows:
        quantized, found = quantize_rows(piece)
        magnitudes.append(found)
        yield data, quantized
    yield scales, torch.cat(magnitudes)
    yield layout, torch.tensor(0, dtype=torch.uint8)


INT8 = Storage(name="int8", plans=plans, encode=encode, options={"load_in_8bit": True})
