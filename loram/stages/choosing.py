"""Which heads and channels stay: scores with and without a pass over calibration text, and the refit after the cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from loram.checkpoint import Checkpoint
from loram.families import Family, Geometry, Weight
from loram.families.small import without_layers
from loram.families.widths import Cut, Widths, parse_ratio
from loram.masks import PackedMask
from loram.options import PruneOptions
from loram.progress import Progress
from loram.prune_options import CutOptions
from loram.pruning import SCORES
from loram.pruning.refit import refit, refit_matrix
from loram.pruning.score import unit_scores
from loram.pruning.selection import layer_axes
from loram.pruning_map import Axis, PruningMap
from loram.quantization import STORAGES
from loram.shards import write_tensors
from loram.stages.given import GivenSparse


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
    axes: dict[str, Axis] = field(default_factory=dict)
    masks: dict[str, PackedMask] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    influences: tuple[float, ...] = ()

    @property
    def source(self) -> Checkpoint:
        """Where the small model's weights are cut from."""
        return self.checkpoint if self.given is None else self.given.checkpoint

    @property
    def shape(self) -> dict[str, Any]:
        """A raw config with as many layers as are left: what `widths` speaks of, before it is known which they are."""
        return without_layers(self.checkpoint.config, range(len(self.widths.mlp)))

    @property
    def cut_layers(self) -> list[int]:
        """The layers that are not left whole."""
        pairs = zip(self.widths.kv_heads, self.widths.mlp, strict=True)
        return [n for n, (heads, mlp) in enumerate(pairs) if heads < self.geometry.kv_heads or mlp < self.geometry.mlp]

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
    def map(self) -> PruningMap:
        """The map made of the axes, masks and layers chosen so far."""
        return PruningMap(self.family, self.geometry, self.axes, self.masks, self.layers)

    @property
    def compression(self) -> tuple[str, ...]:
        """What is done to the large weights, in order."""
        storage = STORAGES.get(self.options.quantize)
        cut = "mask" if self.options.by_weight else "depth" if self.options.method == "depth" else "axes"
        return (cut, *(["refit"] if self.refits else []), *([] if storage is None else [storage.name]))


def choose(work: Pruning, spill: Path, progress: Progress) -> None:
    """Fill `work.axes` layer by layer, and the refitted weights of each layer into `spill`."""
    layers = work.cut_layers
    score = SCORES[work.options.importance]
    scores = scores_beforehand(work, layers)
    progress.begin("score", len(layers))

    def decide(layer: int, moments: dict[str, Tensor]) -> None:
        chosen = scores[layer] if layer in scores else layer_scores(work, layer, moments=moments)
        work.axes.update(layer_axes(layer, work.widths, work.geometry, chosen))
        if moments and work.refits:
            refit_layer(work, layer, moments, spill)
        progress.advance()

    if work.windows is not None and (work.refits or (not scores and score.needs == "inputs")):
        from loram.blockwise import observe_inputs

        observe_inputs(work.checkpoint, work.family, work.windows, layers, decide)
    else:
        for layer in layers:
            decide(layer, {})
    progress.end()


def scores_beforehand(work: Pruning, layers: list[int]) -> dict[int, Any]:
    """Per layer the scores (or the random generator) that need no pass over its inputs."""
    score = SCORES[work.options.importance]
    if work.options.method == "random":
        return dict.fromkeys(layers, numpy.random.default_rng(work.options.seed))
    if score.needs == "weights":
        return {layer: layer_scores(work, layer) for layer in layers}
    if score.needs == "inputs":
        return {}
    from loram.blockwise import BlockRunner, gradients

    assert work.windows is not None
    with BlockRunner(work.checkpoint, dtype=torch.float32) as runner:
        return {
            block.number: layer_scores(work, block.number, gradients=found)
            for block, found in gradients(runner, work.windows, layers)
        }


def layer_scores(
    work: Pruning,
    layer: int,
    *,
    moments: dict[str, Tensor] | None = None,
    gradients: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The score of every unit of one layer."""

    def companion(weight: Weight, start: int, stop: int) -> Tensor:
        if gradients is not None:
            return gradients[weight.name][start:stop].float().cpu()
        return moments[weight.name].diagonal().clamp_min(0).sqrt() if moments else torch.empty(0)

    return unit_scores(
        SCORES[work.options.importance],
        work.family,
        work.geometry,
        lambda weight: work.checkpoint.tiles(f"{work.family.module(layer, weight)}.weight"),
        companion,
    )


def refit_layer(work: Pruning, layer: int, moments: dict[str, Tensor], spill: Path) -> None:
    """Refit the layer's o and down where their inputs are cut, and put the result on disk."""
    for weight in work.family.outputs:
        module = work.family.module(layer, weight)
        kept = work.map.kept(module, 1)
        if kept is None:
            continue
        matrix = refit_matrix(moments[weight.name], kept).float()
        rows = [refit(tile, matrix) for _, tile in work.checkpoint.tiles(f"{module}.weight")]
        name = f"{module}.weight"
        write_tensors(spill / f"{name}.safetensors", {name: torch.cat(rows)})
