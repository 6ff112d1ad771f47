"""The config of a small model: stock where all layers are alike, ours where they are not. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loram.families import SMALL_PREFIX, family_of
from loram.families.widths import Widths

WIDTHS_KEY = "loram_widths"


def small_config(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    """The raw config of the small model: stock where all layers are alike, else ours with widths per layer."""
    family = family_of(config)
    geometry = family.geometry(config)
    small = dict(config)
    if widths.uniform:
        small["head_dim"] = geometry.head_dim
        small["num_key_value_heads"] = widths.kv_heads[0]
        small["num_attention_heads"] = widths.kv_heads[0] * (geometry.heads // geometry.kv_heads)
        small["intermediate_size"] = widths.mlp[0]
        return small
    model_type = str(config["model_type"])
    small["model_type"] = f"{SMALL_PREFIX}{model_type}"
    small["architectures"] = [f"Loram{family.model_class}"]
    small[WIDTHS_KEY] = {"kv_heads": list(widths.kv_heads), "mlp": list(widths.mlp)}
    return small
