"""The config of a small model: stock where all layers are alike, ours where they are not. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loram.families import SMALL_PREFIX, Dimension, Geometry, family_of, is_small_config
from loram.families.family import BIASES_KEY
from loram.families.widths import Widths

WIDTHS_KEY = "loram_widths"


def small_config(config: Mapping[str, Any], widths: Widths, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """The raw config of the small model: stock where all layers are alike, else ours with widths per layer.

    `layers`: the kept ones, where some were dropped; `widths` speaks of these. See `with_biases` for what o and down
    may have besides.
    """
    family = family_of(config)
    geometry = family.geometry(config)
    small = dict(config) if layers is None else without_layers(config, layers)
    model_type = str(config["model_type"]).removeprefix(SMALL_PREFIX)
    small.pop(WIDTHS_KEY, None)
    if widths.uniform and not small.get(BIASES_KEY):
        if is_small_config(config):
            small |= {"model_type": model_type, "architectures": [family.model_class]}
        small["head_dim"] = geometry.head_dim
        small["num_key_value_heads"] = widths.kv_heads[0]
        small["num_attention_heads"] = widths.kv_heads[0] * (geometry.heads // geometry.kv_heads)
        small["intermediate_size"] = widths.mlp[0]
        return small
    small["model_type"] = f"{SMALL_PREFIX}{model_type}"
    small["architectures"] = [f"Loram{family.model_class}"]
    small[WIDTHS_KEY] = {"kv_heads": list(widths.kv_heads), "mlp": list(widths.mlp)}
    return small


def with_biases(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    """The config of a model whose o and down have a bias in every layer where their input is cut (FLAP, 2312.11983).

    Where the architecture gives them one anyway, nothing is added, and a stock config stays one.
    """
    family = family_of(config)
    geometry = family.geometry(config)
    found = {
        weight.name: [layer for layer in range(geometry.layers) if is_cut(weight.columns, geometry, widths, layer)]
        for weight in family.outputs
        if not weight.has_bias(config)
    }
    biases = {name: layers for name, layers in found.items() if layers}
    return {**config, BIASES_KEY: biases} if biases else dict(config)


def is_cut(segments: Dimension, geometry: Geometry, widths: Widths, layer: int) -> bool:
    """Whether a dimension of a layer is smaller at these widths."""
    return any(
        segment.axis is not None and getattr(widths, segment.axis)[layer] < geometry.size(segment.axis)
        for segment in segments
    )


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


def stored_widths(config: Mapping[str, Any]) -> Widths:
    """The widths of every layer of a model, large or small, as its raw config states them."""
    geometry = family_of(config).geometry(config)
    if not is_small_config(config):
        return Widths((geometry.kv_heads,) * geometry.layers, (geometry.mlp,) * geometry.layers)
    return Widths(**{axis: tuple(counts) for axis, counts in config[WIDTHS_KEY].items()})
