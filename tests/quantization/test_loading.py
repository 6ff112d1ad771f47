"""The guard against bitsandbytes' packing for AVX512-BF16, whose undoing corrupts what is saved or merged.

The packing itself runs anywhere; only its fast kernel needs such a CPU. So it is forced here, by telling bitsandbytes
that this is one. On stock models the damage then shows (that is the control); on models that loram loads it must not.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file
from small_models import write_small_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import loram
from loram.modeling import load_model, load_small, register
from loram.quantization.loading import quantization_of, require_library

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers the packing can take: rows in multiples of 32, columns in multiples of 64."""
    config: Any = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=32
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packing") / "large"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(large: Path) -> Path:
    return Path(str(loram.quantize(large, out=large.parent / "nf4").path))


@pytest.fixture(scope="module")
def small(large: Path) -> Path:
    """Layers of different widths, still such that the packing takes them."""
    cut = write_small_folder(large, {1: ([0, 2], list(range(64)))}, large.parent / "small")
    return Path(str(loram.quantize(cut, out=large.parent / "small-nf4").path))


@pytest.fixture
def such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def packs(model: Any) -> bool:
    """Whether an evaluation has packed a weight."""
    states = [getattr(m.weight, "quant_state", None) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


@torch.no_grad()
def evaluated(model: Any) -> Tensor:
    logits: Tensor = model.eval()(TOKENS).logits
    return logits


def saved_as_loaded(model: Any, folder: Path) -> bool:
    """By bitsandbytes' own state dict: transformers 5.23 refuses to `save_pretrained` what it loaded in 4 bit."""
    before, after = load_file(folder / "model.safetensors"), model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.usefixtures("such_a_cpu")
def test_the_trap_is_there(whole: Path) -> None:
    """If this fails, bitsandbytes has mended it: see whether the guard is still needed."""
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    evaluated(model)
    assert packs(model)
    assert not saved_as_loaded(model, whole)


@pytest.mark.usefixtures("such_a_cpu")
@pytest.mark.parametrize("which", ["whole", "small"])
def test_saving_after_an_evaluation_saves_what_was_loaded(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    model = load_small(folder)
    first = evaluated(model)
    assert not packs(model)
    assert torch.equal(evaluated(model), first)
    assert saved_as_loaded(model, folder)


@pytest.mark.usefixtures("such_a_cpu")
def test_the_auto_classes_are_guarded_for_models_of_ours(small: Path) -> None:
    register()
    model = AutoModelForCausalLM.from_pretrained(small)
    evaluated(model)
    assert not packs(model)


def merged(folder: Path, *, evaluate: bool) -> list[Tensor]:
    """Every merged 4-bit weight, dequantized."""
    model = load_model(folder, dtype="fp32")
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    if evaluate:
        evaluated(adapted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit", UserWarning)
        done = adapted.merge_and_unload()
    return [
        bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for module in done.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    ]


@pytest.mark.usefixtures("such_a_cpu")
def test_merging_after_an_evaluation_merges_what_was_loaded(whole: Path) -> None:
    before, after = merged(whole, evaluate=False), merged(whole, evaluate=True)
    assert len(before) == 14
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_computes_in_the_dtype_asked_for(dtype: str, expected: torch.dtype, whole: Path) -> None:
    model = load_model(whole, dtype=dtype)
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(linears) == 14
    assert {module.compute_dtype for module in linears} == {expected}
    assert {p.dtype for name, p in model.named_parameters() if "proj" not in name} == {expected}
    assert not isinstance(model.lm_head, bnb.nn.Linear4bit)
    exact = load_model(whole, dtype="fp32")
    assert evaluated(exact).dtype == torch.float32
    assert torch.allclose(evaluated(model).float(), evaluated(exact), atol=0.05)


def test_what_a_config_says() -> None:
    assert quantization_of({}) is None
    assert quantization_of({"quantization_config": {"quant_method": "gptq"}}) == "gptq"
    assert quantization_of({"quantization_config": "?"}) == "unknown"
    require_library({"quantization_config": {"quant_method": "gptq"}})
