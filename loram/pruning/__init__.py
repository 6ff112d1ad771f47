"""Scores (one file each), selection, and solvers: pure functions over tensors.

To add a score of heads and channels: a file with a Score, and a line in SCORES (and its name in
prune_options.UNIT_SCORES). Of single weights: a WeightScore, and a line in WEIGHT_SCORES (prune_options.WEIGHT_SCORES).
"""

from __future__ import annotations

from loram.pruning.flap import FLAP
from loram.pruning.magnitude import MAGNITUDE, MAGNITUDE_MASK
from loram.pruning.score import Score
from loram.pruning.sparsegpt import SPARSEGPT
from loram.pruning.taylor import TAYLOR
from loram.pruning.wanda import WANDA, WANDA_MASK
from loram.pruning.weight_score import WeightScore

SCORES: dict[str, Score] = {"wanda": WANDA, "magnitude": MAGNITUDE, "taylor": TAYLOR, "flap": FLAP}
WEIGHT_SCORES: dict[str, WeightScore] = {"wanda": WANDA_MASK, "magnitude": MAGNITUDE_MASK, "sparsegpt": SPARSEGPT}
