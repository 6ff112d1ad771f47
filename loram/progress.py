"""How a stage tells how far it is, without knowing whether anybody looks.

A stage calls `begin`, `advance` and `end`; the console draws a bar, a notebook may draw its own,
and this class itself draws nothing. Sentences worth reading go through `logging`, not through here.
"""

from __future__ import annotations


class Progress:
    """A silent progress display; subclasses draw."""

    def begin(self, label: str, total: int) -> None:
        """A piece of work of `total` steps starts."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        """`amount` steps are done; `figures` are the numbers of the moment (loss, tokens/s …)."""

    def end(self) -> None:
        """The piece of work is over."""

    def ask(self, question: str) -> bool | None:
        """A person's yes or no; None where there is nobody to ask."""
        return None


SILENT = Progress()
