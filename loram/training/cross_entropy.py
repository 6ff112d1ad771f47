"""Cross-entropy without whole logits: the output head is applied to a few positions at a time.

With a frozen head, as in LoRA training, the gradient is computed in the same pass as the loss, so that each chunk's
logits are made once and are gone afterwards; a trained head is recomputed chunk by chunk in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loram.activations import chunk_rows as chunk_rows
from loram.data.collate import IGNORED

PASSED = ("attention_mask", "position_ids")


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits with the soft cap that some configs name."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def soft_cap(model: Any) -> float | None:
    """The soft cap of a model's logits, if it has one."""
    found: float | None = getattr(model.config, "final_logit_softcapping", None)
    return found


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """fp32 logits of some positions, with the soft cap that some configs name."""
    return capped(model.get_output_embeddings()(hidden).float(), soft_cap(model))


def position_losses(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, in fp32, of each hidden state (positions, width) against its next token; no gradients."""
    rows = chunk_rows(int(model.config.vocab_size))
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        wanted = targets[piece].to(hidden.device)
        losses[piece] = nn.functional.cross_entropy(head_logits(model, hidden[piece]), wanted, reduction="none")
    return losses


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden states under a head that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, cap: float | None) -> Tensor:
        """The loss, and its gradient laid by for the backward pass."""
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = chunk_rows(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                piece, wanted = slice(start, start + rows), targets[start : start + rows, None]
                logits = capped((hidden[piece].to(weight.dtype) @ weight.T).float(), cap)
                scale = logits.logsumexp(dim=1, keepdim=True)
                total += (scale - logits.gather(1, wanted)).sum()
                slope = None if cap is None else 1 - (logits / cap) ** 2
                share = logits.sub_(scale).exp_()
                share.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=share.dtype))
                share = share if slope is None else share.mul_(slope)
                gradient[piece] = (share.to(weight.dtype) @ weight).to(gradient.dtype)
                del logits, share, slope  # else they are there beside those of the next positions
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def summed_loss(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, in fp32, of hidden states (positions, width) against their next tokens."""
    head: Any = model.get_output_embeddings()
    cap = soft_cap(model)
    plain = type(head) is nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad
    # fp16 gradients need the loss scale from the start, or small ones vanish.
    if plain and hidden.requires_grad and head.weight.dtype != torch.float16:
        found: Tensor = FrozenHeadLoss.apply(hidden, targets, head.weight, cap)  # type: ignore[no-untyped-call]
        return found

    def piece(part: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(capped(head(part).float(), cap), wanted, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32) + 0.0 * hidden.sum().float()
    rows = chunk_rows(int(model.config.vocab_size))
    for start in range(0, len(hidden), rows):
        part, wanted = hidden[start : start + rows], targets[start : start + rows]
        total = total + checkpoint(piece, part, wanted, use_reentrant=False)
    return total


@contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """While the block runs, the model's forward gives the loss alone: summed, over `num_items_in_batch`.

    The model is changed in place, so that it works under peft and under whatever wraps it for several processes.
    """

    def forward(
        input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        inputs = {name: value for name, value in inputs.items() if value is not None and name in PASSED}
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False, **inputs)[0]
        targets = labels[:, 1:]
        carry = targets != IGNORED
        count = carry.sum() if num_items_in_batch is None else num_items_in_batch
        with getattr(model, "holding_head", nullcontext)():
            return {"loss": summed_loss(model, hidden[:, :-1][carry], targets[carry]) / count}

    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        model.forward = before
        if before is None:
            del model.forward
