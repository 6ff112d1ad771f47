"""Whether a large model's files hold what its config promises. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loram.errors import CheckpointError, FamilyError, KindError
from loram.families import Family
from loram.stored import CODES, StoredModel

IGNORED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def refuse_quantized(model: str, config: Mapping[str, Any]) -> None:
    """KindError for a model that cannot be pruned because it is in few bits."""
    if config.get("quantization_config"):
        raise KindError(f"{model} is quantized; pruning needs the 16-bit original: give that")


def check_tensors(checkpoint: StoredModel, family: Family) -> None:
    """Every tensor that the config promises is there in the declared shape, and no other is."""
    config = checkpoint.config
    refuse_quantized(str(checkpoint.folder), config)
    geometry = family.geometry(config)
    declared: set[str] = set()
    for name, dimensions, _ in family.tensors(config):
        shape = tuple(sum(geometry.size(s.count) * geometry.size(s.width) for s in d) for d in dimensions)
        entry = checkpoint.entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {entry.shape}, config.json says {shape}; "
                "the two do not belong together"
            )
        if not entry.is_float:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored as {CODES[entry.code][0]}; give the 16-bit original"
            )
        declared.add(name)
    extra = [n for n in checkpoint.entries if n not in declared and not n.endswith(IGNORED)]
    if geometry.tied:
        extra = [name for name in extra if name != f"{family.head.name}.weight"]
    if extra:
        raise FamilyError(
            f"{checkpoint.folder} holds {extra[0]}, which the {family.name} family does not have; "
            "loram cannot tell how to cut it"
        )
