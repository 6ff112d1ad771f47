"""Do the rows of a pack stay apart in this very model? Tried on a few tokens, before any of the user's are spent.

Families and attention kernels differ, and so do their versions: flash attention, for one, keeps packs apart only in
batches of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loram.data.collate import collate_packs
from loram.data.encoding import EncodedRow
from loram.errors import OptionError

LEAK = 1e-5
"""What other tokens in the pack may change, relative to the largest number: nothing, up to the order of sums."""
DRIFT = {torch.float32: 1e-3}
"""The same between a row in a pack and the row alone, where the kernels differ; 0.1 in 16 bits."""
CHANGING = ("dynamic", "longrope")


def refuse_leaks(model: Any, longest: int) -> None:
    """OptionError with the reason where a row's outputs would depend on what else is in its pack.

    `longest` is the number of tokens in the longest row.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    limit = changes_beyond(inner.config)
    if limit is not None and longest > limit:
        raise OptionError(
            f"--packing: this model turns positions differently once a batch holds a row of more than {limit} tokens "
            f"(the longest has {longest}), so short rows would depend on the long ones beside them; "
            f"set --max-length {limit}, or leave --packing out"
        )
    try:
        leak, drift = leaks(inner)
    except TypeError as error:
        raise OptionError(f"--packing: the model takes no position_ids ({error}); leave --packing out") from error
    dtype = inner.get_input_embeddings().weight.dtype
    if leak > LEAK or drift > DRIFT.get(dtype, 0.1):
        kind = getattr(inner.config, "_attn_implementation", "this")
        raise OptionError(
            f"--packing: {type(inner).__name__} with {kind} attention does not keep the rows of a pack apart "
            f"(outputs move by {max(leak, drift):.1e}); leave --packing out"
        )


def changes_beyond(config: Any) -> int | None:
    """From which length on the rotary embedding depends on the longest row of a batch; None if it never does."""
    found = getattr(config, "rope_parameters", None) or {}
    for part in [value for value in found.values() if isinstance(value, dict)] or [found]:
        if part.get("rope_type") in CHANGING:
            own = part.get("original_max_position_embeddings")
            limit = own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            return int(limit)
    return None


def leaks(model: Any) -> tuple[float, float]:
    """How far a row's outputs move when the row before it changes, and when it is alone; relative to the largest."""
    draw = torch.Generator().manual_seed(0)

    def row(length: int) -> EncodedRow:
        ids = torch.randint(0, int(model.config.vocab_size), (length,), generator=draw).tolist()
        return EncodedRow(input_ids=ids, loss_mask=[False] * length)

    first, other, watched, beside = row(7), row(7), row(6), row(13)
    with measuring(model):
        packed = outputs(model, [[first, watched], [beside]])[0, 7:]
        changed = outputs(model, [[other, watched], [beside]])[0, 7:]
        alone = outputs(model, [[watched]])[0]
    scale = alone.abs().max()
    return float((packed - changed).abs().max() / scale), float((packed - alone).abs().max() / scale)


def outputs(model: Any, packs: list[list[EncodedRow]]) -> torch.Tensor:
    """The decoder's last hidden states, in fp32."""
    device = model.get_input_embeddings().weight.device
    batch = {name: tensor.to(device) for name, tensor in collate_packs(packs).items() if name != "labels"}
    found: torch.Tensor = model.get_decoder()(**batch, use_cache=False)[0]
    return found.float()


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Without dropout and gradients while the block runs."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
