"""Fewer bits per weight, in bitsandbytes' own serialized formats, which stock transformers reads.

A storage turns the rows of one weight into the tensors that stand for it, as a stream. To add one: a file with a
`Storage`, and a line in STORAGES.
"""

from __future__ import annotations

from loram.quantization.int8 import INT8
from loram.quantization.nf4 import NF4
from loram.quantization.storage import Storage

__all__ = ["STORAGES", "Storage"]

STORAGES: dict[str, Storage] = {"nf4": NF4, "int8": INT8}
