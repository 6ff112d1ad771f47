"""Dropped layers, and masks: the LoRAM identity with stock transformers and peft as oracle, and adapters' numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, VARIANTS, leaves, make, random_kept, raw_config, tokens, zero_pruned
from torch import Tensor
from transformers import AutoModelForCausalLM

from loram.errors import MismatchError
from loram.modeling import load_small
from loram.options import ProjectOptions, RecoverOptions, VerifyOptions
from loram.stages.project import project
from loram.stages.recover import recover
from loram.stages.verify import verify

WEIGHTS = "adapter_model.safetensors"


def without(state: dict[str, Tensor], dropped: tuple[int, ...]) -> dict[str, Tensor]:
    """The stock model's tensors with o and down (and their biases) zero in these layers."""
    found = {}
    for name, value in state.items():
        match = re.match(r"model\.layers\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)\.", name)
        found[name] = torch.zeros_like(value) if match and int(match[1]) in dropped else value
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens(9), use_cache=False).logits
    return found


def gap(left: Tensor, right: Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cut", [False, True], ids=["depth", "depth and axes"])
def test_identity(name: str, cut: bool, stock: Callable[[str], Path], tmp_path: Path) -> None:
    kept = random_kept(name, 5) if cut else {}
    small = write_small_folder(stock(name), kept, tmp_path / "small", (0, 2))
    adapter = write_adapter(small, tmp_path / "trained", list(leaves(name)))
    recover(RecoverOptions(adapter=str(adapter), small=str(small), out=str(tmp_path / "adapter")))
    large = make(name)
    large.load_state_dict(without(zero_pruned(name, dict(large.state_dict()), kept), (1,)))
    right = PeftModel.from_pretrained(large, str(tmp_path / "adapter"))
    left = PeftModel.from_pretrained(load_small(small, dtype="fp32"), str(adapter))
    assert gap(logits(left), logits(right)) < 1e-5
    assert gap(logits(load_small(small, dtype="fp32")), logits(left)) > 1e-3
    held = {key.replace(".default.", "."): value for key, value in right.state_dict().items() if "lora_" in key}
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert held.keys() == stored.keys()
    assert not [key for key in stored if ".layers.1." in key]


@pytest.mark.parametrize("name", GROUPED)
def test_whole_layers_make_a_stock_model_that_generates(
    name: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    small = write_small_folder(stock(name), {}, tmp_path / "small", (0, 2))
    config = raw_config(small)
    assert (config["model_type"], config["num_hidden_layers"]) == (VARIANTS[name][0], 2)
    model: Any = AutoModelForCausalLM.from_pretrained(small).eval()
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    prompt = tokens(1, rows=2, length=12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))


def test_kinds_of_layers_go_with_their_layers(stock: Callable[[str], Path], tmp_path: Path) -> None:
    """Sliding, full, sliding: without the second, both that are left slide."""
    small = write_small_folder(stock("gemma3_text-gqa"), {}, tmp_path / "small", (0, 2))
    assert raw_config(small)["layer_types"] == ["sliding_attention", "sliding_attention"]
    small = write_small_folder(stock("gemma3_text-gqa"), {}, tmp_path / "other", (1,))
    assert raw_config(small)["layer_types"] == ["full_attention"]


KINDS: list[dict[str, Any]] = [
    {"targets": ["q_proj", "down_proj"]},
    {"targets": ["o_proj", "up_proj"], "layers_to_transform": [1]},
    {"targets": r".*\.(1)\..*(q_proj|down_proj)"},
    {"targets": ["q_proj", "embed_tokens"]},
    {"targets": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]},
    {"targets": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"targets": ["q_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    {"targets": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 5}},
    {"targets": ["q_proj"], "use_rslora": True, "r": 3, "lora_alpha": 5},
]


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("lora", KINDS, ids=str)
def test_every_kind_of_adapter_moves_to_the_right_layers_and_back(
    lora: dict[str, Any], portable: bool, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = dict(lora)
    small = write_small_folder(stock("llama-gqa"), {}, tmp_path / "small", (0, 2))
    adapter = write_adapter(small, tmp_path / "trained", lora.pop("targets"), **lora)
    there = tmp_path / "adapter"
    recover(RecoverOptions(adapter=str(adapter), small=str(small), out=str(there), portable=portable))
    large = make("llama-gqa")
    large.load_state_dict(without(dict(large.state_dict()), (1,)))
    right = PeftModel.from_pretrained(large, str(there))
    left = PeftModel.from_pretrained(load_small(small, dtype="fp32"), str(adapter))
    assert gap(logits(left), logits(right)) < 1e-5
    assert verify(VerifyOptions(adapter=str(there), large=str(stock("llama-gqa")))).ok
    project(ProjectOptions(adapter=str(there), small=str(small), out=str(tmp_path / "back")))
    again = PeftModel.from_pretrained(load_small(small, dtype="fp32"), str(tmp_path / "back"))
    assert gap(logits(left), logits(again)) < 1e-5
    if not portable:
        before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_an_adapter_of_the_large_model_loses_the_dropped_layers(stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock("llama-gqa"), {}, tmp_path / "small", (0, 2))
    large = write_adapter(stock("llama-gqa"), tmp_path / "large", ["q_proj"])
    result = project(ProjectOptions(adapter=str(large), small=str(small), out=str(tmp_path / "back")))
    assert (result.modules, result.left_out) == (2, 1)
    assert "1 of layers that it does not have are left out" in result.summary()
    before, after = load_file(large / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    for key, value in after.items():
        assert torch.equal(value, before[key.replace("layers.1.", "layers.2.")])
    gone = write_adapter(stock("llama-gqa"), tmp_path / "gone", ["q_proj"], layers_to_transform=[1])
    with pytest.raises(MismatchError, match="the small model has none of them"):
        project(ProjectOptions(adapter=str(gone), small=str(small), out=str(tmp_path / "none")))


def test_an_adapter_with_a_layer_too_many_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock("llama-gqa"), {}, tmp_path / "small", (0, 2))
    adapter = write_adapter(stock("llama-gqa"), tmp_path / "trained", ["q_proj"])
    with pytest.raises(MismatchError, match=r"updates model.layers.2.self_attn.q_proj, which the model does not have"):
        recover(RecoverOptions(adapter=str(adapter), small=str(small), out=str(tmp_path / "adapter")))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3_text-gqa", "phi3-gqa"])
def test_verify_builds_the_twin_itself(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock(name), random_kept(name, 5), tmp_path / "small", (0, 2))
    adapter = write_adapter(small, tmp_path / "trained", list(leaves(name)))
    recover(RecoverOptions(adapter=str(adapter), small=str(small), out=str(tmp_path / "adapter")))
    options = VerifyOptions(adapter=str(tmp_path / "adapter"), large=str(stock(name)), small=str(small), numeric=True)
    result = verify(options)
    assert result.ok, result.summary()
    assert "identity" in [check.name for check in result.checks]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]
