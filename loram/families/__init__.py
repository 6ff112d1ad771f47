"""Families: which weight carries which axis on which dimension. Data, not code; no torch.

To add one: a file with a Family, a line in FAMILIES, and its stock class in tests/families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loram.errors import FamilyError
from loram.families.family import AXES, Dimension, Family, Geometry, Segment, Weight
from loram.families.gemma3 import GEMMA3
from loram.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from loram.families.phi3 import PHI3

__all__ = [
    "AXES",
    "FAMILIES",
    "Dimension",
    "Family",
    "Geometry",
    "Segment",
    "Weight",
    "family_of",
    "is_small_config",
]

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
}

EXPERTS = "a mixture of experts, whose 3-D expert weights have no axis here"
LATENT = "multi-head latent attention, whose heads share no kv rows"
REFUSED: dict[str, str] = {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "llama4": EXPERTS,
    "llama4_text": EXPERTS,
    "phimoe": EXPERTS,
    "olmoe": EXPERTS,
    "dbrx": EXPERTS,
    "granitemoe": EXPERTS,
    "glm4_moe": EXPERTS,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "gpt_oss": "a mixture of experts with per-head attention sinks",
    "gemma3": "the multimodal model; its text checkpoint has model_type gemma3_text",
    "falcon_h1": "a hybrid with per-head state-space parameters",
    "jamba": "a hybrid with experts and state-space layers",
    "qwen3_next": "a hybrid with experts and per-head linear attention parameters",
}
SMALL_PREFIX = "loram_"


def is_small_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a small model whose layers have different widths."""
    return str(config.get("model_type", "")).startswith(SMALL_PREFIX)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a raw config (also of a small model's); FamilyError for an architecture not in the tables."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError(f"config.json has no model_type; expected one of {', '.join(FAMILIES)}")
    known = model_type.removeprefix(SMALL_PREFIX)
    if known in FAMILIES:
        return FAMILIES[known]
    if known in REFUSED:
        raise FamilyError(
            f"model_type {known} is {REFUSED[known]}; loram cannot prune it yet. Families: {', '.join(FAMILIES)}"
        )
    raise FamilyError(f"model_type {known} is not in loram's tables; families: {', '.join(FAMILIES)}")
