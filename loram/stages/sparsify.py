"""What `prune` does when single weights go: a keep-mask for every Linear of every decoder layer.

Magnitude looks at the weights alone and streams. Wanda and SparseGPT go block by block: a block's inputs are
observed, its Linears pruned, and it runs once more, so that the next block sees what the pruned one does. An
already sparse checkpoint from elsewhere is its own mask: see `given`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from loram.checkpoint import Checkpoint, all_finite
from loram.errors import MismatchError
from loram.families import Family, Geometry
from loram.families.sparsity import Sparsity
from loram.masks import PackedMask
from loram.progress import Progress
from loram.pruning.weight_score import WeightScore
from loram.shards import write_tensors

logger = logging.getLogger(__name__)


@dataclass
class Sparsifying:
    """What is pruned, how, and where masks and new weights are put meanwhile."""

    checkpoint: Checkpoint
    family: Family
    geometry: Geometry
    sparsity: Sparsity
    score: WeightScore
    spill: Path
    masks: dict[str, PackedMask] = field(default_factory=dict)

    def keep(self, mask: PackedMask) -> None:
        """Note a mask, its bits on disk."""
        self.masks[mask.name] = mask.spilled(self.spill)


def decoder_weights(family: Family, geometry: Geometry) -> Iterator[tuple[str, int]]:
    """Every weight that is pruned, by name, with its input features."""
    for layer in range(geometry.layers):
        for weight in family.linears:
            width = sum(geometry.size(part.count) * geometry.size(part.width) for part in weight.columns)
            yield f"{family.module(layer, weight)}.weight", width


def check_widths(family: Family, geometry: Geometry, sparsity: Sparsity) -> None:
    """FamilyError where the pattern does not divide a Linear's input features."""
    for name, width in decoder_weights(family, geometry):
        sparsity.check_width(name.removesuffix(".weight"), width)


def removed(family: Family, checkpoint: Checkpoint, sparsity: Sparsity, score: str) -> int:
    """How many weights go: Wanda rounds down in every row, the others in every weight."""
    total = 0
    for name, width in decoder_weights(family, family.geometry(checkpoint.config)):
        rows = checkpoint.entry(name).shape[0]
        total += rows * sparsity.removed(width) if score == "wanda" else sparsity.removed(rows * width)
    return total


def sparsify(work: Sparsifying, windows: Tensor | None, progress: Progress) -> None:
    """Fill `work.masks`, and the folder `work.spill` with the weights that a solver changed."""
    if work.score.masks is not None:
        from_weights(work, progress)
    else:
        assert windows is not None
        from_inputs(work, windows, progress)


def from_weights(work: Sparsifying, progress: Progress) -> None:
    """Masks that need no calibration: tile by tile, whatever the model's size."""
    names = [name for name, _ in decoder_weights(work.family, work.geometry)]
    progress.begin("score", len(names))
    for name in names:
        out, width = work.checkpoint.entry(name).shape

        def tiles(name: str = name) -> Iterator[Tensor]:
            return (tile for _, tile in work.checkpoint.tiles(name))

        assert work.score.masks is not None
        gone = work.score.masks(tiles, out * width, work.sparsity)
        work.keep(PackedMask.of_rows(name, (out, width), (~rows for rows in gone)))
        progress.advance()
    progress.end()


def from_inputs(work: Sparsifying, windows: Tensor, progress: Progress) -> None:
    """One block in memory at a time; each sees what the pruned ones before it do."""
    from loram.blockwise import BlockRunner, Norm, SecondMoment, shared_inputs  # transformers: not for streaming

    moments = work.score.needs == "moments"
    if moments and windows.numel() < max(width for _, width in decoder_weights(work.family, work.geometry)):
        logger.warning(
            "%d tokens of calibration text are fewer than a Linear's input features: the second moment says nothing of "
            "most directions; raise --samples or --length",
            windows.numel(),
        )
    progress.begin(work.score.name, work.geometry.layers)
    with BlockRunner(work.checkpoint, spill=work.spill / "hidden") as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            groups = shared_inputs(work.family)
            observers = {first: SecondMoment() if moments else Norm() for first in groups}
            block.observe(observers)
            for first, names in groups.items():
                seen = observers.pop(first)
                weights = {f"{block.name}.{name}.weight": linear(block.module, name) for name in names}
                prune_group(work, weights, seen.total if isinstance(seen, SecondMoment) else seen.norm)
            if block.number < runner.layers - 1:
                block.run()
            progress.advance()
    progress.end()


def linear(module: nn.Module, name: str) -> Tensor:
    """The weight of a block's Linear."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.data


def prune_group(work: Sparsifying, weights: dict[str, Tensor], observed: Tensor) -> None:
    """Prune the weights that read one input, in place; masks, and weights that a solver changed, go to disk."""
    assert work.score.prune is not None
    first = next(iter(weights)).removesuffix(".weight")
    if not all_finite(observed):
        raise MismatchError(f"the input of {first} is NaN or Inf; the model's weights are damaged")
    found = work.score.prune(list(weights.values()), observed, work.sparsity, first)
    for (name, weight), (new, gone) in zip(weights.items(), found, strict=True):
        stored = new.to(work.checkpoint.entry(name).dtype)
        weight.copy_(stored)  # later blocks see it as it is stored, rounding included
        if work.score.updates:
            write_tensors(work.spill / f"{name}.safetensors", {name: stored.cpu()})
        work.keep(PackedMask.of(name, ~gone))
