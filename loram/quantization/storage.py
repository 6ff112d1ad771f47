"""What a storage is: the tensors that stand for a weight, known beforehand and then made as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loram.errors import OptionError
from loram.shards import TensorPlan

Stored = Iterator[tuple[TensorPlan, Tensor]]
"""The next piece of data with the tensor that it belongs to; the pieces of one tensor follow each other."""


@dataclass(frozen=True)
class Storage:
    """How the weights of Linears are stored.

    `plans(weight)`: the tensors that stand for a weight, each at its largest. `encode(weight, rows)`: the same tensors
    with their data, from the weight's rows (out, in) in order; MismatchError where one is not finite.
    `config(dtype)`: the `quantization_config` of a model whose other tensors have this dtype.
    """

    name: str
    plans: Callable[[TensorPlan], list[TensorPlan]]
    encode: Callable[[TensorPlan, Iterable[Tensor]], Stored]
    options: dict[str, Any]
    variable: str | None = None
    """How the names end of the tensors whose length is known only once they are made."""

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` as transformers writes it; computed in the dtype of the other tensors."""
        import transformers

        four_bit = {"bnb_4bit_compute_dtype": dtype} if self.options.get("load_in_4bit") else {}
        kind: Any = transformers.BitsAndBytesConfig
        body: dict[str, Any] = kind(**self.options, **four_bit).to_dict()
        return body


def bitsandbytes_functions() -> Any:
    """`bitsandbytes.functional`; OptionError that names the extra where it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise OptionError("4 and 8 bit need bitsandbytes; pip install 'loram[quant]'") from None
    return functional
