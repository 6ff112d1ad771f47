"""NF4 with double quantization (QLoRA, 2305.14314), bit for bit as bitsandbytes stores it.

A block of 64 values is scaled by its largest magnitude to [-1, 1] and each value becomes the number of the nearest
of 16 levels; two numbers share a byte. The magnitudes are stored in 8 bit, in blocks of 256, by bitsandbytes itself.

The nearest level is found without a search. The interval [-1, 1] is cut into 128 bins, few enough to look up in and
so many that none holds two of the 15 boundaries: the bin gives the number of boundaries below it, and one comparison
with the bin's own boundary, if it has one, the rest. Rounding is monotone, so that this is exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loram.errors import MismatchError
from loram.quantization.storage import Storage, Stored, bitsandbytes_functions
from loram.shards import TensorPlan

BLOCK = 64
NESTED_BLOCK = 256
TILE = 2**18
"""Values that are worked on at a time: what fits a core's cache; a multiple of BLOCK."""
BINS = 64
"""Bins per unit of the scaled value."""
SMALLEST = 1e-38
"""The least magnitude that bitsandbytes divides by."""
LONGEST_NUMBER = 25
"""Characters of a float in JSON, at most."""
STATE = "quant_state.bitsandbytes__nf4"


@cache
def levels() -> Tensor:
    """The 16 levels, fp32, ascending."""
    found: Tensor = bitsandbytes_functions().get_4bit_type("nf4", device="cpu")
    return found


@cache
def bins() -> tuple[Tensor, Tensor]:
    """Per bin the boundaries below it (uint8), and the boundary inside it (fp32, infinite where there is none)."""
    ascending = levels()
    boundaries = (ascending[:-1] + ascending[1:]) / 2
    places = bin_of(boundaries)
    assert len(set(places.tolist())) == boundaries.numel()
    below = torch.bucketize(torch.arange(2 * BINS + 1, dtype=torch.int32), places).to(torch.uint8)
    inside = torch.full((2 * BINS + 1,), torch.inf)
    inside[places.long()] = boundaries
    return below, inside


def bin_of(scaled: Tensor, out: Tensor | None = None) -> Tensor:
    """The bin of values in [-1, 1], int32."""
    places = torch.add(scaled, 1, out=out).mul_(BINS)
    return places.to(torch.int32)


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Flat fp32 values → (packed numbers, uint8, two to a byte; the blocks' magnitudes, fp32).

    `values` is used as scratch. A last block may be shorter; bitsandbytes divides there where it multiplies elsewhere.
    """
    full = values.numel() // BLOCK * BLOCK
    whole = values[:full].view(-1, BLOCK)
    magnitudes = whole.abs().amax(dim=1)
    whole.mul_((1.0 / magnitudes.clamp(min=SMALLEST)).view(-1, 1)).clamp_(-1, 1)
    if full < values.numel():
        rest = values[full:]
        last = rest.abs().amax().clamp(min=SMALLEST)
        rest.div_(last).clamp_(-1, 1)
        magnitudes = torch.cat([magnitudes, last.view(1)])
    if not bool(torch.isfinite(magnitudes).all()):
        raise MismatchError("holds NaN or Inf; the checkpoint is damaged: fetch it again")
    if values.numel() % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return packed(numbers(values)), magnitudes


def numbers(scaled: Tensor) -> Tensor:
    """Values in [-1, 1] → the number of the nearest level, uint8 (the lower one half-way)."""
    below, inside = bins()
    places = bin_of(scaled, torch.empty_like(scaled))
    found = below.index_select(0, places)
    return found.add_(torch.gt(scaled, inside.index_select(0, places)).view(torch.uint8))


def packed(found: Tensor) -> Tensor:
    """Pairs of numbers in a byte, the first in the high half."""
    pairs = found.view(-1, 2)
    return (pairs[:, 0] << 4).bitwise_or_(pairs[:, 1])


def tiles(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows' values, flat and in fp32, in tiles of whole blocks (the last one may end in a shorter block)."""
    carried = torch.empty(0)
    for piece in rows:
        flat = piece.reshape(-1)
        if carried.numel():
            flat = torch.cat([carried.to(flat.dtype), flat])
        whole = flat.numel() // BLOCK * BLOCK
        for start in range(0, whole, TILE):
            yield flat[start : min(start + TILE, whole)].to(torch.float32, copy=True)
        carried = flat[whole:].clone()
    if carried.numel():
        yield carried.to(torch.float32, copy=True)


def plans(weight: TensorPlan) -> list[TensorPlan]:
    """The six tensors of a weight; the last one, JSON, at its longest."""
    count = weight.shape[0] * weight.shape[1]
    blocks = -(-count // BLOCK)
    longest = len(state_json(weight, 0.5)) - len("0.5") + LONGEST_NUMBER
    return [
        TensorPlan(weight.name, torch.uint8, ((count + 1) // 2, 1)),
        TensorPlan(f"{weight.name}.absmax", torch.uint8, (blocks,)),
        TensorPlan(f"{weight.name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
        TensorPlan(f"{weight.name}.nested_quant_map", torch.float32, (256,)),
        TensorPlan(f"{weight.name}.quant_map", torch.float32, (16,)),
        TensorPlan(f"{weight.name}.{STATE}", torch.uint8, (longest,)),
    ]


def encode(weight: TensorPlan, rows: Iterable[Tensor]) -> Stored:
    """The packed weight tile by tile, then its statistics; only the blocks' magnitudes are kept meanwhile."""
    packed_plan, *others, state_plan = plans(weight)
    magnitudes = []
    for tile in tiles(rows):
        data, found = quantize_blocks(tile)
        magnitudes.append(found)
        yield packed_plan, data
    absmax = torch.cat(magnitudes)
    offset = absmax.mean()
    quantized, state = bitsandbytes_functions().quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    yield from zip(others, (quantized, state.absmax, state.code, levels()), strict=True)
    text = state_json(weight, offset.item()).encode()
    yield TensorPlan(state_plan.name, torch.uint8, (len(text),)), torch.tensor(list(text), dtype=torch.uint8)


def state_json(weight: TensorPlan, offset: float) -> str:
    """What bitsandbytes writes about a weight besides its tensors, in its order."""
    body: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return json.dumps(body)


NF4 = Storage(
    name="nf4",
    plans=plans,
    encode=encode,
    options={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    variable=STATE,
)
