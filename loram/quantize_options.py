"""The options of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from loram.option_fields import WritingOptions, argument, option

TYPES = ("nf4", "int8")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(WritingOptions):
    """Store a small model (or a whole one, to train on it uncut) in 4 or 8 bit, once."""

    model: str = argument("Small model, or a plain one: folder or Hub id.")
    type: str = option("nf4", "nf4: 4 bit with double quantization, as in QLoRA; int8: LLM.int8().", choices=TYPES)
    base_id: str | None = option(None, "Hub id of a plain model, where its folder does not tell.")
    revision: str | None = option(None, "Branch, tag or commit of a plain model on the Hub (or write ID@REVISION).")
