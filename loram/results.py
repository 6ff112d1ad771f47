"""What a stage gives back: a small frozen dataclass that prints well and turns into JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Base of all results: where the artifact is and which command comes next."""

    path: Path | None = None
    next_command: str = ""

    @property
    def exit_code(self) -> int:
        """What the command line exits with; only a failed `verify` says other than 0."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints; subclasses add the keys that others rely on."""
        return {"path": None if self.path is None else str(self.path)}

    def summary(self) -> str:
        """A few lines for a person, without the path and the next command."""
        return ""

    def __str__(self) -> str:
        """Summary, path and next command, a line each."""
        path = "" if self.path is None else f"wrote {self.path}"
        next_command = f"next: {self.next_command}" if self.next_command else ""
        return "\n".join(line for line in (self.summary(), path, next_command) if line)
