"""Which heads and channels stay: scores with and without a pass over calibration text, and the refit after the cut.

A pass leaves the axes and the refitted weights of each layer in a sealed folder, and all is read back from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from loram.calibration_memory import REFITTED
from loram.checkpoint import Checkpoint, all_finite, tile_bounds
from loram.errors import MismatchError
from loram.families import Family, Geometry, Weight
from loram.families.small import with_biases, without_layers
from loram.families.widths import Cut, Widths, parse_ratio
from loram.masks import PackedMask
from loram.options import PruneOptions
from loram.progress import Progress
from loram.prune_options import CutOptions
from loram.pruning import SCORES, WEIGHT_SCORES
from loram.pruning.flap import compensation
from loram.pruning.refit import Refit
from loram.pruning.score import Companion, Tiles, nothing, unit_scores
from loram.pruning.selection import layer_axes
from loram.pruning_map import Axis, PruningMap, read_map
from loram.quantization import STORAGES
from loram.sealing import Steps
from loram.shards import write_tensors
from loram.stages.composing import Earlier
from loram.stages.given import GivenSparse
from loram.stages.sparsify import linear, warn_of_few

if TYPE_CHECKING:  # it brings transformers, which streaming does without
    from loram.blockwise import Block, BlockRunner, Fluctuation, Norm, SecondMoment
    from loram.blockwise.resuming import Backward

Seen = Mapping[str, "Norm | SecondMoment | Fluctuation"]


def needs_of(options: PruneOptions) -> str:
    """What the choice needs: 'weights' at most, or what text does in the model (see Score and WeightScore)."""
    if options.method == "depth":
        return "inputs"
    if options.method in ("random", "given"):
        return "weights"
    return (WEIGHT_SCORES if options.by_weight else SCORES)[options.importance].needs


def cut_of(options: CutOptions) -> Cut:
    """How much is asked to go, and from where."""
    return Cut(parse_ratio(options.ratio), options.keep_first, options.keep_last, options.round_to)


@dataclass
class Pruning:
    """What one call of prune works with."""

    options: PruneOptions
    checkpoint: Checkpoint
    family: Family
    geometry: Geometry
    widths: Widths
    windows: Tensor | None
    given: GivenSparse | None = None
    earlier: Earlier | None = None
    axes: dict[str, Axis] = field(default_factory=dict)
    masks: dict[str, PackedMask] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    influences: tuple[float, ...] = ()
    steps: Steps | None = None

    @property
    def source(self) -> Checkpoint:
        """Where the small model's weights are cut from."""
        return self.checkpoint if self.given is None else self.given.checkpoint

    @property
    def shape(self) -> dict[str, Any]:
        """A raw config with as many layers as are left, and the biases that come: before it is known which layers."""
        config = without_layers(self.checkpoint.config, range(len(self.widths.mlp)))
        return with_biases(config, self.widths) if self.compensates else config

    @property
    def cut_layers(self) -> list[int]:
        """The layers that are not left whole."""
        pairs = zip(self.widths.kv_heads, self.widths.mlp, strict=True)
        return [n for n, (heads, mlp) in enumerate(pairs) if heads < self.geometry.kv_heads or mlp < self.geometry.mlp]

    @property
    def compensates(self) -> bool:
        """Whether biases of o and down stand in for the means of what was cut."""
        return self.score_needs == "variances"

    @property
    def refits(self) -> bool:
        """Whether o and down are refitted: whenever there is calibration text and --refit."""
        wanted = self.options.refit and self.windows is not None and not self.options.by_weight
        return wanted and (self.options.method != "depth" or self.mends)

    @property
    def mends(self) -> bool:
        """Whether a gap can be mended in closed form.

        That takes a layer before it whose down is added to the residual stream as it is, without a norm in between.
        """
        count = self.geometry.layers
        leading = self.layers is not None and self.layers == tuple(range(count))[-len(self.layers) :]
        return self.family.adds_outputs and not leading

    @property
    def passes(self) -> bool:
        """Whether calibration text is sent through the model."""
        needed = self.refits or self.score_needs != "weights"
        somewhere = self.options.by_weight or self.options.method == "depth" or bool(self.cut_layers)
        return self.windows is not None and needed and somewhere

    @property
    def score_needs(self) -> str:
        """See `needs_of`."""
        return needs_of(self.options)

    def runner(self, spill: Path) -> BlockRunner:
        """The large model, one block in memory; hidden states that outgrow --hidden-memory are in `spill`."""
        from loram.blockwise import BlockRunner

        return BlockRunner(self.checkpoint, hidden_memory=self.options.hidden_bytes, spill=spill)

    @property
    def map(self) -> PruningMap:
        """The map made of the axes, masks and layers chosen so far."""
        return PruningMap(self.family, self.geometry, self.axes, self.masks, self.layers)

    @property
    def compression(self) -> tuple[str, ...]:
        """What is done to the large weights, in order."""
        before = () if self.earlier is None else self.earlier.compression
        storage = STORAGES.get(self.options.quantize)
        cut = "mask" if self.options.by_weight else "depth" if self.options.method == "depth" else "axes"
        mended = [*(["refit"] if self.refits else []), *(["bias"] if self.compensates else [])]
        return (*before, cut, *mended, *([] if storage is None else [storage.name]))


def choose(work: Pruning, spill: Path, progress: Progress) -> None:
    """Fill `work.axes` layer by layer; refitted weights are left in the steps."""
    if work.passes:
        with work.runner(spill) as runner:
            for folder in layer_steps(work, runner, progress):
                work.axes.update(read_map(folder).axes)
        return
    layers = work.cut_layers
    drawn = random_axes(work)
    progress.begin("score", len(layers))
    for layer in layers:
        work.axes.update(drawn[layer] if drawn else axes_of(work, layer, stored_tiles(work, layer)))
        progress.advance()
    progress.end()


def layer_steps(work: Pruning, runner: BlockRunner, progress: Progress) -> Iterator[Path]:
    """The folders of the layers that are cut, each with its axes and refitted weights, found now or earlier."""
    from loram.blockwise import backward_pass, forward_pass

    assert work.windows is not None
    assert work.steps is not None
    layers, drawn = work.cut_layers, random_axes(work)
    if work.refits:
        warn_of_few(work.windows.numel(), max(work.widths.mlp[layer] for layer in layers), " that stay")
    if work.score_needs == "gradients":
        progress.begin("score", runner.layers + len(layers))
        visit = partial(weigh, work)
        found = backward_pass(runner, work.windows, work.steps, visit, layers, progress=progress)
    else:
        progress.begin("score", max(layers) + 1)
        found = forward_pass(runner, work.windows, work.steps, partial(look, work, drawn), max(layers) + 1)
    for number, folder in found:
        if number in layers:
            yield folder
        progress.advance()
    progress.end()


def random_axes(work: Pruning) -> dict[int, dict[str, Axis]]:
    """With --method random, the axes of every layer: one generator draws them all, in order."""
    if work.options.method != "random":
        return {}
    generator = numpy.random.default_rng(work.options.seed)
    return {layer: layer_axes(layer, work.widths, work.geometry, generator) for layer in work.cut_layers}


def look(work: Pruning, drawn: Mapping[int, dict[str, Axis]], block: Block, folder: Path) -> None:
    """A block on the way forward: what o and down read decides, or serves the refit."""
    if block.number not in work.cut_layers:
        block.run()
        return
    seen: Seen = {weight.name: observer(work) for weight in work.family.outputs}
    block.run(seen)
    refuse_damaged(work, block.number, seen)
    tiles = block_tiles(work, block)
    companion = companion_of(work, seen)
    axes = drawn.get(block.number) or axes_of(work, block.number, tiles, companion)
    PruningMap(work.family, work.geometry, axes).save(folder)
    refit_into(work, block, seen, folder)


def observer(work: Pruning) -> Norm | SecondMoment | Fluctuation:
    """What is learnt of the input of o or down: as little as score, bias and refit need."""
    from loram.blockwise import Fluctuation, Norm, SecondMoment

    if work.compensates:
        return Fluctuation(products=work.refits)
    return SecondMoment() if work.refits else Norm()


def companion_of(work: Pruning, seen: Seen) -> Companion:
    """What the score multiplies weights with: norms or variances of what they read, whatever the rows."""
    if work.compensates:
        return lambda weight, start, stop: fluctuation(seen[weight.name]).variance
    return (lambda weight, start, stop: seen[weight.name].norm) if work.score_needs == "inputs" else nothing


def fluctuation(seen: Norm | SecondMoment | Fluctuation) -> Fluctuation:
    """What was observed, where means and variances were."""
    from loram.blockwise import Fluctuation

    assert isinstance(seen, Fluctuation)
    return seen


def weigh(work: Pruning, block: Block, back: Backward, folder: Path) -> None:
    """A block on the way back: gradients decide, and what o and down read serves the refit."""
    from loram.blockwise import SecondMoment

    seen = {weight.name: SecondMoment() for weight in work.family.outputs} if work.refits else {}
    gradients = back(seen)
    refuse_damaged(work, block.number, seen)
    tiles = block_tiles(work, block)

    def gradient(weight: Weight, start: int, stop: int) -> Tensor:
        return gradients[weight.name][start:stop]

    axes = axes_of(work, block.number, tiles, gradient)
    gradients.clear()
    PruningMap(work.family, work.geometry, axes).save(folder)
    refit_into(work, block, seen, folder)


def refuse_damaged(work: Pruning, layer: int, seen: Seen) -> None:
    """MismatchError where what a Linear read is not finite."""
    for name, found in seen.items():
        if not all_finite(found.norm):
            raise MismatchError(
                f"the input of {work.family.prefix}{layer}.{name} is NaN or Inf; the model's weights are damaged: "
                "fetch them again"
            )


def stored_tiles(work: Pruning, layer: int) -> Tiles:
    """A layer's weights as they are stored, in pieces of rows."""
    return lambda weight: work.checkpoint.tiles(f"{work.family.module(layer, weight)}.weight")


def block_tiles(work: Pruning, block: Block) -> Tiles:
    """The same pieces of a block that is in memory, so that nothing is read once more."""

    def tiles(weight: Weight) -> Iterable[tuple[int, Tensor]]:
        entry = work.checkpoint.entry(f"{work.family.module(block.number, weight)}.weight")
        value = linear(block.module, weight.name)
        return ((start, value[start:stop]) for start, stop in tile_bounds(entry.shape[0], entry.row_bytes))

    return tiles


def axes_of(work: Pruning, layer: int, tiles: Tiles, companion: Companion = nothing) -> dict[str, Axis]:
    """The axes of one layer that the score cuts."""
    scores = unit_scores(SCORES[work.options.importance], work.family, work.geometry, tiles, companion)
    return layer_axes(layer, work.widths, work.geometry, scores)


def refit_into(work: Pruning, block: Block, seen: Seen, folder: Path) -> None:
    """A block's o and down where their inputs are cut, refitted and with biases, beside its axes in the folder."""
    if not (work.refits or work.compensates):
        return
    cut = read_map(folder)
    for weight in work.family.outputs:
        module = work.family.module(block.number, weight)
        kept = cut.kept(module, 1)
        if kept is not None:
            for name, value in mended(work, module, seen[weight.name], kept, linear(block.module, weight.name)).items():
                write_tensors(folder / f"{name}.safetensors", {name: value})


def mended(
    work: Pruning, module: str, seen: Norm | SecondMoment | Fluctuation, kept: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """What o or down becomes when its input keeps `kept`, by tensor name: its weight where it is refitted, and a bias.

    Both together are the affine least-squares fit: the weight to centered inputs, the bias what the means then lack.
    """
    dtype = work.checkpoint.entry(f"{module}.weight").dtype
    refit = Refit.of(seen.total, kept, what=module) if work.refits else None
    rows, constants = [], []
    for some in torch.split(weight, REFITTED):
        small = (some[:, kept.to(some.device)] if refit is None else refit(some)).to(dtype)
        rows.append(small.cpu())
        if work.compensates:
            constants.append(compensation(some, small, fluctuation(seen).mean, kept).cpu())
    found = {} if refit is None else {f"{module}.weight": torch.cat(rows)}
    if constants:
        bias = f"{module}.bias"
        own = work.checkpoint.read(bias).float() if bias in work.checkpoint else 0
        found[bias] = (torch.cat(constants) + own).to(dtype)
    return found
