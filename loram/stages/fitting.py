"""Whether a training fits: what it will take, a warning before it starts, and advice where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from loram.activations import Workload
from loram.advice import Training, sentence
from loram.artifact import Manifest
from loram.checkpoint import BY_FLAG, FLOATS, Checkpoint
from loram.data.encoding import EncodedRow
from loram.device import resolve_dtype
from loram.errors import LoramError, OutOfMemory, is_out_of_memory
from loram.families import family_of
from loram.families.small import WIDTHS_KEY
from loram.families.widths import Cut, Widths, parse_ratio
from loram.memory import available_bytes, format_bytes, resident_bytes
from loram.memory_model import CPU, CUDA, MemoryPlan, Model, training_memory
from loram.options import TrainOptions
from loram.stages.masking import is_masked
from loram.train_options import may_be_streamed, parse_layers

logger = logging.getLogger(__name__)
NAMES = {dtype: name for name, dtype in BY_FLAG.items()}
DEEPER = Fraction(1, 2)
"""Of what a cut has left, the share that the deeper one leaves."""


def training_of(options: TrainOptions, folder: Path, small: Manifest | None, rows: Sequence[EncodedRow]) -> Training:
    """The training that these options and rows come to, for the memory model."""
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.config
        stored = stored_dtype(checkpoint)
    model = Model(config, recorded_widths(config), quantized_type(config), stored)
    return Training(
        model,
        replace(
            workload_of(options, rows, str(config.get("attn_implementation") or "sdpa")),
            masked_update=is_masked(options, small),
        ),
        CUDA if torch.cuda.is_available() else CPU,
        options.model,
        options.accumulate,
        deeper_cut(model, small),
        may_be_streamed(options),
    )


def workload_of(options: TrainOptions, rows: Sequence[EncodedRow], attention: str) -> Workload:
    """What a step does at most: as many rows as fit a batch, padded to the longest of all."""
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    carrying = sorted((sum(row["loss_mask"]) for row in rows), reverse=True)
    batch = min(options.batch, len(rows))
    length = min(options.max_length, sum(lengths)) if options.packing else lengths[0]
    return Workload(
        batch=batch,
        length=length,
        rank=options.rank,
        targets=options.targets,
        dtype=resolve_dtype(options.dtype),
        checkpointing=options.checkpointing or options.streamed,
        dropout=options.dropout,
        optimizer=options.optimizer,
        frozen_a=options.lora_fa,
        masked=options.packing or (batch > 1 and lengths[0] != lengths[-1]),
        attention=attention,
        layers=tuple(parse_layers(options.layers)),
        supervised=None if options.packing else sum(carrying[:batch]),
        streamed=options.streamed,
    )


def recorded_widths(config: Mapping[str, Any]) -> Widths | None:
    """The widths of a small model whose layers differ; None where the config's own sizes are all there is."""
    recorded = config.get(WIDTHS_KEY)
    return Widths(**{axis: tuple(kept) for axis, kept in recorded.items()}) if recorded else None


def quantized_type(config: Mapping[str, Any]) -> str:
    """none, nf4 or int8."""
    section = config.get("quantization_config")
    if not isinstance(section, Mapping):
        return "none"
    return "int8" if section.get("load_in_8bit") else "nf4"


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the unquantized weights are stored in."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in FLOATS:
            name = NAMES.get(entry.dtype, "fp32")
            sizes[name] = sizes.get(name, 0) + entry.end - entry.start
    return max(sizes, key=lambda name: sizes[name], default="bf16")


def deeper_cut(model: Model, small: Manifest | None) -> tuple[Model, str] | None:
    """A small model cut as this one was, deeper, and what to type; None where it is not known how it was cut."""
    options = {} if small is None else small.options
    if model.widths is None or "ratio" not in options:
        return None
    geometry = family_of(model.config).geometry(model.config)
    ratio = 1 - (1 - parse_ratio(options["ratio"])) * DEEPER
    try:
        cut = Cut(ratio, int(options["keep_first"]), int(options["keep_last"]), int(options["round_to"]))
        widths = cut.widths(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.mlp)
    except (LoramError, KeyError):
        return None
    changed = Model(model.config, widths, model.quantize, model.stored)
    return changed, f"`loram prune LARGE --ratio {float(ratio):g} …` and training on that"


def predicted(training: Training) -> int:
    """The peak as `train` will measure it: torch's count on a GPU, else the process's."""
    plan = memory_plan(training)
    return plan.allocated if training.hardware is CUDA else plan.total


def memory_plan(training: Training) -> MemoryPlan:
    """The prediction by part."""
    return training_memory(training.model, training.work, training.hardware)


def limit_bytes(training: Training) -> int:
    """The most this process may come to hold."""
    if training.hardware is CUDA:
        return int(torch.cuda.mem_get_info()[0])
    return resident_bytes() + available_bytes()


def warn(training: Training) -> None:
    """Say so before hours are spent on a training that is not likely to fit; it may still be tried."""
    limit, peak = limit_bytes(training), training.peak
    if peak > limit:
        logger.warning(
            "this training is predicted to take %s and %s can be had: it is likely to run out of memory; %s",
            format_bytes(peak),
            format_bytes(limit),
            sentence(training, limit),
        )


@contextmanager
def advised(training: Training) -> Iterator[None]:
    """Where memory runs out in the block, OutOfMemory with the cheapest changes and what each saves."""
    limit = limit_bytes(training)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = str(error) if isinstance(error, OutOfMemory) else "out of memory while the model was loaded"
        raise OutOfMemory(
            f"{where}: predicted {format_bytes(training.peak)}, and {format_bytes(limit)} could be had; "
            + sentence(training, min(limit, training.peak - 1))
        ) from error
