"""The masked product against the dense formula written in torch: values, gradients, what is kept, what is ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loram.training import masked_product as module
from loram.training.masked_product import keep_, masked_product, packed_rows

OUT, WIDTH, RANK, TOKENS, SCALE = 37, 45, 3, 11, 0.75
"""Odd on purpose: neither rows nor columns end at a whole byte or tile."""
TILES = pytest.mark.parametrize("tile", [1, 400, 2**22], ids=["8 rows", "some rows", "whole"])


def drawn(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, A, B, the mask, and the gradient of the result."""
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(True)

    mask = torch.rand(OUT, WIDTH, generator=draw) < 0.5
    return numbers(TOKENS, WIDTH), numbers(RANK, WIDTH), numbers(OUT, RANK), mask, numbers(TOKENS, OUT).detach()


def dense(x: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return x @ ((SCALE * (b @ a)) * mask).T


@TILES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
def test_value_and_gradients_are_the_dense_ones(
    dtype: torch.dtype, tolerance: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRODUCT_TILE", tile)
    x, a, b, mask, slope = drawn(dtype)
    found, wanted = masked_product(x, a, b, packed_rows(mask), SCALE), dense(x, a, b, mask)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for mine, oracle in zip(
        torch.autograd.grad(found, (x, a, b), slope), torch.autograd.grad(wanted, (x, a, b), slope), strict=True
    ):
        torch.testing.assert_close(mine, oracle, rtol=tolerance, atol=tolerance)


def test_gradients_by_differences() -> None:
    x, a, b, mask, _ = drawn(torch.float64, 3)
    bits = packed_rows(mask)
    assert torch.autograd.gradcheck(lambda *inputs: masked_product(*inputs, bits, SCALE), (x, a, b))


@TILES
def test_masked_entries_of_the_gradient_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With x the identity, the gradient of the weight is that of the result, transposed: any entry can be set."""
    monkeypatch.setattr(module, "PRODUCT_TILE", tile)
    _, a, b, mask, _ = drawn(torch.float32)
    draw = torch.Generator().manual_seed(9)
    slope = torch.randn(OUT, WIDTH, generator=draw)

    def gradients(of_weight: Tensor) -> tuple[Tensor, ...]:
        result = masked_product(torch.eye(WIDTH), a, b, packed_rows(mask), SCALE)
        return torch.autograd.grad(result, (a, b), of_weight.T)

    before = gradients(slope)
    altered = slope.masked_fill(~mask, 1e30)
    assert all(torch.equal(*pair) for pair in zip(before, gradients(altered), strict=True))
    kept = slope.clone()
    row, column = mask.nonzero()[0].tolist()
    kept[row, column] += 1
    assert not any(torch.equal(*pair) for pair in zip(before, gradients(kept), strict=True))


def test_a_row_that_is_masked_whole_trains_nothing() -> None:
    x, a, b, mask, slope = drawn(torch.float32)
    mask[4], mask[:, 7] = False, False
    result = masked_product(x, a, b, packed_rows(mask), SCALE)
    assert not result[:, 4].any()
    da, db = torch.autograd.grad(result, (a, b), slope)
    assert not db[4].any()
    assert not da[:, 7].any()
    assert db.any(1).sum() == OUT - 1
    assert da.any(0).sum() == WIDTH - 1


def test_nothing_of_the_weights_size_is_kept() -> None:
    """Autograd keeps x, A, B and the bits: nothing else, and no float for each entry of the weight."""
    x, a, b, mask, _ = drawn(torch.float32)
    bits = packed_rows(mask)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        masked_product(x, a, b, bits, SCALE)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, a, b, bits)}
    assert sum(tensor.nbytes for tensor in kept) == x.nbytes + a.nbytes + b.nbytes + bits.nbytes
    assert bits.nbytes == OUT * -(-WIDTH // 8)


def test_under_autocast_x_is_cast_and_the_factors_stay() -> None:
    x, a, b, mask, slope = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = masked_product(x, a, b, packed_rows(mask), SCALE)
    assert result.dtype == torch.bfloat16
    wanted = dense(x, a, b, mask)
    gap = (result.float() - wanted).norm() / wanted.norm()
    assert gap < 0.01
    found = torch.autograd.grad(result, (x, a, b), slope.bfloat16())
    for mine, oracle in zip(found, torch.autograd.grad(wanted, (x, a, b), slope), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - oracle).norm() / oracle.norm() < 0.02


def test_any_leading_shape_and_frozen_factors() -> None:
    x, a, b, mask, _ = drawn(torch.float64)
    bits = packed_rows(mask)
    flat = masked_product(x, a, b, bits, SCALE)
    folded = masked_product(x.reshape(1, TOKENS, 1, WIDTH), a, b, bits, SCALE)
    assert folded.shape == (1, TOKENS, 1, OUT)
    assert torch.equal(folded.reshape(TOKENS, OUT), flat)
    alone = masked_product(x.detach(), a.detach(), b, bits, SCALE)
    (db,) = torch.autograd.grad(alone.sum(), (b,))
    torch.testing.assert_close(db, torch.autograd.grad(flat.sum(), (b,))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeping_is_exact_for_whatever_was_there(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(5)
    mask = torch.rand(OUT, WIDTH, generator=draw) < 0.3
    values = torch.randn(OUT, WIDTH, generator=draw).to(dtype)
    values[0, ::3], values[1, ::3], values[2, ::3] = torch.inf, torch.nan, -0.0
    wanted: Any = torch.where(mask, values, torch.zeros((), dtype=dtype))
    found = keep_(values.clone(), packed_rows(mask))
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
