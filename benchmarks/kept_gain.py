"""What the quality grid's records say: held-out losses, kept gain, and how sure that is.

Kept gain = (base − recovered) / (base − ceiling), the ceiling at the best of its learning rates. Its standard error is
a jackknife over the held-out rows, which base, ceiling and recovered share; what seeds add is shown beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import RESULTS
from benchmarks.grid import RATES, SEEDS, Cell


@dataclass(frozen=True)
class Rows:
    """Summed loss (nats) and tokens of every held-out row."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    def loss(self, without: int | None = None) -> float:
        """Mean loss per token, one row left out where asked for."""
        nll, tokens = sum(self.nll), sum(self.tokens)
        if without is not None:
            nll, tokens = nll - self.nll[without], tokens - self.tokens[without]
        return nll / tokens


def kept_gain(base: Rows, ceiling: Rows, recovered: Rows) -> tuple[float, float]:
    """Kept gain, and its jackknife standard error over the rows; ValueError where the rows are not the same."""
    if not base.tokens == ceiling.tokens == recovered.tokens:
        raise ValueError("base, ceiling and recovered were not measured on the same rows")

    def share(without: int | None = None) -> float:
        low, high, found = (rows.loss(without) for rows in (base, ceiling, recovered))
        return (low - found) / (low - high)

    count = len(base.tokens)
    parts = [share(row) for row in range(count)]
    mean = fmean(parts)
    return share(), sqrt((count - 1) / count * sum((part - mean) ** 2 for part in parts))


class Records:
    """The records of one model and task: those whose stages are the grid's of today."""

    def __init__(self, model: str, task: str, folder: Path = RESULTS) -> None:
        self.model, self.task, self.folder = model, task, folder

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's record; None where it was not run."""
        file = self.folder / f"{cell.id}.json"
        if not file.is_file():
            return None
        body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return body if is_current(body, cell) else None

    def cell(self, method: str, **values: Any) -> Cell:
        """A cell of this model and task."""
        return Cell(self.model, self.task, method, **values)

    def loss(self, cell: Cell) -> float | None:
        """A cell's held-out loss."""
        body = self.find(cell)
        return None if body is None else float(body["loss"])

    def rows(self, cell: Cell) -> Rows | None:
        """A cell's held-out rows."""
        body = self.find(cell)
        return None if body is None else Rows(tuple(body["rows"]["nll"]), tuple(body["rows"]["tokens"]))

    @property
    def base(self) -> Rows | None:
        """The large model as it was."""
        return self.rows(self.cell("base"))

    @property
    def ceilings(self) -> dict[float, Rows]:
        """LoRA on the large model, by learning rate."""
        found = {rate: self.rows(self.cell("ceiling", lr=rate)) for rate in RATES}
        return {rate: rows for rate, rows in found.items() if rows is not None}

    @property
    def ceiling(self) -> Rows | None:
        """The best of them."""
        return min(self.ceilings.values(), key=Rows.loss, default=None)

    def kept(self, cell: Cell) -> tuple[float, float] | None:
        """Kept gain and its standard error over rows; None where something it needs was not run."""
        base, ceiling, found = self.base, self.ceiling, self.rows(cell)
        if base is None or ceiling is None or found is None:
            return None
        return kept_gain(base, ceiling, found)

    def outcome(self, method: str, ratio: str = "", keep: tuple[int, int] | None = None) -> Outcome | None:
        """A method at the best of the rates that its first seed was run at, over the seeds that were run there."""
        first = [self.cell(method, ratio=ratio, keep=keep, lr=rate) for rate in RATES]
        tried = {cell.lr: loss for cell in first if (loss := self.loss(cell)) is not None}
        if not tried or not self.ceilings:
            return None
        lr = min(tried, key=tried.__getitem__)
        cells = [self.cell(method, ratio=ratio, keep=keep, seed=seed, lr=lr) for seed in SEEDS]
        done = [(cell, kept) for cell in cells if (kept := self.kept(cell)) is not None]
        if not done:
            return None
        body = self.find(done[0][0])
        assert body is not None
        return Outcome(
            seeds=tuple(cell.seed for cell, _ in done),
            losses=tuple(loss for cell, _ in done if (loss := self.loss(cell)) is not None),
            kept=tuple(share for _, (share, _) in done),
            stderr=fmean(error for _, (_, error) in done),
            rates=(lr, *(rate for rate in tried if rate != lr)),
            reduction=body["reduction"].get("reduction", 1.0),
            bytes_reduction=bytes_reduction(body),
            seconds=seconds_before_training(body),
        )


@dataclass(frozen=True)
class Outcome:
    """What a method came to: one figure per seed; the rate, then the others that were tried; reductions embeddings
    included; CPU seconds before training.
    """

    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    kept: tuple[float, ...]
    stderr: float
    rates: tuple[float, ...]
    reduction: float
    bytes_reduction: float
    seconds: float

    @property
    def mean(self) -> float:
        """Kept gain, mean over the seeds."""
        return fmean(self.kept)


def is_current(body: dict[str, Any], cell: Cell) -> bool:
    """Whether a record was made with the stages and options that the grid has today."""
    made = [[stage["stage"], stage["options"]] for stage in body["stages"]]
    asked = [[name, {k: v for k, v in options.items() if v is not None}] for name, options in cell.stages()]
    return made == json.loads(json.dumps(asked))


def bytes_reduction(body: dict[str, Any]) -> float:
    """Bytes of the large weights over those that training holds, embeddings included; zeros count where stored."""
    reduction = float(body["reduction"].get("reduction", 1.0))
    for stage in body["stages"]:
        if stage["options"].get("method") in ("semi", "unstructured"):
            reduction = 1.0
        if stage["stage"] == "quantize":
            reduction *= stage["result"]["bytes"]["before"] / stage["result"]["bytes"]["small"]
    return reduction


def seconds_before_training(body: dict[str, Any]) -> float:
    """CPU seconds of making the small model: what comes before train."""
    names = [stage["stage"] for stage in body["stages"]]
    return float(sum(stage["cpu"] for stage in body["stages"][: names.index("train")] if "cpu" in stage))


def spelled(shares: Sequence[float]) -> str:
    """Percentages, the mean first where there are several."""
    texts = [f"{share:.0%}" for share in shares]
    return texts[0] if len(texts) == 1 else f"{fmean(shares):.0%} ({', '.join(texts)})"
