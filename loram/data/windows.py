"""Text to align on: windows of tokens from a mixture of sources, some of them held out, and the order of the rest."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loram.data.calibration import parse_spec, placed_windows, read_calibration, shares
from loram.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Distinct windows (count, length), those held out (rows, length), and which window is seen when.

    `places` and `held_places` say where in its document each token is, where documents are to be kept apart.
    """

    windows: Tensor
    held_out: Tensor
    order: tuple[int, ...]
    places: Tensor | None = None
    held_places: Tensor | None = None

    @property
    def repeats(self) -> float:
        """How often a window is seen on average."""
        return len(self.order) / len(self.windows)


def mix(
    sources: tuple[str, ...],
    tokenizer: Any,
    counts: tuple[int, int],
    shape: tuple[int, bool],
    seed: int,
    columns: str | None = None,
) -> Mixture:
    """`counts` windows to align on and to hold out, shared among the sources by their weights.

    `shape`: the windows' length, and whether documents in a window are kept apart. A source with less text than its
    share is seen several times over. DataError where nothing can be held out.
    """
    parsed = [parse_spec(spec) for spec in sources]
    weights = [weight for _, weight in parsed]
    wanted, kept_out = (shares(weights, count) for count in counts)
    length, apart = shape
    windows: list[tuple[Tensor, Tensor]] = []
    held: list[tuple[Tensor, Tensor]] = []
    order: list[int] = []
    for (path, _), count, out in zip(parsed, wanted, kept_out, strict=True):
        if not count:
            continue
        found = placed_windows(read_calibration(path, columns), tokenizer, count + out, length, seed, apart=apart)
        aside = min(out, max(len(found) - count, len(found) // 4))
        own = range(len(windows), len(windows) + min(count, len(found) - aside))
        windows += found[: len(own)]
        held += found[len(found) - aside :]
        order += [own[position % len(own)] for position in range(count)]
    if not held:
        raise DataError(
            f"the text given with --data fills {len(windows)} windows of {length} tokens, too few to hold any out; "
            "add text, or lower --length"
        )
    random.Random(seed).shuffle(order)
    (seen, places), (aside_ids, aside_places) = (
        [torch.stack(part) for part in zip(*w, strict=True)] for w in (windows, held)
    )
    return Mixture(seen, aside_ids, tuple(order), places if apart else None, aside_places if apart else None)
