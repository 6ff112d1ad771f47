"""plan: does it fit? Parameters, bytes and predicted peak memory of every stage, from config.json alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from loram.artifact import read_json
from loram.errors import FamilyError, InputError, OptionError
from loram.families import family_of, is_small_config
from loram.families.widths import Cut, Widths, describe_uncut, parse_ratio
from loram.hub.download import resolve_model
from loram.memory import format_bytes, parse_bytes
from loram.options import PlanOptions
from loram.progress import SILENT, Progress
from loram.results import StageResult
from loram.sizes import (
    Counts,
    MemoryPlan,
    TrainingShape,
    calibrated_memory,
    count,
    paper_bytes,
    recovery_memory,
    streaming_memory,
    training_memory,
    weight_bytes,
)

BYTES_PER_VALUE = {"bf16": 2, "fp16": 2, "fp32": 4}
STEPS = tuple(Fraction(n, 20) for n in range(1, 20))
"""Ratios that `--memory` tries: 0.05, 0.10 … 0.95."""


@dataclass(frozen=True)
class Choice:
    """One combination of ratio and quantization, and the peak memory of training it (ratio None: no cut)."""

    ratio: str | None
    quantize: str
    train_bytes: int

    def flags(self) -> str:
        """What to type for it."""
        if self.ratio is None:
            return "no cut" + (f", --quantize {self.quantize}" if self.quantize != "none" else "")
        return f"--ratio {self.ratio}" + (f" --quantize {self.quantize}" if self.quantize != "none" else "")


@dataclass(frozen=True, kw_only=True)
class PlanResult(StageResult):
    """Counts, bytes and memory of large and small model."""

    large: Counts
    small: Counts
    quantize: str
    peaks: dict[str, MemoryPlan]
    disk: dict[str, int]
    memory: int | None = None
    choice: Choice | None = None
    tried: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_small(self) -> int:
        """True bytes of the small model."""
        return weight_bytes(self.small, self.quantize)

    @property
    def fits(self) -> bool | None:
        """Whether training at the options asked for fits into --memory (None without it)."""
        return None if self.memory is None else self.peaks["train"].total <= self.memory

    def to_json(self) -> dict[str, Any]:
        """params.*, bytes.*, peak_bytes.*, fits, as design.md §5 names them, and more."""
        large, small, quantize = self.large, self.small, self.quantize
        return {
            "params": {
                "large": large.total,
                "small": small.total,
                "reduction": paper_bytes(large) / paper_bytes(small, quantize),
            },
            "bytes": {
                "large": weight_bytes(large),
                "small": self.bytes_small,
                "reduction": weight_bytes(large) / self.bytes_small,
                "paper_small": paper_bytes(small, quantize),
            },
            "peak_bytes": {name: plan.total for name, plan in self.peaks.items()},
            "train_parts": self.peaks["train"].parts,
            "disk_bytes": self.disk,
            "fits": self.fits,
            "suggestion": None if self.choice is None else vars(self.choice),
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """A small table for people."""
        body = self.to_json()
        lines = [
            f"parameters   {self.large.total:>16,} → {self.small.total:,}",
            f"weights      {format_bytes(weight_bytes(self.large)):>16} → {format_bytes(self.bytes_small)}"
            f"   {body['bytes']['reduction']:.2f}× in true bytes, {body['params']['reduction']:.2f}× as in the paper",
            "peak memory  " + "   ".join(f"{name} {format_bytes(p.total)}" for name, p in self.peaks.items()),
            "training     " + "   ".join(f"{k} {format_bytes(v)}" for k, v in self.peaks["train"].parts.items()),
            "disk         " + "   ".join(f"{name} {format_bytes(size)}" for name, size in self.disk.items()),
        ]
        if self.memory is not None:
            lines.append(f"memory       {format_bytes(self.memory)}: {'fits' if self.fits else 'does not fit'}")
            lines += [self._line(choice) for choice in self.tried]
            if self.choice is None:
                lines.append("no cut fits: lower --max-length or --batch, or give more memory")
        return "\n".join([*lines, *self.notes])

    def _line(self, choice: Choice) -> str:
        assert self.memory is not None
        fits = choice.train_bytes <= self.memory
        bar = "█" * min(40, max(1, round(40 * choice.train_bytes / max(t.train_bytes for t in self.tried))))
        mark = "  ← suggested" if choice == self.choice else ""
        return (
            f"  {choice.flags():<28} {bar:<40} {format_bytes(choice.train_bytes):>10}  {'yes' if fits else 'no'}{mark}"
        )


def plan(options: PlanOptions, progress: Progress = SILENT) -> PlanResult:
    """Predict, without reading a single weight."""
    config = read_model_config(options.model)
    family = family_of(config)
    geometry = family.geometry(config)
    widths = widths_at(options, config, parse_ratio(options.ratio))
    shape = training_shape(options)
    large, small = count(config), count(config, widths)
    memory = None if options.memory is None else parse_bytes(options.memory)
    tried, choice = choices(options, config, memory) if memory is not None else ((), None)
    next((c for c in tried if memory is not None and c.quantize == "none" and c.train_bytes <= memory), None)
    return PlanResult(
        large=large,
        small=small,
        quantize=options.quantize,
        peaks={
            "prune": prune_memory(options, config),
            "align": training_memory(config, widths, replace(shape, rank=0), "none"),
            "train": training_memory(config, widths, shape, options.quantize),
            "recover": recovery_memory(config, options.rank, options.targets),
            "merge": streaming_memory(config),
        },
        disk={"small": weight_bytes(small), "merge": weight_bytes(large)},
        memory=memory,
        choice=choice,
        tried=tried,
        notes=(*describe_uncut(geometry.kv_heads, geometry.mlp, widths), *bits_note(options, choice)),
        next_command=next_command(options, memory, tried),
    )


def next_command(options: PlanOptions, memory: int | None, tried: tuple[Choice, ...]) -> str:
    """What this version can do next: it trains in 16 bit."""
    if memory is None:
        return f"loram prune {options.model} --ratio {options.ratio} -o SMALL"
    fitting = next((c for c in tried if c.quantize == "none" and c.train_bytes <= memory), None)
    if fitting is None:
        return ""
    if fitting.ratio is None:
        return f"loram train {options.model} --data FILE -o ADAPTER"
    return f"loram prune {options.model} --ratio {fitting.ratio} -o SMALL"


def bits_note(options: PlanOptions, choice: Choice | None) -> list[str]:
    """What stands between a plan in few bits and training it."""
    if options.quantize == "none" and (choice is None or choice.quantize == "none"):
        return []
    return ["4 and 8 bit are reckoned here, but this version of loram trains in 16 bit: `quantize` is still to come"]


def read_model_config(model: str) -> dict[str, Any]:
    """The raw config of a folder, a config.json, or a Hub id (its JSON files only)."""
    path = Path(model)
    file = path if path.is_file() else resolve_model(model, weights=False) / "config.json"
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a JSON object; give a model's config.json")
    if is_small_config(config):
        raise FamilyError(f"{model} is a small model; plan for the large one")
    return config


def widths_at(options: PlanOptions, config: dict[str, Any], ratio: Fraction) -> Widths:
    """Widths at a ratio, with the other options as given."""
    geometry = family_of(config).geometry(config)
    cut = Cut(ratio, options.keep_first, options.keep_last, options.round_to)
    return cut.widths(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.mlp)


def training_shape(options: PlanOptions) -> TrainingShape:
    """What a step looks like."""
    return TrainingShape(
        batch=options.batch,
        length=options.max_length,
        rank=options.rank,
        targets=options.targets,
        checkpointing=options.checkpointing,
        bytes_per_value=BYTES_PER_VALUE[options.dtype],
    )


def prune_memory(options: PlanOptions, config: dict[str, Any]) -> MemoryPlan:
    """Peak of prune: a few tiles when it streams, a block when it calibrates, the model for Taylor."""
    if options.method == "random" or options.score == "magnitude":
        return streaming_memory(config)
    return calibrated_memory(config, options.samples, options.length, gradients=options.score == "taylor")


def choices(options: PlanOptions, config: dict[str, Any], memory: int) -> tuple[tuple[Choice, ...], Choice | None]:
    """What was tried, mildest first, and the mildest that fits. Bits before cuts: NF4 alone agrees far better
    with the large model than any cut of the same size (measured: gradient cosine .81 against .54)."""
    shape = training_shape(options)

    def choice(ratio: Fraction | None, quantize: str) -> Choice:
        widths = None if ratio is None else widths_at(options, config, ratio)
        spelled = None if ratio is None else f"{float(ratio):g}"
        return Choice(spelled, quantize, training_memory(config, widths, shape, quantize).total)

    tried = [choice(None, "none"), choice(None, "nf4")]
    for quantize in ("nf4", "none"):
        if any(c.quantize == quantize and c.train_bytes <= memory for c in tried):
            continue
        for ratio in STEPS:
            try:
                candidate = choice(ratio, quantize)
            except OptionError:
                break
            if candidate.train_bytes <= memory:
                tried.append(candidate)
                break
    # Without a cut beats with one; with a cut, 4 bit allows the milder one.
    return tuple(tried), next((c for c in tried if c.train_bytes <= memory), None)
