"""The local training loop: a thin `transformers.Trainer`.

The loss is the mean over the tokens that carry loss, over all forward passes of an optimizer step.
Arguments and Trainer are made and used in one go: a second TrainingArguments made before the first
Trainer has run would pull accelerate's state from under it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from loram.artifact import TRACKED, read_json
from loram.data.collate import collate, collate_packs
from loram.data.encoding import EncodedRow
from loram.data.isolation import refuse_leaks
from loram.data.packing import packed
from loram.device import peak_bytes, refuse_without_compiler, reset_peak, resolve_dtype
from loram.errors import Interrupted, OptionError, OutOfMemory, is_out_of_memory
from loram.option_fields import command_line
from loram.options import TrainOptions
from loram.progress import SILENT, Progress
from loram.training.checkpoints import FOLDER, Checkpoint
from loram.training.cross_entropy import without_logits
from loram.training.metrics import METRICS, StepReport, read_metrics
from loram.training.processes import is_writer
from loram.training.signals import StopRequest
from loram.training.trainer import CheckpointingTrainer, SaveAndStop, load_weights
from loram.training.watching import Watch, Watcher, restore_best

logger = logging.getLogger(__name__)

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainingRun:
    """What a run of the loop came to."""

    steps: int
    loss_first: float
    loss_last: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class Session:
    """What makes a run one that can be stopped and continued: where it starts, whose it is, who may stop it."""

    start: Checkpoint | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    stop: StopRequest = field(default_factory=StopRequest)
    watch: Watch = field(default_factory=Watch)


def fit(
    model: nn.Module,
    rows: list[EncodedRow],
    options: TrainOptions,
    folder: Path,
    progress: Progress = SILENT,
    session: Session | None = None,
) -> TrainingRun:
    """Train the model's trainable weights on the rows; `folder` receives `metrics.jsonl` and, meanwhile, checkpoints.

    Interrupted where a signal stopped it; the last step is saved then.
    """
    session = session or Session()
    reset_peak()
    report = StepReport(folder, progress, options.log_every if is_writer() else 10**9)
    again = command_line("train", replace(options, resume="auto"))
    if session.stop and session.start is None:
        raise Interrupted(f"stopped by {session.stop.name} before the first step", again)
    begin_metrics(report, folder, session.start)
    if session.start is not None and is_finished(session.start, session.watch, report):
        load_weights(model, session.start.folder)
    else:
        train(model, rows, options, folder, (report, session))
    if session.stop:
        raise Interrupted(
            f"stopped by {session.stop.name} at step {len(report.losses)}, which is saved",
            command_line("train", options),
        )
    restore_best(model, session.watch, report, folder / FOLDER)
    return summed_up(report)


def summed_up(report: StepReport) -> TrainingRun:
    """The figures of all steps, those before a continuation included."""
    return TrainingRun(
        steps=len(report.losses),
        loss_first=report.losses[0],
        loss_last=report.losses[-1],
        tokens=report.tokens,
        seconds=report.seconds,
        tokens_per_second=report.tokens / report.seconds if report.seconds else 0.0,
        peak_bytes=peak_bytes(),
    )


def finished_run(folder: Path) -> TrainingRun:
    """The figures of a training that an earlier call finished."""
    report = StepReport(folder, SILENT, 1)
    report.restore(read_metrics(folder))
    return summed_up(report)


def train(
    model: nn.Module, rows: list[EncodedRow], options: TrainOptions, folder: Path, parts: tuple[StepReport, Session]
) -> None:
    """All steps that are left."""
    report, session = parts
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        with without_logits(inner), logging_to(folder / TRACKED):
            trainer = build_trainer(model, rows, options, folder, (report, session))
            trainer.train(resume_from_checkpoint=str(session.start.folder) if session.start else None)
    except ImportError as error:
        raise missing_library(options.optimizer, error) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory at step {len(report.losses) + 1}") from error


def missing_library(optimizer: str, error: ImportError) -> OptionError:
    """What to install for an optimizer that is not torch's own."""
    if "bitsandbytes" in str(error):
        return OptionError(f"--optimizer {optimizer} needs bitsandbytes; pip install 'loram[quant]'")
    return OptionError(f"--optimizer {optimizer} needs a library: {error}")


def packed_for(model: nn.Module, rows: list[EncodedRow], options: TrainOptions) -> list[list[EncodedRow]]:
    """The rows in packs of --max-length tokens; OptionError where the model would not keep them apart."""
    refuse_leaks(model, max(len(row["input_ids"]) for row in rows))
    packs = packed(rows, options.max_length)
    logger.info("packing: %s rows in %s of %d tokens", f"{len(rows):,}", f"{len(packs):,}", options.max_length)
    return packs


def build_trainer(
    model: nn.Module, rows: list[EncodedRow], options: TrainOptions, folder: Path, parts: tuple[StepReport, Session]
) -> CheckpointingTrainer:
    """The Trainer with our callbacks; OptionError where a tracker is unknown or not installed."""
    report, session = parts
    arguments = training_arguments(options, folder)
    watcher = Watcher(session.watch, report, folder / FOLDER)
    try:
        trainer = CheckpointingTrainer(
            model=model,
            args=arguments,
            train_dataset=packed_for(model, rows, options) if options.packing else rows,
            data_collator=collate_packs if options.packing else collate,
            callbacks=[watcher, SaveAndStop(options.save_every, session.stop), report],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        if not options.report_to:
            raise
        raise OptionError(f"--report-to {','.join(options.report_to)} does not work here: {error}") from error
    refuse_shards(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.metrics, trainer.identity, trainer.options = folder / METRICS, session.identity, options
    trainer.report = report
    return trainer


def refuse_shards(trainer: CheckpointingTrainer) -> None:
    """OptionError where no process would hold a whole model: loss, measurements and the written adapter need one."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    what = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed ZeRO-3" if plugin and plugin.zero_stage == 3 else None
    if what is not None:
        raise OptionError(
            f"{what} keeps the weights in shards and loram needs them whole in every process; "
            "use several processes without it, or DeepSpeed ZeRO-2 (docs/distributed.md)"
        )


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Where TensorBoard writes, unless the environment says otherwise."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if given == str(folder):
            os.environ.pop(name, None)


def begin_metrics(report: StepReport, folder: Path, start: Checkpoint | None) -> None:
    """The lines up to the checkpoint, and no others."""
    lines = read_metrics(start.folder) if start else []
    report.restore(lines)
    if not is_writer():
        return
    if start is not None:
        (folder / METRICS).write_bytes((start.folder / METRICS).read_bytes())
    elif (folder / METRICS).is_file():
        (folder / METRICS).unlink()


def is_finished(start: Checkpoint, watch: Watch, report: StepReport) -> bool:
    """Whether the run of this checkpoint has no step left."""
    planned = int(read_json(start.folder / "trainer_state.json")["max_steps"])
    return start.step >= planned or watch.exhausted(report.lines)


def training_arguments(options: TrainOptions, folder: Path) -> TrainingArguments:
    """The options in the Trainer's words. It logs every step to us and nothing to anybody else."""
    dtype = resolve_dtype(options.dtype)
    if options.compile:
        refuse_without_compiler()
    try:
        arguments = TrainingArguments(
            output_dir=str(folder / FOLDER),
            max_steps=options.steps or -1,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.lr,
            lr_scheduler_type=SCHEDULES[options.schedule],
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            max_grad_norm=options.clip,
            optim=options.optimizer,
            torch_compile=options.compile,
            seed=options.seed,
            bf16=dtype == "bf16",
            fp16=dtype == "fp16",
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=options.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if options.checkpointing else None,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            remove_unused_columns=False,
            save_strategy="no",
            eval_strategy="no",
            report_to=list(options.report_to) or "none",
            neftune_noise_alpha=options.neftune,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:
        raise OptionError(f"the training options do not go together: {error}") from error
    if torch.cuda.is_available():
        # Several GPUs without a launcher would mean nn.DataParallel; several processes is how it is done.
        arguments._n_gpu = 1
    return arguments
