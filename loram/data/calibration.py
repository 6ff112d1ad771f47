"""Calibration text: windows of tokens from several weighted sources.

Text is what `train` would see (prompt and completion with the same encoding), documents are shuffled
with the seed and laid end to end. Where a tokenizer begins every text with BOS, every window does too:
such models (Gemma) compute nonsense without it.
"""

from __future__ import annotations

import logging
import math
import random
from importlib import resources
from typing import Any

import torch

from loram.data.encoding import begins_with_bos, encode_example
from loram.data.places import split_weight
from loram.data.sources import Source, read_source
from loram.errors import DataError, OptionError

logger = logging.getLogger(__name__)
BUILTIN = "builtin"


def is_general(spec: str) -> bool:
    """Whether a source is the packaged general text, not a text of the user's."""
    return parse_spec(spec)[0] == BUILTIN


def parse_spec(spec: str) -> tuple[str, float]:
    """`NAME`, `NAME=WEIGHT` or `builtin[=WEIGHT]` as (name, weight); a path that exists is taken whole."""
    return split_weight(spec, "--calibration")


def shares(weights: list[float], total: int) -> list[int]:
    """`total` divided by weight in whole numbers that sum to it (largest remainder)."""
    exact = [weight * total / sum(weights) for weight in weights]
    whole = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for index in order[: total - sum(whole)]:
        whole[index] += 1
    return whole


def calibration_windows(
    sources: tuple[str, ...], tokenizer: Any, samples: int, length: int, seed: int, *, columns: str | None = None
) -> list[torch.Tensor]:
    """`samples` windows of `length` token ids, shared among the sources by their weights."""
    if not sources:
        raise OptionError("no calibration text was given; add --calibration FILE or --calibration builtin")
    parsed = [parse_spec(spec) for spec in sources]
    windows: list[torch.Tensor] = []
    for (path, _), count in zip(parsed, shares([weight for _, weight in parsed], samples), strict=True):
        if count:
            windows += source_windows(read_calibration(path, columns), tokenizer, count, length, seed)
    return windows


def read_calibration(path: str, columns: str | None = None) -> Source:
    """A source by path, or the packaged excerpt."""
    if path != BUILTIN:
        return read_source(path, columns)
    with resources.as_file(resources.files("loram.data") / "builtin.txt") as file:
        return read_source(file)


def source_windows(source: Source, tokenizer: Any, count: int, length: int, seed: int) -> list[torch.Tensor]:
    """`count` windows from one source, or as many as it fills, which is said; DataError where it fills none."""
    found = text_windows(source, tokenizer, count, length, seed)
    if len(found) < count:
        logger.warning(
            "calibration text %s fills %d windows of %d tokens, not %d; more text repairs the cut better",
            source.path,
            len(found),
            length,
            count,
        )
    return found


def text_windows(source: Source, tokenizer: Any, count: int, length: int, seed: int) -> list[torch.Tensor]:
    """At most `count` windows from one source; DataError where it holds too little text for one."""
    return [window for window, _ in placed_windows(source, tokenizer, count, length, seed)]


def placed_windows(
    source: Source, tokenizer: Any, count: int, length: int, seed: int, *, apart: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same with each token's place in its document, which begins anew with 0.

    `apart`: documents are to be kept apart, so each keeps the BOS that it begins with.
    """
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    body = length - len(bos)
    order = list(source.rows)
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    places: list[int] = []
    for example in order:
        if len(stream) >= count * body:
            break
        ids = encode_example(example, tokenizer)["input_ids"]
        own = ids if apart or ids[: len(bos)] != bos else ids[len(bos) :]
        stream += own
        places += range(len(own))
    enough = min(count, len(stream) // body)
    if not enough:
        raise DataError(
            f"calibration text {source.path} holds {len(stream)} tokens, less than one window of {length}; "
            "add text, or lower --length"
        )
    parts = [slice(body * i, body * (i + 1)) for i in range(enough)]
    ahead = [0] * len(bos)
    return [(torch.tensor(bos + stream[part]), torch.tensor(ahead + places[part])) for part in parts]
