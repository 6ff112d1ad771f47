"""The refit against a least-squares solver that sees the inputs themselves, not their second moment."""

from __future__ import annotations

import pytest
import torch

from loram.pruning.damping import DAMPING
from loram.pruning.refit import Refit


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
    found = Refit.of(x.T @ x, kept, damping)(weight)
    assert torch.allclose(found, ridge(x, weight, kept, damping), rtol=1e-8, atol=1e-10)


def test_refit_beats_the_plain_cut() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    kept = torch.arange(6)
    repaired = Refit.of(x.T @ x, kept)(weight)
    target = x @ weight.T
    assert (x[:, kept] @ repaired.T - target).norm() < 0.8 * (x[:, kept] @ weight[:, kept].T - target).norm()


def test_independent_features_and_no_features_stay_as_they_are() -> None:
    weight, kept = torch.randn(3, 6), torch.tensor([1, 4])
    assert torch.allclose(Refit.of(torch.eye(6), kept, 0.0)(weight), weight[:, kept])
    assert torch.equal(Refit.of(torch.zeros(6, 6), kept)(weight), weight[:, kept])


def test_a_dead_feature_does_not_break_the_solver() -> None:
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    x[:, 4] = 0
    found = Refit.of(x.T @ x, torch.tensor([1, 4]))(weight)
    assert torch.isfinite(found).all()
    assert found[:, 1].abs().max() < 1e-12


def test_rows_are_repaired_one_by_one() -> None:
    x, weight, kept = torch.randn(90, 8), torch.randn(7, 8), torch.tensor([0, 2, 5])
    refit = Refit.of(x.T @ x, kept)
    assert torch.allclose(torch.cat([refit(weight[:3]), refit(weight[3:])]), refit(weight), atol=1e-6)


def test_all_features_kept_is_the_damping_alone() -> None:
    x, weight = torch.randn(90, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    everything = torch.arange(8)
    assert torch.allclose(Refit.of(x.T @ x, everything, 0.0)(weight), weight, atol=1e-12)
    assert torch.allclose(Refit.of(x.T @ x, everything, 0.1)(weight), ridge(x, weight, everything, 0.1), atol=1e-10)


def test_a_moment_in_fp32_gives_what_one_in_fp64_does() -> None:
    x = torch.randn(300, 40, dtype=torch.float64) @ torch.randn(40, 40, dtype=torch.float64)
    weight, kept = torch.randn(9, 40, dtype=torch.float64), torch.arange(0, 40, 2)
    exact = Refit.of(x.T @ x, kept)(weight)
    assert (Refit.of((x.T @ x).float(), kept)(weight.float()) - exact).norm() < 1e-3 * exact.norm()


def test_the_dtype_is_the_weights() -> None:
    assert Refit.of(torch.eye(6), torch.tensor([1, 4]))(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
