"""How much memory `prune` needs at its peak where it sends calibration text through the model, by part.

No torch. One block is in memory at a time (`loram.blockwise`); beside it is, in turn, what goes through it, its
gradients, and what solving for its new weights takes. The peak is the largest of these moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loram.activations import chunk_rows
from loram.families import Geometry, family_of
from loram.memory_model import HIDDEN_MEMORY, MIB, ROWS, MemoryPlan
from loram.sizes import count

RUNTIME = 430 * MIB
"""What a process holds that has imported transformers and has read the text, before any block (measured, on a CPU)."""
REFITTED = 512
"""Rows of a weight that are refitted at a time; fewer take longer in all."""


@dataclass(frozen=True)
class Calibration:
    """A pass of `samples` windows of `length` tokens, and what it is to find; a value takes `value_bytes`.

    `kept`: of down's input features, those that stay and are refitted (None: no refit). `gradients`: those of Taylor.
    `hessians`: second moments of every Linear's input, as SparseGPT solves with. `gaps`: what down lacks where layers
    are dropped.
    """

    samples: int
    length: int
    value_bytes: int = 2
    kept: int | None = None
    gradients: bool = False
    hessians: bool = False
    gaps: bool = False


def calibrated_memory(config: Mapping[str, Any], work: Calibration) -> MemoryPlan:
    """Peak of a calibrated `prune`; compared with measured peaks in docs/benchmarks.md."""
    geometry = family_of(config).geometry(config)
    states = samples_bytes(geometry, work)
    pair = states * (2 if work.gradients or work.gaps else 1)
    # Beyond the limit they are in a file. Where two are needed, that is the second one; Taylor's first is gone by then.
    held = pair if pair <= HIDDEN_MEMORY else states if work.gaps and states <= HIDDEN_MEMORY else 0
    always = {"runtime": RUNTIME, "hidden states": held}
    return MemoryPlan(always | max(moments_of(config, geometry, work), key=lambda parts: sum(parts.values())))


def samples_bytes(geometry: Geometry, work: Calibration) -> int:
    """The hidden states of all windows between two blocks."""
    return work.samples * work.length * geometry.hidden * work.value_bytes


def moments_of(config: Mapping[str, Any], geometry: Geometry, work: Calibration) -> Iterator[dict[str, int]]:
    """What is there beside the hidden states, moment by moment."""
    linear = count(config).linear // geometry.layers
    block = {"block": linear * work.value_bytes}
    squares = {"second moments": observed_bytes(geometry, work)}
    rows = min(ROWS, work.samples) * work.length
    widths = 3 * geometry.mlp + 4 * geometry.hidden
    yield block | squares | {"activations": rows * (widths * work.value_bytes + geometry.mlp * 4)}
    yield block | squares | {"solver": solver_bytes(geometry, work)}
    if work.gradients:
        kept = rows * (2 * widths * work.value_bytes + geometry.hidden * 16)
        yield block | squares | {"gradients": linear * (4 + work.value_bytes), "activations": kept}
        logits = min(rows, chunk_rows(geometry.vocab)) * geometry.vocab * 4 * 2
        yield {"head": geometry.vocab * geometry.hidden * work.value_bytes, "logits and loss": logits}


def observed_bytes(geometry: Geometry, work: Calibration) -> int:
    """Second moments of the inputs of o and down (refit), of all Linears (SparseGPT), or of down where a gap begins."""
    queries = geometry.heads * geometry.head_dim
    if work.gaps:
        return geometry.mlp**2 * 8
    if work.hessians:
        return (geometry.mlp**2 + queries**2 + 2 * geometry.hidden**2) * 4
    return 0 if work.kept is None else (geometry.mlp**2 + queries**2) * 4


def solver_bytes(geometry: Geometry, work: Calibration) -> int:
    """What solving for the weights of down takes beside what was observed of its input."""
    mlp, hidden = geometry.mlp, geometry.hidden
    if work.gaps:  # what the output lacks, a copy of the moment with its factor, and the new weight: in fp64
        return mlp**2 * 8 * 2 + mlp * hidden * 8 * 3
    if work.hessians:  # the factor, the inverse, and what its halves are multiplied with; then it, weights and marks
        return max(mlp**2 * 10, mlp**2 * 4 + mlp * hidden * 10)
    if work.kept is None:
        return 0
    # Of the moment, in fp64, the kept part and its factor; what the rest shares with it; right-hand sides of some rows.
    rows = min(hidden, REFITTED)
    return work.kept**2 * 8 * 2 + (mlp - work.kept) * work.kept * 4 + rows * (mlp * 8 + work.kept * 8 * 4)
