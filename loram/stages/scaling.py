"""recover --calibrate: from a recovered adapter to scales per group of its modules, and what is recorded of them.

Every evaluation of the large model is kept on disk (checkpoints of OUT.partial) until OUT is whole: the search is the
same each time, so a call that was stopped finds again what it measured and goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.adapter import Adapter
from loram.artifact import Base, find_location, read_json, sha256_json, write_json
from loram.checkpoint import describe_base, read_config
from loram.device import resolve_dtype
from loram.errors import InputError, Interrupted, MismatchError
from loram.evaluation.losses import RowLosses, paired_gain
from loram.evaluation.scale_search import Comparison, Measure, check, mean, remembered, search
from loram.evaluation.scoring import Score, fits, resident, streamed
from loram.families import family_of
from loram.group_scales import Groups, Scales
from loram.hub.download import resolve_model
from loram.option_fields import command_line
from loram.options import RecoverOptions
from loram.progress import Progress
from loram.sealing import Steps
from loram.stages.calibration_rows import Rows, read_rows
from loram.stages.lineage import check_same
from loram.stages.wiring import content_digest
from loram.training.signals import StopRequest

logger = logging.getLogger(__name__)
CHOICE, CHECK = "choose", "check"
LOSSES = "losses.json"


@dataclass(frozen=True)
class Calibration:
    """The adapter with its scales folded in, and what the manifest says about them."""

    adapter: Adapter
    record: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a calibration works with; `place` is where its evaluations are kept."""

    options: RecoverOptions
    adapter: Adapter
    large: Path
    groups: Groups
    rows: Rows
    steps: Steps
    progress: Progress


def calibrate(
    options: RecoverOptions, adapter: Adapter, base: Base | None, place: Path, stop: StopRequest, progress: Progress
) -> Calibration:
    """Choose a scale for every group of the recovered adapter's modules, and fold them in."""
    large = find_base(options, base)
    config = read_config(large)
    family = family_of(config)
    groups = Groups(family, family.geometry(config).layers)
    names = groups.present(adapter)
    if not names:
        raise MismatchError(
            f"{options.adapter} adapts no attention and no MLP module: there is nothing to scale; leave out --calibrate"
        )
    rows = read_rows(options, large)
    dtype = resolve_dtype("auto")
    identity = {
        "schema": 1,
        "base": describe_base(large).weights_fingerprint,
        "inputs": [content_digest(place) for place in (options.adapter, options.small) if place],
        "portable": options.portable,
        "rows": rows.digests,
        "split": len(rows.choose),
        "tokens": sum(len(row["input_ids"]) for row in (*rows.choose, *rows.check)),
        "dtype": dtype,
    }
    steps = Steps(place, identity, interruption_of(options, stop))
    work = Work(options, adapter, large, groups, rows, steps, progress)
    whole = fits(large, dtype)
    logger.info(
        "the large model is %s", "kept in memory" if whole else "run one block at a time: it does not fit memory"
    )
    opened = (resident if whole else streamed)(large, adapter, dtype, options.batch)
    return chosen(work, names, opened)


def find_base(options: RecoverOptions, base: Base | None) -> Path:
    """The large model's folder; InputError where it is not found, MismatchError where it is another one."""
    hinted = find_location(base.location, options.adapter) if base is not None else None
    folder = resolve_model(options.large) if options.large is not None else hinted
    if folder is None:
        name = base.id if base is not None else "the large model"
        raise InputError(f"--calibrate runs {name}, which was not found; give it with --large FOLDER")
    if base is not None:
        check_same(base, describe_base(folder), folder)
    return folder


def interruption_of(options: RecoverOptions, stop: StopRequest) -> Any:
    """The error that a signal leads to, once what was measured is on disk."""

    def interruption() -> Exception | None:
        if not stop:
            return None
        return Interrupted(f"recover --calibrate was stopped by {stop.name}", command_line("recover", options))

    return interruption


def chosen(work: Work, names: Sequence[str], opened: AbstractContextManager[Score]) -> Calibration:
    """Search on one half, check on the other, and put down what was found."""
    limit, progress = work.options.evaluations, work.progress
    with opened as score:
        choosing, checking = (remembered(kept(work, split, score)) for split in (CHOICE, CHECK))
        progress.begin(CHOICE, limit)
        found = search(names, choosing, limit)
        progress.end()
        progress.begin(CHECK, len(names) + 2)
        scales = check(found, checking)
        progress.end()
        ones = dict.fromkeys(names, 1.0)
        splits = {
            CHOICE: Comparison(choosing(ones), choosing(scales)),
            CHECK: Comparison(checking(ones), checking(scales)),
        }
    record = {
        "family": work.groups.family.name,
        "layers": work.groups.layers,
        "scales": scales,
        "found": found,
        "norms": work.groups.norms(work.adapter),
        "loss": {split: told(each) for split, each in splits.items()},
        "rows": work.rows.digests,
    }
    return Calibration(work.groups.scaled(work.adapter, scales), record)


def told(split: Comparison) -> dict[str, Any]:
    """A split's losses before and after, and the standard error of their difference over its rows."""
    stderr = paired_gain(split.before, split.after)[1]
    rows, tokens = len(split.before.nll), sum(split.before.tokens)
    return {"before": mean(split.before), "after": mean(split.after), "stderr": stderr, "rows": rows, "tokens": tokens}


def kept(work: Work, split: str, score: Score) -> Measure:
    """The losses of a split's rows under some scales: measured now, or by a call that was stopped."""
    rows = work.rows.choose if split == CHOICE else work.rows.check

    def measure(scales: Scales) -> RowLosses:
        name = f"{split}-{sha256_json(dict(scales))[:16]}"
        if not work.steps.whole(name):
            losses = score(work.groups.scaled(work.adapter, scales), rows)
            with work.steps.writing(name) as folder:
                write_json(folder / LOSSES, {"scales": dict(scales), "nll": losses.nll, "tokens": losses.tokens})
        body = read_json(work.steps.folder(name) / LOSSES)
        losses = RowLosses(tuple(body["nll"]), tuple(body["tokens"]))
        work.progress.advance(loss=mean(losses))
        work.steps.stop_here()
        return losses

    return measure
