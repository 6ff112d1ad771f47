"""The rows of recover --calibrate: drawn from any data that `train` reads, halved, and kept apart from other rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.artifact import read_manifest, sha256_json
from loram.checkpoint import read_config
from loram.data.encoding import EncodedRow, Encoder, within_context
from loram.data.formats import Example
from loram.data.places import names_one_of
from loram.data.sources import Source, read_sources
from loram.errors import DataError
from loram.modeling import load_tokenizer
from loram.options import RecoverOptions
from loram.recover_options import FEWEST_ROWS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The encoded rows to choose on and those to check on, and a digest of the text of each."""

    choose: list[EncodedRow]
    check: list[EncodedRow]
    digests: list[str]


def warn_of_shared(options: RecoverOptions) -> None:
    """Say so where the rows are those that the adapter was trained on, or that its training was watched with."""
    trained = read_manifest(options.adapter)
    known = trained.options if trained is not None else {}
    for spec in options.calibrate:
        if names_one_of(spec, known.get("eval_data") or ()):
            logger.warning(
                "--calibrate %s is the held-out data of the training: scales chosen on it flatter every loss measured "
                "on it; report on other rows",
                spec,
            )
        if names_one_of(spec, known.get("data") or ()):
            logger.warning(
                "--calibrate %s is what the adapter was trained on: scales chosen on it tend to be too large; give "
                "held-out rows",
                spec,
            )


def read_rows(options: RecoverOptions, large: Path) -> Rows:
    """Distinct rows of all the data, drawn with the seed; DataError where there are too few that can be used."""
    sources = read_sources(options.calibrate, options.columns, options.system)
    tokenizer = load_tokenizer(large)
    length = within_context(options.max_length, read_config(large))
    distinct = {row_digest(row): row for source in sources for row in source.rows}
    digests = sorted(distinct)
    random.Random(options.seed).shuffle(digests)
    encoder = Encoder(tokenizer, length, drop_long=options.long == "drop")
    used: list[str] = []
    for digest in digests:
        if len(used) < options.calibrate_rows and encoder.add(distinct[digest]):
            used.append(digest)
    if len(used) < FEWEST_ROWS:
        raise DataError(
            f"--calibrate {', '.join(options.calibrate)} has {len(used)} rows with a token that carries loss within "
            f"--max-length {length}; {FEWEST_ROWS} are needed at least: give more"
        )
    if len(used) < options.calibrate_rows:
        logger.info("--calibrate: %d usable rows, fewer than --calibrate-rows %d", len(used), options.calibrate_rows)
    half = len(used) // 2
    return Rows(encoder.rows[:half], encoder.rows[half:], used)


def row_digest(row: Example) -> str:
    """Sixteen hex digits for what a row says, wherever it stands."""
    return sha256_json([row.text, row.prompt, row.completion, row.messages])[:16]


def overlap(sources: Sequence[Source], record: Mapping[str, Any] | None) -> int:
    """How many rows of these sources scales were chosen or checked on, by what a manifest records."""
    used = set((record or {}).get("rows", ()))
    return len(used & {row_digest(row) for source in sources for row in source.rows}) if used else 0
