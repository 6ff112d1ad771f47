"""The quality ladder: base, small, small + adapter, large + recovered, and perhaps a ceiling.

Only `large + recovered` against `base` says whether LoRAM helped; the small rungs explain why.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BASE = "base"
SMALL = "small"
SMALL_ADAPTER = "small + adapter"
RECOVERED = "large + recovered"
CEILING = "ceiling"
ORDER = (BASE, SMALL, SMALL_ADAPTER, RECOVERED, CEILING)
ADVICE = (
    "put more of the task's text into --calibration",
    "cut less and take 4 bits for it",
    "train more steps, or at a higher rate",
)
ENOUGH = 0.75
"""The share of what is possible below which a helpful adapter is still worth advice."""


@dataclass(frozen=True)
class Rung:
    """One model on the held-out data: mean loss, its standard error, and exact match if it was asked for."""

    name: str
    loss: float
    stderr: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Ladder:
    """The rungs, the standard error of large + recovered against base on the same rows, and what could be changed."""

    rows: tuple[Rung, ...]
    gain_stderr: float | None = None
    advice: tuple[str, ...] = ADVICE

    def rung(self, name: str) -> Rung | None:
        """The rung of that name, if it was measured."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """`ladder.json`."""
        return {"rows": [asdict(row) for row in self.rows]}

    @property
    def gain(self) -> float | None:
        """How many nats a token the large model gained; None unless both rungs are there."""
        base, recovered = self.rung(BASE), self.rung(RECOVERED)
        return None if base is None or recovered is None else base.loss - recovered.loss

    @property
    def kept_share(self) -> float | None:
        """The gain over that of LoRA trained on the large model itself, where that is known and positive."""
        base, ceiling = self.rung(BASE), self.rung(CEILING)
        if self.gain is None or base is None or ceiling is None or ceiling.loss >= base.loss:
            return None
        return self.gain / (base.loss - ceiling.loss)

    def verdict(self) -> str:
        """Plain words: did it help the large model, by how much of what is possible, and what to change if not."""
        gain = self.gain
        if gain is None:
            return "no verdict: the ladder needs the base and the large model with the recovered adapter"
        margin = 0.0 if self.gain_stderr is None else 2 * self.gain_stderr
        error = "" if self.gain_stderr is None else f" ± {self.gain_stderr:.3f}"
        share = (
            "" if self.kept_share is None else f", {self.kept_share:.0%} of what LoRA on the large model itself gains"
        )
        if gain > margin:
            short = self.kept_share is not None and self.kept_share < ENOUGH
            more = f"; to keep more: {self.change}" if short else ""
            return f"the recovered adapter helps the large model: {gain:.3f}{error} nats a token less loss{share}{more}"
        if gain < -margin:
            return (
                f"the recovered adapter harms the large model: {-gain:.3f}{error} nats a token more loss; what to "
                f"change, the strongest first: {self.change}"
            )
        return (
            f"the recovered adapter makes no clear difference ({gain:+.3f}{error} nats a token gained){share}; what to "
            f"change, the strongest first: {self.change}"
        )

    @property
    def change(self) -> str:
        """The advice in a line."""
        return "; ".join(self.advice)
