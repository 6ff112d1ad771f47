"""plan: does it fit? Parameters, bytes and predicted peak memory of every stage, from config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from loram.activations import Workload
from loram.advice import Change, Training, cheapest
from loram.artifact import read_json, read_manifest
from loram.calibration_memory import Calibration, calibrated_memory
from loram.declared import refuse_quantized
from loram.errors import InputError, KindError, OptionError
from loram.families import Geometry, family_of, is_small_config
from loram.families.small import with_biases, without_layers
from loram.families.sparsity import check_widths
from loram.families.widths import Cut, describe_uncut, parse_ratio
from loram.hub.download import resolve_model
from loram.measured import because
from loram.memory import format_bytes, parse_bytes
from loram.memory_model import (
    HARDWARE,
    MemoryPlan,
    Model,
    reconstruction_memory,
    recovery_memory,
    streaming_memory,
    training_memory,
)
from loram.option_fields import flag
from loram.options import AlignOptions, PlanOptions, TrainOptions
from loram.progress import SILENT, Progress
from loram.prune_options import QUANTIZATIONS
from loram.results import StageResult
from loram.sizes import VALUE_BYTES, Counts, count, paper_bytes, weight_bytes
from loram.train_options import may_be_streamed

BAR = 24
ALIGNED = AlignOptions(model="-")
"""`align` as it is by default."""
DENSE = (
    "single weights are pruned: their zeros are stored, so bytes and memory are those of the large model, and training "
    "has a mask of one bit a weight on its updates; the ratios that --memory tries are of --method structured"
)
STEPS = tuple(Fraction(n, 20) for n in range(1, 20))
"""Ratios that `--memory` tries: 0.05, 0.10 … 0.95."""


@dataclass(frozen=True)
class Choice:
    """One combination of ratio and quantization, and the peak memory of training it (ratio None: no cut)."""

    ratio: str | None
    quantize: str
    train_bytes: int

    @property
    def reason(self) -> str:
        """Why it is the one to take, by what was measured."""
        return because(self.ratio, self.quantize)

    def flags(self) -> str:
        """What to type for it, after the method."""
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
    nonzero: int | None = None
    tried: tuple[Choice, ...] = ()
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_small(self) -> int:
        """True bytes of the small model."""
        return weight_bytes(self.small, self.quantize)

    @property
    def kept(self) -> int:
        """Parameters that are left: zeros that are stored do not count."""
        return self.small.total if self.nonzero is None else self.nonzero

    @property
    def fits(self) -> bool | None:
        """Whether training at the options asked for fits into --memory (None without it)."""
        return self.fitting("train")

    def fitting(self, stage: str) -> bool | None:
        """The same of any stage."""
        return None if self.memory is None else self.peaks[stage].total <= self.memory

    def to_json(self) -> dict[str, Any]:
        """params.*, bytes.*, peak_bytes.*, fits, and what they are made of."""
        large, small, quantize = self.large, self.small, self.quantize
        return {
            "params": {
                "large": large.total,
                "small": self.kept,
                "reduction": paper_bytes(large) / paper_bytes(Counts(self.kept, 0), quantize),
            },
            "bytes": {
                "large": weight_bytes(large),
                "small": self.bytes_small,
                "reduction": weight_bytes(large) / self.bytes_small,
                "paper_small": paper_bytes(small, quantize),
            },
            "peak_bytes": {name: plan.total for name, plan in self.peaks.items()},
            "train_parts": self.peaks["train"].parts,
            "stages": {
                name: {"peak_bytes": plan.total, "parts": plan.parts, "fits": self.fitting(name)}
                for name, plan in self.peaks.items()
            },
            "disk_bytes": self.disk,
            "fits": self.fits,
            "suggestion": None if self.choice is None else vars(self.choice) | {"reason": self.choice.reason},
            "changes": [vars(change) for change in self.changes],
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """A small table for people."""
        body = self.to_json()
        lines = [
            f"parameters   {self.large.total:>16,} → {self.kept:,}",
            f"weights      {format_bytes(weight_bytes(self.large)):>16} → {format_bytes(self.bytes_small)}"
            f"   {body['bytes']['reduction']:.2f}× in true bytes, {body['params']['reduction']:.2f}× as in the paper",
            "disk         " + "   ".join(f"{name} {format_bytes(size)}" for name, size in self.disk.items()),
            "peak memory  predicted, by stage",
            *(self.stage_line(name) for name in self.peaks),
        ]
        if self.memory is not None:
            lines.append(
                f"memory       {format_bytes(self.memory)}: training {'fits' if self.fits else 'does not fit'}"
            )
            lines += [f"  {change}" for change in self.changes]
            lines += [self._line(choice) for choice in self.tried]
            if self.choice is None:
                lines.append("no cut fits: lower --max-length or --batch, or give more memory")
            else:
                lines.append(f"why          {self.choice.reason} (docs/transfer.md)")
        return "\n".join([*lines, *self.notes])

    def stage_line(self, name: str) -> str:
        """A stage's bar, its peak, whether it fits, and its largest parts."""
        plan, most = self.peaks[name], max(peak.total for peak in self.peaks.values())
        fits = {None: "", True: "fits", False: "does not fit"}[self.fitting(name)]
        parts = sorted(plan.parts.items(), key=lambda part: -part[1])
        spelled = ", ".join(f"{part} {format_bytes(size)}" for part, size in parts if size > plan.total / 100)
        return f"  {name:<8} {bar(plan.total / most):<{BAR}} {format_bytes(plan.total):>10}  {fits}  {spelled}".rstrip()

    def _line(self, choice: Choice) -> str:
        assert self.memory is not None
        fits = choice.train_bytes <= self.memory
        share = choice.train_bytes / max(tried.train_bytes for tried in self.tried)
        mark = "  ← suggested" if choice == self.choice else ""
        return (
            f"  {choice.flags():<28} {bar(share):<{BAR}} {format_bytes(choice.train_bytes):>10}  "
            f"{'yes' if fits else 'no'}{mark}"
        )


def bar(share: float) -> str:
    """A bar of blocks, one at least."""
    return "█" * min(BAR, max(1, round(BAR * share)))


def plan(options: PlanOptions, progress: Progress = SILENT) -> PlanResult:
    """Predict, without reading a single weight."""
    config = read_model_config(options.model)
    family = family_of(config)
    geometry = family.geometry(config)
    if options.sparsity is not None:
        check_widths(family, geometry, options.sparsity)
    hardware, work = HARDWARE[options.device], workload(options)
    small_model = cut_model(options, config, None if options.by_weight else parse_ratio(options.ratio))
    large, small = count(config), count(small_model.config, small_model.widths)
    memory = None if options.memory is None else parse_bytes(options.memory)
    tried, choice = choices(options, config, memory) if memory is not None else ((), None)
    windows = (ALIGNED.samples, ALIGNED.length, ALIGNED.batch)
    peaks = {
        "prune": prune_memory(options, config),
        "align": reconstruction_memory(Model(config), small_model, windows, work.value_bytes),
        "train": training_memory(small_model, work, hardware),
        "recover": recovery_memory(config, options.rank, options.targets),
        "merge": streaming_memory(),
    }
    unfit = memory is not None and peaks["train"].total > memory
    return PlanResult(
        large=large,
        small=small,
        quantize=options.quantize,
        peaks=peaks,
        disk={"small": weight_bytes(small), "merge": weight_bytes(large)},
        memory=memory,
        choice=choice,
        tried=tried,
        changes=cheapest(asked_for(options, small_model), memory) if unfit else (),
        nonzero=large.total - options.sparsity.removed(large.linear) if options.sparsity else None,
        notes=(*notes_on(options, geometry, small_model), *note_on_embeddings(geometry, large)),
        next_command=next_command(options, memory, choice),
    )


def notes_on(options: PlanOptions, geometry: Geometry, small: Model) -> tuple[str, ...]:
    """What a reader should know about the cut."""
    if options.by_weight:
        return (DENSE,)
    if small.widths is None:
        left = int(small.config["num_hidden_layers"])
        return (f"{left} of {geometry.layers} layers stay; which ones, prune decides by its calibration text",)
    return tuple(describe_uncut(geometry.kv_heads, geometry.mlp, small.widths))


def note_on_embeddings(geometry: Geometry, large: Counts) -> tuple[str, ...]:
    """Why a cut saves so little where most of a model is its vocabulary."""
    share = geometry.vocab * geometry.hidden * (1 if geometry.tied else 2) / large.total
    return () if share < 0.5 else (f"{share:.0%} of the parameters are embeddings, which are never cut",)


def next_command(options: PlanOptions, memory: int | None, choice: Choice | None) -> str:
    """What to type for the choice that fits, or for what was asked for."""
    path = Path(options.model)
    model = options.model if not path.is_file() else str(path.parent) if path.name == "config.json" else "MODEL"
    if memory is None:
        return " ".join(["loram prune", model, *cut_flags(options), "-o SMALL"])
    if choice is None:
        return ""
    if choice.ratio is not None:
        chosen = replace(by_units(options), ratio=choice.ratio, quantize=choice.quantize)
        return " ".join(["loram prune", model, *cut_flags(chosen), "-o SMALL"])
    if choice.quantize != "none":
        return f"loram quantize {model} --type {choice.quantize} -o SMALL"
    return f"loram train {model} --data FILE -o ADAPTER"


def cut_flags(options: PlanOptions) -> Iterator[str]:
    """The options of `prune` that make the cut planned for: the ratio, and what is not as it is by default."""
    usual = PlanOptions(model=options.model, method=options.method)
    if options.method != "structured":
        yield f"--method {options.method}"
    for name in ("score", "pattern", "ratio", "keep_first", "keep_last", "round_to", "samples", "length"):
        value = getattr(options, name)
        always = name == "ratio" and options.method != "semi"
        if always or value != getattr(usual, name):
            yield f"--{flag(name)} {value}"
    if not options.refit:
        yield "--no-refit"
    if options.quantize != "none":
        yield f"--quantize {options.quantize}"
    if looks_at_text(options):
        yield "--calibration FILE --calibration builtin"


def looks_at_text(options: PlanOptions) -> bool:
    """Whether `prune` sends calibration text through the model for these options, as they are typed here."""
    from_weights = options.importance == "magnitude" and (options.by_weight or not options.refit)
    return options.method != "random" and not from_weights


def by_units(options: PlanOptions) -> PlanOptions:
    """The same for a cut that saves memory: where single weights were to go, heads and channels do."""
    if not options.by_weight:
        return options
    return replace(options, method="structured", score=None, pattern=None)


def read_model_config(model: str) -> dict[str, Any]:
    """The raw config of a folder, a config.json, or a Hub id (its JSON files only)."""
    path = Path(model)
    file = path if path.is_file() else resolve_model(model, weights=False) / "config.json"
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a JSON object; give a model's config.json")
    manifest = read_manifest(file.parent) if file.name == "config.json" else None
    refuse_quantized(model, config)
    narrowed = manifest is not None and not {"axes", "mask", *QUANTIZATIONS}.isdisjoint(manifest.compression)
    if is_small_config(config) or narrowed:  # what lost whole layers only may be pruned once more
        raise KindError(f"{model} is a small model; plan for the large one")
    return config


def cut_model(options: PlanOptions, config: dict[str, Any], ratio: Fraction | None, quantize: str = "") -> Model:
    """The small model at a ratio (None: of the large one's shape), with the other options as given."""
    quantize = quantize or options.quantize
    if ratio is None:
        return Model(config, None, quantize)
    geometry = family_of(config).geometry(config)
    cut = Cut(ratio, options.keep_first, options.keep_last, options.round_to)
    if options.method == "depth":
        # Any layers: they have one size, and only which of them have a sliding window is not known yet.
        return Model(without_layers(config, range(geometry.layers - cut.depth(geometry.layers))), None, quantize)
    widths = cut.widths(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.mlp)
    return Model(with_biases(config, widths) if options.importance == "flap" else config, widths, quantize)


def workload(options: PlanOptions) -> Workload:
    """What a step looks like: full rows, none of them padded."""
    return Workload(
        batch=options.batch,
        length=options.max_length,
        rank=options.rank,
        targets=options.targets,
        dtype=options.dtype,
        checkpointing=options.checkpointing,
        optimizer=options.optimizer,
        masked_update=options.by_weight,
    )


def asked_for(options: PlanOptions, small: Model) -> Training:
    """The training that is to fit, as `train` would be asked for it."""
    trained = TrainOptions(model="-", data=("-",), out="-", targets=options.targets, dtype=options.dtype)
    return Training(small, workload(options), HARDWARE[options.device], streamable=may_be_streamed(trained))


def prune_memory(options: PlanOptions, config: dict[str, Any]) -> MemoryPlan:
    """Peak of prune: a few tiles when it streams, a block with what is known of its inputs when it calibrates."""
    if not looks_at_text(options):
        return streaming_memory()
    fitted = options.refit and options.method == "structured"
    widths = cut_model(options, config, parse_ratio(options.ratio)).widths if fitted else None
    return calibrated_memory(
        config,
        Calibration(
            options.samples,
            options.length,
            calibrated_bytes(options, config),
            kept=None if widths is None else min(widths.mlp),
            gradients=options.importance == "taylor",
            hessians=options.importance == "sparsegpt",
            gaps=options.method == "depth" and options.refit and family_of(config).adds_outputs,
        ),
    )


def calibrated_bytes(options: PlanOptions, config: dict[str, Any]) -> int:
    """Of a value in calibration, which computes in bf16 where the model is stored so, and else in fp32."""
    stored = config.get("dtype", config.get("torch_dtype")) or "bfloat16"
    return VALUE_BYTES["bf16" if stored == "bfloat16" and options.dtype != "fp32" else "fp32"]


def choices(options: PlanOptions, config: dict[str, Any], memory: int) -> tuple[tuple[Choice, ...], Choice | None]:
    """What was tried, mildest first, and the mildest that fits. Bits before cuts: NF4 alone agrees far better
    with the large model than any cut of the same size (measured: gradient cosine .81 against .54)."""
    options = by_units(options)
    work, hardware = workload(options), HARDWARE[options.device]

    def choice(ratio: Fraction | None, quantize: str) -> Choice:
        spelled = None if ratio is None else f"{float(ratio):g}"
        model = cut_model(options, config, ratio, quantize)
        return Choice(spelled, quantize, training_memory(model, work, hardware).total)

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
