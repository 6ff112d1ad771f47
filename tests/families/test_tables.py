"""The tables against the stock classes: nothing missing, nothing invented, every size true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from stock_models import CLASSES, VARIANTS, leaves, make, raw_config
from torch import nn

from loram.errors import FamilyError
from loram.families import FAMILIES, REFUSED, family_of

SMALLEST = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    heads = {"num_key_value_heads": 1, "head_dim": 4}
    body = {"model_type": model_type, **SMALLEST, **heads, **changes}
    return {key: value for key, value in body.items() if value is not None}


def test_every_family_is_tested() -> None:
    assert set(CLASSES) == set(FAMILIES)
    assert {model_type for model_type, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_linear_and_no_other_is_in_the_table(name: str, stock: Callable[[str], Path]) -> None:
    model = make(name)
    family = family_of(raw_config(stock(name)))
    linears = {module for module, found in model.named_modules() if isinstance(found, nn.Linear)} - {"lm_head"}
    table = {family.module(layer, weight) for layer in range(3) for weight in family.linears}
    assert table == linears
    assert {weight.name.rpartition(".")[2] for weight in family.linears} == set(leaves(name))
    assert {weight.name.rpartition(".")[2] for weight in family.outputs} == {"o_proj", "down_proj"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_declared_tensor_has_the_stock_name_and_shape(name: str, stock: Callable[[str], Path]) -> None:
    config = raw_config(stock(name))
    family = family_of(config)
    geometry = family.geometry(config)
    declared = {
        tensor: tuple(sum(geometry.size(s.count) * geometry.size(s.width) for s in d) for d in dimensions)
        for tensor, dimensions, _ in family.tensors(config)
    }
    with safe_open(stock(name) / "model.safetensors", "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
    assert declared == stored


@pytest.mark.parametrize("name", VARIANTS)
def test_every_module_is_found_with_its_layer(name: str, stock: Callable[[str], Path]) -> None:
    config = raw_config(stock(name))
    family = family_of(config)
    for tensor, _, layer in family.tensors(config):
        weight, found = family.find(tensor.rpartition(".")[0])
        assert found == layer
        assert tensor.rpartition(".")[0].endswith(weight.name)
    for strange in ("model.layers.0.mlp.router", "model.layers.x.mlp.up_proj", "transformer.h.0.mlp.up_proj"):
        with pytest.raises(FamilyError, match="is not a module of"):
            family.find(strange)


def test_a_small_config_is_of_its_large_family() -> None:
    assert family_of({"model_type": "loram_qwen3"}) is FAMILIES["qwen3"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name_with_the_reason(model_type: str) -> None:
    with pytest.raises(FamilyError) as caught:
        family_of(config_of(model_type))
    assert f"model_type {model_type} is {REFUSED[model_type]}" in str(caught.value)
    for family in FAMILIES:
        assert family in str(caught.value)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_moe_latent_attention_and_sinks_are_among_the_refused(model_type: str) -> None:
    assert model_type in REFUSED


@pytest.mark.parametrize("model_type", ["bloom", "loram_bloom", "", None, 3])
def test_an_unknown_model_type_lists_the_families(model_type: Any) -> None:
    with pytest.raises(FamilyError) as caught:
        family_of({"model_type": model_type})
    for family in FAMILIES:
        assert family in str(caught.value)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", SMALLEST)
@pytest.mark.parametrize("value", [None, 0, -1, "8", 8.0, True])
def test_a_missing_or_impossible_size_is_named(model_type: str, key: str, value: Any) -> None:
    config = config_of(model_type, **{key: value})
    with pytest.raises(FamilyError, match=f"config.json: {key} is"):
        family_of(config).geometry(config)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        *[(name, "num_key_value_heads") for name in ("mistral", "qwen2", "qwen3", "gemma3_text")],
        *[(name, "head_dim") for name in ("qwen3", "gemma3_text")],
    ],
)
def test_a_count_that_transformers_would_silently_fill_in_is_required(model_type: str, key: str) -> None:
    """Left out, the stock class takes 8 or 32 heads, or 128 or 256 rows a head, whatever the tensors say."""
    config = config_of(model_type, **{key: None})
    with pytest.raises(FamilyError, match=f"{key} is missing"):
        family_of(config).geometry(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 attention heads are not a multiple of 2"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None}, "8 is not a multiple of 3 heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"num_key_value_heads": -1}, "num_key_value_heads"),
        ({"head_dim": -4}, "head_dim"),
        ({"head_dim": 4.5}, "head_dim"),
    ],
)
def test_contradicting_counts_are_refused(changes: dict[str, Any], message: str) -> None:
    config = config_of("llama", **changes)
    with pytest.raises(FamilyError, match=message):
        family_of(config).geometry(config)


def test_optional_counts_have_the_stock_defaults() -> None:
    geometry = FAMILIES["llama"].geometry(config_of("llama", num_key_value_heads=None, head_dim=None))
    assert (geometry.kv_heads, geometry.head_dim, geometry.group) == (2, 4, 4)
    assert not geometry.tied
    assert FAMILIES["gemma3_text"].geometry(config_of("gemma3_text")).tied
