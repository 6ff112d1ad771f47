"""The held-out loss of a model that does not fit in memory: block by block, every row through a block at a time.

The adapter stays beside the weights, as peft would have it: merged in 16 bit, a small update would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from loram.adapter import Adapter, LoraPair
from loram.blockwise import BlockRunner, Hidden
from loram.checkpoint import BY_FLAG, Checkpoint
from loram.data.collate import IGNORED
from loram.data.encoding import EncodedRow
from loram.evaluation.losses import RowLosses
from loram.evaluation.under_masks import masks_for
from loram.masks import Masks
from loram.memory_model import HIDDEN_MEMORY
from loram.progress import SILENT, Progress
from loram.training.masked_product import masked_product, packed_rows

LENGTHS = 8
"""Lengths that rows are padded to at most: each is one more set of windows, and less padding."""


@dataclass(frozen=True)
class StreamedModel:
    """A model's folder, measured with one block in memory; `batch` rows pass a block at a time.

    Every weight is read once for a measurement, whatever the number of rows. Hidden states beyond `hidden_memory` bytes
    are in a temporary file.
    """

    folder: Path
    batch: int
    dtype: str
    hidden_memory: int = HIDDEN_MEMORY

    def measure(
        self,
        rows: list[EncodedRow],
        adapter: Adapter | None = None,
        progress: Progress = SILENT,
        label: str = "evaluate",
    ) -> RowLosses:
        """What `evaluation.losses.measure` gives for the model with the adapter; raises MismatchError as that does.

        Rows need no packing: they are padded to lengths that are almost theirs.
        """
        groups = by_length([len(row["input_ids"]) for row in rows], self.batch)
        windows = [padded_windows([rows[index] for index in group]) for group in groups]
        with (
            TemporaryDirectory(prefix="loram-hidden-") as spill,
            Checkpoint(self.folder) as checkpoint,
            BlockRunner(checkpoint, dtype=BY_FLAG[self.dtype], rows=self.batch, spill=Path(spill)) as runner,
        ):
            values = sum(ids.numel() for ids, _ in windows) * int(runner.model.config.hidden_size)
            # The groups are there together: all of them in memory, or all in files.
            runner.hidden_memory = self.hidden_memory * (values * BY_FLAG[self.dtype].itemsize <= self.hidden_memory)
            progress.begin(label, runner.layers)
            masks = None if adapter is None else masks_for(adapter, self.folder)
            sums = window_sums(runner, windows, {} if adapter is None else adapter.pairs, progress, masks)
            progress.end()
        nll = [0.0] * len(rows)
        for index, value in zip([index for group in groups for index in group], sums, strict=True):
            nll[index] = value
        return RowLosses(tuple(nll), tuple(sum(row["loss_mask"][1:]) for row in rows))


def window_sums(
    runner: BlockRunner,
    windows: list[tuple[Tensor, Tensor]],
    pairs: Mapping[str, LoraPair],
    progress: Progress,
    masks: Masks | None = None,
) -> list[float]:
    """The summed loss of every window of (ids, labels), of all groups one after the other."""
    states = [runner.embed(ids) for ids, _ in windows]
    add_embedding(runner, pairs, states, [ids for ids, _ in windows])
    for number in range(runner.layers):
        with runner.block(number, states[0]) as block, adapted(block.module, block.name, pairs, masks):
            for hidden in states:
                block.on(hidden).run()
        progress.advance()
    sums: list[float] = []
    with adapted(runner.model.get_output_embeddings(), runner.family.head.name, pairs):
        for hidden, (_, labels) in zip(states, windows, strict=True):
            sums += runner.losses(hidden, labels)[0].tolist()
    return sums


def by_length(lengths: list[int], batch: int) -> list[list[int]]:
    """Row numbers, longest first, in at most LENGTHS groups of whole batches (the last one may be ragged)."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    batches = -(-len(order) // batch)
    size = -(-batches // LENGTHS) * batch
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded_windows(rows: list[EncodedRow]) -> tuple[Tensor, Tensor]:
    """Token ids and labels (rows, longest); padding on the right is seen by no token that counts."""
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for number, row in enumerate(rows):
        found, mask = torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])
        ids[number, : len(found)] = found
        labels[number, : len(found)] = found.where(mask, IGNORED)
    return ids, labels


@contextmanager
def adapted(module: nn.Module, name: str, pairs: Mapping[str, LoraPair], masks: Masks | None = None) -> Iterator[None]:
    """While the block runs, the Linears in a module of this name, or the module itself, have their LoRA beside them."""
    named = {f"{name}.{path}".removesuffix("."): part for path, part in module.named_modules()}
    handles = [
        part.register_forward_hook(beside(pairs[each], masks(each) if masks is not None else None))
        for each, part in named.items()
        if each in pairs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def beside(pair: LoraPair, mask: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds s·B·A·x, or under a mask (s·(B·A) ∘ M)·x, computed in fp32 as peft does."""
    held: dict[torch.device, tuple[Tensor, Tensor]] = {}
    bits = None if mask is None else packed_rows(mask)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.device not in held:
            held[x.device] = (pair.a.to(x.device).float(), pair.b.to(x.device).float())
        a, b = held[x.device]
        if bits is not None:
            return (output + masked_product(x.float(), a, b, bits.to(x.device), pair.scale)).to(output.dtype)
        return (output + (x.float() @ a.T @ b.T) * pair.scale).to(output.dtype)

    return hook


def add_embedding(
    runner: BlockRunner, pairs: Mapping[str, LoraPair], states: list[Hidden], windows: list[Tensor]
) -> None:
    """Add the update of the embeddings, which is there for the input alone: peft leaves a tied head as it is."""
    pair = pairs.get(runner.family.embedding.name)
    if pair is None:
        return
    table: Any = runner.model.get_decoder().embed_tokens
    factor = pair.scale * float(getattr(table, "embed_scale", 1.0))
    a, b = pair.a.float(), pair.b.float()
    for hidden, ids in zip(states, windows, strict=True):
        for start in range(0, len(hidden), runner.rows):
            part = slice(start, start + runner.rows)
            update = a.T[ids[part]] @ b.T * factor
            hidden.write(part, (hidden.read(part).float() + update).to(hidden.dtype))
