"""BlockRunner and Block: the stock model without weights, whose layers are filled, run and emptied in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from loram.blockwise.hidden import Hidden
from loram.checkpoint import Checkpoint, all_finite
from loram.data.collate import IGNORED
from loram.device import native_bf16, pick_device
from loram.errors import MismatchError
from loram.families import Family, family_of
from loram.memory import return_holes, return_large_blocks
from loram.modeling import empty_model
from loram.training.cross_entropy import position_losses

Edit = Callable[[str, Tensor], Tensor]
Inputs = Mapping[str, Callable[[Tensor], None]]
"""{weight name of a layer: called with its Linear's input, (tokens, in)}."""
Around = Callable[[Tensor, Tensor], None]
"""Called with a block's input and output, (rows, T, hidden)."""


class _Seen(Exception):
    """All that was to be observed has been."""


@dataclass
class Block:
    """One decoder layer with its weights, inside the loop over `BlockRunner.blocks`."""

    number: int
    module: nn.Module
    hidden: Hidden
    runner: BlockRunner
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def name(self) -> str:
        """The layer's module name: `model.layers.3`."""
        return f"{self.runner.family.prefix}{self.number}"

    def on(self, hidden: Hidden) -> Block:
        """The same layer, with other hidden states as its input; their windows may have another length."""
        return replace(self, hidden=hidden, arguments=self.runner.arguments(hidden.shape[1])[self.number])

    def __call__(self, x: Tensor) -> Tensor:
        """The layer on some windows (rows, T, hidden), on the runner's device; with gradients where they are on."""
        positional, named = self.arguments
        found = self.module(x, *positional, **named)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """The block's input, a few windows at a time, on the runner's device: (which, (rows, T, hidden))."""
        for start in range(0, len(self.hidden), self.runner.rows):
            part = slice(start, min(start + self.runner.rows, len(self.hidden)))
            yield part, self.hidden.read(part).to(self.runner.device)

    @torch.no_grad()
    def run(self, inputs: Inputs | None = None, around: Around | None = None, into: Hidden | None = None) -> None:
        """All windows through the block; the outputs overwrite its inputs, or go `into` other hidden states.

        Raises MismatchError where an output is not finite.
        """
        target = self.hidden if into is None else into
        self._pass(inputs, around, target.write)

    @torch.no_grad()
    def observe(self, inputs: Inputs | None = None, around: Around | None = None) -> None:
        """As `run`, but the outputs are forgotten and the hidden states stay the block's inputs.

        Where nobody looks at outputs either, a block is left as soon as every observer has seen its input: what the
        last Linear would give is of no use.
        """
        if around is not None or not inputs:
            return self._pass(inputs, around, lambda part, y: None)
        seen: set[str] = set()

        def stopping(name: str, observer: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
            def observe(x: Tensor) -> None:
                observer(x)
                seen.add(name)
                if len(seen) == len(inputs):
                    raise _Seen

            return observe

        with listening(self.module, {name: stopping(name, one) for name, one in inputs.items()}):
            for _, x in self.batches():
                seen.clear()
                with suppress(_Seen):
                    self(x)

    def _pass(self, inputs: Inputs | None, around: Around | None, write: Callable[[slice, Tensor], None]) -> None:
        with listening(self.module, inputs or {}):
            for part, x in self.batches():
                y = self(x)
                if not all_finite(y):
                    raise MismatchError(
                        f"layer {self.number}: its output is NaN or Inf; the model's weights are damaged "
                        f"(fetch them again), or too large for {str(y.dtype).removeprefix('torch.')}"
                    )
                if around is not None:
                    around(x, y)
                write(part, y)


@contextmanager
def listening(module: nn.Module, inputs: Inputs) -> Iterator[None]:
    """While the block runs, the observers see the inputs of their Linears."""

    def hook(observer: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, found: observer(found[0].detach().reshape(-1, found[0].shape[-1]))

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(one)) for name, one in inputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class BlockRunner:
    """A decoder of which one block is in memory; see the package's docstring.

    `dtype` is what weights and hidden states are computed in: by default bf16 for a bf16 checkpoint where the hardware
    computes it, else fp32. `rows` windows go through a block at a time. `hidden_memory` in bytes.
    """

    checkpoint: Checkpoint
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    rows: int = 4
    hidden_memory: int = 2 * 2**30
    spill: Path | None = None
    edit: Edit | None = None
    family: Family = field(init=False)
    model: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        return_large_blocks()
        self.family = family_of(self.checkpoint.config)
        self.device = pick_device() if self.device is None else torch.device(self.device)
        if self.dtype is None:
            stored = self.checkpoint.entry(f"{self.family.embedding.name}.weight").dtype
            # Emulated bf16 is several times slower than fp32.
            self.dtype = stored if native_bf16() and stored == torch.bfloat16 else torch.float32
        self.model = empty_model(self.checkpoint.folder, self.dtype)
        self._open: list[Hidden] = []
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __enter__(self) -> BlockRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the spill files."""
        for hidden in self._open:
            hidden.close()
        self._open.clear()

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.model.get_decoder().layers)

    def hidden(self, windows: Sequence[int], copies: int = 1) -> Hidden:
        """Room for the hidden states of (N, T) tokens.

        In memory where `copies` of it fit `hidden_memory`, else in a file in `spill`.
        """
        assert self.dtype is not None
        shape = (*windows, int(self.model.config.hidden_size))
        size = copies * math.prod(shape) * self.dtype.itemsize
        file = None
        if self.spill is not None and size > self.hidden_memory:
            self.spill.mkdir(parents=True, exist_ok=True)
            file = self.spill / f"hidden-{len(self._open)}.bin"
        self._open.append(Hidden(shape, self.dtype, file))
        return self._open[-1]

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Hidden:
        """The embeddings of token ids (N, T): the input of block 0.

        Only the rows of the table that the windows name are held.
        """
        hidden = self.hidden(windows.shape)
        table: Any = self.model.get_decoder().embed_tokens
        with self.holding_rows(table, windows) as places:
            for start in range(0, len(hidden), self.rows):
                part = slice(start, start + self.rows)
                hidden.write(part, table(places[part].to(self.device)))
        return hidden

    @contextmanager
    def holding_rows(self, table: Any, tokens: Tensor) -> Iterator[Tensor]:
        """While the context lasts, the embedding module holds the rows of these token ids alone; their places there."""
        ids, places = torch.unique(tokens, return_inverse=True)
        padding, table.padding_idx = table.padding_idx, None
        try:
            with self.filled(table, {"weight": self._table_rows(ids.cpu())}):
                yield places
        finally:
            table.padding_idx = padding

    def blocks(self, hidden: Hidden, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """Blocks `start` to `stop` in turn, each with its weights until the next one is asked for."""
        for number in range(self.layers)[start:stop]:
            with self.block(number, hidden) as block:
                yield block

    @contextmanager
    def block(self, number: int, hidden: Hidden) -> Iterator[Block]:
        """One block with its weights, while the context lasts; `hidden` is its input."""
        layer = self.model.get_decoder().layers[number]
        name = f"{self.family.prefix}{number}"
        arguments = self.arguments(hidden.shape[1])[number]
        with self.filled(layer, {key: self.read(f"{name}.{key}") for key in layer.state_dict()}):
            yield Block(number, layer, hidden, self, arguments)
        return_holes()  # else those between what lives longer add up from layer to layer

    @contextmanager
    def head(self) -> Iterator[Any]:
        """The model with its final norm and output head filled, while the context lasts."""
        norm, head = self.model.get_decoder().norm, self.model.get_output_embeddings()
        with (
            self.filled(norm, {"weight": self.read(f"{self.family.norm.name}.weight")}),
            self.filled(head, {"weight": self.read(self.head_name)}),
        ):
            yield self.model

    @property
    def head_name(self) -> str:
        """The weight that the output head applies: its own, or the embeddings'."""
        tied = self.family.geometry(self.checkpoint.config).tied
        return f"{(self.family.embedding if tied else self.family.head).name}.weight"

    @torch.no_grad()
    def losses(self, hidden: Hidden, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Per window the summed negative log-likelihood, fp64, and the number of tokens summed over.

        `labels` (N, T) are token ids, IGNORED (-100) where a token carries no loss; a label is predicted from the
        position before it. Raises MismatchError where a loss is not finite.
        """
        nll = torch.zeros(len(hidden), dtype=torch.float64)
        targets = labels[:, 1:]
        carry = targets != IGNORED
        with self.head() as model:
            for start in range(0, len(hidden), self.rows):
                part = slice(start, start + self.rows)
                states = hidden.read(part)[:, :-1][carry[part]].to(self.device)
                found = position_losses(model, model.get_decoder().norm(states), targets[part][carry[part]])
                owner = carry[part].nonzero()[:, 0] + start
                nll.index_add_(0, owner, found.double().cpu())
        if not all_finite(nll):
            raise MismatchError("the loss is NaN or Inf: the final norm or the output head is damaged")
        return nll, carry.sum(1)

    def read(self, name: str) -> Tensor:
        """A weight of the checkpoint, in the runner's dtype, on its device, edited."""
        entry = self.checkpoint.entry(name)
        weight = torch.empty(entry.shape, dtype=self.dtype, device=self.device)
        for start, tile in self.checkpoint.tiles(name):
            weight[start : start + len(tile)].copy_(tile)
        return weight if self.edit is None else self.edit(name, weight)

    def _table_rows(self, ids: Tensor) -> Tensor:
        """The rows of the embedding that belong to sorted token ids."""
        name = f"{self.family.embedding.name}.weight"
        if self.edit is not None:
            return self.read(name)[ids.to(self.device)]
        rows = torch.empty((len(ids), self.checkpoint.entry(name).shape[1]), dtype=self.dtype, device=self.device)
        for start, tile in self.checkpoint.tiles(name):
            inside = (ids >= start) & (ids < start + len(tile))
            rows[inside.to(self.device)] = tile[ids[inside] - start].to(self.device, self.dtype)
        return rows

    @contextmanager
    def filled(self, module: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
        """A module with these weights, without them afterwards; buffers that are not saved stay."""
        slots = {key: (module.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]) for key in state}
        before = {key: getattr(owner, leaf) for key, (owner, leaf) in slots.items()}
        for key, (owner, leaf) in slots.items():
            setattr(owner, leaf, nn.Parameter(state.pop(key), requires_grad=False))
        try:
            yield
        finally:
            for key, (owner, leaf) in slots.items():
                setattr(owner, leaf, before[key])

    def arguments(self, length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the stock model hands each of its layers for windows of this length."""
        if length not in self._arguments:
            self._arguments[length] = moved(record(self.model, length, self.dtype), self.device)
        return self._arguments[length]


class Recorder(nn.Module):
    """Stands where a layer does, notes what it is called with, and hands its input on."""

    def __init__(self, layer: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        super().__init__()
        self._calls = calls
        object.__setattr__(self, "_layer", layer)  # not a submodule: nothing of it is to be found in here

    def __getattr__(self, name: str) -> Any:
        """Whatever the stock model asks its layer for (attention_type and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the call."""
        self._calls.append((args, kwargs))
        return hidden_states


@torch.no_grad()
def record(model: Any, length: int, dtype: torch.dtype | None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments beside the hidden states that each layer gets in the stock model's forward, for one window.

    They hold for any number of windows: the first dimension of masks and rotary embeddings is 1 and broadcasts.
    """
    decoder = model.get_decoder()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layers, norm = decoder.layers, decoder.norm
    decoder.layers = nn.ModuleList([Recorder(layer, calls) for layer in layers])
    decoder.norm = nn.Identity()
    try:
        states = torch.zeros(1, length, int(model.config.hidden_size), dtype=dtype)
        decoder(inputs_embeds=states, use_cache=False)
    finally:
        decoder.layers, decoder.norm = layers, norm
    return calls


def moved(value: Any, device: Any) -> Any:
    """Tensors in nested tuples, lists and dicts on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
