"""Predicted against measured peak memory of calibrated `loram prune`, each in a process of its own.

The measured figure is the process's VmHWM; the prediction is what `loram plan` prints for the same options.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.measure import Sample, job, run, say
from benchmarks.memory import error_of, goals_of
from benchmarks.outcome import Bench, Outcome
from benchmarks.streaming import WHOLE, base

WAYS: dict[str, tuple[str, ...]] = {
    "wanda": ("--score", "wanda", *WHOLE),
    "taylor": ("--score", "taylor", *WHOLE),
    "flap": ("--score", "flap", *WHOLE),
    "wanda, ratio 0.25": ("--score", "wanda", "--ratio", "0.25", *WHOLE),
    "wanda, no refit": ("--score", "wanda", "--no-refit", *WHOLE),
    "semi, wanda": ("--method", "semi", "--score", "wanda"),
    "semi, sparsegpt": ("--method", "semi", "--score", "sparsegpt"),
    "depth": ("--method", "depth", *WHOLE),
}
"""How the small model is chosen."""
BROAD = 3
"""Layers of the broadest model: what a layer takes does not depend on how many there are."""


@dataclass(frozen=True)
class Configuration:
    """What is pruned, how, and by how much text; `model` is a field of `Size`."""

    model: str
    way: str
    samples: int
    length: int

    def __str__(self) -> str:
        """The configuration in a cell of a table."""
        return f"{self.model}, {self.samples}×{self.length}, {self.way}"

    @property
    def flags(self) -> tuple[object, ...]:
        """The options of `loram prune`, and of `loram plan`."""
        return (*WAYS[self.way], "--samples", self.samples, "--length", self.length)


def configurations(bench: Bench) -> list[Configuration]:
    """All of them; two at the toy size."""
    if not bench.size.judged:
        return [Configuration("narrow", way, 2, 32) for way in ("taylor", "semi, sparsegpt")]
    made = [Configuration("narrow", way, 8, 512) for way in ("wanda", "taylor", "semi, sparsegpt", "depth")]
    made += [Configuration("narrow", "taylor", 64, 256), Configuration("wide", "taylor", 8, 512)]
    made += [Configuration("wide", way, 16, 128) for way in WAYS]
    return made + [Configuration("huge", way, 8, 64) for way in ("wanda", "taylor", "semi, sparsegpt", "depth")]


def measured(bench: Bench) -> Iterator[tuple[Configuration, Sample]]:
    """Every configuration, one process each."""
    for wanted in configurations(bench):
        layers = BROAD if wanted.model == "huge" else getattr(bench.size, wanted.model).layers
        model, out = base(bench, wanted.model, layers), bench.folder / "calibrated"
        planned = run(job("loram-json", "plan", model, *wanted.flags), bench.folder)
        sample = run(job("loram", "prune", model, *wanted.flags, "--quiet", "-o", out), bench.folder)
        shutil.rmtree(out)
        sample = replace(sample, figures=planned.figures)
        say(f"  {wanted}: {sample.peak / 2**20:.0f} MiB, predicted {error_of(sample):+.1%}, {sample.wall:.0f} s")
        yield wanted, sample


def calibration(bench: Bench) -> Outcome:
    """Predicted against measured peak memory of `loram prune`; every configuration is run once."""
    samples = {str(wanted): [sample] for wanted, sample in measured(bench)}
    goals = goals_of(samples)
    broad = bench.describe("huge").replace(f"{bench.size.huge.layers} layers", f"{BROAD} layers")
    setting = (
        f"narrow: {bench.describe('narrow')}; wide: {bench.describe('wide')}; huge: {broad}; windows × tokens of "
        "`loram prune` on the CPU, ratio 0.5 unless said, no layer is left whole; one run of each. What a process "
        "holds before the first block is measured, everything else is derived"
    )
    return Outcome("Predicted and measured memory of calibration", setting, samples, goals)
