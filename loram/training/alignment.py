"""The loop that aligns a small model's weights: AdamW over windows in a fixed order, stopped and continued exactly.

It is not the Trainer because nothing of it is LoRA: the weights themselves are trained, in fp32 whatever is computed
in, and their checkpoints are safetensors and JSON alone. Nothing random is left to carry over: the order of the
windows is given, and what a model's dropout draws depends on the seed and the step.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loram.align_options import AlignOptions
from loram.artifact import read_json, write_json
from loram.device import reset_peak
from loram.errors import Interrupted, ResourceError
from loram.option_fields import command_line
from loram.progress import SILENT, Progress
from loram.training import checkpoints
from loram.training.checkpoints import FOLDER, PREFIX, Checkpoint
from loram.training.loop import Session, begin_metrics
from loram.training.metrics import METRICS, StepReport

logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
Objective = Callable[[Sequence[int]], Tensor]
"""Numbers of windows → their mean loss per token, with its graph."""


@dataclass(frozen=True)
class Task:
    """What is trained on what: parameters by name, loss, windows in order, tokens of one, and masks of kept weights."""

    parameters: Mapping[str, nn.Parameter]
    objective: Objective
    order: Sequence[int]
    length: int
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def align_weights(
    task: Task, options: AlignOptions, folder: Path, progress: Progress = SILENT, session: Session | None = None
) -> StepReport:
    """Train the task's parameters in place; `folder` receives `metrics.jsonl` and, meanwhile, checkpoints.

    Interrupted where a signal stopped it; the last step is saved then.
    """
    session = session or Session()
    reset_peak()
    report = StepReport(folder, progress, options.log_every)
    begin_metrics(report, folder, session.start)
    optimizer = torch.optim.AdamW(
        [*task.parameters.values()], lr=options.rate, weight_decay=options.weight_decay, betas=(0.9, 0.95)
    )
    done = restore(task, optimizer, session.start) if session.start else 0
    report.begin("align", options.step_count)
    for step in range(done, options.step_count):
        refuse_stop(session, step, options)
        try:
            loss, rate = one_step(task, optimizer, options, step)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of GPU memory at step {step + 1} with --batch {options.batch} and --length {options.length}; "
                "lower --batch (and raise --accumulate), add --checkpointing, or use --scope lora or --method block"
            ) from error
        report.tokens = (step + 1) * options.batch * options.accumulate * task.length
        report.record(step + 1, loss, rate, options.rate)
        if is_due(step + 1, options) or session.stop:
            save(task, optimizer, folder / FOLDER, step + 1, (options, session))
    progress.end()
    refuse_stop(session, options.step_count, options)
    return report


def refuse_stop(session: Session, step: int, options: AlignOptions) -> None:
    """Interrupted where somebody has asked to stop."""
    if session.stop:
        unit = "layer" if options.method in ("refit", "block") else "step"
        where = f"at {unit} {step}, which is saved" if step else f"before the first {unit} was done"
        raise Interrupted(f"stopped by {session.stop.name} {where}", command_line("align", options))


def one_step(task: Task, optimizer: torch.optim.Optimizer, options: AlignOptions, step: int) -> tuple[float, float]:
    """One optimizer step; its mean loss and learning rate."""
    torch.manual_seed(options.seed * 1_000_003 + step)
    rate = rate_at(step, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = 0.0
    for part in range(options.accumulate):
        first = (step * options.accumulate + part) * options.batch
        loss = task.objective(task.order[first : first + options.batch]) / options.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    mask_(task, gradients=True)
    if options.clip:
        nn.utils.clip_grad_norm_([*task.parameters.values()], options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mask_(task, gradients=False)
    return total, rate


def mask_(task: Task, *, gradients: bool) -> None:
    """Zeros of a masked weight stay zero, and its gradients count neither in the clip norm nor in the moments."""
    for name, mask in task.masks.items():
        parameter = task.parameters[name]
        found = parameter.grad if gradients else parameter.data
        if found is not None:
            found.mul_(mask.to(found.device))


def rate_at(step: int, options: AlignOptions) -> float:
    """The learning rate of a step, counted from 0: a warm-up from above zero, then the schedule down to zero."""
    steps = options.step_count
    warmup = math.ceil(options.warmup * steps) if options.warmup < 1 else int(options.warmup)
    if step < warmup:
        return options.rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return options.rate * share[options.schedule]


def is_due(step: int, options: AlignOptions) -> bool:
    """Whether a checkpoint is written after this step."""
    return options.save_every > 0 and (step % options.save_every == 0 or step == options.step_count)


def save(
    task: Task, optimizer: torch.optim.Optimizer, place: Path, step: int, run: tuple[AlignOptions, Session]
) -> None:
    """A checkpoint of weights, moments and metrics, sealed last."""
    options, session = run
    folder = place / f"{PREFIX}{step}"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.write_identity(place, session.identity)
    folder.mkdir(parents=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in task.parameters.items()}, folder / WEIGHTS)
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment].detach().cpu().contiguous()
        for name, parameter in task.parameters.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }
    save_file(moments, folder / OPTIMIZER)
    write_json(folder / STATE, {"step": step})
    shutil.copyfile(place.parent / METRICS, folder / METRICS)
    checkpoints.seal(folder)
    checkpoints.keep_newest(place, options.keep_checkpoints)


def restore(task: Task, optimizer: torch.optim.Optimizer, start: Checkpoint) -> int:
    """Put a checkpoint's weights and moments in place; the number of steps that are done."""
    weights, moments = load_file(start.folder / WEIGHTS), load_file(start.folder / OPTIMIZER)
    for name, parameter in task.parameters.items():
        parameter.data.copy_(weights[name])
        if f"step.{name}" in moments:
            found = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in found.items()
            }
    return int(read_json(start.folder / STATE)["step"])


def finished_losses(folder: Path) -> list[float]:
    """The training losses of an alignment that is done."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines() if (folder / METRICS).is_file() else []
    return [float(json.loads(line)["loss"]) for line in lines]
