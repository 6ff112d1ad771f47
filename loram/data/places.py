"""How data is named on the command line: `PATH`, `FOLDER@SPLIT`, `ORG/NAME:CONFIG@SPLIT`, each perhaps `=WEIGHT`.

What exists under its full name is taken whole, whatever signs are in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loram.errors import DataError, OptionError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """A file or folder, or a dataset on the Hub with its configuration; perhaps one split of it."""

    path: str
    config: str | None = None
    split: str | None = None

    @property
    def on_disk(self) -> bool:
        """Whether there is such a file or folder."""
        return Path(self.path).exists()

    def __str__(self) -> str:
        config = "" if self.config is None else f":{self.config}"
        return self.path + config + ("" if self.split is None else f"@{self.split}")


def split_weight(spec: str, option: str) -> tuple[str, float]:
    """`NAME=WEIGHT` as (name, weight); weight 1 where none is given."""
    name, separator, tail = spec.rpartition("=")
    if not separator or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return spec, 1.0
    if not name or not weight > 0 or not math.isfinite(weight):
        raise OptionError(f"{option} {spec!r} has the weight {tail}; expected FILE=WEIGHT with a positive weight")
    return name, weight


def parse_place(name: str) -> Place:
    """A name without its weight; DataError where it is neither on the disk nor a Hub id by its looks."""
    if Path(name).exists():
        return Place(name)
    rest, separator, split = name.rpartition("@")
    rest, split = (rest, split) if separator else (name, "")
    if separator and (not rest or not split):
        raise DataError(f"{name} names no split; expected e.g. FOLDER@test or openai/gsm8k:main@test")
    place = Place(rest, split=split or None)
    if place.on_disk:
        return place
    identifier, colon, config = rest.partition(":")
    if not looks_like_hub_id(identifier) or (colon and not config):
        raise DataError(f"{rest} does not exist; check the path")
    return Place(identifier, config or None, split or None)


def looks_like_hub_id(name: str) -> bool:
    """ORG/NAME without the ending of a data file."""
    endings = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
    return HUB_ID.fullmatch(name) is not None and not name.lower().endswith(endings)


def source_path(spec: str) -> str:
    """The file or folder that a spec means, without split and weight; a Hub dataset by its whole name."""
    name, _ = split_weight(spec, "--data")
    try:
        place = parse_place(name)
    except DataError:
        return name
    return place.path if place.on_disk else str(place)


def names_one_of(spec: str, others: Sequence[str]) -> bool:
    """Whether a spec means the same data as one of the others, however their paths are written."""
    return resolved(spec) in {resolved(other) for other in others}


def resolved(spec: str) -> str:
    """A spec without its weight, a path in it absolute; two that are equal mean the same data."""
    path = source_path(spec)
    split = split_weight(spec, "--data")[0].removeprefix(path)
    return (str(Path(path).resolve()) if Path(path).exists() else path) + split
