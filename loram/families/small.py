"""The config of a small model: stock where all layers are alike, ours where they are not. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loram.families import SMALL_PREFIX, family_of
from loram.families.widths import Widths

WIDTHS_KEY = "loram_widths"


def small_config(config: Mapping[str, Any], widths: Widths, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """The raw config of the small model: stock where all layers are alike, else ours with widths per layer.

    `layers`: the kept ones, where some were dropped; `widths` speaks of these.
    """
    family = family_of(config)
    geometry = family.geometry(config)
    small = dict(config) if layers is None else without_layers(config, layers)
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


def without_layers(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A raw config of the kept layers only: their count, and every list that has an entry per layer.

    What a stock class derives from layer numbers (gemma3's layer_types) must be spelled out in `config` beforehand.
    """
    count = int(config["num_hidden_layers"])
    small = dict(config)
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            small[key] = [value[number] for number in kept]
    small["num_hidden_layers"] = len(kept)
    return small
