"""Small models as transformers models: built, saved, loaded, generated with; and what plain transformers does."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import write_small_folder
from stock_models import GROUPED, LAYERS, MLP, VARIANTS, cut_by_hand, make, random_kept, raw_config, tokens, zero_pruned
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from loram.errors import CheckpointError, DataError, FamilyError
from loram.modeling import classes_in, empty_model, load_small, load_tokenizer, small_classes

UNIFORM = {layer: ([1], [2, *range(10, 33)]) for layer in range(LAYERS)}
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM
import torch
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            said = model(torch.arange(3, 23)[None], use_cache=False).logits[0, -1].tolist()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
assert not [name for name in sys.modules if name.split(".")[0] == "loram"]
"""


def plain_transformers(*folders: Path) -> list[Any]:
    """What a process that never imports loram makes of these folders: last logits, or the error."""
    command = [sys.executable, "-c", PLAIN, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_small_model_computes_what_the_zeroed_large_one_does(
    name: str, attention: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    kept = random_kept(name, 11)
    folder = write_small_folder(stock(name), kept, tmp_path / "small")
    small = load_small(folder, dtype="fp32", attn_implementation=attention).eval()
    expected = make(name)
    state = cut_by_hand(name, dict(expected.state_dict()), kept)
    for tensor, value in small.state_dict().items():
        assert torch.equal(value, state[tensor]), tensor
    large = AutoModelForCausalLM.from_pretrained(stock(name), attn_implementation=attention).eval()
    large.load_state_dict(zero_pruned(name, dict(large.state_dict()), kept))
    with torch.no_grad():
        found, wanted = (model(tokens(), use_cache=False).logits for model in (small, large))
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_generation_equals_uncached(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_small_folder(stock(name), random_kept(name, 12), tmp_path / "small")
    small: Any = load_small(folder, dtype="fp32").eval()
    prompt = tokens(1, rows=2, length=12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached = small.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 20)
    assert torch.equal(cached, small.generate(prompt, attention_mask=mask, use_cache=False, **options))
    with torch.no_grad():
        step = small(cached[:, :-1], use_cache=False).logits[:, -1].argmax(-1)
    assert torch.equal(step, cached[:, -1])


@pytest.mark.parametrize("name", GROUPED)
def test_saved_again_it_loads_again(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_small_folder(stock(name), random_kept(name, 13), tmp_path / "small")
    small = load_small(folder)
    small.save_pretrained(tmp_path / "again")
    again = load_small(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[tensor]) for tensor, value in small.state_dict().items())
    assert load_small(folder, dtype="bf16").dtype == torch.bfloat16
    assert load_small(folder, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", GROUPED)
def test_gradient_checkpointing_gives_the_same_gradients(
    name: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = write_small_folder(stock(name), random_kept(name, 14), tmp_path / "small")
    found = []
    for checkpointing in (False, True):
        small: Any = load_small(folder, dtype="fp32").train()
        if checkpointing:
            small.activation_checkpointing_enable()
        small(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append(small.model.layers[1].mlp.down_proj.weight.grad)
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_layers_cut_alike_give_a_stock_model_and_others_fail_loudly_without_loram(
    stock: Callable[[str], Path], tmp_path: Path
) -> None:
    alike = [write_small_folder(stock(name), UNIFORM, tmp_path / f"alike-{name}") for name in GROUPED]
    unlike = [write_small_folder(stock(name), random_kept(name, 15), tmp_path / f"unlike-{name}") for name in GROUPED]
    answers = plain_transformers(*alike, *unlike)
    for name, folder, answer in zip(GROUPED, alike, answers[: len(alike)], strict=True):
        config = raw_config(folder)
        assert config["model_type"] == VARIANTS[name][0]
        assert (config["num_key_value_heads"], config["num_attention_heads"]) == (1, 2)
        assert config["intermediate_size"] == 24
        large = make(name)
        large.load_state_dict(zero_pruned(name, dict(large.state_dict()), UNIFORM))
        with torch.no_grad():
            expected = large(torch.arange(3, 23)[None], use_cache=False).logits[0, -1]
        assert torch.allclose(torch.tensor(answer), expected, atol=1e-5 * expected.abs().max().item()), name
    for name, answer in zip(GROUPED, answers[len(alike) :], strict=True):
        assert isinstance(answer, str), f"plain transformers loaded {name} as something else"
        assert f"loram_{VARIANTS[name][0]}" in answer


def test_register_makes_the_auto_classes_load_them(stock: Callable[[str], Path], tmp_path: Path) -> None:
    folders = [write_small_folder(stock(name), random_kept(name, 16), tmp_path / name) for name in GROUPED]
    code = """
import sys, loram, torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
loram.register()
loram.register()
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(type(AutoConfig.from_pretrained(folder)).__name__, type(model).__name__, model.num_parameters())
"""
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    for name, folder, line in zip(GROUPED, folders, done.stdout.splitlines(), strict=True):
        config_class, model_class = small_classes(VARIANTS[name][0])
        count = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
        assert line == f"{config_class.__name__} {model_class.__name__} {count}"


def test_widths_that_contradict_the_config_are_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 1), tmp_path / "small")
    config = raw_config(folder)
    config["loram_widths"]["mlp"].pop()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="speaks of 2 layers, the model has 3"):
        load_small(folder)


def test_a_small_config_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "loram_bloom"}))
    with pytest.raises(FamilyError, match="bloom is not in loram's tables"):
        load_small(tmp_path)


def test_what_transformers_cannot_load_is_one_sentence(stock: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 1), tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"^transformers cannot load .*small: .*") as caught:
        load_small(folder, attn_implementation="no such attention")
    assert "\n" not in str(caught.value)


def test_a_folder_without_safetensors_is_no_model(stock: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 1), tmp_path / "small")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which loram never reads"):
        load_small(folder)


def test_a_plain_model_is_loaded_as_it_is(stock: Callable[[str], Path]) -> None:
    assert classes_in(stock("phi3-gqa")) is None
    model = load_small(stock("phi3-gqa"))
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert model.config.intermediate_size == MLP
    assert type(AutoConfig.from_pretrained(stock("phi3-gqa"))).__name__ == "Phi3Config"


def test_a_model_without_tokenizer_is_said(stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 1), tmp_path / "small")
    for folder in (stock("llama-gqa"), small):
        with pytest.raises(DataError, match=r"has no usable tokenizer .*copy tokenizer.json"):
            load_tokenizer(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_model_without_weights_takes_no_address_space(tmp_path: Path) -> None:
    """Weights that are made and then thrown away leave holes in the heap that the next ones do not fit into."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 40, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64}
    LlamaConfig(**sizes, **heads).save_pretrained(tmp_path)

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    before = mapped()
    model = empty_model(tmp_path)
    assert mapped() - before < 32 * 2**20
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
