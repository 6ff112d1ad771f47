"""Measure, print the table, write results.json and docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.conditions import conditions
from benchmarks.measure import say
from benchmarks.render import PAGE, RESULTS, load, page, table
from benchmarks.sizes import SIZES
from benchmarks.suite import SUITE, Bench


def main() -> int:
    options = arguments()
    results = {} if options.fresh else load(options.output)
    command = "python -m benchmarks" + "".join(f" {word}" for word in sys.argv[1:])
    missed = False
    with tempfile.TemporaryDirectory(prefix="loram-bench-", dir=options.scratch) as scratch:
        for name in options.only or SUITE:
            if name == "sparsify" and not options.llmcompressor:
                say("sparsify is left out: give --llmcompressor PYTHON, of an environment that has llm-compressor")
                continue
            say(f"{name} ({options.size})")
            assert "torch" not in sys.modules, "the launcher must stay small: a child's ru_maxrss starts at its own"
            outcome = SUITE[name](Bench(options.size, Path(scratch), options.rounds, options.llmcompressor))
            results[name] = outcome.to_json() | {"conditions": conditions(options.size, command)}
            missed |= SIZES[options.size].judged and any(goal.met is False for goal in outcome.goals)
    ordered = {name: results[name] for name in SUITE if name in results}
    options.output.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.output == RESULTS:
        PAGE.write_text(page(ordered), encoding="utf-8")
    sys.stdout.write(table(ordered) + "\n")
    return int(missed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="tiny is a smoke run (default: full)")
    parser.add_argument(
        "--only", choices=list(SUITE), action="append", help="may be repeated; others keep their figures"
    )
    parser.add_argument("--rounds", type=int, help="runs of each contender")
    parser.add_argument("--fresh", action="store_true", help="forget the figures of benchmarks that are not run")
    parser.add_argument(
        "--scratch", help="folder on a disk with 10 GB free (stages: 45 GB), not in memory (default: the system's)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="where the figures go (default: results.json here)"
    )
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="of an environment with llm-compressor, for sparsify")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
