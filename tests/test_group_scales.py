"""Groups of modules, and scales on them: counted by hand, and compared with what PEFT does at run time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_models import write_adapter
from stock_models import GROUPED, LAYERS, VARIANTS, leaves, raw_config, tokens

from loram.adapter import load_adapter
from loram.families import family_of
from loram.group_scales import NAMES, Groups
from loram.modeling import load_model

THIRD = {0: "first", 1: "middle", 2: "last"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")


def groups_of(folder: Path) -> Groups:
    family = family_of(raw_config(folder))
    return Groups(family, LAYERS)


def by_hand(module: str) -> str | None:
    if ".layers." not in module:
        return None
    part = "attention" if module.rpartition(".")[2] in ATTENTION else "mlp"
    return f"{part}.{THIRD[int(module.split('.')[2])]}"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_module_is_in_the_group_that_its_name_says(name: str, stock: Callable[[str], Path]) -> None:
    groups = groups_of(stock(name))
    modules = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in parts(name)]
    for module in [*modules, "model.embed_tokens", "lm_head"]:
        assert groups.of(module) == by_hand(module), module


def parts(name: str) -> list[str]:
    return [f"{'self_attn' if leaf in ATTENTION else 'mlp'}.{leaf}" for leaf in leaves(name)]


@pytest.mark.parametrize(("layers", "sizes"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (4, [2, 1, 1]), (30, [10, 10, 10])])
def test_thirds_of_the_depth(layers: int, sizes: list[int], stock: Callable[[str], Path]) -> None:
    groups = Groups(groups_of(stock("llama-gqa")).family, layers)
    found = [groups.of(f"model.layers.{layer}.mlp.up_proj") for layer in range(layers)]
    assert [found.count(f"mlp.{third}") for third in THIRD.values()] == sizes


@pytest.mark.parametrize("name", GROUPED)
def test_folded_into_b_is_what_peft_scales_at_run_time(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    """With powers of two to the last bit, with other numbers up to rounding."""
    large = stock(name)
    folder = write_adapter(large, tmp_path / "adapter", [*leaves(name)], 3)
    adapter, groups = load_adapter(folder), groups_of(large)
    assert groups.present(adapter) == NAMES
    for scales, gap in (([2.0, 1, 0.5, 4, 0.25, 1], 0.0), ([0.3, 1.7, 1, 0.9, 0, 2.2], 1e-5)):
        named = dict(zip(NAMES, scales, strict=True))
        folded = groups.scaled(adapter, named)
        folded.save(tmp_path / "folded", "x") if (tmp_path / "folded").is_dir() else save(folded, tmp_path / "folded")
        expected = at_run_time(large, folder, {module: named[groups.of(module) or ""] for module in adapter.pairs})
        found = logits(PeftModel.from_pretrained(load_model(large, dtype="fp32"), str(tmp_path / "folded")))
        assert ((found - expected).abs().max() / expected.abs().max()).item() <= gap


def save(adapter: Any, folder: Path) -> None:
    folder.mkdir()
    adapter.save(folder, "x")


def at_run_time(large: Path, adapter: Path, scales: dict[str, float]) -> torch.Tensor:
    model: Any = PeftModel.from_pretrained(load_model(large, dtype="fp32"), str(adapter))
    for module, scale in scales.items():
        model.get_base_model().get_submodule(module).scaling["default"] *= scale
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens(4), use_cache=False).logits
    return found


def test_ones_leave_the_bits_and_norms_are_multiplied(stock: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(stock("llama-gqa"), tmp_path / "a", ["q_proj", "down_proj", "lm_head"], 1))
    groups = groups_of(stock("llama-gqa"))
    same = groups.scaled(adapter, dict.fromkeys(NAMES, 1.0))
    assert all(same.pairs[module].b is pair.b for module, pair in adapter.pairs.items())
    changed = groups.scaled(adapter, {"mlp.last": 3.0})
    before, after = groups.norms(adapter), groups.norms(changed)
    assert after == {**before, "mlp.last": pytest.approx(3 * before["mlp.last"])}
    assert set(before) == set(NAMES)
    assert torch.equal(changed.pairs["lm_head"].b, adapter.pairs["lm_head"].b)
    down = adapter.pairs["model.layers.2.mlp.down_proj"]
    assert before["mlp.last"] == pytest.approx(float((down.scale * down.b).norm()))
