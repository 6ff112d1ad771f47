"""Gradients of every decoder Linear with one block in memory: forward keeping each block's input, then backward.

Going back from the end, each block is computed again from its input, this time with gradients. So every weight is read
twice, and what is in memory is one block, its gradients and the activations of a few windows. The inputs of all blocks
are kept: in memory where they fit `hidden_memory`, else in the runner's spill folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from loram.blockwise.hidden import Hidden
from loram.blockwise.runner import Block, BlockRunner, Inputs, listening
from loram.checkpoint import all_finite
from loram.errors import MismatchError
from loram.training.cross_entropy import summed_loss


def gradients(
    runner: BlockRunner, windows: Tensor, layers: Collection[int] | None = None
) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """∂L/∂W of the Linears of `layers` (all of them by default), from the last block to the first.

    Yields the block with its weights and {weight name: (out, in)}, in the runner's dtype: fp32 wherever small
    gradients matter. L is the sum over the windows (N, T) of a window's mean next-token loss. Raises MismatchError
    where a gradient is not finite.
    """
    wanted = sorted(range(runner.layers) if layers is None else layers)
    if not wanted:
        return
    states, slope = forward(runner, windows, wanted[0])
    loss_slope(runner, slope, windows)
    for number in reversed(range(wanted[0], runner.layers)):
        with runner.block(number, states[number]) as block:
            found = backward(block, slope, number in wanted)
            if found:
                yield block, found
        states.pop(number).close()


def forward(runner: BlockRunner, windows: Tensor, first: int) -> tuple[dict[int, Hidden], Hidden]:
    """The inputs of the blocks from `first` on, and the output of the last."""
    hidden = runner.embed(windows)
    states = {}
    for number in range(runner.layers):
        with runner.block(number, hidden) as block:
            if number < first:
                block.run()
                continue
            after = runner.hidden(windows.shape, copies=runner.layers - first + 1)
            block.run(into=after)
        states[number], hidden = hidden, after
    return states, hidden


def loss_slope(runner: BlockRunner, hidden: Hidden, windows: Tensor) -> None:
    """Replace the output of the last block by the gradient of the loss in it."""
    with runner.head() as model, torch.enable_grad():
        for start in range(0, len(hidden), runner.rows):
            part = slice(start, start + runner.rows)
            x = hidden.read(part).to(runner.device).detach().requires_grad_(True)
            states: Tensor = model.get_decoder().norm(x)[:, :-1]
            targets = windows[part, 1:].to(x.device)
            loss = summed_loss(model, states.reshape(-1, states.shape[-1]), targets.reshape(-1)) / targets.shape[1]
            hidden.write(part, torch.autograd.grad(loss, x)[0])


def backward(block: Block, slope: Hidden, keep: bool, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """Carry the gradient in the block's output over to its input, and give those of its Linears where they are kept.

    `inputs` observe the Linears on the way, as in `Block.run`.
    """
    names = [weight.name for weight in block.runner.family.linears] if keep else []
    linears: dict[str, Any] = {name: block.module.get_submodule(name) for name in names}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    with torch.enable_grad(), listening(block.module, inputs or {}):
        for part, x in block.batches():
            x = x.detach().requires_grad_(True)
            block(x).backward(slope.read(part).to(x.device))  # type: ignore[no-untyped-call]
            assert x.grad is not None
            slope.write(part, x.grad)
    found: dict[str, Tensor] = {name: linear.weight.grad for name, linear in linears.items()}
    for name, gradient in found.items():
        if not all_finite(gradient):
            raise MismatchError(f"layer {block.number}: the gradient of {name} is NaN or Inf; the weights are damaged")
    return found
