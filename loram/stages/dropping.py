"""What `prune --method depth` does: whole layers go, those that change their input least (ShortGPT, 2403.03853).

One pass over the large model measures every layer's block influence, and goes on where it was stopped. A second one
mends what stays, where that is in closed form: the down projection before a gap takes over what the layers in the gap
added to the residual stream. It is fitted on the small model's own stream, in which all gaps before are mended, against
the large model's stream.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from loram.artifact import read_json, write_json
from loram.blockwise import Block, BlockRunner, Cosine, Hidden, forward_pass
from loram.blockwise.runner import listening
from loram.checkpoint import all_finite
from loram.errors import MismatchError
from loram.progress import Progress
from loram.pruning.residual import Residual
from loram.pruning.selection import layers_left
from loram.shards import write_tensors
from loram.stages.choosing import Pruning, cut_of
from loram.stages.sparsify import warn_of_few

logger = logging.getLogger(__name__)
FILE = "influence.json"


def drop_layers(work: Pruning, spill: Path, progress: Progress) -> None:
    """Fill `work.layers` and `work.influences`, and `spill` with the weights that were refitted."""
    assert work.windows is not None
    cut, count = cut_of(work.options), work.geometry.layers
    with work.runner(spill / "hidden") as runner:
        work.influences = influences(work, runner, count - cut.keep_last, progress)
        candidates = range(cut.keep_first, count - cut.keep_last)
        work.layers = layers_left(work.influences, candidates, cut.depth(count), count)
        for layer, found in enumerate(work.influences):
            logger.debug("layer %d: block influence %.5f%s", layer, found, "" if layer in work.layers else ", dropped")
        if work.refits:
            mend(work, runner, spill, progress)


def influences(work: Pruning, runner: BlockRunner, stop: int, progress: Progress) -> tuple[float, ...]:
    """1 − the mean cosine between input and output of each block before `stop`, over all tokens of the windows."""
    assert work.windows is not None
    assert work.steps is not None
    found = []
    progress.begin("influence", stop)
    for _, folder in forward_pass(runner, work.windows, work.steps, measure, stop):
        found.append(float(read_json(folder / FILE)["influence"]))
        progress.advance()
    progress.end()
    return tuple(found)


def measure(block: Block, folder: Path) -> None:
    """Run a block and leave its influence."""
    cosine = Cosine()
    block.run(around=cosine)
    write_json(folder / FILE, {"influence": 1 - cosine.mean})


def mend(work: Pruning, runner: BlockRunner, spill: Path, progress: Progress) -> None:
    """Refit the down before each gap; from there on, the large and the small stream run side by side."""
    assert work.windows is not None
    assert work.layers is not None
    warn_of_few(work.windows.numel(), work.geometry.mlp)
    first = min(set(range(runner.layers)) - set(work.layers))
    large, small = runner.embed(work.windows), runner.hidden(work.windows.shape, copies=2)
    for block in runner.blocks(large, stop=max(first - 1, 0)):
        block.run()
    copy(runner, large, small)
    left = [layer for layer in work.layers if layer >= first - 1]
    for block in runner.blocks(large, max(first - 1, 0), left[0]):
        block.run()
    steps = list(pairwise((*left, runner.layers)))
    while steps and steps[-1][1] == steps[-1][0] + 1:
        steps.pop()  # behind the last gap nothing is mended
    progress.begin("refit", len(steps))
    for layer, following in steps:
        with runner.block(layer, large) as block:
            block.run()
            for dropped in runner.blocks(large, layer + 1, following):
                dropped.run()
            own = replace(block, hidden=small)
            if following > layer + 1:
                refit_down(work, own, large, spill)
            own.run()
        progress.advance()
    progress.end()


def copy(runner: BlockRunner, source: Hidden, target: Hidden) -> None:
    """The same hidden states once more."""
    for start in range(0, len(source), runner.rows):
        part = slice(start, start + runner.rows)
        target.write(part, source.read(part))


@torch.no_grad()
def refit_down(work: Pruning, block: Block, target: Hidden, spill: Path) -> None:
    """Change the block's down, in place and on disk, so that its output comes closest to the target stream."""
    found, seen = Residual(), list[Tensor]()
    name = work.family.outputs[-1].name
    with listening(block.module, {name: seen.append}):
        for part, x in block.batches():
            missing = target.read(part).to(x.device) - block(x)
            found.add(seen.pop(), missing.reshape(-1, missing.shape[-1]))
    full = f"{block.name}.{name}.weight"
    weight = block.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    update = found.update(what=full)
    if not all_finite(update):
        raise MismatchError(f"the refit of {full} is NaN or Inf; the model's weights are damaged: fetch them again")
    stored = update.add_(weight).to(work.checkpoint.entry(full).dtype)  # in place: it is the largest of what is here
    weight.data.copy_(stored)  # later blocks see it as it is stored, rounding included
    write_tensors(spill / f"{full}.safetensors", {full: stored.cpu()})
