"""What `prune` does when single weights go: a keep-mask for every Linear of every decoder layer.

Magnitude looks at the weights alone and streams. Wanda and SparseGPT go block by block: a block's inputs are
observed, its Linears pruned, and it runs once more, so that the next block sees what the pruned one does. An
already sparse checkpoint from elsewhere is its own mask: see `given`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from loram.checkpoint import Checkpoint, all_finite
from loram.errors import MismatchError
from loram.families import Family, Geometry
from loram.families.sparsity import Sparsity, decoder_weights
from loram.masks import PackedMask
from loram.progress import Progress
from loram.pruning.weight_score import WeightScore
from loram.pruning_map import PruningMap, read_map
from loram.sealing import Steps
from loram.shards import write_tensors

if TYPE_CHECKING:  # it brings transformers, which streaming does without
    from loram.blockwise import Block, BlockRunner

logger = logging.getLogger(__name__)


@dataclass
class Sparsifying:
    """What is pruned, and how; `masks` is what came of it, their bits on disk."""

    checkpoint: Checkpoint
    family: Family
    geometry: Geometry
    sparsity: Sparsity
    score: WeightScore
    masks: dict[str, PackedMask] = field(default_factory=dict)


def removed(family: Family, checkpoint: Checkpoint, sparsity: Sparsity, score: str) -> int:
    """How many weights go: Wanda rounds down in every row, the others in every weight."""
    total = 0
    for name, width in decoder_weights(family, family.geometry(checkpoint.config)):
        rows = checkpoint.entry(name).shape[0]
        total += rows * sparsity.removed(width) if score == "wanda" else sparsity.removed(rows * width)
    return total


def from_weights(work: Sparsifying, spill: Path, progress: Progress) -> None:
    """Masks that need no calibration: tile by tile, whatever the model's size; their bits are in `spill`."""
    names = [name for name, _ in decoder_weights(work.family, work.geometry)]
    progress.begin("score", len(names))
    for name in names:
        out, width = work.checkpoint.entry(name).shape

        def tiles(name: str = name) -> Iterator[Tensor]:
            return (tile for _, tile in work.checkpoint.tiles(name))

        assert work.score.masks is not None
        gone = work.score.masks(tiles, out * width, work.sparsity)
        work.masks[name] = PackedMask.of_rows(name, (out, width), (~rows for rows in gone)).spilled(spill)
        progress.advance()
    progress.end()


def from_inputs(work: Sparsifying, runner: BlockRunner, windows: Tensor, steps: Steps, progress: Progress) -> None:
    """One block in memory at a time; each sees what the pruned ones before it do.

    A block's masks, and the weights that a solver changed, are left in its step.
    """
    from loram.blockwise import forward_pass

    if work.score.needs == "moments":
        warn_of_few(windows.numel(), max(width for _, width in decoder_weights(work.family, work.geometry)))
    progress.begin(work.score.name, work.geometry.layers)
    for _, folder in forward_pass(runner, windows, steps, partial(prune_block, work)):
        work.masks.update(read_map(folder).masks)
        progress.advance()
    progress.end()


def warn_of_few(tokens: int, features: int, which: str = "") -> None:
    """Say so where there are fewer tokens than a Linear has input features, or `which` of them are solved with."""
    if tokens < features:
        logger.warning(
            "%d tokens of calibration text are fewer than a Linear's input features%s (up to %d): the second moment "
            "says nothing of most directions; raise --samples or --length",
            tokens,
            which,
            features,
        )


def prune_block(work: Sparsifying, block: Block, folder: Path) -> None:
    """Observe a block's inputs, prune its Linears, and run it as it is then."""
    from loram.blockwise import Norm, SecondMoment, shared_inputs

    groups = shared_inputs(work.family)
    observers = {first: SecondMoment() if work.score.needs == "moments" else Norm() for first in groups}
    block.observe(observers)
    masks: dict[str, PackedMask] = {}
    for first, names in groups.items():
        seen = observers.pop(first)
        weights = {f"{block.name}.{name}.weight": linear(block.module, name) for name in names}
        masks |= prune_group(work, weights, seen.total if isinstance(seen, SecondMoment) else seen.norm, folder)
    PruningMap(work.family, work.geometry, {}, masks).save(folder)
    if block.number < work.geometry.layers - 1:
        block.run()


def linear(module: nn.Module, name: str) -> Tensor:
    """The weight of a block's Linear."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.data


def prune_group(work: Sparsifying, weights: dict[str, Tensor], observed: Tensor, folder: Path) -> dict[str, PackedMask]:
    """Prune the weights that read one input, in place; those that a solver changed go to disk. Returns the masks."""
    assert work.score.prune is not None
    first = next(iter(weights)).removesuffix(".weight")
    if not all_finite(observed):
        raise MismatchError(f"the input of {first} is NaN or Inf; the model's weights are damaged: fetch them again")
    found = work.score.prune(list(weights.values()), observed, work.sparsity, first)
    masks = {}
    for (name, weight), (new, gone) in zip(weights.items(), found, strict=True):
        stored = new.to(work.checkpoint.entry(name).dtype)
        weight.copy_(stored)  # later blocks see it as it is stored, rounding included
        if work.score.updates:
            write_tensors(folder / f"{name}.safetensors", {name: stored.cpu()})
        masks[name] = PackedMask.of(name, ~gone)
    return masks
