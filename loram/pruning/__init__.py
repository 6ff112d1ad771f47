"""Scores (one file each), selection, and solvers: pure functions over tensors.

To add a score: a file with a Score, and a line in SCORES (and its name in prune_options.SCORES).
"""

from __future__ import annotations

from loram.pruning.magnitude import MAGNITUDE
from loram.pruning.score import Score
from loram.pruning.taylor import TAYLOR
from loram.pruning.wanda import WANDA

SCORES: dict[str, Score] = {"wanda": WANDA, "magnitude": MAGNITUDE, "taylor": TAYLOR}
