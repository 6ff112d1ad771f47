"""Does the large model get better? The quality grid: `python -m benchmarks.quality --list | --run [--only PATTERN]`.

Every cell is one small JSON file under benchmarks/quality; cells that have one are skipped, so the grid may be stopped
at any time (also by SIGKILL) and goes on. docs/transfer.md is rendered from those files: `--page`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.cells import RESULTS, Bench, run_cell
from benchmarks.grid import Cell, grid
from benchmarks.measure import ONE_THREAD, QUIET, say
from loram.errors import Interrupted, LoramError


def main() -> int:
    options = arguments()
    bench = Bench(options.scratch, dict(text.split("=", 1) for text in options.place), options.data, options.output)
    cells = [cell for cell in grid() if chosen(cell, options.only)]
    if not options.run:
        for cell in cells:
            sys.stdout.write(f"{'done   ' if bench.record(cell).is_file() else 'not run'}  {cell.id}\n")
        return 0
    os.environ.update(QUIET | ONE_THREAD)
    return run_all(cells, bench, options.minutes)


def run_all(cells: list[Cell], bench: Bench, minutes: float | None) -> int:
    """Every cell that has no record yet; one that fails is said and passed over."""
    began, failed = time.monotonic(), 0
    for cell in cells:
        if bench.record(cell).is_file():
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            say("out of time; the other cells are as they were")
            break
        say(cell.id)
        try:
            body = run_cell(cell, bench)
        except Interrupted as stopped:
            say(f"  {stopped.what}; the same command goes on")
            return stopped.exit_code
        except Exception as error:  # a method that this version lacks must not stop the others
            failed += 1
            say(f"  not run: {error}" if isinstance(error, (LoramError, LookupError)) else traceback.format_exc())
        else:
            say(f"  held-out loss {body['loss']:.4f} ± {body['stderr']:.4f}")
    return int(failed > 0)


def chosen(cell: Cell, patterns: list[str]) -> bool:
    """Whether a cell is asked for."""
    return not patterns or any(fnmatch(cell.id, f"*{pattern}*") for pattern in patterns)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="the cells, and which are done (default)")
    what.add_argument("--run", action="store_true", help="run what is not done yet")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cells with this in their name")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes")
    parser.add_argument("--place", action="append", default=[], metavar="MODEL=FOLDER", help="where a model lies")
    parser.add_argument("--data", type=Path, help="folder with the tasks' files that do not come with loram")
    parser.add_argument("--scratch", type=Path, default=Path("loram-quality"), help="folder for what the stages write")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="where the figures go (default: benchmarks/quality)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
