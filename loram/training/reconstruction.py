"""Layer by layer: each small layer's weights from the large model's stream, in closed form or by a few steps.

Sequential: a layer is repaired on what the repaired layers before it give. A layer's new weights are put on disk,
sealed, in the dtype they will be written in, before the next layer begins; what was done is read back from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loram.align_options import AlignOptions
from loram.blockwise import BlockRunner, shared_inputs
from loram.checkpoint import read_entry, read_header
from loram.pruning_map import PruningMap
from loram.shards import write_tensors
from loram.training import checkpoints
from loram.training.alignment import WEIGHTS, Task, one_step, refuse_stop
from loram.training.checkpoints import PREFIX, Checkpoint
from loram.training.loop import Session, begin_metrics
from loram.training.metrics import METRICS, StepReport
from loram.training.streams import Pair, relative_error, residuals, side_by_side, was_cut

Repair = Callable[["Job", Pair], None]
"""Changes the weights of a pair's small layer in place."""


@dataclass(frozen=True)
class Job:
    """Which models, on which windows, how, and where what is done is kept; `repair` does one layer."""

    large: BlockRunner
    small: BlockRunner
    windows: Tensor
    pruning_map: PruningMap
    options: AlignOptions
    place: Path
    session: Session
    repair: Repair

    def mask(self, pair: Pair, name: str) -> Tensor | None:
        """The keep-mask of a weight of the layer over its small shape."""
        return self.pruning_map.small_mask(pair.module(name))

    def folder(self, number: int) -> Path:
        """Where layer `number` is kept."""
        return self.place / f"{PREFIX}{number + 1}"


def reconstruct(job: Job, report: StepReport) -> dict[str, Path]:
    """Repair all layers; {tensor name: the file that holds what it became}."""
    done = done_layers(job)
    begin_metrics(report, job.place.parent, Checkpoint(job.folder(done - 1), done) if done else None)
    changed: dict[str, Path] = {}
    for number in range(done):
        changed |= dict.fromkeys(read_header(job.folder(number) / WEIGHTS)[1], job.folder(number) / WEIGHTS)
    if done == job.small.layers:
        return changed
    job.small.edit = partial(replaced, changed)
    report.begin("align", job.small.layers)
    for pair in side_by_side(job.large, job.small, job.windows, job.pruning_map):
        refuse_stop(job.session, pair.number, job.options)
        if pair.number >= done:
            changed |= repair_layer(job, pair, report)
    refuse_stop(job.session, job.small.layers, job.options)
    report.progress.end()
    return changed


def done_layers(job: Job) -> int:
    """How many layers, from the first, are kept whole."""
    if job.session.start is None:
        return 0
    number = 0
    while number < job.session.start.step and checkpoints.damage(job.folder(number)) is None:
        number += 1
    return number


def replaced(changed: Mapping[str, Path], name: str, weight: Tensor) -> Tensor:
    """A weight as it is now."""
    if name not in changed:
        return weight
    return stored(changed[name], name).to(weight.device, weight.dtype)


def stored(file: Path, name: str) -> Tensor:
    """A tensor of a layer's file."""
    return read_entry(read_header(file)[1][name])


def repair_layer(job: Job, pair: Pair, report: StepReport) -> dict[str, Path]:
    """Repair one layer where something of it was cut, keep what became of it, and note its error."""
    before = error = pair.error()
    changed: dict[str, Tensor] = {}
    if was_cut(job.pruning_map, pair.large_number):
        old = {name: value.detach().clone() for name, value in pair.block.module.named_parameters()}
        job.repair(job, pair)
        changed = settle(job, pair, old)
        error = pair.error()
    report.tokens = job.windows.numel() * (pair.number + 1)
    report.extra = {"error_before": before}
    report.record(pair.number + 1, error, job.options.rate, job.options.rate)
    keep(job, pair.number, changed)
    return {name: job.folder(pair.number) / WEIGHTS for name in changed}


def settle(job: Job, pair: Pair, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round what changed to the dtype it is stored in, in the block as well; by tensor name."""
    changed = {}
    for name, value in [*pair.block.module.named_parameters()]:
        full = f"{pair.block.name}.{name}"
        rounded = value.detach().to("cpu", job.small.checkpoint.entry(full).dtype)
        again = rounded.to(old[name].device, old[name].dtype)
        if not torch.equal(again, old[name]):
            changed[full] = rounded
        set_weight(pair.block.module, name, again)
    return changed


def set_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a frozen weight in place."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def keep(job: Job, number: int, changed: Mapping[str, Tensor]) -> None:
    """Put a layer on disk with the metrics so far, sealed last."""
    folder = job.folder(number)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.write_identity(job.place, job.session.identity)
    folder.mkdir(parents=True)
    write_tensors(folder / WEIGHTS, changed)
    shutil.copyfile(job.place.parent / METRICS, folder / METRICS)
    checkpoints.seal(folder)


def refit_layer(job: Job, pair: Pair) -> None:
    """o, then down, in closed form; with --refit-all what stands before each of them first."""
    outputs = [weight.name for weight in job.pruning_map.family.outputs]
    groups: list[Sequence[str]] = [*shared_inputs(job.pruning_map.family).values()]
    if not job.options.refit_all:
        groups = [names for names in groups if names[0] in outputs]
    for names in groups:
        for name, found in residuals(pair, names).items():
            weight: Any = pair.block.module.get_submodule(name).weight
            update = found.update(job.mask(pair, name), what=f"{pair.block.name}.{name}")
            weight.data = (weight.double() + update.to(weight.device)).to(weight.dtype)


def train_layer(job: Job, pair: Pair) -> None:
    """Steps of AdamW on all weights of the layer against its target; kept only if they bring it closer."""
    module = pair.block.module
    before = pair.error()
    old = {name: value.detach().clone() for name, value in module.named_parameters()}
    for name in old:
        set_weight(module, name, old[name].float())
    parameters = dict(module.named_parameters())
    for value in parameters.values():
        value.requires_grad_(True)
    masks = {name: job.mask(pair, name.removesuffix(".weight")) for name in old if old[name].dim() == 2}
    task = Task(
        parameters,
        partial(layer_loss, pair),
        batches(job, pair.number),
        job.windows.shape[1],
        {name: mask for name, mask in masks.items() if mask is not None},
    )
    optimizer = torch.optim.AdamW([*parameters.values()], lr=job.options.rate, weight_decay=job.options.weight_decay)
    for step in range(job.options.step_count):
        refuse_stop(job.session, pair.number, job.options)
        one_step(task, optimizer, job.options, step)
    for name in old:
        set_weight(module, name, parameters[name].detach().to(old[name].dtype))
    if not pair.error() < before:
        for name in old:
            set_weight(module, name, old[name])


def layer_loss(pair: Pair, numbers: Sequence[int]) -> Tensor:
    """Mean relative error of the layer's output on the small stream."""
    device, dtype = pair.block.runner.device, pair.block.runner.dtype
    x, wanted = (
        torch.cat([hidden.read(slice(n, n + 1)) for n in numbers]).to(device) for hidden in (pair.small_in, pair.target)
    )
    if dtype == torch.float32:
        return relative_error(pair.block(x), wanted)
    with torch.autocast(torch.device(str(device)).type, dtype=dtype):
        return relative_error(pair.block(x), wanted)


def batches(job: Job, layer: int) -> list[int]:
    """The windows of all steps of a layer: passes over all of them, each in another order."""
    count = job.options.step_count * job.options.batch * job.options.accumulate
    generator = torch.Generator().manual_seed(job.options.seed * 1_000_003 + layer)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(job.windows), generator=generator).tolist()
    return order[:count]


REPAIRS: dict[str, Repair] = {"refit": refit_layer, "block": train_layer}
