"""LoRA: what is adapted, what is drawn, what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from loram.errors import OptionError
from loram.families.small import small_config
from loram.families.widths import Widths
from loram.modeling import small_classes
from loram.options import TrainOptions
from loram.training.lora import resolve_targets, save_adapter, wrap

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LLAMA_LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"model": "m", "rank": 2, "alpha": 4.0, **changes})


def narrow_llama() -> Any:
    large = LlamaConfig(**SIZES).to_dict() | {"model_type": "llama"}
    raw = small_config(large, Widths(kv_heads=(2, 1), mlp=(48, 24)))
    config_class, model_class = small_classes("llama")
    return model_class(config_class(**{key: value for key, value in raw.items() if key != "model_type"}))


def models() -> dict[str, Any]:
    return {
        "llama": (LlamaForCausalLM(LlamaConfig(**SIZES)), LLAMA_LINEARS),
        "narrow llama": (narrow_llama(), LLAMA_LINEARS),
        "gemma": (Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)), LLAMA_LINEARS),
        "phi3": (
            Phi3ForCausalLM(Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
            ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
        ),
    }


@pytest.mark.parametrize("name", ["llama", "narrow llama", "gemma", "phi3"])
def test_all_linear_is_every_linear_but_the_head(name: str) -> None:
    model, expected = models()[name]
    assert resolve_targets(model, ("all-linear",)) == expected
    linears = sum(isinstance(part, torch.nn.Linear) for part in model.modules()) - 1
    wrapped = wrap(model, options())
    assert sum(name.endswith("lora_A.default") for name, _ in wrapped.named_modules()) == linears


def test_named_targets_and_embeddings() -> None:
    model = models()["llama"][0]
    assert resolve_targets(model, ("q_proj", "embed_tokens")) == ["embed_tokens", "q_proj"]
    assert resolve_targets(model, ("layers.1.mlp.up_proj",)) == ["layers.1.mlp.up_proj"]
    assert resolve_targets(model, ("all-linear", "embed_tokens")) == sorted([*LLAMA_LINEARS, "embed_tokens"])
    with pytest.raises(OptionError, match=r"'qproj'.*all-linear or some of down_proj, .*did you mean q_proj"):
        resolve_targets(model, ("qproj",))
    with pytest.raises(OptionError, match="--targets is empty"):
        resolve_targets(model, ())


def lora_state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(torch.seed())  # whatever happened before must not matter
    torch.manual_seed(1234 + seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    torch.rand(seed + 3)
    return {name: p for name, p in wrap(model, options(seed=7)).named_parameters() if "lora_A" in name}


def test_the_seed_is_set_before_wrapping() -> None:
    first, second = lora_state(0), lora_state(1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_is_fp32_on_a_bf16_base_and_only_lora_trains() -> None:
    model = wrap(AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.bfloat16), options())
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert all("lora_" in name for name in trainable)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_what_one_of_two_tied_weights_cannot_do_is_said_before_training(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrap(AutoModelForCausalLM.from_pretrained(FIXTURE), options(targets=("q_proj", end)))
    assert f"{end} is one weight with the model's" in caplog.text
    assert "cannot be merged" in caplog.text
    caplog.clear()
    wrap(AutoModelForCausalLM.from_pretrained(FIXTURE), options(targets=("all-linear",)))
    assert not caplog.text


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "embed_tokens"), ("q_proj", "lm_head")])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_saving_takes_no_base_weights_along_and_peft_reads_it(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = wrap(AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32), options(targets=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    ids = torch.arange(20).reshape(2, 10)
    expected = model.eval()(ids).logits
    save_adapter(model, tmp_path, "org/name")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all("lora_" in key for key in keys)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 4, True)
    fresh = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    torch.testing.assert_close(again(ids).logits, expected)


def trained_shapes(model: Any) -> dict[str, int]:
    """Module → rank, for every adapted module."""
    return {
        name.partition(".lora_A")[0].removeprefix("base_model.model."): int(p.shape[0])
        for name, p in model.named_parameters()
        if "lora_A" in name
    }


def test_patterns_give_other_ranks_and_scales_to_some_modules() -> None:
    changes = {"rank_pattern": ("q_proj=4", "layers.1.self_attn.q_proj=5"), "alpha_pattern": ("up_proj=1",)}
    model = wrap(models()["llama"][0], options(**changes))
    ranks = trained_shapes(model)
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.self_attn.q_proj"] == 5
    assert ranks["model.layers.1.self_attn.k_proj"] == 2
    up, down = (model.get_submodule(f"base_model.model.model.layers.0.mlp.{name}_proj") for name in ("up", "down"))
    assert (up.scaling["default"], down.scaling["default"]) == (0.5, 2.0)


def test_only_the_chosen_layers_are_adapted() -> None:
    assert {name.split(".")[2] for name in trained_shapes(wrap(models()["llama"][0], options(layers=("1",))))} == {"1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("0-5",)}, "names layer 5, and the model has the layers 0 to 1"),
        ({"layers": ("1",), "targets": ("all-linear", "embed_tokens")}, "is about decoder layers"),
        ({"rank_pattern": ("qproj=4",)}, "'qproj', which no adapted module is called; .*did you mean q_proj"),
        ({"alpha_pattern": ("embed_tokens=4",)}, "no adapted module"),
    ],
)
def test_patterns_and_layers_that_name_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        wrap(models()["llama"][0], options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dora": True}, "--dora trains magnitudes of the small model's columns"),
        (
            {"modules_to_save": ("lm_head",)},
            "--modules-to-save trains whole weights .*--targets all-linear,embed_tokens",
        ),
        *(({"init": name}, "would be added twice") for name in ("pissa", "pissa_niter_16", "olora", "loftq", "corda")),
        ({"init": "zero"}, "expected one of default, gaussian"),
        ({"layers": ("3-1",)}, "--layers has '3-1'"),
        ({"rank_pattern": ("q_proj=1.5",)}, "whole number"),
        ({"alpha_pattern": ("q_proj",)}, "expected MODULE=N"),
        ({"lora_fa": True, "lora_plus_ratio": 4.0}, "trains B alone"),
        ({"lora_fa": True, "optimizer": "sgd"}, "its own AdamW"),
        ({"lora_fa": True, "targets": ("embed_tokens",)}, "an embedding's A is zero"),
        ({"lora_plus_ratio": 0.5}, "must be 1 or more"),
        ({"neftune": 0.0}, "above 0"),
        ({"patience": 1}, "needs held-out rows"),
        ({"stop_on": "large", "eval_split": 0.1}, "add --recover-eval N"),
        ({"eval_split": 0.1, "eval_data": ("f",)}, "two answers"),
    ],
)
def test_what_does_not_carry_over_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        options(**changes)
    assert caught.value.exit_code == 2


def test_gaussian_init_is_another_draw() -> None:
    first, second = (
        next(p for name, p in wrap(models()["llama"][0], options(init=init)).named_parameters() if "lora_A" in name)
        for init in ("default", "gaussian")
    )
    assert not torch.equal(first, second)
    assert second.abs().max() > 0
