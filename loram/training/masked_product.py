"""x·(s·(B·A) ∘ M)ᵀ, the masked LoRA update (2502.13533; SparsePEFT, 2410.03750), a tile of the product at a time.

s·B·A ∘ M is as large as the weight and of full rank. It is never whole and never kept: forward makes it again by rows,
backward by columns, from A (r, in), B (out, r) and a mask of one bit an entry. Autograd keeps x and nothing else that
is new. Gradients reach A and B through kept entries only: with G = dL/dy ᵀ·x, dB = s·(G ∘ M)·Aᵀ and dA = s·Bᵀ·(G ∘ M).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loram.activations import PRODUCT_TILE

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_rows(mask: Tensor) -> Tensor:
    """A boolean mask (out, in) as bits, uint8 (out, ⌈in/8⌉): every row begins at a whole byte."""
    return torch.from_numpy(numpy.packbits(mask.cpu().numpy(), axis=1))


@cache
def unpacked_bytes(device: torch.device) -> Tensor:
    """Of every byte its eight bits, each a byte of its own: int64 (256,), so that looking up is one copy."""
    bits = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1)
    return torch.from_numpy(bits).view(torch.int64).reshape(256).to(device)


def keep_(values: Tensor, bits: Tensor) -> Tensor:
    """Zero, in place, the entries of `values` (rows, columns) whose bit is off; whatever they are, NaN included."""
    rows, columns = values.shape
    found = unpacked_bytes(bits.device).index_select(0, bits.reshape(-1).int()).view(torch.int8)
    mask = found.view(rows, -1)[:, :columns].neg()  # all bits on, or none
    integers = INTEGERS[values.element_size()]
    values.view(integers).bitwise_and_(mask.to(integers))
    return values


def pieces(length: int, width: int) -> Iterator[slice]:
    """Slices of `length`, each a multiple of 8 long (but the last), of about a tile at this width."""
    step = max(8, PRODUCT_TILE // max(1, width) // 8 * 8)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def of_columns(bits: Tensor, columns: slice) -> Tensor:
    """The bits of some columns; `columns` begins at a whole byte."""
    return bits[:, columns.start // 8 : (columns.stop + 7) // 8]


class MaskedProduct(torch.autograd.Function):
    """x (tokens, in), A (r, in), B (out, r), bits (out, ⌈in/8⌉), s → (tokens, out), in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bits: Tensor, scale: float) -> Tensor:
        """The product is made in the dtype of A and B, and cast to x's."""
        ctx.save_for_backward(x, a, b, bits)
        ctx.scale = scale
        found = x.new_empty(len(x), len(b))
        for rows in pieces(len(b), a.shape[1]):
            tile = keep_(torch.mm(b[rows], a).mul_(scale), bits[rows])
            found[:, rows] = x @ tile.to(x.dtype).T
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """By columns: what x and A are due is then complete in each tile, and only dB is summed, in B's dtype."""
        x, a, b, bits = ctx.saved_tensors
        for_x, for_a, for_b = ctx.needs_input_grad[:3]
        dx, da, db = torch.empty_like(x) if for_x else None, torch.zeros_like(a), torch.zeros_like(b)
        out = outputs[0].to(x.dtype)
        for columns in pieces(a.shape[1], len(b)):
            mask, factor = of_columns(bits, columns), a[:, columns]
            if dx is not None:
                dx[:, columns] = out @ keep_(torch.mm(b, factor).mul_(ctx.scale), mask).to(x.dtype)
            if for_a or for_b:
                slope = keep_((out.T @ x[:, columns]).to(b.dtype).contiguous(), mask)
                da[:, columns] = b.T @ slope
                db.addmm_(slope, factor.T)
        return dx, da.mul_(ctx.scale) if for_a else None, db.mul_(ctx.scale) if for_b else None, None, None


def masked_product(x: Tensor, a: Tensor, b: Tensor, bits: Tensor, scale: float) -> Tensor:
    """x·(s·(B·A) ∘ M)ᵀ for x (…, in) → (…, out). Under autocast x is cast down, and the tiles with it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(kind, enabled=False):
        found: Tensor = MaskedProduct.apply(flat, a, b, bits, scale)  # type: ignore[no-untyped-call]
    return found.reshape(*x.shape[:-1], len(b))
