"""align: make a small model behave like the large one again (2502.13533, section 3.2, and cheaper ways to the same)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.artifact import Manifest, check_output, drafting, require_kind
from loram.checkpoint import Checkpoint, read_config
from loram.data.calibration import BUILTIN, is_general
from loram.data.encoding import within_context
from loram.data.places import source_path
from loram.data.windows import Mixture, mix
from loram.errors import KindError
from loram.memory import check_disk
from loram.modeling import load_tokenizer
from loram.options import AlignOptions
from loram.progress import SILENT, Progress
from loram.pruning_map import FILE as MAP_FILE
from loram.results import StageResult
from loram.rewriting import rewrite
from loram.stages.aligning import CHANGES, Work, digest_of, held_out_loss
from loram.stages.carried import MODEL_FILES, copy_files
from loram.stages.lineage import moved, parent_of
from loram.stages.resuming import earlier_result, is_same_run, open_session
from loram.stages.wiring import content_digest
from loram.training.checkpoints import discard, identity, set_aside
from loram.training.processes import process_count
from loram.training.signals import stop_on_signals

logger = logging.getLogger(__name__)
ADDED = {"lm": "aligned", "distill": "aligned", "block": "aligned", "refit": "refit"}
"""What a method adds to a manifest's `compression`."""
WORSE = (
    "it did not get better: train on the model that was given, or align again with more text (--samples, --steps, "
    "--data) or a lower --lr"
)


@dataclass(frozen=True, kw_only=True)
class AlignResult(StageResult):
    """The aligned small model and its held-out losses; None after a dry run."""

    before: float | None = None
    after: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`path`, `loss.before`, `loss.after` (mean per token of held-out windows), `notes`."""
        body = super().to_json() | {"notes": list(self.notes)}
        return body if self.before is None else body | {"loss": {"before": self.before, "after": self.after}}

    def summary(self) -> str:
        """One line, and what a reader should mind."""
        if self.before is None or self.after is None:
            return "\n".join(["nothing was aligned (--dry-run)", *self.notes])
        lines = [f"the small model's held-out loss: {self.before:.3f} → {self.after:.3f}"]
        if not self.after < self.before:
            lines.append(WORSE)
        return "\n".join([*lines, *self.notes])


def align(options: AlignOptions, progress: Progress = SILENT) -> AlignResult:
    """Change the small model's weights so that it stands in for the large one better; the map stays as it is."""
    inputs = [options.model, *map(source_path, options.data), *([options.large] if options.large else [])]
    earlier = earlier_result(options, "align")
    out = check_output(options.out, inputs, force=options.force or earlier is not None)
    manifest = alignable(options)
    folder = Path(options.model)
    mixture = text_of(options, folder)
    result = AlignResult(notes=notes_on(options, mixture), next_command=f"loram train {out} --data FILE -o ADAPTER")
    if options.dry_run:
        return result
    now = identity(options, digest_of(mixture), content_digest(str(folder)))
    if earlier is not None and is_same_run(earlier, now):
        logger.info("%s is finished already; to align it anew add --force", out)
        loss = (earlier.training or {})["loss"]
        return replace(result, path=out, before=loss["before"], after=loss["after"])
    check_output(out, inputs, force=options.force)
    with stop_on_signals() as stop, Checkpoint(folder) as checkpoint:
        check_disk(out, checkpoint.total_bytes)
        session = open_session(options, out, now, stop)
        with drafting(out, force=options.force, inputs=inputs, keep_partial=True) as draft:
            work = Work(options, manifest, checkpoint, mixture, draft.path, out, session, progress)
            before = held_out_loss(work, folder)
            changed = CHANGES[options.method](work)
            progress.begin("write", checkpoint.total_bytes)
            draft.digests.update(rewrite(checkpoint, changed, draft.path, progress.advance))
            progress.end()
            del changed
            copy_files(folder, draft.path, ("config.json", MAP_FILE, *MODEL_FILES))
            after = held_out_loss(work, draft.path)
            training = now | {"loss": {"before": before, "after": after}}
            draft.manifest = manifest_of(options, manifest, folder, out, training)
            set_aside(draft.path, out)
    discard(out)
    return replace(result, path=out, before=before, after=after)


def alignable(options: AlignOptions) -> Manifest:
    """The manifest of the small model; KindError for what is none, or is quantized already."""
    manifest = require_kind(options.model, ("small-model",), "align")
    if "quantization_config" in read_config(Path(options.model)):
        raise KindError(
            f"{options.model} is quantized, and rounded weights cannot be aligned; align first, then quantize: "
            "give the small model that it was made from"
        )
    if process_count() > 1:
        raise KindError("`loram align` works in one process; start it without the launcher")
    return manifest


def text_of(options: AlignOptions, folder: Path) -> Mixture:
    """The windows to align on and those held out."""
    length = within_context(options.length, read_config(folder))
    learns = options.method in ("lm", "distill")
    count = options.step_count * options.batch * options.accumulate if learns else options.samples
    return mix(
        options.data or (BUILTIN,),
        load_tokenizer(folder),
        (count, options.held_out),
        (length, options.packing),
        options.seed,
        options.columns,
    )


def notes_on(options: AlignOptions, mixture: Mixture) -> tuple[str, ...]:
    """What a reader should know about the text."""
    notes = []
    if all(is_general(source) for source in options.data):
        notes.append(
            "aligned on general text only: the adapter will carry over much better with the text you will train on "
            "(--data FILE --data builtin)"
        )
    if mixture.repeats > 1.5:
        notes.append(f"the text fills {len(mixture.windows)} windows, each seen {mixture.repeats:.1f} times on average")
    return tuple(notes)


def manifest_of(options: AlignOptions, small: Manifest, folder: Path, out: Path, training: dict[str, Any]) -> Manifest:
    """The small model's manifest, with what was done to it now."""
    added = ADDED[options.method]
    return replace(
        small,
        stage="align",
        options=options.outcome(),
        compression=small.compression if small.compression[-1:] == (added,) else (*small.compression, added),
        base=moved(small.base, folder, out) if small.base else None,
        parents=(parent_of(folder, "small-model", out),),
        training=training,
        files={},
    )
