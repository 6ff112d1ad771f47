"""The memory model: parts that sum, sizes that are real tensors', and figures that move the way they must."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from stock_models import GROUPED, leaves, make, raw_config

from loram.activations import PRODUCT_BYTES, PRODUCT_TILE, Workload
from loram.families.widths import Widths
from loram.memory_model import CPU, CUDA, Hardware, MemoryPlan, Model, reconstruction_memory, training_memory
from loram.sizes import NF4_BITS

WORK = Workload(batch=4, length=32, rank=4, dtype="fp32")
BOTH = pytest.mark.parametrize("hardware", [CPU, CUDA], ids=lambda hardware: hardware.name)
LLAMA_8B: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "docs" / "configs" / "Llama-3.1-8B.json").read_text(encoding="utf-8")
)


def plan(config: dict[str, Any], hardware: Hardware = CUDA, **changes: Any) -> MemoryPlan:
    """Of a file in fp32: no loading counts for more than a step."""
    return training_memory(Model(config, stored="fp32"), replace(WORK, **changes), hardware)


@pytest.mark.parametrize("name", GROUPED)
def test_weights_lora_and_gradients_are_the_tensors_of_real_models(name: str, stock: Callable[[str], Path]) -> None:
    config = raw_config(stock(name))
    model: Any = peft.get_peft_model(make(name), peft.LoraConfig(r=4, target_modules=list(leaves(name))))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = plan(config).parts
    assert parts["weights"] == frozen * 4
    assert (parts["lora"], parts["gradients"], parts["optimizer"]) == (trained * 4, trained * 4, trained * 8)
    assert plan(config, dtype="bf16").parts["weights"] == frozen * 2
    assert plan(config, dtype="bf16").parts["lora"] == trained * 6  # fp32, and autocast's copy
    rows = sum(p.numel() for key, p in model.named_parameters() if "lora_B" in key)
    assert plan(config, frozen_a=True).parts["gradients"] == rows * 4
    one = sum(p.numel() for key, p in model.named_parameters() if "lora_" in key and ".layers.1." in key)
    assert plan(config, layers=(1,)).parts["lora"] == one * 4


def test_a_masked_update_takes_a_bit_a_weight_and_a_tile(stock: Callable[[str], Path]) -> None:
    config = raw_config(stock("llama-gqa"))
    bits = sum(p.shape[0] * -(-p.shape[1] // 8) for n, p in make("llama-gqa").named_parameters() if "_proj" in n)
    parts = plan(config, masked_update=True).parts
    assert parts["masks"] == bits
    assert "masks" not in plan(config).parts
    assert parts["lora"] == plan(config).parts["lora"]
    assert plan(config, masked_update=True, dtype="bf16").parts["lora"] == parts["lora"]  # no 16-bit copy
    few = LLAMA_8B | {"vocab_size": 512}  # so that no logits are larger than what goes backward
    more = plan(few, masked_update=True).parts["backward pass"] - plan(few).parts["backward pass"]
    assert more == PRODUCT_TILE * PRODUCT_BYTES


@pytest.mark.parametrize("name", GROUPED)
def test_alignment_holds_a_layer_of_either_model(name: str, stock: Callable[[str], Path]) -> None:
    """The Linears of the largest layer, counted on real models; fp32, so that autocast's copy is one, too."""
    config, model = raw_config(stock(name)), make(name)
    layer = max(
        sum(part.weight.numel() for part in each.modules() if isinstance(part, torch.nn.Linear))
        for each in model.get_decoder().layers
    )
    parts = reconstruction_memory(Model(config), Model(config), (5, 7, 2), 4).parts
    assert parts["layers"] == layer * (4 + 4 + 4 + 8 + 4 + 4)
    assert parts["hidden states"] == 3 * 5 * 7 * model.config.hidden_size * 4
    assert reconstruction_memory(Model(config), Model(config), (10**9, 7, 2), 4).parts["hidden states"] == 0


@BOTH
def test_more_takes_more(hardware: Hardware) -> None:
    base = plan(LLAMA_8B, hardware).total
    for more in ({"batch": 5}, {"length": 33}, {"rank": 5}, {"dropout": 0.1}, {"masked": True}, {"attention": "eager"}):
        before = plan(LLAMA_8B, hardware, dropout=0.0).total if "dropout" in more else base
        assert plan(LLAMA_8B, hardware, **more).total > before, more
    for less in ({"layers": (31,)}, {"frozen_a": True}, {"optimizer": "sgd"}, {"optimizer": "adamw_8bit"}):
        assert plan(LLAMA_8B, hardware, **less).total < base, less


@BOTH
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 512), (8, 64), (4, 2048)])
def test_checkpointing_never_takes_more(hardware: Hardware, dtype: str, batch: int, length: int) -> None:
    changes: dict[str, Any] = {"batch": batch, "length": length, "dtype": dtype}
    assert plan(LLAMA_8B, hardware, checkpointing=True, **changes).total <= plan(LLAMA_8B, hardware, **changes).total


def test_parts_sum_and_torch_does_not_count_what_lies_outside() -> None:
    found = plan(LLAMA_8B)
    assert found.total == sum(found.parts.values())
    assert found.allocated == found.total - found.parts["runtime"] - found.parts["allocator"]
    assert all(size >= 0 for size in found.parts.values())


def test_loading_counts_where_it_is_the_peak() -> None:
    """On the CPU a bf16 file loaded in fp32 is there twice for a while: 6 bytes a parameter, and no step needs more."""
    tiny = replace(WORK, batch=1, length=8)
    loading = training_memory(Model(LLAMA_8B, stored="bf16"), tiny, CPU)
    assert loading.parts["loading"] * 2 == loading.parts["weights"]
    assert "loading" not in training_memory(Model(LLAMA_8B, stored="fp32"), tiny, CPU).parts
    assert "loading" not in training_memory(Model(LLAMA_8B, stored="bf16"), tiny, CUDA).parts


def test_four_bit_weights_and_the_one_that_is_dequantized() -> None:
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    work = replace(WORK, dtype="bf16")
    whole, four = (training_memory(Model(LLAMA_8B, quantize=bits), work, CUDA).parts for bits in ("none", "nf4"))
    assert four["quantized weights"] == int(linears * NF4_BITS / 8)
    assert whole["weights"] - four["weights"] == linears * 2
    quiet = replace(work, batch=1, length=2, checkpointing=True)
    whole, four = (training_memory(Model(LLAMA_8B, quantize=bits), quiet, CUDA).parts for bits in ("none", "nf4"))
    assert four["backward pass"] >= 4096 * 14336 * 2
    eight = training_memory(Model(LLAMA_8B, quantize="int8"), work, CUDA)
    assert eight.parts["activations"] > plan(LLAMA_8B, dtype="bf16").parts["activations"]  # its inputs are kept


def test_a_cut_takes_less_of_everything_but_the_ends() -> None:
    widths = Widths((8, *[4] * 30, 8), (14336, *[7000] * 30, 14336))
    cut, whole = (training_memory(Model(LLAMA_8B, each), WORK, CUDA).parts for each in (widths, None))
    assert all(cut[name] < whole[name] for name in ("weights", "lora", "activations"))
    assert cut["logits and loss"] == whole["logits and loss"]


def test_llama_3_1_8b_by_hand() -> None:
    """Worked out from the shapes: hidden 4096, MLP 14336, 32 layers, kv width 1024, rank 4, 128 tokens, fp32, CUDA."""
    linears = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
    lora = 32 * 4 * sum((out + into) * times for (out, into), times in linears.items())
    inputs = 6 * 4096 + 14336
    kept = 2 * 4097 * 4 + 3 * 14336 * 4 + (2 * 4096 + 2 * 1024) * 4 + 32 * 4 + 7 * 4 * 4 + inputs * (4 + 1)
    parts = plan(LLAMA_8B).parts
    assert parts["weights"] == 8_030_261_248 * 4
    assert parts["lora"] == lora * 4
    assert parts["activations"] == 128 * (32 * kept + 4097 * 4)
    assert parts["logits and loss"] == 2 * 128 * 128_256 * 4 + 2 * 128 * 4096 * 4
