"""Every option of every stage, once: its type, its default, its help.

One frozen dataclass per stage. The command line, the recipes and the Python functions are all made
from these, so none of them can disagree. No torch and no typer here: `loram --help` reads this file.
What a field may be is said in `option_fields`; the larger stages have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from loram.align_options import AlignOptions
from loram.data_options import DataOptions, ReadingOptions
from loram.option_fields import (
    DTYPES,
    StageOptions,
    WritingOptions,
    argument,
    assignments,
    did_you_mean,
    flag,
    from_mapping,
    option,
    require,
)
from loram.prune_options import SCORES, PlanOptions, PruneOptions
from loram.quantize_options import QuantizeOptions
from loram.recover_options import RecoverOptions
from loram.train_options import TrainOptions

__all__ = [
    "DTYPES",
    "SCORES",
    "SECTIONS",
    "AlignOptions",
    "DataOptions",
    "PlanOptions",
    "PruneOptions",
    "QuantizeOptions",
    "RecoverOptions",
    "StageOptions",
    "TrainOptions",
    "WritingOptions",
    "did_you_mean",
    "flag",
    "from_mapping",
    "require",
]


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
class PushOptions(StageOptions):
    """Put a verified adapter (or a merged model) on the Hub, with a model card; private unless told otherwise."""

    adapter: str = argument("Adapter of the large model, or a merged model.")
    to: str = option("", "Repository on the Hub, user/name.", flags=("--repo-id",))
    base_id: str | None = option(None, "Hub id of the large model, where the manifest does not tell.")
    large: str | None = option(None, "The large model to verify against, where the manifest does not say.")
    license: str | None = option(None, "License id for the card, where the base model's card says none.")
    ladder: str | None = option(None, "ladder.json to show on the card; default: that of the run it lies in.")
    public: bool = option(False, "Let everybody read it; without this only you and your organization can.")
    pr: bool = option(False, "Open a pull request instead of writing to the repository.")
    yes: bool = option(False, "Do not ask before uploading.")
    dry_run: bool = option(False, "Verify, show files, sizes, target and card, upload nothing.")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ReadingOptions):
    """Held-out loss of a model; the quality ladder with --compare."""

    model: str = argument("Large model or small model: folder or Hub id.")
    data: tuple[str, ...] = option(
        (), "Evaluation data: file, folder or Hub dataset (ORG/NAME:CONFIG@SPLIT); may be repeated."
    )
    adapter: str | None = option(None, "Adapter to load on the model.")
    compare: bool = option(False, "Print the ladder: base, small, small + adapter, large + recovered.")
    small: str | None = option(None, "The small model for --compare, where the manifests do not say.")
    small_adapter: str | None = option(None, "The small adapter for --compare, where the manifest does not say.")
    ceiling: str | None = option(None, "For --compare: an adapter trained on the large model itself.")
    batch: int = option(8, "Rows in a forward pass.", flags=("--per-device-eval-batch-size",))
    limit: int | None = option(None, "Look at the first N rows only.")
    generate: bool = option(False, "Also generate an answer per prompt and count exact matches.")
    new_tokens: int = option(64, "Tokens to generate at most, with --generate.")
    dtype: str = option("auto", "Dtype to load and compute in.", choices=("auto", *DTYPES))
    tasks: tuple[str, ...] = option((), "lm-eval tasks to run as well, comma separated (extra: loram[eval]).")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, f"--batch is {self.batch}; it must be 1 or more")
        require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; it must be 1 or more")
        require(self.new_tokens >= 1, f"--new-tokens is {self.new_tokens}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class RunOptions(WritingOptions):
    """All sections of a recipe in order, skipping what is done."""

    recipe: str = argument("Recipe file, or the name of a packaged one.")
    model: str | None = option(None, "The large model (recipe: run.model).")
    data: tuple[str, ...] = option((), "Training data (recipe: run.data).")
    eval_data: tuple[str, ...] = option((), "Held-out data for the ladder (recipe: run.eval_data).")
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    ceiling: bool = option(False, "Also train LoRA on the large model itself, to show what is possible.")
    touch_up: int = option(
        0,
        "After recover, so many further steps on the large model itself, one layer in memory at a time, at a quarter "
        "of the training's rate.",
    )
    stages: tuple[str, ...] = option((), "Stages to run, in order; default: the sections of the recipe.")
    overrides: tuple[str, ...] = assignments()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.touch_up >= 0, f"--touch-up is {self.touch_up}; it must be 0 or more")


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
    "align": AlignOptions,
    "quantize": QuantizeOptions,
    "train": TrainOptions,
    "recover": RecoverOptions,
    "project": ProjectOptions,
    "verify": VerifyOptions,
    "merge": MergeOptions,
    "push": PushOptions,
    "eval": EvalOptions,
    "data": DataOptions,
    "run": RunOptions,
    "demo": DemoOptions,
    "init": InitOptions,
}
