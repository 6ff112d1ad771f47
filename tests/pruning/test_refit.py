"""The refit against a least-squares solver that sees the inputs themselves, not their second moment."""

from __future__ import annotations

import pytest
import torch

from loram.pruning.refit import DAMPING, refit, refit_matrix


def ridge(x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """argmin ‖X·Wᵀ − X_K·W′ᵀ‖² + λ·m·‖W′‖² by QR, with m the mean square column norm of X_K."""
    inner = x[:, kept]
    size = kept.numel()
    penalty = (damping * inner.square().sum(0).mean()).sqrt() * torch.eye(size, dtype=torch.float64)
    left = torch.cat([inner, penalty])
    right = torch.cat([x @ weight.T, torch.zeros(size, weight.shape[0], dtype=torch.float64)])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("damping", [DAMPING, 1e-6, 1.0])
def test_refit_is_ridge_regression_on_the_kept_features(damping: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    kept = torch.tensor([0, 3, 4, 7, 11])
    found = weight @ refit_matrix(x.T @ x, kept, damping)
    assert torch.allclose(found, ridge(x, weight, kept, damping), rtol=1e-8, atol=1e-10)


def test_refit_beats_the_plain_cut() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    kept = torch.arange(6)
    repaired = refit(weight, refit_matrix(x.T @ x, kept))
    target = x @ weight.T
    assert (x[:, kept] @ repaired.T - target).norm() < 0.8 * (x[:, kept] @ weight[:, kept].T - target).norm()


def test_independent_features_and_no_features_stay_as_they_are() -> None:
    weight, kept = torch.randn(3, 6), torch.tensor([1, 4])
    assert torch.allclose(refit(weight, refit_matrix(torch.eye(6), kept, 0.0)), weight[:, kept])
    assert torch.equal(refit(weight, refit_matrix(torch.zeros(6, 6), kept)), weight[:, kept])


def test_a_dead_feature_does_not_break_the_solver() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 4] = 0
    matrix = refit_matrix(x.T @ x, torch.tensor([1, 4]))
    assert torch.isfinite(matrix).all()
    assert matrix[:, 1].abs().max() < 1e-12


def test_the_dtype_is_the_weights() -> None:
    matrix = refit_matrix(torch.eye(6), torch.tensor([1, 4]))
    assert refit(torch.randn(3, 6).bfloat16(), matrix).dtype == torch.bfloat16
