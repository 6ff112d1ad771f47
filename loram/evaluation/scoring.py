"""The large model's loss under an adapter that is changed again and again: in memory, or one block at a time.

Both give the same numbers: the update is added to each Linear's output in fp32, as PEFT does, and not to its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from loram.adapter import Adapter, LoraPair
from loram.blockwise import BlockRunner, Hidden
from loram.checkpoint import BY_FLAG, Checkpoint
from loram.data.collate import collate
from loram.data.encoding import EncodedRow
from loram.device import place
from loram.evaluation.losses import RowLosses, measure
from loram.evaluation.subjects import attach
from loram.memory import available_bytes
from loram.modeling import load_model

Score = Callable[[Adapter, Sequence[EncodedRow]], RowLosses]
"""The loss of every row under an adapter, all of one set of modules, ranks and scales."""
ROOM = 1.2
"""Free memory that is asked for, over the size of the weights."""


def fits(folder: Path, dtype: str) -> bool:
    """Whether the whole model can be in memory, on the device that it would run on."""
    with Checkpoint(folder) as checkpoint:
        needed = sum(math.prod(entry.shape) for entry in checkpoint.entries.values()) * BY_FLAG[dtype].itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_bytes()
    return needed * ROOM <= free


@contextmanager
def resident(folder: Path, adapter: Adapter, dtype: str, batch: int) -> Iterator[Score]:
    """Score with the whole model in memory, PEFT's adapter on it; only B is changed between two scores."""
    with TemporaryDirectory() as scratch:
        adapter.save(scratch, "large")
        adapted = attach(place(load_model(folder, dtype=dtype)), Path(scratch))

    def score(changed: Adapter, rows: Sequence[EncodedRow]) -> RowLosses:
        base = adapted.get_base_model()
        for module, pair in changed.pairs.items():
            layer = base.get_submodule(module)
            held = layer.lora_embedding_B["default"] if pair.embedding else layer.lora_B["default"].weight
            held.data.copy_(pair.b)
        return measure(adapted, list(rows), batch)

    yield score


@contextmanager
def streamed(folder: Path, adapter: Adapter, dtype: str, batch: int) -> Iterator[Score]:
    """Score with one block of the model in memory."""
    with Checkpoint(folder) as checkpoint, BlockRunner(checkpoint, dtype=BY_FLAG[dtype], rows=batch) as runner:
        yield partial(stream, runner)


def stream(runner: BlockRunner, adapter: Adapter, rows: Sequence[EncodedRow]) -> RowLosses:
    """All rows, padded to the longest, through block after block and the head."""
    batch = collate(rows)
    hidden = runner.embed(batch["input_ids"])
    embedding = adapter.pairs.get(runner.family.embedding.name)
    if embedding is not None:
        add_to_embeddings(runner, hidden, batch["input_ids"], embedding)
    for block in runner.blocks(hidden):
        with updated(block.module, f"{block.name}.", adapter):
            block.run()
    with updated(runner.model, "", adapter, only=runner.family.head.name):
        nll, tokens = runner.losses(hidden, batch["labels"])
    hidden.close()
    return RowLosses(tuple(nll.tolist()), tuple(tokens.tolist()))


@contextmanager
def updated(module: nn.Module, prefix: str, adapter: Adapter, only: str = "") -> Iterator[None]:
    """While the block runs, the Linears under `prefix` (or the `only` one) give what they give with the adapter."""
    with ExitStack() as hooks:
        for name, pair in adapter.pairs.items():
            if name == only or (not only and name.startswith(prefix)):
                linear = module.get_submodule(name.removeprefix(prefix))
                hooks.callback(linear.register_forward_hook(update_hook(pair)).remove)
        yield


def update_hook(pair: LoraPair) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that adds s·x·Aᵀ·Bᵀ."""
    factors: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not factors:
            factors.extend(value.to(output.device, torch.float32).T for value in (pair.a, pair.b))
        update: Tensor = inputs[0].float() @ factors[0] @ factors[1] * pair.scale
        return (output + update).to(output.dtype)

    return hook


def add_to_embeddings(runner: BlockRunner, hidden: Hidden, windows: Tensor, pair: LoraPair) -> None:
    """Add an embedding's update, s·(B·A)ᵀ by rows, to what the table gave; Gemma multiplies both."""
    table: Any = runner.model.get_decoder().embed_tokens
    by = pair.scale * float(getattr(table, "scalar_embed_scale", 1.0))
    for start in range(0, len(hidden), runner.rows):
        part = slice(start, start + runner.rows)
        update = pair.a.float().T[windows[part]] @ pair.b.float().T
        states = hidden.read(part)
        hidden.write(part, (states + update * by).to(states.dtype))
