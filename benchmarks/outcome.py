"""What a benchmark is made of: where it runs, what it came to, and the goals its figures are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Command, Sample, interleaved, job, run, say
from benchmarks.sizes import SIZES, Size


@dataclass(frozen=True)
class Goal:
    """A figure and the most (or least) it may be; a figure without a limit is for information."""

    what: str
    value: float
    unit: str = "×"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the limit holds; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        return {**asdict(self), "value": round(self.value, 6), "met": self.met}


@dataclass(frozen=True)
class Outcome:
    """What a benchmark came to."""

    title: str
    setting: str
    samples: dict[str, list[Sample]]
    goals: list[Goal]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        runs = {name: [sample.to_json() for sample in samples] for name, samples in self.samples.items()}
        goals = [goal.to_json() for goal in self.goals]
        return {"title": self.title, "setting": self.setting, "goals": goals, "facts": self.facts, "runs": runs}


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs: its size and a scratch folder."""

    size_name: str
    folder: Path
    rounds: int | None = None
    llmcompressor: str | None = None
    """The Python of an environment that has llm-compressor."""

    @property
    def size(self) -> Size:
        """The shapes and rounds."""
        return SIZES[self.size_name]

    def race(
        self, contenders: Mapping[str, Command], outputs: Mapping[str, Path], rounds: int | None = None
    ) -> dict[str, list[Sample]]:
        """The contenders in turns."""
        return interleaved(contenders, self.rounds or rounds or self.size.rounds, self.folder, outputs)

    def base(self, what: str = "checkpoint") -> Path:
        """A random model, made once: `checkpoint` to merge into and to prune, `trained` and `stepped` to train on."""
        place = self.folder / what
        if not place.is_dir():
            say(f"  making a random model ({self.describe(what)})")
            run(job("make-base", self.size_name, what, place), self.folder)
        return place

    def prepare(self, place: Path, *arguments: object) -> Path:
        """What a job writes to `place`, once; it is not measured."""
        if not place.is_dir():
            run(job(*arguments), self.folder)
        return place

    def describe(self, what: str) -> str:
        """The model in words."""
        shape = getattr(self.size, what)
        return (
            f"random Llama in bf16: hidden {shape.hidden}, MLP {shape.mlp}, {shape.layers} layers, "
            f"{shape.heads} heads on {shape.kv_heads} kv heads, vocabulary {shape.vocab}"
        )
