"""Gradients of decoder Linears with one block in memory; `backward_pass` goes through the model with them.

Going back from the end, each block is computed again from its input, this time with gradients. So every weight is read
twice, and what is in memory is one block, its gradients in fp32 and the activations of a few windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loram.blockwise.hidden import Hidden
from loram.blockwise.runner import Block, BlockRunner, Inputs, listening
from loram.checkpoint import all_finite
from loram.errors import MismatchError
from loram.progress import Progress
from loram.training.cross_entropy import summed_loss


def loss_slope(runner: BlockRunner, hidden: Hidden, windows: Tensor, progress: Progress) -> None:
    """Replace the output of the last block by the gradient of the loss in it.

    With a large vocabulary this takes as long as many blocks, so it is a piece of work of its own.
    """
    starts = range(0, len(hidden), runner.rows)
    progress.begin("loss", len(starts))
    with runner.head() as model, torch.enable_grad():
        for start in starts:
            part = slice(start, start + runner.rows)
            x = hidden.read(part).to(runner.device).detach().requires_grad_(True)
            states: Tensor = model.get_decoder().norm(x)[:, :-1]
            targets = windows[part, 1:].to(x.device)
            loss = summed_loss(model, states.reshape(-1, states.shape[-1]), targets.reshape(-1)) / targets.shape[1]
            hidden.write(part, torch.autograd.grad(loss, x)[0])
            progress.advance()
    progress.end()


def backward(block: Block, slope: Hidden, keep: bool, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """Carry the gradient in the block's output over to its input, and give those of its Linears where they are kept.

    `inputs` observe the Linears on the way, as in `Block.run`.
    """
    names = [weight.name for weight in block.runner.family.linears] if keep else []
    linears: dict[str, Any] = {name: block.module.get_submodule(name) for name in names}
    found: dict[str, Tensor] = {}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    with torch.enable_grad(), listening(block.module, inputs or {}):
        for part, x in block.batches():
            x = x.detach().requires_grad_(True)
            block(x).backward(slope.read(part).to(x.device))  # type: ignore[no-untyped-call]
            assert x.grad is not None
            slope.write(part, x.grad)
            gather(linears, found)
    for name, gradient in found.items():
        if not all_finite(gradient):
            raise MismatchError(
                f"layer {block.number}: the gradient of {name} is NaN or Inf; the model's weights are damaged: "
                "fetch them again"
            )
    return found


def gather(linears: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Add the gradients of some windows up, in fp32: bf16 would lose what is small beside the sum so far."""
    for name, linear in linears.items():
        gradient: Tensor = linear.weight.grad
        linear.weight.grad = None
        found[name] = found[name].add_(gradient) if name in found else gradient.float()
