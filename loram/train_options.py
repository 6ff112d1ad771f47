"""The options of `train`, in groups: what is adapted, how it is optimized, how a run survives being stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loram.data_options import ReadingOptions
from loram.option_fields import DTYPES, WritingOptions, argument, flag, option, require


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(WritingOptions):
    """How often training is saved, and where it goes on."""

    resume: str = option(
        "auto",
        "Where to go on: auto (the newest good checkpoint, if any), never (start anew), or a checkpoint folder.",
        flags=("--resume-from-checkpoint",),
    )
    save_every: int = option(100, "Save a checkpoint every N steps; 0 saves on a signal only.", flags=("--save-steps",))
    keep_checkpoints: int = option(2, "Keep the newest N checkpoints.", flags=("--save-total-limit",))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.resume), "--resume is empty; expected auto, never or a checkpoint folder")
        require(self.save_every >= 0, f"--save-every is {self.save_every}; it must be 0 or more")
        require(self.keep_checkpoints >= 1, f"--keep-checkpoints is {self.keep_checkpoints}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ReadingOptions, ResumeOptions):
    """Train LoRA on a small model (or on any plain one)."""

    model: str = argument("Small model (or a plain model folder or Hub id).")
    data: tuple[str, ...] = option(
        (),
        "Training data: file, folder or Hub dataset (ORG/NAME:CONFIG@SPLIT), optionally =WEIGHT; may be repeated.",
        flags=("--dataset-name",),
    )
    steps: int | None = option(None, "Optimizer steps (instead of --epochs).", flags=("--max-steps",))
    epochs: float = option(1.0, "Passes over the data.", flags=("--num-train-epochs",))
    rank: int = option(8, "LoRA rank.", flags=("--lora-r",))
    alpha: float = option(16.0, "LoRA alpha; the update is scaled by alpha / rank.", flags=("--lora-alpha",))
    dropout: float = option(0.05, "LoRA dropout.", flags=("--lora-dropout",))
    targets: tuple[str, ...] = option(
        ("all-linear",),
        "Modules to adapt, comma separated: all-linear (without lm_head) or names.",
        flags=("--lora-target-modules",),
    )
    rslora: bool = option(False, "Scale by alpha / sqrt(rank) (rsLoRA, 2312.03732).", flags=("--use-rslora",))
    lr: float = option(2e-4, "Peak learning rate.", flags=("--learning-rate",))
    warmup: float = option(0.03, "Warm-up: share of the steps if below 1, else steps.", flags=("--warmup-ratio",))
    schedule: str = option(
        "cosine",
        "Learning rate after warm-up.",
        choices=("cosine", "linear", "constant"),
        flags=("--lr-scheduler-type",),
    )
    weight_decay: float = option(0.0, "AdamW weight decay.")
    clip: float = option(1.0, "Clip the gradient norm to this.", flags=("--max-grad-norm",))
    optimizer: str = option("adamw_torch", "Optimizer, by its transformers name.", flags=("--optim",))
    batch: int = option(8, "Rows in a forward pass.", flags=("--per-device-train-batch-size",))
    accumulate: int = option(1, "Forward passes per optimizer step.", flags=("--gradient-accumulation-steps",))
    dtype: str = option("auto", "Dtype to load and compute in; auto is bf16 where it pays.", choices=("auto", *DTYPES))
    checkpointing: bool = option(False, "Recompute activations to save memory.", flags=("--gradient-checkpointing",))
    log_every: int = option(10, "Log every N steps.", flags=("--logging-steps",))
    backend: str = option("local", "Where training runs.", choices=("local",))
    task: str = option("causal-lm", "What is trained.", choices=("causal-lm",))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "batch", "accumulate", "log_every"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")
        require(self.steps is None or self.steps >= 1, f"--steps is {self.steps}; it must be 1 or more")
        require(0 < self.epochs < math.inf, f"--epochs is {self.epochs}; it must be more than 0 and finite")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        require(self.lr > 0 and math.isfinite(self.lr), f"--lr is {self.lr}; it must be a positive number")
        require(self.alpha > 0 and math.isfinite(self.alpha), f"--alpha is {self.alpha}; it must be positive")
        require(self.warmup >= 0, f"--warmup is {self.warmup}; it must be 0 or more")
