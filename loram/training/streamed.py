"""Training with one decoder layer in memory: weights are read again wherever they are needed, twice a step.

Every layer reads its weights when it is called and lets go of them when it is done; its input is kept, and in the
backward pass the layer is computed again from it (torch's checkpointing), for which the weights are read once more.
To whatever wraps or trains the model it is an ordinary one, and what is trained comes out the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loram.blockwise import BlockRunner
from loram.checkpoint import BY_FLAG, Checkpoint
from loram.memory import return_large_blocks

BASE = ".base_layer"
"""What peft puts into the name of a weight that it adapts."""
RETURNED = 2**20
"""Bytes of a block that is given back to the system when it is freed: the holes that a layer's activations leave
between the inputs that are kept came to 1.1 GiB of 2.1 (SmolLM2-135M, 8 × 256 tokens in fp32). It costs time."""


@contextmanager
def streamed_model(folder: Path, dtype: str) -> Iterator[Any]:
    """A model's folder as `modeling.load_model` gives it, with one layer's weights in memory, while the context lasts.

    `dtype` is bf16 or fp32. The output head must stay as it is: it is read for the loss alone.
    """
    with Checkpoint(folder) as stored, BlockRunner(stored, dtype=BY_FLAG[dtype]) as runner:
        return_large_blocks(RETURNED)
        model, decoder = runner.model, runner.model.get_decoder()
        let_go(model)
        decoder.norm.weight = nn.Parameter(runner.read(f"{runner.family.norm.name}.weight"), requires_grad=False)
        decoder.embed_tokens.forward = partial(embed, runner, decoder.embed_tokens, decoder.embed_tokens.forward)
        for number, layer in enumerate(decoder.layers):
            layer.forward = partial(compute, runner, layer, f"{runner.family.prefix}{number}", layer.forward)
        head = model.get_output_embeddings()
        head.forward = partial(apply_head, runner, head, head.forward)
        model.holding_head = partial(holding, runner, head)
        yield model


def let_go(model: nn.Module) -> None:
    """Put nothing in place of every weight that is on `meta`: nothing can be moved to any device at no cost."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False))


def compute(
    runner: BlockRunner,
    layer: nn.Module,
    name: str,
    stock: Callable[..., Any],
    hidden: Tensor,
    *args: Any,
    **named: Any,
) -> Any:
    """The layer on its input; computed again in the backward pass where there is to be one."""

    def once(x: Tensor) -> Any:
        own = [key for key, weight in layer.named_parameters() if weight.numel() == 0]
        with runner.filled(layer, {key: runner.read(f"{name}.{key.replace(BASE, '')}") for key in own}):
            return stock(x, *args, **named)

    return checkpoint(once, hidden, use_reentrant=False) if torch.is_grad_enabled() else once(hidden)


def embed(runner: BlockRunner, table: nn.Module, stock: Callable[..., Tensor], ids: Tensor) -> Tensor:
    """The embeddings of some tokens, holding only their rows of the table."""
    with runner.holding_rows(table, ids) as places:
        return stock(places)


def apply_head(runner: BlockRunner, head: nn.Module, stock: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    """The output head on some positions."""
    with holding(runner, head):
        return stock(hidden)


def holding(runner: BlockRunner, head: Any) -> Any:
    """While the block runs, the output head has its weight."""
    if head.weight.numel():
        return nullcontext()
    return runner.filled(head, {"weight": runner.read(runner.head_name)})
