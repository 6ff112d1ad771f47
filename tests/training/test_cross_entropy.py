"""The chunked loss against the plain one: value and gradients, with soft caps, trained heads and every family."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from stock_models import GROUPED, VOCABULARY, make, tokens
from torch import nn

from loram.options import TrainOptions
from loram.training import cross_entropy
from loram.training.cross_entropy import summed_loss, without_logits
from loram.training.lora import wrap

CASES = [*((name, None) for name in GROUPED), ("gemma3_text-gqa", 2.5)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one not full."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocabulary: 7)


def plain_loss(model: Any, labels: torch.Tensor, count: int) -> torch.Tensor:
    """What transformers computes, summed over the tokens that carry loss."""
    logits = model(input_ids=tokens(1), attention_mask=torch.ones_like(labels)).logits.float()
    flat = logits[:, :-1].reshape(-1, VOCABULARY)
    return nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum") / count


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 12:] = -100
    return labels


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "cap"), CASES)
@pytest.mark.parametrize("targets", [("all-linear",), ("all-linear", "lm_head")])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_loss_and_gradients_are_the_plain_ones(name: str, targets: tuple[str, ...], cap: float | None) -> None:
    base = make(name)
    if cap is not None:
        base.config.final_logit_softcapping = cap
    model = wrap(base, TrainOptions(model="m", rank=3, dropout=0.0, targets=targets))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    labels = labels_of(tokens(1))
    plain = plain_loss(model, labels, 23)
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    inputs = {"input_ids": tokens(1), "attention_mask": torch.ones_like(labels), "labels": labels}
    with without_logits(model.get_base_model()):
        found = model(**inputs, num_items_in_batch=23)
    assert found.keys() == {"loss"}
    found["loss"].backward()
    assert model(**inputs).logits.shape == (*labels.shape, VOCABULARY)
    torch.testing.assert_close(found["loss"], plain, rtol=1e-6, atol=1e-6)
    assert gradients(model).keys() == expected.keys() != set()
    for key, gradient in gradients(model).items():
        assert (gradient - expected[key]).norm() <= 1e-6 * max(float(expected[key].norm()), 1.0), key


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits: list[weakref.ref[torch.Tensor]] = []
    real = torch.Tensor.logsumexp

    def watching(self: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        seen.append(len(self))
        assert not any(earlier() is not None for earlier in logits), "an earlier chunk is still in memory"
        logits.append(weakref.ref(self))
        return real(self, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "logsumexp", watching)
    model = make("llama-gqa").requires_grad_(False)
    hidden = torch.randn(30, model.config.hidden_size, requires_grad=True)
    summed_loss(model, hidden, torch.randint(0, VOCABULARY, (30,))).backward()
    assert seen == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_that_carries_loss_is_a_loss_of_zero(trained: bool) -> None:
    model = make("llama-gqa").requires_grad_(trained)
    hidden = torch.randn(0, model.config.hidden_size, requires_grad=True)
    loss = summed_loss(model, hidden, torch.randint(0, VOCABULARY, (0,)))
    loss.backward()
    assert loss.item() == 0


def test_the_chunk_shrinks_with_the_vocabulary() -> None:
    from importlib import reload

    assert reload(cross_entropy).chunk_rows(128_256) * 128_256 * 4 <= 2**26
    assert cross_entropy.chunk_rows(10**9) == 16
