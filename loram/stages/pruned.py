"""What pruning came to, whichever way it went. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loram.errors import Interrupted
from loram.families.widths import Widths
from loram.option_fields import command_line
from loram.options import PruneOptions
from loram.results import StageResult
from loram.training.signals import StopRequest

UNCALIBRATED = "no calibration text: nothing was refitted; add --calibration FILE with the text you will train on"


@dataclass(frozen=True, kw_only=True)
class PruneResult(StageResult):
    """The small model."""

    large: int
    small: int
    widths: Widths
    notes: tuple[str, ...] = ()
    cut: str = ""
    """What went, where it is not the same share of each cut layer. `small` counts what stays, not zeros."""
    layers: tuple[int, ...] | None = None
    influences: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """path, params.large, params.small; for depth the kept `layers` and every layer's `influences`."""
        reduction = self.large / self.small
        body = super().to_json() | {
            "params": {"large": self.large, "small": self.small, "reduction": reduction},
            "notes": list(self.notes),
        }
        if self.layers is None:
            return body
        return body | {"layers": list(self.layers), "influences": list(self.influences)}

    def summary(self) -> str:
        """Counts, widths, and what a reader should mind."""
        cut = min(self.widths.mlp), min(self.widths.kv_heads)
        whole = max(self.widths.mlp), max(self.widths.kv_heads)
        lines = [
            f"{self.large:,} → {self.small:,} parameters ({self.large / self.small:.2f}×)",
            self.cut or f"cut layers keep {cut[0]} of {whole[0]} channels and {cut[1]} of {whole[1]} kv heads",
        ]
        return "\n".join([*lines, *self.notes])


def depth_words(count: int, left: int, kept: tuple[int, ...] | None, influences: tuple[float, ...]) -> str:
    """Which of `count` layers went, with their block influence beside that of those that might have."""
    if kept is None:
        return f"{count - left} of {count} layers will go: those of least block influence"
    gone = [layer for layer in range(count) if layer not in kept]
    said = f"{len(gone)} of {count} layers went: {', '.join(map(str, gone))}"
    if not influences:  # it was done before
        return said
    most = max(influences[layer] for layer in gone)
    return said + (
        f" (block influence at most {most:.3f}; over all layers that were measured {min(influences):.3f} to "
        f"{max(influences):.3f})"
    )


def stopped(options: PruneOptions, stop: StopRequest, saved: Callable[[], str] = str) -> Interrupted | None:
    """Once somebody has asked to stop: the error that says how to go on, and what is saved, asked only then."""
    if not stop:
        return None
    found = saved()
    where = f"behind {found}, which are saved" if found else "before anything was done that could be saved"
    return Interrupted(f"stopped by {stop.name} {where}", command_line("prune", options))
