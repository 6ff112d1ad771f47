"""KL of chunked logits: against autograd on whole ones, and against the definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loram import activations
from loram.training import cross_entropy, divergence
from loram.training.divergence import (
    TopK,
    against_hidden,
    against_top_k,
    hidden_error,
    summed_divergence,
    top_k,
)

POSITIONS, WIDTH, VOCABULARY = 37, 12, 50


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(weight: Tensor, cap: float | None = None) -> Any:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    config = SimpleNamespace(final_logit_softcapping=cap, vocab_size=len(weight))
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them short."""
    monkeypatch.setattr(activations, "CHUNK_BYTES", 4 * VOCABULARY * 16)


def exact(hidden: Tensor, teacher: Tensor, weight: Tensor, cap: float | None, t: float) -> Tensor:
    """t²·Σ KL by its definition, on whole logits."""

    def logs(states: Tensor) -> Tensor:
        logits = states @ weight.T
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return torch.log_softmax(logits / t, dim=1)

    wanted = logs(teacher)
    return t * t * (wanted.exp() * (wanted - logs(hidden))).sum()


def bucketed(logits: Tensor, p: Tensor, tokens: Tensor, t: float) -> Tensor:
    """t²·Σ KL between {the listed tokens, one bucket of all others}, by its definition."""
    q = torch.softmax(logits / t, dim=1)
    p_listed, q_listed = p.gather(1, tokens), q.gather(1, tokens)
    p_rest, q_rest = 1 - p_listed.sum(1), 1 - q_listed.sum(1)
    return t * t * ((p_listed * (p_listed / q_listed).log()).sum() + (p_rest * (p_rest / q_rest).log()).sum())


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    point = at.clone().requires_grad_(True)
    value = loss(point)
    value.backward()  # type: ignore[no-untyped-call]
    assert point.grad is not None
    return value.detach(), point.grad


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("t", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["hidden", "all tokens"])
def test_value_and_gradient_are_those_of_whole_logits(cap: float | None, t: float, kind: str) -> None:
    """Also a list of all tokens is the exact divergence: its bucket is empty."""
    hidden, teacher, weight = drawn(POSITIONS, WIDTH), drawn(POSITIONS, WIDTH, seed=1), drawn(VOCABULARY, WIDTH, seed=2)
    if kind == "hidden":
        compare = against_hidden(teacher, weight, cap, t)
    else:
        compare = against_top_k(top_k(cross_entropy.capped(teacher @ weight.T, cap) / t, VOCABULARY))
    found = gradient(lambda point: summed_divergence(model(weight, cap), point, compare, t), hidden)
    wanted = gradient(lambda point: exact(point, teacher.double(), weight.double(), cap, t), hidden.double())
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-6)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-6 * float(wanted[1].abs().max()))


@pytest.mark.parametrize("count", [1, 7, 49])
def test_the_rest_is_one_bucket(count: int) -> None:
    t = 1.5
    hidden, teacher, weight = drawn(POSITIONS, WIDTH), drawn(POSITIONS, WIDTH, seed=1), drawn(VOCABULARY, WIDTH, seed=2)
    cached = top_k(teacher @ weight.T / t, count)
    p = torch.softmax(teacher.double() @ weight.double().T / t, dim=1)
    assert set(cached.tokens[0].tolist()) == set(p[0].topk(count).indices.tolist())
    torch.testing.assert_close(
        cached.rest.double().exp(), 1 - p.gather(1, cached.tokens.long()).sum(1), rtol=1e-4, atol=1e-6
    )
    found = gradient(lambda h: summed_divergence(model(weight), h, against_top_k(cached), t), hidden)
    wanted = gradient(lambda h: bucketed(h @ weight.double().T, p, cached.tokens.long(), t), hidden.double())
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-4, atol=2e-6 * float(wanted[1].abs().max()))


def test_a_bucket_can_only_hide_divergence() -> None:
    """The data-processing inequality: merging tokens never makes the KL larger, and the more are listed the closer."""
    hidden, teacher, weight = drawn(POSITIONS, WIDTH), drawn(POSITIONS, WIDTH, seed=1), drawn(VOCABULARY, WIDTH, seed=2)
    values = [
        float(summed_divergence(model(weight), hidden, against_top_k(top_k(teacher @ weight.T, count)), 1.0))
        for count in (1, 4, 16, 50)
    ]
    assert values == sorted(values)
    assert values[0] > 0


def test_a_teacher_that_agrees_moves_nothing() -> None:
    hidden, weight = drawn(POSITIONS, WIDTH), drawn(VOCABULARY, WIDTH, seed=2)
    value, slope = gradient(
        lambda h: summed_divergence(model(weight), h, against_hidden(hidden, weight, None, 1.0), 1.0), hidden
    )
    assert value == 0
    assert not slope.any()


def test_certain_teachers_make_no_nan() -> None:
    """Mass that underflows in the bucket or at a token."""
    logits = torch.zeros(3, 5)
    logits[:, 2] = 500.0
    value, slope = divergence.bucket_divergence(torch.zeros(3, 5), top_k(logits, 2))
    assert torch.isfinite(value)
    assert torch.isfinite(slope).all()
    value, slope = divergence.bucket_divergence(logits, top_k(torch.zeros(3, 5), 2))
    assert torch.isfinite(value)
    assert torch.isfinite(slope).all()
    empty = TopK(torch.arange(5).expand(3, 5), torch.zeros(3, 5).log_softmax(1), torch.full((3,), float("-inf")))
    value, slope = divergence.bucket_divergence(torch.zeros(3, 5), empty)
    assert value == pytest.approx(0, abs=1e-6)
    assert slope.abs().max() < 1e-6


def test_hidden_error_is_relative() -> None:
    wanted = drawn(4, 6)
    assert float(hidden_error(wanted * 1.1, wanted)) == pytest.approx(0.01, rel=1e-4)
    assert float(hidden_error(1e3 * wanted * 1.1, 1e3 * wanted)) == pytest.approx(0.01, rel=1e-4)
