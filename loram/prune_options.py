"""The options of `plan` and `prune`: what is cut, how it is scored, and on which text."""

from __future__ import annotations

from dataclasses import dataclass

from loram.families.widths import parse_ratio
from loram.option_fields import DTYPES, StageOptions, WritingOptions, argument, flag, option, require

METHODS = ("structured", "random")
SCORES = ("wanda", "magnitude", "taylor")
QUANTIZATIONS = ("none", "nf4", "int8")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "batch", "max_length"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CutOptions, WritingOptions):
    """Cut a large model down to a small one, and keep the map."""

    model: str = argument("The large model: folder or Hub id.")
    calibration: tuple[str, ...] = option(
        (), "Calibration text: FILE or 'builtin', optionally =WEIGHT; may be repeated. Use the text you will train on."
    )
    quantize: str = option("none", "Store the small model in 4 or 8 bit at once.", choices=QUANTIZATIONS)
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    base_id: str | None = option(None, "Hub id of the large model, where its folder does not tell.")
    revision: str | None = option(None, "Branch, tag or commit of the large model on the Hub (or write ID@REVISION).")
