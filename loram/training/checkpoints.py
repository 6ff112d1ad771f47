"""Checkpoints in OUT.partial/checkpoints: whole or not there, and only ever continued by the run they belong to.

A checkpoint is what the Trainer writes (adapter, optimizer, schedule, random states), a copy of `metrics.jsonl`, and,
written last, `checksums.json`. One without checksums, or with others, is damaged and passed over. `run.json` beside
the checkpoints says which options, data and model they belong to.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.artifact import SEAL, read_json, sha256_json
from loram.data.encoding import EncodedRow
from loram.errors import InputError, OptionError
from loram.option_fields import RUNNING, flag
from loram.options import StageOptions
from loram.sealing import FOLDER as FOLDER
from loram.sealing import IDENTITY as IDENTITY
from loram.sealing import checkpoints_of as checkpoints_of
from loram.sealing import damage as damage
from loram.sealing import discard as discard
from loram.sealing import seal as seal
from loram.sealing import set_aside as set_aside
from loram.sealing import set_aside_folder as set_aside_folder
from loram.sealing import write_identity as write_identity
from loram.train_options import ResumeOptions
from loram.training.processes import process_count

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
PLACES = {
    "out",
    "force",
    "dry_run",
    "model",
    "large",
    "base_id",
    "revision",
    "data",
    "eval_data",
    "calibration",
    "adapter",
}
FREE = PLACES | {"log_every", "columns"} | RUNNING
"""Options that may change between a run and its continuation; model and data are compared by content."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    folder: Path
    step: int


def identity(options: StageOptions, data: list[EncodedRow] | str, model_digest: str) -> dict[str, Any]:
    """What makes a continuation the same run: options, the encoded rows (or a digest), model, number of processes."""
    return {
        "options": {key: value for key, value in options.to_json().items() if key not in FREE},
        "data": data if isinstance(data, str) else rows_digest(data),
        "model": model_digest,
        "processes": process_count(),
    }


def rows_digest(rows: list[EncodedRow]) -> str:
    """Digest of encoded rows, loss masks included."""
    return sha256_json([[row["input_ids"], [int(value) for value in row["loss_mask"]]] for row in rows])


def differences(before: Mapping[str, Any], now: Mapping[str, Any], data: str = "training data") -> list[str]:
    """In words, what differs between the run of a checkpoint and this one; `data` says what was read."""
    found = []
    old, new = before.get("options", {}), now["options"]
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            found.append(f"--{flag(key)} was {shown(old.get(key))} and is {shown(new.get(key))} now")
    if before.get("data") != now["data"]:
        found.append(f"the {data} is not the same")
    if before.get("model") != now["model"]:
        found.append("the model is not the same")
    if before.get("processes") != now["processes"]:
        found.append(f"{before.get('processes')} processes trained it and {now['processes']} would go on")
    return found


def shown(value: Any) -> str:
    """A value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def find_start(out: Path, options: ResumeOptions, now: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None to start anew. OptionError where it is another run's."""
    if options.resume == "never":
        return None
    place = checkpoints_of(out) if options.resume == "auto" else Path(options.resume)
    wanted = None
    if place.name.startswith(PREFIX):
        place, wanted = place.parent, place
    elif (place / FOLDER).is_dir():
        place = place / FOLDER
    found = newest_whole(place, wanted)
    if found is None:
        if options.resume != "auto":
            raise InputError(f"--resume {options.resume}: there is no whole checkpoint; give OUT.partial, or auto")
        return None
    other = differences(read_json(place / IDENTITY), now)
    if other:
        raise OptionError(
            f"{place} holds a run stopped at step {found.step} that is not this one: {'; '.join(other)}; "
            "give what it was started with to go on, or --resume never to start anew"
        )
    return found


def newest_whole(place: Path, wanted: Path | None = None) -> Checkpoint | None:
    """The wanted checkpoint, or else the newest one that is whole; says which ones are damaged."""
    candidates = listed(place)
    if wanted is not None:
        candidates.sort(key=lambda item: (item.folder.name == wanted.name, item.step))
    damaged: list[str] = []
    while candidates:
        last = candidates.pop()
        reason = damage(last.folder)
        if reason is None:
            if damaged:
                logger.warning("going back to step %d: %s", last.step, "; ".join(damaged))
            return last
        damaged.append(f"{last.folder.name} is damaged ({reason})")
    if damaged:
        logger.warning("no whole checkpoint in %s: %s", place, "; ".join(damaged))
    return None


def listed(place: Path) -> list[Checkpoint]:
    """Every checkpoint folder, oldest first, whole or not."""
    folders = [folder for folder in place.glob(PREFIX + "*") if folder.name.removeprefix(PREFIX).isdigit()]
    return sorted((Checkpoint(f, int(f.name.removeprefix(PREFIX))) for f in folders), key=lambda item: item.step)


def keep_newest(place: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints; the seal goes first, so that none is ever taken for whole."""
    for item in listed(place)[:-count]:
        (item.folder / SEAL).unlink(missing_ok=True)
        shutil.rmtree(item.folder, ignore_errors=True)
