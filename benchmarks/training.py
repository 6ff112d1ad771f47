"""Steps of loram's training loop on random tokens, and the floating-point operations that a step has."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from loram.families import family_of
from loram.families.widths import Widths
from loram.progress import Progress
from loram.sizes import count, lora_parameters

RANK = 8


class StepClock(Progress):
    """CPU and wall time at the end of every step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def advance(self, amount: int = 1, **figures: float) -> None:
        """A step is done."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())


def train_steps(folder: str, steps: int, batch: int, length: int, scratch: Path) -> dict[str, Any]:
    """Median seconds of a step, without the first: it warms up."""
    import torch

    from loram.data.encoding import EncodedRow
    from loram.device import resolve_dtype
    from loram.modeling import load_model
    from loram.options import TrainOptions
    from loram.training.loop import fit
    from loram.training.lora import wrap

    options = TrainOptions(
        model=folder, steps=steps, batch=batch, max_length=length, rank=RANK, log_every=1, warmup=0.0, out=str(scratch)
    )
    dtype = resolve_dtype(options.dtype)
    model = wrap(load_model(folder, dtype=dtype), options)
    tokens = torch.randint(model.config.vocab_size, (batch * steps, length), generator=torch.Generator().manual_seed(2))
    mask = [False, *[True] * (length - 1)]
    rows = [EncodedRow(input_ids=row, loss_mask=mask) for row in tokens.tolist()]
    scratch.mkdir(exist_ok=True)
    clock = StepClock()
    fit(model, rows, options, scratch, clock)
    shutil.rmtree(scratch)
    return {"cpu_step": per_step(clock.cpu), "wall_step": per_step(clock.wall), "dtype": dtype}


def per_step(times: list[float]) -> float:
    """The median difference between neighbors."""
    return median(after - before for before, after in pairwise(times))


def step_flops(config: Mapping[str, Any], length: int, rank: int = RANK) -> int:
    """Operations per token of a LoRA step: 4 per frozen weight (forward, and backward to its input; the head
    included), 6 per LoRA weight, and attention's products in full, three times (forward and backward)."""
    family = family_of(config)
    geometry = family.geometry(config)
    recorded = config.get("loram_widths")
    widths = Widths(**{axis: tuple(kept) for axis, kept in recorded.items()}) if recorded else None
    kv_heads = widths.kv_heads if widths else (geometry.kv_heads,) * geometry.layers
    frozen = count(config, widths).linear + geometry.vocab * geometry.hidden
    attention = sum(heads * geometry.group for heads in kv_heads) * 4 * length * 3
    return 4 * frozen + 6 * lora_parameters(config, rank, ("all-linear",), widths) + attention
