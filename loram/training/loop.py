"""The local training loop: a thin `transformers.Trainer`.

The loss is the mean over the tokens that carry loss, over all forward passes of an optimizer step.
Arguments and Trainer are made and used in one go: a second TrainingArguments made before the first
Trainer has run would pull accelerate's state from under it. Checkpoints and resuming belong in `fit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from loram.data.collate import IGNORED, collate
from loram.data.encoding import EncodedRow
from loram.device import peak_bytes, reset_peak, resolve_dtype
from loram.errors import OptionError, ResourceError
from loram.options import TrainOptions
from loram.progress import SILENT, Progress
from loram.training.metrics import StepReport

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


def fit(
    model: nn.Module, rows: list[EncodedRow], options: TrainOptions, folder: Path, progress: Progress = SILENT
) -> TrainingRun:
    """Train the model's trainable weights on the rows; `folder` receives `metrics.jsonl`."""
    reset_peak()
    report = StepReport(folder, progress, options.log_every)
    trainer = Trainer(
        model=model,
        args=training_arguments(options, folder),
        train_dataset=rows,
        data_collator=collate,
        compute_loss_func=mean_token_loss,
        callbacks=[report],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of GPU memory at step {len(report.losses) + 1} with --batch {options.batch} and --max-length "
            f"{options.max_length}; lower --batch (and raise --accumulate), or add --checkpointing"
        ) from error
    return TrainingRun(
        steps=len(report.losses),
        loss_first=report.losses[0],
        loss_last=report.losses[-1],
        tokens=report.tokens,
        seconds=report.seconds,
        tokens_per_second=report.tokens / report.seconds,
        peak_bytes=peak_bytes(),
    )


def mean_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the tokens that carry loss, over their number in the whole optimizer step.

    Positions without loss are left out before the logits are widened to fp32.
    """
    targets = labels[:, 1:]
    carry = targets != IGNORED
    logits = outputs["logits"][:, :-1][carry].float()
    return nn.functional.cross_entropy(logits, targets[carry], reduction="sum") / num_items_in_batch


def training_arguments(options: TrainOptions, folder: Path) -> TrainingArguments:
    """The options in the Trainer's words. It logs every step to us and nothing to anybody else."""
    dtype = resolve_dtype(options.dtype)
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
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
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:
        raise OptionError(f"the training options do not go together: {error}") from error
    if torch.cuda.is_available():
        # Several GPUs without a launcher would mean nn.DataParallel; several processes is how it is done.
        arguments._n_gpu = 1
    return arguments
