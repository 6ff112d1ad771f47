"""SparseGPT against optimal brain surgery done by brute force, and against the other ways to choose."""

from __future__ import annotations

import logging
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from loram.errors import MismatchError
from loram.families.sparsity import Sparsity, parse_sparsity
from loram.pruning.inverse import DAMPING, inverse_factor
from loram.pruning.lowest import lowest_elements
from loram.pruning.sparsegpt import sparsegpt
from loram.pruning.wanda import WANDA

HALF = Sparsity(Fraction(1, 2))


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * 0.3 + torch.eye(width)
    scales = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return torch.randn(tokens, width, generator=generator) @ mixing * scales


def damped(moment: Tensor) -> Tensor:
    moment = moment.double().clone()
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    return moment


def surgeon(weight: Tensor, moment: Tensor, sparsity: Sparsity, block: int) -> tuple[Tensor, Tensor]:
    """OBS as its equations say: for every column the inverse of the *remaining* H anew, in fp64.

    An element that goes, wⱼ → 0, changes those behind it by −wⱼ/[H⁻¹]ⱼⱼ · [H⁻¹]ⱼ. Which go is decided for a
    whole block (or group) at its first column.
    """
    w, hessian = weight.double().clone(), damped(moment)
    gone = torch.zeros_like(w, dtype=torch.bool)
    step = sparsity.group or block
    for column in range(w.shape[1]):
        if column % step == 0:
            last = min(column + step, w.shape[1])
            diagonal = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(column, last)])
            scores = w[:, column:last] ** 2 / diagonal
            for row in range(w.shape[0]) if sparsity.group else [slice(None)]:
                flat = scores[row].reshape(-1)
                size = w.shape[0]
                count = sparsity.removed(size * last) - sparsity.removed(size * column)
                count = step - sparsity.keep if sparsity.group else count
                mark = torch.zeros(flat.numel(), dtype=torch.bool)
                mark[torch.argsort(flat, stable=True)[:count]] = True
                gone[row, column:last] = mark.reshape(scores[row].shape)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = w[:, column] * gone[:, column] / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
        w[gone[:, column], column] = 0
    return w, gone


@pytest.mark.parametrize("sparsity", [HALF, Sparsity(Fraction("0.55")), parse_sparsity("2:4"), parse_sparsity("1:4")])
@pytest.mark.parametrize("width", [24, 160])
def test_it_is_optimal_brain_surgery(sparsity: Sparsity, width: int) -> None:
    x = correlated(400, width)
    weights = [torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) for rows in (7, 5)]
    moment = x.T @ x
    for weight, (found, gone) in zip(weights, sparsegpt(weights, moment, sparsity), strict=True):
        expected, mask = surgeon(weight, moment, sparsity, 128)
        agree = (gone == mask).all(1)
        assert agree.float().mean() > (0.99 if width < 128 else 0.7)  # fp32 may part a tie of the second block
        torch.testing.assert_close(found[agree].double(), expected[agree], rtol=2e-3, atol=2e-4)
        assert not found[gone].any()


def test_what_stays_is_the_least_squares_solution_of_the_last_group() -> None:
    """With one block and the elements that go all in front, OBS leaves the ridge solution on those that stay."""
    width = 8
    x = correlated(100, width).double()
    moment = damped(x.T @ x)
    weight = torch.randn(1, width).double()
    weight[:, :4] *= 1e-6  # these go
    ((found, gone),) = sparsegpt([weight.float()], x.T @ x, HALF)
    assert gone.tolist() == [[True] * 4 + [False] * 4]
    target = weight @ moment
    best = torch.linalg.solve(moment[4:, 4:], target[0, 4:])
    torch.testing.assert_close(found[0, 4:].double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [HALF, parse_sparsity("2:4")])
def test_with_independent_inputs_it_is_magnitude(sparsity: Sparsity) -> None:
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    ((found, gone),) = sparsegpt([weight], torch.eye(64), sparsity)
    expected = (
        lowest_elements(weight.abs(), sparsity)
        if sparsity.group
        else lowest_elements(weight.abs().reshape(1, -1), sparsity).reshape(weight.shape)
    )
    assert torch.equal(gone, expected)
    torch.testing.assert_close(found, weight.masked_fill(gone, 0))


@pytest.mark.parametrize("ratio", ["0.5", "0.55", "0.3", "1/7"])
@pytest.mark.parametrize("width", [64, 128, 300])
def test_exact_counts(ratio: str, width: int) -> None:
    x = correlated(500, width)
    weights = [torch.randn(rows, width) for rows in (3, 10, 6)]
    for weight, (found, gone) in zip(weights, sparsegpt(weights, x.T @ x, Sparsity(Fraction(ratio))), strict=True):
        assert int(gone.sum()) == int(Fraction(ratio) * weight.numel()) == int((found == 0).sum())
        assert found.shape == gone.shape == weight.shape


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3", "3:5", "10:150"])
def test_exact_patterns(pattern: str) -> None:
    sparsity = parse_sparsity(pattern)
    width = sparsity.group * (300 // sparsity.group)
    x = correlated(500, width)
    ((found, gone),) = sparsegpt([torch.randn(5, width).bfloat16()], x.T @ x, sparsity)
    assert gone.reshape(-1, sparsity.group).sum(1).unique().tolist() == [sparsity.group - sparsity.keep]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found == 0, gone)


def test_stacked_weights_are_solved_as_if_alone() -> None:
    x = correlated(500, 200)
    weights = [torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows)) for rows in (16, 40)]
    together = sparsegpt(weights, x.T @ x, HALF)
    for weight, (found, gone) in zip(weights, together, strict=True):
        ((alone, mask),) = sparsegpt([weight], x.T @ x, HALF)
        assert (gone == mask).float().mean() > 0.999
        assert (found - alone).norm() < 1e-3 * alone.norm()


@pytest.mark.parametrize("sparsity", [HALF, parse_sparsity("2:4")])
def test_reconstruction_is_better_than_wanda_and_wanda_than_magnitude(sparsity: Sparsity) -> None:
    x = correlated(800, 160, seed=5)
    weight = torch.randn(64, 160, generator=torch.Generator().manual_seed(6))
    moment = x.T @ x

    def error(small: Tensor) -> float:
        return float(((small - weight) @ x.T).norm() / (weight @ x.T).norm())

    magnitude = weight.masked_fill(lowest_elements(weight.abs(), sparsity), 0)
    wanda = weight.masked_fill(lowest_elements(WANDA.element(weight, moment.diagonal().sqrt()), sparsity), 0)
    ((ours, _),) = sparsegpt([weight], moment, sparsity)
    assert error(ours) < 0.95 * error(wanda)
    assert error(wanda) < 0.9 * error(magnitude)


def test_dead_inputs_go_first() -> None:
    x = correlated(300, 32)
    x[:, [3, 17]] = 0
    ((found, gone),) = sparsegpt([torch.randn(6, 32)], x.T @ x, Sparsity(Fraction(1, 8)))
    assert gone[:, [3, 17]].all()
    assert not found[:, [3, 17]].any()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("size", [5, 128, 129, 400])
def test_the_factor_is_that_of_two_factorizations(size: int) -> None:
    x = correlated(3 * size, size).double()
    moment = damped(x.T @ x)
    usual = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    torch.testing.assert_close(inverse_factor(x.T @ x, "x"), usual, rtol=1e-6, atol=1e-9)


def test_more_damping_with_a_warning_then_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    x = correlated(200, 16)
    moment = x.T @ x
    moment[0, 1] = moment[1, 0] = 1.05 * (moment[0, 0] * moment[1, 1]).sqrt() + moment.diagonal().mean() * 0.05
    with caplog.at_level(logging.WARNING):
        ((found, _),) = sparsegpt([torch.randn(4, 16)], moment, HALF, "layers.3.mlp.up_proj")
    assert "layers.3.mlp.up_proj is not positive definite with damping 0.01; trying 0.1" in caplog.text
    assert torch.isfinite(found).all()
    for broken in (-moment, torch.zeros(16, 16), moment * float("nan")):
        with pytest.raises(MismatchError, match=r"input of layers\.3\.mlp\.up_proj is not positive definite, whatever"):
            sparsegpt([torch.randn(4, 16)], broken, HALF, "layers.3.mlp.up_proj")


def test_fewer_tokens_than_inputs_still_works() -> None:
    x = correlated(20, 64)
    ((found, gone),) = sparsegpt([torch.randn(8, 64)], x.T @ x, HALF)
    assert torch.isfinite(found).all()
    assert int(gone.sum()) == 8 * 32
