"""The options of `train`, in groups: what is adapted, how it is optimized, how a run survives being stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loram.data_options import ReadingOptions
from loram.errors import OptionError
from loram.option_fields import DTYPES, WritingOptions, argument, flag, option, require

INITS = ("default", "gaussian")
ABSORBING = ("pissa", "olora", "loftq", "corda", "lora_ga")


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
class LoraOptions(WritingOptions):
    """What is adapted, and how."""

    rank: int = option(8, "LoRA rank.", flags=("--lora-r",))
    alpha: float = option(16.0, "LoRA alpha; the update is scaled by alpha / rank.", flags=("--lora-alpha",))
    dropout: float = option(0.05, "LoRA dropout.", flags=("--lora-dropout",))
    targets: tuple[str, ...] = option(
        ("all-linear",),
        "Modules to adapt, comma separated: all-linear (without lm_head) or names.",
        flags=("--lora-target-modules",),
    )
    layers: tuple[str, ...] = option(
        (), "Adapt these decoder layers only, e.g. 0,4-7.", flags=("--layers-to-transform",)
    )
    rank_pattern: tuple[str, ...] = option((), "Other ranks by module, e.g. q_proj=16,layers.0.mlp.up_proj=4.")
    alpha_pattern: tuple[str, ...] = option((), "Other alphas by module, e.g. q_proj=32.")
    rslora: bool = option(False, "Scale by alpha / sqrt(rank) (rsLoRA, 2312.03732).", flags=("--use-rslora",))
    init: str = option("default", "How A is drawn (B begins at zero).", choices=INITS, flags=("--init-lora-weights",))
    unmasked_update: bool = option(
        False,
        "On a model with masks (semi, unstructured, given): train plain LoRA, and not only where the mask is on.",
    )
    dora: bool = option(False, "Refused: DoRA's magnitudes do not carry over.", flags=("--use-dora",))
    modules_to_save: tuple[str, ...] = option((), "Refused: whole modules do not carry over.")

    def __post_init__(self) -> None:
        if self.init.lower().startswith(ABSORBING):
            raise OptionError(
                f"--init {self.init} moves part of the base weights into A and B, and on the large model that part "
                "would be added twice; use --init default or gaussian"
            )
        super().__post_init__()
        require(
            not self.dora,
            "--dora trains magnitudes of the small model's columns, which are not those of the large model's; "
            "train plain LoRA (--rslora and --lora-plus-ratio carry over)",
        )
        require(
            not self.modules_to_save,
            "--modules-to-save trains whole weights of the small model, which no adapter of the large one can hold; "
            "adapt them with LoRA instead, e.g. --targets all-linear,embed_tokens",
        )
        require(self.rank >= 1, f"--rank is {self.rank}; it must be 1 or more")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        require(self.alpha > 0 and math.isfinite(self.alpha), f"--alpha is {self.alpha}; it must be positive")
        parse_layers(self.layers)
        parse_pattern("rank_pattern", self.rank_pattern)
        parse_pattern("alpha_pattern", self.alpha_pattern)


def parse_layers(texts: tuple[str, ...]) -> list[int]:
    """`0`, `4-7` … as sorted layer numbers."""
    found: set[int] = set()
    for text in texts:
        first, dash, last = text.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise OptionError(f"--layers has {text!r}; expected numbers and ranges such as 0,4-7")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def parse_pattern(name: str, texts: tuple[str, ...]) -> dict[str, float]:
    """`module=number` … as a mapping."""
    found: dict[str, float] = {}
    for text in texts:
        module, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not module or not 0 < value < math.inf or (name == "rank_pattern" and value != int(value)):
            kind = "a whole number" if name == "rank_pattern" else "a number"
            raise OptionError(f"--{flag(name)} has {text!r}; expected MODULE=N with {kind} above 0, e.g. q_proj=16")
        found[module] = value
    return found


@dataclass(frozen=True, kw_only=True)
class LoopOptions(WritingOptions):
    """How the weights are optimized."""

    steps: int | None = option(None, "Optimizer steps (instead of --epochs).", flags=("--max-steps",))
    epochs: float = option(1.0, "Passes over the data.", flags=("--num-train-epochs",))
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
    lora_plus_ratio: float | None = option(None, "LoRA+ (2402.12354): learn B this many times faster than A.")
    lora_fa: bool = option(False, "LoRA-FA (2308.03303): keep A as drawn and train B alone, with its own AdamW.")
    neftune: float | None = option(None, "NEFTune (2310.05914): noise on embeddings.", flags=("--neftune-noise-alpha",))
    batch: int = option(8, "Rows in a forward pass.", flags=("--per-device-train-batch-size",))
    accumulate: int = option(1, "Forward passes per optimizer step.", flags=("--gradient-accumulation-steps",))
    dtype: str = option("auto", "Dtype to load and compute in; auto is bf16 where it pays.", choices=("auto", *DTYPES))
    checkpointing: bool = option(False, "Recompute activations to save memory.", flags=("--gradient-checkpointing",))
    streamed: bool = option(
        False,
        "Hold one layer of the model in memory and read every weight twice a step: for a few steps on a model that "
        "does not fit.",
    )
    compile: bool = option(
        False,
        "Compile the model (torch.compile): the first steps take minutes, the others less time; for long runs.",
        flags=("--torch-compile",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "accumulate"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")
        require(self.steps is None or self.steps >= 1, f"--steps is {self.steps}; it must be 1 or more")
        require(0 < self.epochs < math.inf, f"--epochs is {self.epochs}; it must be more than 0 and finite")
        require(self.lr > 0 and math.isfinite(self.lr), f"--lr is {self.lr}; it must be a positive number")
        require(self.clip >= 0, f"--clip is {self.clip}; it must be 0 or more")
        require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}; it must be 0 or more")
        require(self.warmup >= 0, f"--warmup is {self.warmup}; it must be 0 or more")
        ratio = self.lora_plus_ratio
        require(ratio is None or 1 <= ratio < math.inf, f"--lora-plus-ratio is {ratio}; it must be 1 or more")
        require(self.neftune is None or self.neftune > 0, f"--neftune is {self.neftune}; it must be above 0")
        require(not (self.streamed and self.compile), "--streamed computes layer by layer; leave out --compile")
        require(
            not (self.streamed and self.dtype == "fp16"), "--streamed computes in bf16 or fp32; leave out --dtype fp16"
        )
        require(not (self.lora_fa and ratio is not None), "--lora-fa trains B alone; leave out --lora-plus-ratio")
        require(
            not self.lora_fa or self.optimizer == "adamw_torch",
            f"--lora-fa brings its own AdamW; leave out --optimizer {self.optimizer}",
        )


@dataclass(frozen=True, kw_only=True)
class WatchOptions(WritingOptions):
    """What is measured on held-out rows meanwhile, and when that ends the training."""

    eval_data: tuple[str, ...] = option((), "Held-out data to measure the loss on while training.")
    eval_split: float = option(0.0, "Or hold out this share of the training rows (from 1 up: this many rows).")
    eval_every: int = option(50, "Measure the held-out loss every N steps.", flags=("--eval-steps",))
    recover_eval: int = option(0, "Every N steps, recover the adapter and measure the large model's held-out loss too.")
    patience: int | None = option(
        None, "Stop after N measurements without a better one, and keep the best.", flags=("--early-stopping-patience",)
    )
    stop_on: str = option("small", "Whose held-out loss --patience looks at.", choices=("small", "large"))
    log_every: int = option(10, "Log every N steps.", flags=("--logging-steps",))
    report_to: tuple[str, ...] = option(
        (), "Trackers to log to as well, by their transformers names, e.g. tensorboard."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_every", "log_every"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")
        require(self.recover_eval >= 0, f"--recover-eval is {self.recover_eval}; it must be 0 or more")
        require(0 <= self.eval_split < math.inf, f"--eval-split is {self.eval_split}; it must be 0 or more")
        require(not (self.eval_split and self.eval_data), "--eval-data and --eval-split are two answers; give one")
        require(self.patience is None or self.patience >= 1, f"--patience is {self.patience}; it must be 1 or more")
        watched = bool(self.eval_split or self.eval_data)
        require(watched or self.patience is None, "--patience needs held-out rows; add --eval-data or --eval-split")
        require(watched or not self.recover_eval, "--recover-eval needs held-out rows; add --eval-data or --eval-split")
        require(
            self.stop_on == "small" or bool(self.recover_eval),
            "--stop-on large needs the large model's loss; add --recover-eval N",
        )


@dataclass(frozen=True, kw_only=True)
class TrainInputs(ReadingOptions, WritingOptions):
    """What is trained, and on what."""

    model: str = argument("Small model (or a plain model folder or Hub id).")
    data: tuple[str, ...] = option(
        (),
        "Training data: file, folder or Hub dataset (ORG/NAME:CONFIG@SPLIT), optionally =WEIGHT; may be repeated.",
        flags=("--dataset-name",),
    )
    adapter: str | None = option(
        None,
        "Begin with the A and B of this adapter of the same model, its rank and targets, in place of fresh ones: "
        "further steps, other data, or a few steps of a recovered adapter on the large model.",
        flags=("--lora-model-dir",),
    )
    backend: str = option("local", "Where training runs.", choices=("local",))
    task: str = option("causal-lm", "What is trained.", choices=("causal-lm",))


# The groups are shown from the last base to the first: that is how Python orders inherited fields.
@dataclass(frozen=True, kw_only=True)
class TrainOptions(ResumeOptions, WatchOptions, LoopOptions, LoraOptions, TrainInputs):
    """Train LoRA on a small model (or on any plain one)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.streamed and any(target.endswith("lm_head") for target in self.targets)),
            "--streamed reads the output head for the loss alone; leave lm_head out of --targets",
        )
        require(
            not (self.lora_fa and any(target.endswith("embed_tokens") for target in self.targets)),
            "--lora-fa keeps A as drawn, and an embedding's A is zero; leave embed_tokens out of --targets",
        )


def may_be_streamed(options: TrainOptions) -> bool:
    """Whether `--streamed` goes with the other options."""
    try:
        replace(options, streamed=True)
    except OptionError:
        return False
    return True
