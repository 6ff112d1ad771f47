"""What pruning came to, whichever way it went. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loram.families.widths import Widths
from loram.results import StageResult

UNCALIBRATED = "no calibration text: nothing was refitted; add --calibration FILE with the text you will train on"


@dataclass(frozen=True, kw_only=True)
class PruneResult(StageResult):
    """The small model."""

    large: int
    small: int
    widths: Widths
    notes: tuple[str, ...] = ()
    masked: str = ""
    """What single weights were pruned by; then `small` counts those that stay."""

    def to_json(self) -> dict[str, Any]:
        """path, params.large, params.small."""
        reduction = self.large / self.small
        return super().to_json() | {
            "params": {"large": self.large, "small": self.small, "reduction": reduction},
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Counts, widths, and what a reader should mind."""
        cut = min(self.widths.mlp), min(self.widths.kv_heads)
        whole = max(self.widths.mlp), max(self.widths.kv_heads)
        lines = [
            f"{self.large:,} → {self.small:,} parameters ({self.large / self.small:.2f}×)",
            self.masked or f"cut layers keep {cut[0]} of {whole[0]} channels and {cut[1]} of {whole[1]} kv heads",
        ]
        return "\n".join([*lines, *self.notes])
