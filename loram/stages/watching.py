"""What train measures meanwhile: the held-out loss of what it trains and, recovered on the fly, of the large model.

The large model is loaded at the first measurement and stays; where it does not fit, it is measured block by block.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loram.adapter import load_adapter
from loram.advice import Training
from loram.artifact import Manifest
from loram.data.encoding import EncodedRow, encode
from loram.data.sources import read_sources
from loram.device import place, resolve_dtype
from loram.errors import InputError, OptionError
from loram.evaluation.losses import measure, summarize
from loram.evaluation.room import whole_bytes
from loram.evaluation.streamed import StreamedModel
from loram.evaluation.subjects import attach
from loram.memory import format_bytes
from loram.modeling import load_model
from loram.options import TrainOptions
from loram.pruning_map import PruningMap, read_map
from loram.stages.fitting import limit_bytes
from loram.stages.lineage import check_base, find_large
from loram.stages.recover import recover_adapter
from loram.training.lora import save_adapter
from loram.training.processes import done_by_writer
from loram.training.watching import LARGE_LOSS, SMALL_LOSS, Measure, Watch

logger = logging.getLogger(__name__)


def held_out(
    options: TrainOptions, rows: list[EncodedRow], tokenizer: Any, max_length: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """(training rows, held-out rows): from --eval-data, or split off by the seed, or none."""
    if options.eval_data:
        sources = read_sources(options.eval_data, options.columns, options.system)
        held, summary = encode(sources, tokenizer, max_length, long=options.long)
        logger.info("held out: %s", summary)
        return rows, held
    if not options.eval_split:
        return rows, []
    share = options.eval_split
    # A row that is there twice (FILE=2 makes it so) must not be on both sides.
    distinct = list(dict.fromkeys(tuple(row["input_ids"]) for row in rows))
    count = round(share * len(distinct)) if share < 1 else int(share)
    if not 0 < count < len(distinct):
        raise OptionError(f"--eval-split {share:g} of {len(distinct)} rows leaves none on one side; give another share")
    numbers = sorted(random.Random(options.seed).sample(range(len(distinct)), count))
    chosen = {distinct[number] for number in numbers}
    logger.info("held out: %d of %d rows", count, len(distinct))
    seen = {tuple(row["input_ids"]): row for row in rows}
    kept = [row for row in rows if tuple(row["input_ids"]) not in chosen]
    return kept, [seen[distinct[number]] for number in numbers]


def watch_of(
    options: TrainOptions, held: list[EncodedRow], folder: Path, small: Manifest | None, training: Training
) -> Watch:
    """The measures that the options ask for."""
    if not held:
        return Watch()
    measures = [Measure(SMALL_LOSS, options.eval_every, lambda model: loss_of(model, held, options.batch))]
    if options.recover_eval:
        if small is None:
            raise OptionError(
                "--recover-eval is about small models; of a plain one the held-out loss says it all: leave it out"
            )
        large = large_model(options, held, folder, small, training)
        measures.append(Measure(LARGE_LOSS, options.recover_eval, large))
    return Watch(tuple(measures), options.patience, LARGE_LOSS if options.stop_on == "large" else SMALL_LOSS)


def loss_of(model: Any, rows: list[EncodedRow], batch: int) -> float:
    """The held-out loss of a model as it stands."""
    return summarize(measure(model, rows, batch)).mean


@dataclass
class LargeModel:
    """Measures the large model with what the small one's adapter has become; `whole` is None until it is loaded."""

    folder: Path
    pruning_map: PruningMap
    rows: list[EncodedRow]
    batch: int
    dtype: str
    fits: bool
    whole: Any = field(default=None)

    def __call__(self, model: Any) -> float:
        """Recover, attach, measure, detach."""
        # Loading and attaching draw random numbers for weights that are overwritten; training must not notice.
        with TemporaryDirectory() as scratch, torch.random.fork_rng():
            save_adapter(model, Path(scratch), "small")
            recovered = recover_adapter(load_adapter(scratch), self.pruning_map, "the adapter in training").portable()
            if not self.fits:
                streamed = StreamedModel(self.folder, self.batch, self.dtype)
                return summarize(streamed.measure(self.rows, recovered)).mean
            if self.whole is None:
                self.whole = place(load_model(self.folder, dtype=self.dtype))
            recovered.save(scratch, "large")
            adapted = attach(self.whole, Path(scratch))
        loss = loss_of(adapted, self.rows, self.batch)
        self.whole = adapted.unload()
        return loss


def large_model(
    options: TrainOptions, held: list[EncodedRow], folder: Path, small: Manifest, training: Training
) -> LargeModel:
    """The measure of the large model: whole where it fits beside the training, block by block where it does not."""
    found = find_large(folder, small, None)
    if found is None or small.base is None:
        raise InputError(
            f"--recover-eval: the large model that {folder} was cut from is not there; leave the option out"
        )
    check_base(small.base, found)
    dtype = resolve_dtype(options.dtype)
    needed = whole_bytes(found, held, options.batch, dtype) or 0
    free = limit_bytes(training) - training.peak
    fits = bool(done_by_writer(lambda: needed <= free))
    if not fits:
        logger.info(
            "--recover-eval: the large model takes %s, and beside the training %s are free: its loss is measured block "
            "by block, every weight read once each time",
            format_bytes(needed),
            format_bytes(max(0, free)),
        )
    return LargeModel(found, read_map(folder), held, options.batch, dtype, fits)
