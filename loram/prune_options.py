"""The options of `plan` and `prune`: what is cut, how it is scored, and on which text."""

from __future__ import annotations

from dataclasses import dataclass

from loram.families.sparsity import Sparsity, parse_sparsity
from loram.families.widths import parse_ratio
from loram.memory import parse_bytes
from loram.option_fields import DTYPES, StageOptions, WritingOptions, argument, flag, option, require

METHODS = ("structured", "random", "semi", "unstructured", "given", "depth")
UNIT_SCORES = ("taylor", "wanda", "magnitude", "flap")
"""Importances of whole heads and channels, for --method structured."""
WEIGHT_SCORES = ("wanda", "magnitude", "sparsegpt")
"""Importances of single weights, for --method semi and unstructured."""
LAYER_SCORES = ("influence",)
"""Importances of whole layers, for --method depth."""
SCORES = tuple(dict.fromkeys((*UNIT_SCORES, *WEIGHT_SCORES, *LAYER_SCORES)))
SCORES_OF = dict.fromkeys(METHODS, WEIGHT_SCORES) | {
    "structured": UNIT_SCORES,
    "random": SCORES,
    "depth": LAYER_SCORES,
}
"""The scores that each method knows, its default first; random units need none, and any is taken."""
RATIO, PATTERN = "0.5", "2:4"
KEEP_FIRST, KEEP_LAST = 4, 2
QUANTIZATIONS = ("none", "nf4", "int8")


@dataclass(frozen=True, kw_only=True)
class CutOptions(StageOptions):
    """How much is cut away, and where: shared by plan and prune."""

    method: str = option(
        "structured",
        "What is cut: heads and channels by score (structured) or at random; whole layers (depth); single weights by "
        "N:M pattern (semi) or ratio (unstructured); or what --given has cut.",
        choices=METHODS,
    )
    score: str | None = option(
        None,
        f"How importance is measured; units: {', '.join(UNIT_SCORES)}; single weights: {', '.join(WEIGHT_SCORES)}; "
        f"layers: {', '.join(LAYER_SCORES)}; by default the first of these.",
        choices=SCORES,
    )
    ratio: str = option(
        RATIO,
        "Share of each layer's heads and channels (or of weights, or of the layers themselves) to remove, as an exact "
        "decimal or fraction.",
    )
    pattern: str | None = option(
        None, f"With --method semi: keep N of every M consecutive weights of a row, N:M (default {PATTERN})."
    )
    keep_first: int = option(KEEP_FIRST, "Leave the first N layers alone (single weights are pruned in every layer).")
    keep_last: int = option(KEEP_LAST, "Leave the last N layers alone.")
    round_to: int = option(1, "Round kept MLP channels down to a multiple of N (64 suits GPUs).")
    samples: int = option(32, "Calibration windows in all.")
    length: int = option(256, "Tokens in a calibration window.")
    refit: bool = option(
        True, "With calibration: refit o and down in closed form after the cut (depth: down before a gap)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_ratio(self.ratio)
        self._check_method()
        object.__setattr__(self, "score", self.importance)  # what is recorded is what was used
        require(self.keep_first >= 0 and self.keep_last >= 0, "--keep-first and --keep-last must be 0 or more")
        require(self.round_to >= 1, f"--round-to is {self.round_to}; it must be 1 or more")
        require(self.samples >= 1 and self.length >= 2, "--samples must be at least 1 and --length at least 2")

    @property
    def by_weight(self) -> bool:
        """Whether single weights go, and the shapes stay."""
        return self.method in ("semi", "unstructured", "given")

    @property
    def sparsity(self) -> Sparsity | None:
        """How many single weights go; None where units do, or where it has been decided elsewhere."""
        if self.method == "semi":
            return parse_sparsity(PATTERN if self.pattern is None else self.pattern)
        return Sparsity(parse_ratio(self.ratio)) if self.method == "unstructured" else None

    @property
    def importance(self) -> str:
        """The score that is used: the one asked for, or the method's own."""
        return self.score or SCORES_OF[self.method][0]

    def _check_method(self) -> None:
        """OptionError for an option that the method has no use for."""
        method, known = self.method, SCORES_OF[self.method]
        require(self.pattern is None or method == "semi", f"--pattern has no use with --method {method}; use semi")
        require(
            self.importance in known,
            f"--score {self.score} measures {measured(self.importance)}; with --method {method} use one of "
            f"{', '.join(known)}",
        )
        if method == "depth":
            self._check_unused(("round_to", 1), "which drops whole layers")
        if not self.by_weight:
            return
        assert self.sparsity or method == "given"  # refuses an impossible pattern
        require(
            method == "unstructured" or self.ratio == RATIO,
            f"--ratio {self.ratio} has no use with --method {method}, which "
            + (
                "keeps N of every M: give --pattern N:M, or --method unstructured"
                if method == "semi"
                else "keeps what is there: leave it out"
            ),
        )
        for unused in (("keep_first", KEEP_FIRST), ("keep_last", KEEP_LAST), ("round_to", 1)):
            self._check_unused(unused, "which prunes single weights of every decoder layer")

    def _check_unused(self, unused: tuple[str, int], why: str) -> None:
        """OptionError where an option (name, default) was given that means nothing to the method."""
        name, usual = unused
        found = getattr(self, name)
        require(
            found in (0, usual), f"--{flag(name)} {found} has no use with --method {self.method}, {why}; leave it out"
        )


def measured(score: str) -> str:
    """What a score measures, in words."""
    kinds = {"whole heads and channels": UNIT_SCORES, "single weights": WEIGHT_SCORES, "whole layers": LAYER_SCORES}
    return " or ".join(what for what, known in kinds.items() if score in known)


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
    optimizer: str = option("adamw_torch", "Optimizer, by its transformers name.", flags=("--optim",))
    device: str = option("cuda", "Where training is to run.", choices=("cuda", "cpu"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.method != "given", "--method given is of `loram prune`: its --given FOLDER has been pruned already"
        )
        for name in ("rank", "batch", "max_length"):
            require(getattr(self, name) >= 1, f"--{flag(name)} is {getattr(self, name)}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class StreamOptions(WritingOptions):
    """What a stage that runs a model block by block may hold in memory."""

    hidden_memory: str = option(
        "2GiB", "Memory for the hidden states of all windows between two blocks; what is larger waits in a file by OUT."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.hidden_memory, "--hidden-memory")

    @property
    def hidden_bytes(self) -> int:
        """The same in bytes."""
        return parse_bytes(self.hidden_memory, "--hidden-memory")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CutOptions, StreamOptions):
    """Cut a large model down to a small one, and keep the map."""

    model: str = argument("The large model: folder or Hub id.")
    calibration: tuple[str, ...] = option(
        (), "Calibration text: FILE or 'builtin', optionally =WEIGHT; may be repeated. Use the text you will train on."
    )
    given: str | None = option(
        None, "With --method given: a sparse checkpoint of MODEL from elsewhere; its zeros are the mask."
    )
    quantize: str = option("none", "Store the small model in 4 or 8 bit at once.", choices=QUANTIZATIONS)
    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    base_id: str | None = option(None, "Hub id of the large model, where its folder does not tell.")
    revision: str | None = option(None, "Branch, tag or commit of the large model on the Hub (or write ID@REVISION).")
    resume: str = option(
        "auto",
        "Whether a calibration that was stopped goes on where it was (auto) or starts anew (never).",
        choices=("auto", "never"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.method == "given"
        require(not asked or bool(self.given), "--method given needs the sparse checkpoint: add --given FOLDER")
        require(asked or self.given is None, f"--given has no use with --method {self.method}; add --method given")
