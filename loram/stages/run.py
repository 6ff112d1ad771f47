"""run: the sections of a recipe in order, each into its folder; a finished stage with the same digest is skipped."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.artifact import (
    MANIFEST,
    Base,
    Manifest,
    check_output,
    environment,
    locked,
    logging_into,
    output_error,
    read_json,
    read_manifest,
    scratch,
    write_json,
)
from loram.checkpoint import describe_base
from loram.data.places import source_path
from loram.errors import Interrupted, MismatchError, OutputError
from loram.hub.download import resolve_model
from loram.memory import format_bytes, give_back, peak_bytes, restart_peak
from loram.option_fields import command_line
from loram.options import PushOptions, RunOptions
from loram.progress import SILENT, Progress
from loram.recipe import Recipe, load_recipe
from loram.results import StageResult
from loram.stages import stage_function
from loram.stages.push import check_ahead
from loram.stages.wiring import Step, final_adapter, settle, wire

logger = logging.getLogger(__name__)
RECORD = "run.json"
LADDER = "ladder.json"


@dataclass(frozen=True, kw_only=True)
class RunResult(StageResult):
    """What every stage did, and the ladder of the large model."""

    stages: tuple[dict[str, Any], ...]
    ladder: Any = None
    adapter: str = ""

    def to_json(self) -> dict[str, Any]:
        """path, stages[], and the ladder."""
        body = super().to_json() | {"stages": list(self.stages)}
        if self.ladder is not None:
            body |= {"ladder": self.ladder.to_json(), "verdict": self.ladder.verdict()}
        return body

    def summary(self) -> str:
        """A line per stage and the verdict."""
        lines = []
        for stage in self.stages:
            if "digest" not in stage:
                lines.append(f"{stage['name']:<8} would run")
            elif stage.get("skipped"):
                lines.append(f"{stage['name']:<8} skipped: done before with the same options and inputs")
            else:
                lines.append(f"{stage['name']:<8} {stage.get('seconds', 0):6.1f} s   {memory_of(stage)}")
        return "\n".join([*lines, *([self.ladder.verdict()] if self.ladder is not None else [])])


def memory_of(stage: dict[str, Any]) -> str:
    """A stage's measured peak, and the predicted one where there was a prediction."""
    measured = f"{format_bytes(stage.get('peak_bytes', 0)):>10}"
    predicted = stage.get("predicted_bytes")
    return measured if predicted is None else f"{measured} ({format_bytes(predicted)} predicted)"


def run(options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Work through a recipe. Killed and started again it goes on where it was."""
    options, recipe = settle(options, load_recipe(options.recipe))
    model = str(resolve_model(str(options.model)))
    steps = wire(options, recipe, model)
    if options.dry_run:
        plan = tuple({"name": step.name, "options": step.options.to_json()} for step in steps)
        return RunResult(stages=plan, next_command=f"loram run {options.recipe} -o {options.out}")
    for step in steps:
        if isinstance(step.options, PushOptions):
            check_ahead(step.options, describe_base(model), stated_base(recipe))
    folder = open_run(options, model)
    record = Record(folder)
    with locked(folder), logging_into(folder / "loram.log"):
        for step in steps:
            work_on(step, options, record, progress)
        close_run(folder, options, recipe, record, describe_base(model, seen_from=folder))
    adapter = Path(final_adapter(folder, options.touch_up))
    return RunResult(
        stages=tuple(record.stages[step.name] for step in steps),
        ladder=record.ladder(),
        adapter=str(adapter),
        path=folder,
        next_command=next_of(steps, adapter),
    )


def stated_base(recipe: Recipe) -> str | None:
    """The id that a section before push gives the large model."""
    return next((found for name in ("recover", "prune") if (found := recipe.section(name).get("base_id"))), None)


def next_of(steps: list[Step], adapter: Path) -> str:
    """The push that was only shown; else a merge."""
    shown = [step.options for step in steps if isinstance(step.options, PushOptions) and step.options.dry_run]
    if shown:
        return command_line("push", replace(shown[0], dry_run=False, seed=0))
    return f"loram merge {adapter} -o MERGED" if adapter.is_dir() else ""


def work_on(step: Step, options: RunOptions, record: Record, progress: Progress) -> None:
    """One step; an interruption ends with the line that goes on with the whole run."""
    again = command_line("run", replace(options, force=False))
    try:
        result = do(step, record, progress)
    except Interrupted as stopped:
        # Nothing after a half-done stage is run; the line to type is the run's, not the stage's.
        raise Interrupted(f"{step.name} {stopped.what}", again) from None
    except KeyboardInterrupt:
        raise Interrupted(f"{step.name} was interrupted", again) from None
    ladder = getattr(result, "ladder", None)
    if ladder is not None:
        write_json(record.folder / LADDER, ladder.to_json())


class Record:
    """`run.json`: per stage its digest, time, memory and figures; written after every stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        body = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
        self.stages: dict[str, dict[str, Any]] = {stage["name"]: stage for stage in body.get("stages", ())}

    def save(self, **more: Any) -> None:
        """Write the file whole."""
        write_json(self.folder / RECORD, {"stages": list(self.stages.values()), **more})

    def ladder(self) -> Any:
        """The ladder of an evaluation that was skipped this time."""
        from loram.evaluation.ladder import ADVICE, Ladder, Rung

        file = self.folder / LADDER
        if not file.is_file():
            return None
        told = self.stages.get("eval", {}).get("result", {})
        rows = tuple(Rung(**row) for row in read_json(file)["rows"])
        return Ladder(rows, told.get("gain_stderr"), tuple(told.get("advice") or ADVICE))


def do(step: Step, record: Record, progress: Progress) -> StageResult | None:
    """Run one step, or skip it where its digest is recorded and its folder is whole."""
    digest = step.digest()
    before = record.stages.get(step.name, {})
    if before.get("digest") == digest and before.get("output") == output_digest(step):
        logger.info("%s: skipped, done before with the same options and inputs", step.name)
        record.stages[step.name] = before | {"skipped": True}
        return None
    logger.info("── %s", step.name)
    options = replace(step.options, force=True) if step.out is not None else step.options  # type: ignore[call-arg]
    give_back()
    restart_peak()
    began = time.monotonic()
    result = stage_function(step.stage)(options, progress)
    if result.exit_code:
        logger.info("%s", result.summary())
        raise MismatchError(f"{step.name} failed on {step.inputs[0]}: see the checks above; nothing after it was run")
    body = result.to_json()
    record.stages[step.name] = {
        "name": step.name,
        "digest": digest,
        "output": output_digest(step),
        "seconds": round(time.monotonic() - began, 3),
        "peak_bytes": peak_bytes(),
        **({"predicted_bytes": body["predicted_bytes"]} if "predicted_bytes" in body else {}),
        "options": step.options.to_json(),
        "result": body,
    }
    record.save()
    if result.summary() and step.stage != "eval":
        logger.info("%s", result.summary())
    return result


def output_digest(step: Step) -> str | None:
    """Digest of the folder a step wrote; None for a step that writes none, '' where it is gone or not whole."""
    if step.out is None:
        return None
    manifest = read_manifest(step.out) if step.out.is_dir() else None
    return manifest.digest() if manifest else ""


def open_run(options: RunOptions, model: str) -> Path:
    """The run's folder: new, or an earlier run of loram's that goes on."""
    folder = check_output(options.out, [model, *map(source_path, (*options.data, *options.eval_data))], force=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file() and not options.force:
        raise OutputError(f"{folder} exists and is not a run of loram's; choose another with -o or add --force")
    try:
        if options.force and folder.is_dir():
            _, aside = scratch(folder)
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # not complete any more
        Record(folder).save()
    except OSError as error:
        raise output_error(error, folder) from error
    return folder


def close_run(folder: Path, options: RunOptions, recipe: Recipe, record: Record, base: Base) -> None:
    """Write the record with the recipe, and the manifest that says the run is complete."""
    record.save(recipe=recipe.sections, source=recipe.source, options=options.to_json(), environment=environment())
    manifest = Manifest(kind="run", stage="run", options=options.to_json(), base=base, environment=environment())
    write_json(folder / MANIFEST, manifest.to_json())
    shutil.rmtree(scratch(folder)[1], ignore_errors=True)
