"""demo: the recipe quickstart on a real small model, offline, with data that comes along."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from loram.errors import InputError
from loram.options import DemoOptions, RunOptions
from loram.progress import SILENT, Progress
from loram.stages.run import RunResult, run

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def demo(options: DemoOptions, progress: Progress = SILENT) -> RunResult:
    """Run quickstart from end to end and end with the ladder of the large model."""
    data = Path(str(resources.files("loram_recipes"))) / "data"
    return run(
        RunOptions(
            recipe="quickstart",
            model=options.model or str(find_model()),
            data=(str(data / "train.jsonl"),),
            eval_data=(str(data / "test.jsonl"),),
            out=options.out or "loram-demo",
            ceiling=options.ceiling,
            force=options.force,
            dry_run=options.dry_run,
            overrides=options.overrides,
            seed=options.seed,
        ),
        progress,
    )


def find_model() -> Path | str:
    """SmolLM2-135M: in loram's cache (where `make demo` puts it), in the Hub's cache, else one sentence."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "loram" / "models" / MODEL.rpartition("/")[2]
    if folder.is_dir():
        return folder
    from loram.errors import HubError
    from loram.hub.download import resolve_model

    try:
        return resolve_model(MODEL)
    except HubError as error:
        raise InputError(
            f"the demo's model {MODEL} is neither in {folder} nor to be had from the Hub; run `make model`, "
            "go online, or give another model with --model FOLDER"
        ) from error
