"""How train and align go on where they were stopped and say that they are finished; only one process writes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loram.artifact import Draft, Manifest, drafting, read_manifest, sha256_json
from loram.data.encoding import EncodedRow
from loram.data.places import source_path
from loram.options import TrainOptions
from loram.stages.wiring import content_digest
from loram.train_options import ResumeOptions
from loram.training.checkpoints import differences, discard, find_start, identity
from loram.training.loop import Session
from loram.training.processes import done_by_writer, is_writer
from loram.training.signals import StopRequest
from loram.training.watching import Watch

logger = logging.getLogger(__name__)


def open_session(
    options: ResumeOptions, out: Path, now: dict[str, Any], stop: StopRequest, watch: Watch | None = None
) -> Session:
    """The newest good checkpoint of this very run, if there is one; all processes get the same."""

    def begin() -> Any:
        if options.resume == "never":
            discard(out)
        return find_start(out, options, now)

    start = done_by_writer(begin)
    if start is not None:
        logger.info("going on at step %d (%s)", start.step, start.folder)
    return Session(start, now, stop, watch or Watch())


def identity_of(options: TrainOptions, rows: list[EncodedRow], folder: Path) -> dict[str, Any]:
    """What makes a continuation the same run."""
    places = [str(folder), *filter(None, [options.adapter])]
    digests = [content_digest(place) for place in places]
    return identity(options, rows, digests[0] if len(digests) == 1 else sha256_json(digests))


def inputs_of(options: TrainOptions) -> tuple[str, ...]:
    """The folders and files that are read, and must not be written to."""
    return (options.model, *filter(None, [options.adapter]), *map(source_path, (*options.data, *options.eval_data)))


@contextmanager
def writing(options: TrainOptions, out: Path) -> Iterator[Draft]:
    """The draft of OUT, which process 0 finishes and puts in place; the others get the folder and leave it alone."""
    if is_writer():
        with drafting(out, force=options.force, inputs=inputs_of(options), keep_partial=True) as draft:
            yield draft
    else:
        yield Draft(out.with_name(out.name + ".partial"), out)


def earlier_result(options: ResumeOptions, stage: str = "train") -> Manifest | None:
    """The manifest of a finished training (or alignment) that stands in OUT and may be this one."""
    if options.force or options.resume != "auto" or not Path(options.out).is_dir():
        return None
    manifest = read_manifest(options.out)
    return manifest if manifest is not None and manifest.stage == stage else None


def is_same_run(earlier: Manifest, now: dict[str, Any]) -> bool:
    """Whether the finished training is the one that is asked for."""
    return not differences(earlier.training or {}, now)
