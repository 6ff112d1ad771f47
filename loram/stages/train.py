"""loram train: LoRA on a small model, or on any plain one."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.adapter import load_adapter
from loram.advice import Training
from loram.artifact import Draft, Manifest, check_output, read_manifest, relative_location
from loram.checkpoint import describe_base, read_config
from loram.data.encoding import EncodedRow, encode, within_context
from loram.data.sources import read_sources, weighted
from loram.data.summary import DataSummary, stop_tokens
from loram.device import resolve_dtype
from loram.errors import InputError, KindError, OptionError
from loram.hidden_update import HiddenUpdate
from loram.hub.download import resolve_model, split_id
from loram.memory import format_bytes
from loram.modeling import load_model, load_tokenizer
from loram.options import TrainOptions
from loram.progress import SILENT, Progress
from loram.pruning_map import read_map
from loram.quantization.loading import quantization_of
from loram.results import StageResult
from loram.sizes import count
from loram.stages.beginning import begun_with
from loram.stages.carried import copy_files
from loram.stages.fitting import advised, memory_plan, predicted, recorded_widths, training_of, warn
from loram.stages.lineage import moved, parent_of
from loram.stages.masking import look_behind, recorded, refuse_unmaskable, training_masks
from loram.stages.resuming import earlier_result, identity_of, inputs_of, is_same_run, open_session, writing
from loram.stages.watching import held_out, watch_of
from loram.training.checkpoints import discard, set_aside
from loram.training.loop import Session, TrainingRun, finished_run, fit
from loram.training.lora import save_adapter, wrap
from loram.training.processes import connect, is_writer
from loram.training.signals import stop_on_signals
from loram.training.streamed import streamed_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult(StageResult):
    """The adapter's folder and how training went; `run` is None after a dry run."""

    data: DataSummary
    run: TrainingRun | None = None
    training: Training | None = None
    hidden: HiddenUpdate | None = None

    def to_json(self) -> dict[str, Any]:
        """`path`, `steps`, `loss.first`, `loss.last`, `tokens_per_second`, `peak_bytes`, `predicted_bytes`, `data`;
        where there are masks, `mask`."""
        body = super().to_json() | {"data": self.data.to_json()}
        if self.training is not None:
            body |= {"predicted_bytes": predicted(self.training), "predicted_parts": memory_plan(self.training).parts}
        if self.hidden is not None:
            body["mask"] = self.hidden.to_json()
        if self.run is None:
            return body
        return body | {
            "steps": self.run.steps,
            "loss": {"first": self.run.loss_first, "last": self.run.loss_last},
            "tokens": self.run.tokens,
            "seconds": self.run.seconds,
            "tokens_per_second": self.run.tokens_per_second,
            "peak_bytes": self.run.peak_bytes,
        }

    def summary(self) -> str:
        """What came of it; what was trained on has been said before."""
        if self.run is None:
            peak = f"; peak memory would be {self.predicted()}" if self.training else ""
            return f"nothing was trained (--dry-run){peak}"
        return (
            f"{self.run.steps} steps: training loss {self.run.loss_first:.3f} → {self.run.loss_last:.3f}, "
            f"{self.run.tokens_per_second:,.0f} tokens/s, peak {format_bytes(self.run.peak_bytes)}"
            + (f" ({self.predicted()} predicted)" if self.training else "")
            + (f"\n{self.hidden}" if self.hidden else "")
        )

    def predicted(self) -> str:
        """The predicted peak, in words."""
        return format_bytes(predicted(self.training)) if self.training else ""


def train(options: TrainOptions, progress: Progress = SILENT) -> TrainResult:
    """Train LoRA on `options.data` and write a PEFT folder: a small-adapter, or an adapter of a plain model."""
    connect()
    inputs = inputs_of(options)
    earlier = earlier_result(options)
    out = check_output(options.out, inputs, force=options.force or earlier is not None)
    folder, small = trainable(options.model)
    options = begun_with(options, folder, small)
    refuse_quantized(options, folder)
    refuse_unmaskable(options, folder, small)
    tokenizer = load_tokenizer(folder)
    length = within_context(options.max_length, read_config(folder))
    sources = weighted(read_sources(options.data, options.columns, options.system, weights=True), options.seed)
    rows, summary = encode(sources, tokenizer, length, long=options.long, stops=stop_tokens(folder, tokenizer))
    logger.info("%s", summary)
    rows, held = held_out(options, rows, tokenizer, length)
    training = training_of(options, folder, small, rows)
    watch = watch_of(options, held, folder, small, training)
    warn(training)
    if options.dry_run:
        return TrainResult(data=summary, training=training)
    now = identity_of(options, [*rows, *held], folder)
    command = f"loram verify {out}" if small is None else f"loram recover {out} -o {out}-large"
    if earlier is not None and is_same_run(earlier, now):
        run = finished_run(out)
        logger.info("%s is finished already, at step %d; to train it anew add --force", out, run.steps)
        return TrainResult(path=out, next_command=command, data=summary, run=run, hidden=recorded(earlier))
    check_output(out, inputs, force=options.force)
    hidden = None
    with stop_on_signals() as stop:
        session = open_session(options, out, now, stop, watch)
        with writing(options, out) as draft:
            draft.manifest = replace(manifest_of(options, folder, small, out), training=now)
            with advised(training):
                run = train_into(draft, folder, rows, options, session, progress)
            if is_writer():
                copy_files(folder, draft.path)
                if small is not None:
                    read_map(folder).without_masks().save(draft.path)
                    hidden = look_behind(draft, folder)
                set_aside(draft.path, out)
    if is_writer():
        discard(out)
    return TrainResult(path=out, next_command=command, data=summary, run=run, training=training, hidden=hidden)


def trainable(model: str) -> tuple[Path, Manifest | None]:
    """The model's folder, and its manifest if it is a small model; KindError for what is no model."""
    folder = resolve_model(model)
    if not folder.is_dir():
        raise InputError(f"{model} is a file; give the folder of a small model or of any plain one")
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind == "merged-model":
        return folder, None
    if manifest.kind != "small-model":
        raise KindError(
            f"{model} is a {manifest.kind}; `loram train` works on a small model (`loram prune`) or a plain one"
        )
    return folder, manifest


def refuse_quantized(options: TrainOptions, folder: Path) -> None:
    """OptionError for ways of training that a model in 4 or 8 bit cannot go."""
    if quantization_of(read_config(folder)) is None:
        return
    if options.compile:  # transformers will not train one compiled
        raise OptionError(f"--compile does not go with {folder}, which is quantized; leave it out")
    if options.streamed:
        raise OptionError(f"--streamed reads weights in 16 or 32 bits and {folder} is quantized; leave it out")


def train_into(
    draft: Draft, folder: Path, rows: list[EncodedRow], options: TrainOptions, session: Session, progress: Progress
) -> TrainingRun:
    """Load, wrap, train, save."""
    dtype = resolve_dtype(options.dtype)
    first = load_adapter(options.adapter) if options.adapter else None
    with streamed_model(folder, dtype) if options.streamed else nullcontext(load_model(folder, dtype=dtype)) as base:
        model = wrap(base, options, training_masks(options, folder), first)
        trained, total = model.get_nb_trainable_parameters()
        if options.streamed:
            config = read_config(folder)
            total += count(config, recorded_widths(config)).total
        logger.info(
            "%s: LoRA trains %s of %s parameters (%.2f%%)", dtype, f"{trained:,}", f"{total:,}", 100 * trained / total
        )
        run = fit(model, rows, options, draft.path, progress, session)
    if is_writer():
        assert draft.manifest is not None
        base = draft.manifest.base if draft.manifest.kind == "adapter" else None
        save_adapter(model, draft.path, base.id if base else relative_location(folder, draft.out))
    return run


def manifest_of(options: TrainOptions, folder: Path, small: Manifest | None, out: Path) -> Manifest:
    """What the adapter was made from."""
    first = (parent_of(options.adapter, "small-adapter" if small else "adapter", out),) if options.adapter else ()
    if small is None:
        base = describe_base(folder, split_id(options.model)[0], seen_from=out)
        return Manifest("adapter", "train", options.outcome(), base=base, parents=first)
    if small.base is None or small.pruning_map_sha256 is None:
        raise InputError(f"{folder}/loram.json does not name the large model and the map; run `loram prune` again")
    return Manifest(
        "small-adapter",
        "train",
        options.outcome(),
        family=small.family,
        compression=small.compression,
        base=moved(small.base, folder, out),
        pruning_map_sha256=small.pruning_map_sha256,
        parents=(parent_of(folder, "small-model", out), *first),
    )
