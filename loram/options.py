"""Every option of every stage, once: its type, its default, its help.

One frozen dataclass per stage. The command line, the recipes and the Python functions are all made
from these, so none of them can disagree. No torch and no typer here: `loram --help` reads this file.

Field types are limited to `str`, `int`, `float`, `bool`, their `| None`, and `tuple[str, ...]`.
`metadata` keys: `help`; `argument` (positional); `choices`; `short` (a one-letter flag); `flags` (hidden long
aliases); `assignments` (no flag of its own: the command line's `--set` fills it).
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from loram.errors import OptionError
from loram.families.widths import parse_ratio

Options = TypeVar("Options", bound="StageOptions")

METHODS = ("structured", "random")
SCORES = ("wanda", "magnitude", "taylor")
QUANTIZATIONS = ("none", "nf4", "int8")
DTYPES = ("bf16", "fp16", "fp32")


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field that carries its own help."""
    return field(default=default, metadata={"help": text, **metadata})


def argument(text: str, **metadata: Any) -> Any:
    """A positional field without a default."""
    return field(metadata={"help": text, "argument": True, **metadata})


def assignments() -> Any:
    """The field that `--set` fills where a stage reads a whole recipe."""
    return option((), "Changes to the recipe, each section.key=value.", assignments=True)


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What every stage takes."""

    seed: int = option(0, "Seed of everything random: same seed, same machine, same result.")

    def __post_init__(self) -> None:
        check_choices(self)

    def to_json(self) -> dict[str, Any]:
        """The options as a JSON object, for manifests and digests."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class WritingOptions(StageOptions):
    """What every stage that writes a folder takes."""

    out: str = option("", "Folder to write; must not exist.", short="-o", flags=("--output-dir",))
    force: bool = option(False, "Replace OUT if it exists (it is moved aside until the new one is complete).")
    dry_run: bool = option(False, "Check everything, say what would be written, write nothing.")


@dataclass(frozen=True, kw_only=True)
class CutOptions(StageOptions):
    """How much is cut away, and where: shared by plan and prune."""

    method: str = option(
        "structured", "What is cut: the units with the lowest scores, or random ones.", choices=METHODS
    )
    score: str = option("wanda", "How units are scored with --method structured.", choices=SCORES)
    ratio: str = option("0.5", "Share of each layer's heads and channels to remove, as an exact decimal or fraction.")
    keep_first: int = option(4, "Leave the first N layers whole.")
    keep_last: int = option(2, "Leave the last N layers whole.")
    round_to: int = option(1, "Round kept MLP channels down to a multiple of N (64 suits GPUs).")
    samples: int = option(32, "Calibration windows in all.")
    length: int = option(256, "Tokens in a calibration window.")
    refit: bool = option(True, "With calibration: refit o and down in closed form after the cut.")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_ratio(self.ratio)
        require(self.keep_first >= 0 and self.keep_last >= 0, "--keep-first and --keep-last must be 0 or more")
        require(self.round_to >= 1, f"--round-to is {self.round_to}; it must be 1 or more")
        require(self.samples >= 1 and self.length >= 2, "--samples must be at least 1 and --length at least 2")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CutOptions):
    """Does it fit? Parameters, bytes and peak memory of every stage."""

    model: str = argument("Model folder, config.json, or Hub id.")
    memory: str | None = option(None, "Memory to fit into, e.g. 24GiB: names the mildest cut that fits.")
    quantize: str = option("none", "Plan with the small model's linears in 4 or 8 bit.", choices=QUANTIZATIONS)
    rank: int = option(8, "LoRA rank to plan for.")
    targets: tuple[str, ...] = option(("all-linear",), "LoRA target modules to plan for.")
    batch: int = option(1, "Rows in a training step.", flags=("--per-device-train-batch-size",))
    max_length: int = option(512, "Tokens in a row.", flags=("--max-seq-length",))
    checkpointing: bool = option(True, "Plan with activation checkpointing.", flags=("--gradient-checkpointing",))
    dtype: str = option("bf16", "Dtype that training computes in.", choices=DTYPES)


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CutOptions, WritingOptions):
    """Cut a large model down to a small one, and keep the map."""

    model: str = argument("The large model: folder or Hub id.")
    calibration: tuple[str, ...] = option(
        (), "Calibration text: FILE or 'builtin', optionally =WEIGHT; may be repeated. Use the text you will train on."
    )
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    base_id: str | None = option(None, "Hub id of the large model, where its folder does not tell.")
    revision: str | None = option(None, "Commit of the large model on the Hub.")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(WritingOptions):
    """Train LoRA on a small model (or on any plain one)."""

    model: str = argument("Small model (or a plain model folder or Hub id).")
    data: tuple[str, ...] = option((), "Training data: file or folder; may be repeated.", flags=("--dataset-name",))
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
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
    max_length: int = option(512, "Tokens in a row; longer rows are cut.", flags=("--max-seq-length",))
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
        require(self.max_length >= 2, f"--max-length is {self.max_length}; it must be 2 or more")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        require(self.lr > 0 and math.isfinite(self.lr), f"--lr is {self.lr}; it must be a positive number")
        require(self.alpha > 0 and math.isfinite(self.alpha), f"--alpha is {self.alpha}; it must be positive")
        require(self.warmup >= 0, f"--warmup is {self.warmup}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(WritingOptions):
    """Carry a small adapter over to the large model."""

    adapter: str = argument("Adapter trained on the small model.")
    small: str | None = option(None, "The small model, for an adapter trained outside loram.")
    portable: bool = option(True, "One rank and one alpha for all modules, as every server reads it.")
    base_id: str | None = option(None, "Hub id of the large model to name in the adapter.")


@dataclass(frozen=True, kw_only=True)
class ProjectOptions(WritingOptions):
    """Carry an adapter of the large model over to a small one."""

    adapter: str = argument("Adapter of the large model.")
    small: str = argument("The small model.")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(StageOptions):
    """Is this adapter right, complete, finite and portable?"""

    adapter: str = argument("Any PEFT LoRA folder.")
    large: str | None = option(None, "The large model, where the manifest does not say.")
    small: str | None = option(None, "The small model, for --numeric, where the manifest does not say.")
    numeric: bool = option(False, "Also check the LoRAM identity in numbers, on one batch.")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(WritingOptions):
    """Write W + s·B·A into a copy of the large checkpoint."""

    adapter: str = argument("Adapter of the large model.")
    base: str | None = option(None, "The large model, where the manifest does not say.")
    dtype: str = option("same", "Dtype of the merged weights.", choices=("same", *DTYPES))


@dataclass(frozen=True, kw_only=True)
class EvalOptions(StageOptions):
    """Held-out loss of a model; the quality ladder with --compare."""

    model: str = argument("Large model, small model, or plain model folder.")
    data: tuple[str, ...] = option((), "Evaluation data: file or folder; may be repeated.")
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    adapter: str | None = option(None, "Adapter to load on the model.")
    compare: bool = option(False, "Print the ladder: base, small, small + adapter, large + recovered.")
    small: str | None = option(None, "The small model for --compare, where the manifests do not say.")
    small_adapter: str | None = option(None, "The small adapter for --compare, where the manifest does not say.")
    ceiling: str | None = option(None, "For --compare: an adapter trained on the large model itself.")
    batch: int = option(8, "Rows in a forward pass.", flags=("--per-device-eval-batch-size",))
    max_length: int = option(512, "Tokens in a row; longer rows are cut.", flags=("--max-seq-length",))
    limit: int | None = option(None, "Look at the first N rows only.")
    generate: bool = option(False, "Also generate an answer per prompt and count exact matches.")
    new_tokens: int = option(64, "Tokens to generate at most, with --generate.")
    dtype: str = option("auto", "Dtype to load and compute in.", choices=("auto", *DTYPES))
    tasks: tuple[str, ...] = option((), "lm-eval tasks to run as well, comma separated (extra: loram[eval]).")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, f"--batch is {self.batch}; it must be 1 or more")
        require(self.max_length >= 2, f"--max-length is {self.max_length}; it must be 2 or more")
        require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class RunOptions(WritingOptions):
    """All sections of a recipe in order, skipping what is done."""

    recipe: str = argument("Recipe file, or the name of a packaged one.")
    model: str | None = option(None, "The large model (recipe: run.model).")
    data: tuple[str, ...] = option((), "Training data (recipe: run.data).")
    eval_data: tuple[str, ...] = option((), "Held-out data for the ladder (recipe: run.eval_data).")
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    ceiling: bool = option(False, "Also train LoRA on the large model itself, to show what is possible.")
    stages: tuple[str, ...] = option((), "Stages to run, in order; default: the sections of the recipe.")
    overrides: tuple[str, ...] = assignments()


@dataclass(frozen=True, kw_only=True)
class DemoOptions(WritingOptions):
    """The whole pipeline on a real small model, offline."""

    out: str = option("loram-demo", "Folder to write; what is there already is reused.", short="-o")
    model: str | None = option(None, "Another model than the cached SmolLM2-135M.")
    ceiling: bool = option(False, "Also train LoRA on the large model itself, to show what is possible.")
    overrides: tuple[str, ...] = assignments()


@dataclass(frozen=True, kw_only=True)
class InitOptions(WritingOptions):
    """Write a recipe for a model, a data file and a memory size."""

    out: str = option("recipe.yaml", "Recipe file to write.", short="-o")
    model: str = argument("The large model: folder or Hub id.")
    data: tuple[str, ...] = option((), "Training data: file or folder; may be repeated.")
    eval_data: tuple[str, ...] = option((), "Held-out data for the ladder.")
    memory: str | None = option(None, "Memory to fit into, e.g. 24GiB.")


SECTIONS: dict[str, type[StageOptions]] = {
    "plan": PlanOptions,
    "prune": PruneOptions,
    "train": TrainOptions,
    "recover": RecoverOptions,
    "project": ProjectOptions,
    "verify": VerifyOptions,
    "merge": MergeOptions,
    "eval": EvalOptions,
    "run": RunOptions,
    "demo": DemoOptions,
    "init": InitOptions,
}


def flag(name: str) -> str:
    """A field's name as it is typed on the command line."""
    return name.replace("_", "-")


def require(condition: bool, message: str) -> None:
    """Raise OptionError with `message` unless the condition holds."""
    if not condition:
        raise OptionError(message)


def check_choices(options: StageOptions) -> None:
    """Refuse a value outside a field's choices, naming the nearest one."""
    for item in fields(options):
        choices = item.metadata.get("choices")
        value = getattr(options, item.name)
        if choices and value not in choices:
            raise OptionError(
                f"--{flag(item.name)} is {value!r}; expected one of {', '.join(choices)}" + did_you_mean(value, choices)
            )


def did_you_mean(word: str, known: Any) -> str:
    """'; did you mean X?' for the nearest known word, or nothing."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def from_mapping(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """Options from a recipe section or keyword arguments.

    Hyphens and underscores are the same. An unknown key or a value of the wrong type raises
    OptionError that names `where` and the nearest known key.
    """
    known = {item.name: item for item in fields(kind)}
    hints = get_type_hints(kind)
    clean: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(f"{where} has no option {key!r}" + did_you_mean(name, known))
        clean[name] = convert(value, hints[name], f"{where}: {name}")
    missing = [n for n, item in known.items() if n not in clean and item.default is dataclasses.MISSING]
    if missing:
        raise OptionError(f"{where} needs {', '.join(missing)}")
    return kind(**clean)


def convert(value: Any, hint: Any, where: str) -> Any:
    """One value as YAML or Python gives it, turned into the field's type, or refused."""
    text = str(hint).replace("<class '", "").replace("'>", "")
    if value is None and "None" in text:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        value = [value] if text.startswith("tuple") else value
    if text.startswith("tuple"):
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)):
            return tuple(str(part).strip() for part in parts if str(part).strip())
    elif text.startswith("bool"):
        if isinstance(value, bool):
            return value
    elif text.startswith("int"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif text.startswith("float"):
        number = as_float(value)
        if number is not None:
            return number
    elif text.startswith("str") and not isinstance(value, (bool, list, dict)) and value is not None:
        return repr(value) if isinstance(value, float) else str(value)
    raise OptionError(f"{where} is {value!r}; expected {text.replace(' | None', '')}")


def as_float(value: Any) -> float | None:
    """A number, also written as YAML 1.1 reads no number ('1e-5')."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
