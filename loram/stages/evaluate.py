"""loram eval: held-out loss of a model, with or without an adapter, and the quality ladder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loram.artifact import read_manifest
from loram.checkpoint import read_config
from loram.data.encoding import encode, within_context
from loram.data.sources import Source, read_sources
from loram.data.summary import stop_tokens
from loram.device import resolve_dtype
from loram.errors import InputError, KindError, OptionError
from loram.evaluation.advice import advise
from loram.evaluation.generation import questions
from loram.evaluation.ladder import (
    ADVICE,
    BASE,
    CEILING,
    ORDER,
    RECOVERED,
    SMALL,
    SMALL_ADAPTER,
    Ladder,
    Rung,
)
from loram.evaluation.losses import Loss, RowLosses, paired_gain, summarize
from loram.evaluation.subjects import Exam, Measured, Subject, examine
from loram.hub.download import fetched, resolve_artifact, resolve_model
from loram.modeling import load_tokenizer
from loram.options import EvalOptions
from loram.progress import SILENT, Progress
from loram.results import StageResult
from loram.stages.calibration_rows import overlap
from loram.stages.making import making_of
from loram.stages.pairing import check_pair, model_manifest, parent_folder

logger = logging.getLogger(__name__)
TRAINED = (RECOVERED, SMALL_ADAPTER, SMALL)


@dataclass(frozen=True, kw_only=True)
class EvalResult(StageResult):
    """The held-out loss of `subject`, also by row; with --compare, that of large + recovered, and the ladder."""

    subject: str
    loss: Loss
    losses: RowLosses
    accuracy: float | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    ladder: Ladder | None = None

    def to_json(self) -> dict[str, Any]:
        """`loss`, `perplexity`, `tokens`, `accuracy`, and what else was asked for."""
        body: dict[str, Any] = {
            "subject": self.subject,
            "loss": self.loss.mean,
            "stderr": self.loss.stderr,
            "perplexity": self.loss.perplexity,
            "tokens": self.loss.tokens,
            "rows": self.loss.rows,
            "accuracy": self.accuracy,
        }
        if self.tasks:
            body["tasks"] = self.tasks
        if self.ladder is not None:
            body |= {"ladder": self.ladder.to_json(), "verdict": self.ladder.verdict()}
            body |= {"gain_stderr": self.ladder.gain_stderr, "advice": list(self.ladder.advice)}
            body["kept_share"] = self.ladder.kept_share
        return body

    def summary(self) -> str:
        """The verdict after the ladder, else the loss in a line; always whose loss it is."""
        if self.ladder is not None:
            return self.ladder.verdict()
        right = "" if self.accuracy is None else f", {self.accuracy:.1%} exact matches"
        return (
            f"{self.subject}: loss {self.loss.mean:.4f} ± {self.loss.stderr:.4f} nats a token, perplexity "
            f"{self.loss.perplexity:.2f}, over {self.loss.tokens:,} tokens of {self.loss.rows:,} rows{right}"
        )


def evaluate(options: EvalOptions, progress: Progress = SILENT) -> EvalResult:
    """Measure one model, or every rung of the ladder with `--compare`."""
    model = model_folder(options.model)
    subjects = ladder_subjects(fetched(options), model) if options.compare else [single_subject(options, model)]
    for subject in subjects:
        if subject.adapter is not None:
            check_pair(subject.model, subject.adapter)
    found = examine(subjects, exam_of(options, model), progress)
    headline = RECOVERED if options.compare else subjects[-1].name
    measured = found[headline]
    return EvalResult(
        subject=headline,
        loss=summarize(measured.losses),
        losses=measured.losses,
        accuracy=measured.accuracy,
        tasks=measured.tasks,
        ladder=ladder_of(found, subjects) if options.compare else None,
    )


def model_folder(model: str) -> Path:
    """The folder of something that is a model."""
    folder = resolve_model(model)
    if not folder.is_dir():
        raise InputError(f"{model} is a file; give a model folder")
    model_manifest(folder)
    return folder


def exam_of(options: EvalOptions, model: Path) -> Exam:
    """The data, encoded as `train` would, and what is asked besides the loss."""
    sources = first_rows(read_sources(options.data, options.columns, options.system), options.limit)
    warn_of_seen(options, sources)
    tokenizer = load_tokenizer(model)
    length = within_context(options.max_length, read_config(model))
    rows, summary = encode(sources, tokenizer, length, long=options.long, stops=stop_tokens(model, tokenizer))
    logger.info("%s", summary)
    asked = questions([row for source in sources for row in source.rows], tokenizer) if options.generate else []
    return Exam(
        rows=rows,
        tokenizer=tokenizer,
        batch=options.batch,
        dtype=resolve_dtype(options.dtype),
        questions=asked,
        new_tokens=options.new_tokens,
        tasks=options.tasks,
        limit=options.limit,
        packed_to=length if options.packing else None,
    )


def warn_of_seen(options: EvalOptions, sources: list[Source]) -> None:
    """Say so where rows are those that `recover --calibrate` chose the adapter's scales on."""
    manifest = read_manifest(options.adapter) if options.adapter is not None else None
    seen = overlap(sources, manifest.calibration if manifest else None)
    if seen:
        logger.warning(
            "%d of these rows are those that the scales of %s were chosen on (recover --calibrate): its loss here is "
            "lower than on new rows; measure on others",
            seen,
            options.adapter,
        )


def first_rows(sources: list[Source], limit: int | None) -> list[Source]:
    """The sources with their first `limit` rows in all."""
    kept: list[Source] = []
    left = limit
    for source in sources:
        rows = source.rows if left is None else source.rows[:left]
        left = None if left is None else left - len(rows)
        kept += [replace(source, rows=rows)] if rows else []
    return kept


def single_subject(options: EvalOptions, model: Path) -> Subject:
    """The one model that is measured, named so that nobody takes a small model for the large one."""
    manifest = model_manifest(model)
    name = f"small model {options.model}" if manifest and manifest.kind == "small-model" else options.model
    if options.adapter is None:
        return Subject(name, model)
    return Subject(f"{name} + adapter {options.adapter}", model, resolve_artifact(options.adapter))


def ladder_subjects(options: EvalOptions, model: Path) -> list[Subject]:
    """Every rung that can be measured, large + recovered last, so that lm-eval tasks are its."""
    manifest = model_manifest(model)
    if manifest is not None and manifest.kind == "small-model":
        raise KindError(f"{options.model} is a small model; --compare starts from the large one: give that as MODEL")
    if options.adapter is None:
        raise OptionError("--compare needs the recovered adapter; add --adapter FOLDER (from `loram recover`)")
    recovered = Path(options.adapter)
    subjects = [Subject(BASE, model)]
    small_adapter = parent_folder(recovered, "small-adapter", options.small_adapter, "--small-adapter")
    if small_adapter is not None or options.small is not None:
        small = parent_folder(small_adapter or recovered, "small-model", options.small, "--small")
        subjects += [Subject(SMALL, small)] if small else []
        subjects += [Subject(SMALL_ADAPTER, small, small_adapter)] if small and small_adapter else []
    subjects += [Subject(CEILING, model, Path(options.ceiling))] if options.ceiling is not None else []
    return [*subjects, Subject(RECOVERED, model, recovered)]


def ladder_of(found: dict[str, Measured], subjects: list[Subject]) -> Ladder:
    """The rungs in their order, the paired standard error of what the large model gained, and what could be changed."""
    rungs = []
    for name in ORDER:
        if name in found:
            loss = summarize(found[name].losses)
            rungs.append(Rung(name, loss.mean, loss.stderr, found[name].accuracy))
    made = making_of([place for each in subjects if each.name in TRAINED for place in (each.adapter, each.model)])
    gain_stderr = paired_gain(found[BASE].losses, found[RECOVERED].losses)[1]
    return Ladder(tuple(rungs), gain_stderr, advise(made) if made.compression else ADVICE)
