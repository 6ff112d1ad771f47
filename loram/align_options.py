"""The options of `align`, in groups: what the small model learns from, how, and how a stopped run goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loram.option_fields import argument, flag, option, require
from loram.prune_options import StreamOptions
from loram.train_options import ResumeOptions

METHODS = ("block", "refit", "distill", "lm")
SCOPES = ("all", "lora", "norms")
RATES = {"all": 1e-4, "lora": 1e-3, "norms": 1e-3}
"""The peak learning rate of lm and distill where none is given, by --scope."""
BLOCK_RATE = 3e-4
STEPS = {"lm": 200, "distill": 200, "block": 100, "refit": 1}


@dataclass(frozen=True, kw_only=True)
class AlignLoopOptions(ResumeOptions):
    """How the weights are optimized."""

    steps: int | None = option(
        None, "Optimizer steps (lm, distill: 200), or steps per layer (block: 100).", flags=("--max-steps",)
    )
    batch: int = option(4, "Windows in a forward pass.", flags=("--per-device-train-batch-size",))
    accumulate: int = option(1, "Forward passes per optimizer step.", flags=("--gradient-accumulation-steps",))
    lr: float | None = option(
        None,
        "Peak learning rate; default by --method and --scope (all 1e-4, lora and norms 1e-3, block 3e-4).",
        flags=("--learning-rate",),
    )
    warmup: float = option(0.03, "Warm-up: share of the steps if below 1, else steps.", flags=("--warmup-ratio",))
    schedule: str = option(
        "cosine",
        "Learning rate after warm-up.",
        choices=("cosine", "linear", "constant"),
        flags=("--lr-scheduler-type",),
    )
    weight_decay: float = option(0.0, "AdamW weight decay.")
    clip: float = option(1.0, "Clip the gradient norm to this; 0 does not.", flags=("--max-grad-norm",))
    dtype: str = option(
        "auto", "Dtype to compute in; trained weights are fp32 throughout.", choices=("auto", "bf16", "fp32")
    )
    checkpointing: bool = option(False, "Recompute activations to save memory.", flags=("--gradient-checkpointing",))
    log_every: int = option(10, "Log every N steps.", flags=("--logging-steps",))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "accumulate", "log_every"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")
        require(self.steps is None or self.steps >= 1, f"--steps is {self.steps}; it must be 1 or more")
        lr = self.lr
        require(lr is None or (lr > 0 and math.isfinite(lr)), f"--lr is {lr}; it must be a positive number")
        for name in ("clip", "weight_decay", "warmup"):
            require(getattr(self, name) >= 0, f"--{flag(name)} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(AlignLoopOptions):
    """What is learned from the large model."""

    large: str | None = option(None, "The large model, where the manifest does not say.")
    temperature: float = option(1.0, "distill: soften both distributions by this.")
    hidden_weight: float = option(0.0, "distill: weight of the relative squared error of the last hidden states.")
    teacher_cache: str | None = option(
        None,
        "distill: folder for the large model's logits, written once, one layer in memory at a time; without it the "
        "large model is in memory beside the small one.",
    )
    top_k: int = option(64, "distill: logits per token in the cache; the rest of the mass is one bucket.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.temperature < math.inf, f"--temperature is {self.temperature}; it must be more than 0 and finite"
        )
        require(0 <= self.hidden_weight < math.inf, f"--hidden-weight is {self.hidden_weight}; it must be 0 or more")
        require(self.top_k >= 1, f"--top-k is {self.top_k}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class AlignInputs(TeacherOptions, StreamOptions):
    """What is aligned, and on which text."""

    model: str = argument("The small model.")
    data: tuple[str, ...] = option(
        (),
        "Text to align on: what train reads, or 'builtin'; optionally =WEIGHT; may be repeated. Use the text you will "
        "train on, half and half with general text.",
        flags=("--dataset-name",),
    )
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    length: int = option(256, "Tokens in a window.", flags=("--max-length", "--max-seq-length"))
    packing: bool = option(
        False, "lm, distill: keep the documents in a window apart, so that none sees the one before it."
    )
    samples: int = option(64, "refit, block: windows in all.")
    held_out: int = option(16, "Windows that are left out, to measure the loss before and after.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.length >= 2, f"--length is {self.length}; it must be 2 or more")
        for name in ("samples", "held_out"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")


# The groups are shown from the last base to the first: that is how Python orders inherited fields.
@dataclass(frozen=True, kw_only=True)
class AlignOptions(AlignInputs):
    """Make a small model behave like the large one again."""

    method: str = option(
        "block",
        "block (steps layer by layer), refit (closed form), distill (KL to the large model) or lm (next tokens).",
        choices=METHODS,
    )
    scope: str = option(
        "all", "lm, distill: train all weights but lm_head, LoRA merged back, or norms alone.", choices=SCOPES
    )
    rank: int = option(32, "Rank of the LoRA with --scope lora.", flags=("--lora-r",))
    refit_all: bool = option(False, "refit: q, k, v, gate and up as well as o and down.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, f"--rank is {self.rank}; it must be 1 or more")
        learns = self.method in ("lm", "distill")
        require(
            learns or self.scope == "all", f"--scope {self.scope} is for lm and distill, not for --method {self.method}"
        )
        require(
            self.method == "distill" or self.teacher_cache is None,
            f"--teacher-cache is for --method distill; --method {self.method} has no use for it",
        )
        require(
            self.method == "distill" or not self.hidden_weight,
            f"--hidden-weight is for --method distill; --method {self.method} has no use for it",
        )
        require(self.method == "refit" or not self.refit_all, "--refit-all is for --method refit")
        require(
            not self.packing or (learns and self.teacher_cache is None),
            "--packing is for lm and for distill with the large model in memory: refit, block and --teacher-cache put "
            "all windows through a layer under one mask, which keeps no documents apart",
        )

    @property
    def step_count(self) -> int:
        """Optimizer steps in all; with `block`, per layer."""
        return STEPS[self.method] if self.steps is None else self.steps

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return BLOCK_RATE if self.method == "block" else RATES[self.scope]
