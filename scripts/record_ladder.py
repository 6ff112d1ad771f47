"""Keep the ladder of a finished run for docs/quality.md: figures, settings, commands, commit, machine.

    scripts/record_ladder.py RUN docs/ladders/NAME.json --title TEXT --task TEXT --command 'loram run …'

What is kept is JSON without paths of the machine; `scripts/render_docs.py` turns it into the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.conditions import commit, machine  # noqa: E402  (the checkout is no package of its own)

SETTINGS: dict[str, tuple[str, ...]] = {
    "prune": ("method", "score", "ratio", "keep_first", "keep_last", "samples", "length", "refit"),
    "train": ("rank", "alpha", "lr", "steps", "epochs", "batch", "accumulate", "max_length"),
}


def record(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What quality.md needs of a run folder."""
    body, ladder = read(run / "run.json"), read(run / "ladder.json")
    stages = {stage["name"]: stage for stage in body["stages"]}
    model = options.model or read(run / "loram.json")["base"]["id"]
    if Path(model).is_absolute():
        raise SystemExit(f"{model} is a path of this machine; name the model with --model")
    return {
        "title": options.title,
        "model": model,
        "task": options.task,
        "settings": settings(stages),
        "rows": ladder["rows"],
        "verdict": stages["eval"]["result"]["verdict"],
        "stages": [{key: stage[key] for key in ("name", "seconds", "peak_bytes")} for stage in body["stages"]],
        "commands": options.command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": options.commit or commit(),
        "machine": options.machine or machine(threads=options.threads),
    }


def settings(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options that decide the outcome; epochs only where no steps were given."""
    found: dict[str, Any] = {}
    for stage, names in SETTINGS.items():
        chosen = stages.get(stage, {}).get("options", {})
        for name in names:
            if chosen.get(name) is not None and not (name == "epochs" and chosen.get("steps")):
                found[name.replace("_", "-")] = chosen[name]
    return found


def read(file: Path) -> Any:
    """A JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that loram run or demo wrote, with a ladder")
    parser.add_argument("target", type=Path, help="docs/ladders/NAME.json")
    parser.add_argument("--title", required=True)
    parser.add_argument("--task", required=True, help="the data, in a few words")
    parser.add_argument("--command", action="append", required=True, help="what was typed; may be repeated")
    parser.add_argument("--model", help="name of the large model, where the run only knows a path")
    parser.add_argument("--commit", help="commit the run was made with (default: the checkout's)")
    parser.add_argument("--machine", help="in words (default: this one)")
    parser.add_argument("--threads", type=int, default=1, help="threads the run used (default: 1)")
    options = parser.parse_args()
    text = json.dumps(record(options.run, options), indent=1, ensure_ascii=False)
    options.target.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
